"""Reading trajectory dictionaries as UniAD, VAD and Agent-Driver leave them: token to waypoints, no text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax.console import UserError
from spacedrive_jax.evaluation.predictions import Predictions, sort_predictions
from spacedrive_jax.pickled_numpy import numpy_allowed
from spacedrive_jax.restricted_pickle import read_pickle

PICKLE_SUFFIXES = (".pkl", ".pickle")


def read_pickled(path: Path) -> Any:
    """Reads a pickle of numbers, texts, containers and numpy arrays.

    Raises:
        UserError: the file cannot be read, is no pickle, or holds anything else.
    """
    return read_pickle(path, numpy_allowed(), contents="plain containers and numpy arrays")


def read_pickled_trajectories(path: Path) -> Predictions:
    """Reads a pickled dictionary of token to waypoints.

    Raises:
        UserError: the file is not such a dictionary (plain containers and numpy arrays only).
    """
    content = read_pickled(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: expected a dictionary of token to waypoints, found {type(content).__name__}"
        )
    return _sort(path, content.items())


def read_json_trajectories(path: Path, text: str) -> Predictions:
    """Reads a JSON object of token to waypoints; a token that occurs twice is listed.

    Raises:
        UserError: the text is not such an object.
    """
    try:
        items = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(items, _Pairs):
        raise UserError(f"{path}: expected an object of token to waypoints, found {type(items).__name__}")
    return _sort(path, items)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that repeated names survive."""


def _sort(path: Path, items: Iterable[tuple[Any, Any]]) -> Predictions:
    entries = []
    for token, points in items:
        if not isinstance(token, str) or not token:
            raise UserError(f"{path}: a token must be a non-empty text, found {token!r}")
        entries.append((token, "", _waypoints(points, f"{path}, token {token}")))
    if not entries:
        raise UserError(f"{path} holds no prediction")
    return sort_predictions(path, entries)


def _waypoints(points: Any, where: str) -> Float[np.ndarray, "n 2"] | None:
    """Waypoints from n x 2 numbers, or n x 3 with a heading that is left out; None stays None."""
    if points is None:
        return None
    try:
        values = np.array(points, np.float64)
    except (TypeError, ValueError):
        raise UserError(
            f"{where}: expected waypoints [[x, y], …] of numbers, found {str(points)[:60]}"
        ) from None
    if values.size == 0:
        return np.zeros((0, 2))
    while values.ndim > 2 and len(values) == 1:  # UniAD and VAD keep a batch axis
        values = values[0]
    if values.ndim != 2 or values.shape[1] not in (2, 3):
        raise UserError(
            f"{where}: expected an n x 2 (or n x 3) array of waypoints, found shape {values.shape}"
        )
    return values[:, :2]

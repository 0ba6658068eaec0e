"""Reading prediction files.

A prediction file is JSON Lines, one object a keyframe:
`{"token": …, "waypoints": [[x, y], …6], "text": …, "status": "ok" | "unparsed"}`, metres in the ego frame.
A folder is read as the published code's, one file per keyframe (`published_predictions`); a pickle, or one
JSON object of token to waypoints, as a trajectory dictionary (`trajectory_files`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax.console import UserError
from spacedrive_jax.evaluation.axes import AxesName, to_ego_axes
from spacedrive_jax.evaluation.predictions import Predictions, sort_predictions
from spacedrive_jax.evaluation.published_predictions import read_published_folder
from spacedrive_jax.evaluation.trajectory_files import (
    PICKLE_SUFFIXES,
    read_json_trajectories,
    read_pickled_trajectories,
)

STATUSES = ("ok", "unparsed")

Entry = tuple[str, str, "Float[np.ndarray, 'n 2'] | None"]
"""Token, text and trajectory; None where the text holds no trajectory."""


def read_predictions(path: Path | str, axes: AxesName = "forward-left") -> Predictions:
    """Reads predictions in any of the supported forms.

    Args:
        path: a JSON Lines file, a folder of the published code's, or a JSON (.json) or pickled (.pkl)
            dictionary of token to waypoints.
        axes: what the two numbers of a waypoint mean.

    Returns:
        The predictions, waypoints in ego axes.

    Raises:
        UserError: the file does not exist or is empty, or something in it is not a prediction (the message
            names the line or token and what is wrong with it).
    """
    return to_ego_axes(_read(Path(path)), axes)


def _read(path: Path) -> Predictions:
    if path.is_dir():
        return read_published_folder(path)
    if not path.is_file():
        raise UserError(
            f"no prediction file {path}; write one with `python -m spacedrive_jax predict --out {path}`"
        )
    if path.suffix in PICKLE_SUFFIXES:
        return read_pickled_trajectories(path)
    if path.suffix == ".json" and not _is_json_lines(text := path.read_text(encoding="utf-8")):
        return read_json_trajectories(path, text)
    predictions = sort_predictions(path, _parse_lines(path))
    if not predictions.tokens:
        raise UserError(f"{path} holds no prediction")
    return predictions


def _is_json_lines(text: str) -> bool:
    """Whether the first line is a prediction by itself."""
    try:
        entry = json.loads(text.lstrip().partition("\n")[0])
    except json.JSONDecodeError:
        return False
    return isinstance(entry, dict) and "token" in entry


def _parse_lines(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_line(line, where=f"{path}, line {number}")


def _parse_line(line: str, where: str) -> Entry:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(entry).__name__}")
    token = entry.get("token")
    if not isinstance(token, str) or not token:
        raise UserError(f'{where}: "token" must be a non-empty string, found {token!r}')
    status = entry.get("status", "ok")
    if status not in STATUSES:
        raise UserError(f'{where}: "status" must be one of {", ".join(STATUSES)}, found {status!r}')
    text = entry.get("text")
    if text is not None and not isinstance(text, str):
        raise UserError(f'{where}: "text" must be a string, found {type(text).__name__}')
    trajectory = None if status == "unparsed" else _parse_waypoints(entry.get("waypoints"), where)
    return token, text or "", trajectory


def _parse_waypoints(points: Any, where: str) -> Float[np.ndarray, "n 2"]:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    well_formed = isinstance(points, list) and all(
        isinstance(point, list) and len(point) == 2 and all(map(is_number, point)) for point in points
    )
    if not well_formed:
        raise UserError(
            f'{where}: "waypoints" must be a list of six [x, y] number pairs, found {str(points)[:80]}'
        )
    return np.array(points, np.float64).reshape(-1, 2)

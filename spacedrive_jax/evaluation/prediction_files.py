"""Reading prediction files.

A prediction file is JSON Lines, one object a keyframe:
`{"token": …, "waypoints": [[x, y], …6], "text": …, "status": "ok" | "unparsed"}`, metres in the ego frame.
A folder is read as the published code's, one file per keyframe (`read_published_folder`); a pickle, or one
JSON object of token to waypoints, as a trajectory dictionary (`read_pickled_trajectories`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.predictions import Predictions, is_unicode, sort_predictions
from spacedrive_jax.io import file_sha256, is_bucket, local, place, read_text
from spacedrive_jax.json_files import MOST_JSON, parse_json, read_json, read_json_lines
from spacedrive_jax.restricted_pickle import numpy_allowed, read_pickle

# Axes in which other projects write waypoints.


AxesName = Literal["forward-left", "forward-right", "right-forward"]

TO_EGO: Mapping[AxesName, np.ndarray] = MappingProxyType(
    {
        "forward-left": np.eye(2),
        "forward-right": np.array([[1.0, 0.0], [0.0, -1.0]]),
        "right-forward": np.array([[0.0, 1.0], [-1.0, 0.0]]),
    }
)
"""What the two numbers of a waypoint mean, to the matrix that takes them to x forward, y left.
`right-forward` is the nuScenes lidar frame, which UniAD and VAD plan in."""


def to_ego_axes(predictions: Predictions, axes: AxesName) -> Predictions:
    """The predictions with waypoints in the ego frame's axes (their origin stays where it is)."""
    matrix = TO_EGO[axes]
    waypoints = {token: exact.rotate(each, matrix) for token, each in predictions.waypoints.items()}
    return dataclasses.replace(predictions, waypoints=waypoints)


# Reading trajectory dictionaries as UniAD, VAD and Agent-Driver leave them: token to waypoints, no text.


PICKLE_SUFFIXES = (".pkl", ".pickle")


def read_pickled(path: Path) -> Any:
    """Reads a pickle of numbers, texts, containers and numpy arrays.

    Raises:
        DataError: the file cannot be read, is no pickle, or holds anything else.
    """
    return read_pickle(path, numpy_allowed(), contents="plain containers and numpy arrays")


def read_pickled_trajectories(path: Path) -> Predictions:
    """Reads a pickled dictionary of token to waypoints.

    Raises:
        DataError: the file is not such a dictionary (plain containers and numpy arrays only).
    """
    content = read_pickled(path)
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: expected a dictionary of token to waypoints, found {type(content).__name__}"
        )
    return _sort(path, content.items())


def read_json_trajectories(path: Path, text: str) -> Predictions:
    """Reads a JSON object of token to waypoints; a token that occurs twice is listed.

    Raises:
        DataError: the text is not such an object.
    """
    items = parse_json(text, path, nan=True, pairs=_Pairs)
    if not isinstance(items, _Pairs):
        raise DataError(f"{path}: expected an object of token to waypoints, found {type(items).__name__}")
    return _sort(path, items)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that repeated names survive."""


def _sort(path: Path, items: Iterable[tuple[Any, Any]]) -> Predictions:
    entries = []
    for token, waypoints in items:
        if not isinstance(token, str) or not token or not is_unicode(token):
            raise DataError(f"{path}: a token must be a non-empty text, found {token!r}")
        entries.append((token, "", _waypoints(waypoints, f"{path}, token {token}")))
    if not entries:
        raise DataError(f"{path} holds no prediction")
    return sort_predictions(path, entries)


def _waypoints(given: Any, where: str) -> Float[np.ndarray, "n 2"] | None:
    """Waypoints from n x 2 numbers, or n x 3 with a heading that is left out; None stays None."""
    if given is None:
        return None
    try:
        if isinstance(given, _Pairs | dict | str | bytes):
            raise TypeError
        values = np.array(given, np.float64)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise DataError(
            f"{where}: expected waypoints [[x, y], …] of numbers, found {str(given)[:60]}"
        ) from None
    if values.size == 0:
        return np.zeros((0, 2))
    while values.ndim > 2 and len(values) == 1:  # UniAD and VAD keep a batch axis
        values = values[0]
    if values.ndim != 2 or values.shape[1] not in (2, 3):
        raise DataError(
            f"{where}: expected an n x 2 (or n x 3) array of waypoints, found shape {values.shape}"
        )
    return values[:, :2]


# Reading predictions as the published code leaves them: a folder with one file per keyframe.
#
# A file is named after its token, has no extension and holds a JSON list whose first item has the question
# "Q" and the answer "A" (a text, or a list with one text). The waypoints are read out of the answer the way
# the published evaluation script reads it.


_PAIR = r"\(-?[\d.]+, -?[\d.]+\)"
_PAIR_WITH_PLUS = r"\(\+?-?[\d.]+, \+?-?[\d.]+\)"
_TRAJECTORIES = (
    re.compile(rf"\[<POS_INDICATOR>{_PAIR}(?:(?:, )?(?:<POS_INDICATOR>)?{_PAIR})*"),
    re.compile(rf"\[<tool_call>{_PAIR}(?:, <tool_call>{_PAIR})*"),
    re.compile(rf"\[(?:PT, )?{_PAIR_WITH_PLUS}(?:, {_PAIR_WITH_PLUS})*"),
)
"""After position indicators, after the text model's stand-in for them, and as plain numbers (OmniDrive's
begin with `PT`). The published script picks one by the words in the folder's path; here the text decides."""
_WAYPOINT = re.compile(_PAIR_WITH_PLUS)
_DECIMAL = re.compile(r"-?\d+\.\d+")


def parse_answer(text: str) -> Float[np.ndarray, "n 2"] | None:
    """The waypoints in an answer such as `… [<POS_INDICATOR>(1.20, 0.05), <POS_INDICATOR>(2.41, -0.11)]`.

    Only the first bracketed list of the first form that occurs counts, and numbers need a decimal point
    (without one the published script fails on the sample and drops it).

    Returns:
        Waypoints in metres, or None when the answer holds none that can be read.
    """
    found = next((match for pattern in _TRAJECTORIES if (match := pattern.search(text))), None)
    if found is None:
        return None
    waypoints = [_DECIMAL.findall(pair) for pair in _WAYPOINT.findall(found.group())]
    if any(len(pair) != 2 for pair in waypoints):
        return None
    return np.array(waypoints, np.float64)


def read_published_folder(directory: Path) -> Predictions:
    """Reads a folder with one answer file per keyframe.

    Raises:
        DataError: the folder is empty, or a file is not a JSON list with an answer.
    """
    # Hidden ones are a file manager's (.DS_Store, ._TOKEN).
    files = sorted(
        path
        for path in directory.iterdir()
        if path.is_file() and not path.suffix and not path.name.startswith(".")
    )
    if not files:
        raise DataError(
            f"{directory} holds no prediction: expected files named after tokens, without extension"
        )
    entries = []
    for path in files:
        answer = _read_answer(path)
        entries.append((path.name, answer, parse_answer(answer)))
    return sort_predictions(directory, entries)


def _read_answer(path: Path) -> str:
    try:
        answer = read_json(path, nan=True)[0]["A"]
    except (IndexError, KeyError, TypeError):
        raise DataError(f'{path}: expected a JSON list whose first item has the answer under "A"') from None
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, str):
        raise DataError(f'{path}: the answer "A" must be a text, found {str(answer)[:60]}')
    return answer


STATUSES = ("ok", "unparsed")

Entry = tuple[str, str, "Float[np.ndarray, 'n 2'] | None"]
"""Token, text and waypoints; None where the text holds none."""


def predictions_sha256(path: Path) -> str | None:
    """SHA-256 of a prediction file, by which scores, reports and model cards know it; None for a folder."""
    return file_sha256(path) if path.is_file() else None


def read_predictions(path: Path | str, axes: AxesName = "forward-left") -> Predictions:
    """Reads predictions in any of the supported forms.

    Args:
        path: a JSON Lines file, a folder of the published code's, or a JSON (.json) or pickled (.pkl)
            dictionary of token to waypoints.
        axes: what the two numbers of a waypoint mean.

    Returns:
        The predictions, waypoints in ego axes.

    Raises:
        DataError: the file does not exist or is empty, or something in it is not a prediction (the message
            names the line or token and what is wrong with it).
    """
    found = place(path)
    # A folder has thousands of small files; a pickle is read by what needs a disk.
    if is_bucket(found) and (found.suffix in PICKLE_SUFFIXES or found.is_dir()):
        found = local(found)
    return to_ego_axes(_read(found), axes)


def _read(path: Path) -> Predictions:
    if path.is_dir():
        return read_published_folder(path)
    if not path.exists():
        raise DataError(
            f"no prediction file {path}; write one with `python -m spacedrive_jax predict --out {path}`"
        )
    if path.suffix in PICKLE_SUFFIXES:
        return read_pickled_trajectories(path)
    if path.suffix == ".json" and not _is_json_lines(text := read_text(path, most=MOST_JSON)):
        return read_json_trajectories(path, text)
    predictions = sort_predictions(path, _parse_lines(path))
    if not predictions.tokens:
        raise DataError(f"{path} holds no prediction")
    return predictions


def _is_json_lines(text: str) -> bool:
    """Whether the first line is a prediction by itself."""
    try:
        entry = parse_json(text.lstrip().partition("\n")[0], "the first line", nan=True)
    except DataError:
        return False
    return isinstance(entry, dict) and "token" in entry


def _parse_lines(path: Path) -> Iterator[Entry]:
    # Python's writers leave NaN for coordinates that are none; those are listed, not refused.
    for where, entry in read_json_lines(path, nan=True):
        yield _parse_entry(entry, where.removesuffix(":"))


def _parse_entry(entry: Any, where: str) -> Entry:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(entry).__name__}")
    token = entry.get("token")
    if not isinstance(token, str) or not token or not is_unicode(token):
        raise DataError(f'{where}: "token" must be a non-empty string, found {token!r}')
    status = entry.get("status", "ok")
    if status not in STATUSES:
        raise DataError(f'{where}: "status" must be one of {", ".join(STATUSES)}, found {status!r}')
    text = entry.get("text")
    if text is not None and not isinstance(text, str):
        raise DataError(f'{where}: "text" must be a string, found {type(text).__name__}')
    waypoints = None if status == "unparsed" else _parse_waypoints(entry.get("waypoints"), where)
    return token, text or "", waypoints


def _parse_waypoints(given: Any, where: str) -> Float[np.ndarray, "n 2"]:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    well_formed = isinstance(given, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in given
    )
    if not well_formed:
        raise DataError(
            f'{where}: "waypoints" must be a list of six [x, y] number pairs, found {str(given)[:80]}'
        )
    return np.array(given, np.float64).reshape(-1, 2)

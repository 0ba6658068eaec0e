"""Reading predictions as the published code leaves them: a folder with one file per keyframe.

A file is named after its token, has no extension and holds a JSON list whose first item has the question "Q"
and the answer "A" (a text, or a list with one text). The trajectory is read out of the answer the way the
published evaluation script reads it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float

from spacedrive_jax.console import UserError
from spacedrive_jax.evaluation.predictions import Predictions, sort_predictions

_PAIR = r"\(-?[\d.]+, -?[\d.]+\)"
_PAIR_WITH_PLUS = r"\(\+?-?[\d.]+, \+?-?[\d.]+\)"
_TRAJECTORIES = (
    re.compile(rf"\[<POS_INDICATOR>{_PAIR}(?:(?:, )?(?:<POS_INDICATOR>)?{_PAIR})*"),
    re.compile(rf"\[<tool_call>{_PAIR}(?:, <tool_call>{_PAIR})*"),
    re.compile(rf"\[(?:PT, )?{_PAIR_WITH_PLUS}(?:, {_PAIR_WITH_PLUS})*"),
)
"""After position indicators, after the text model's stand-in for them, and as plain numbers (OmniDrive's
begin with `PT`). The published script picks one by the words in the folder's path; here the text decides."""
_POINT = re.compile(_PAIR_WITH_PLUS)
_DECIMAL = re.compile(r"-?\d+\.\d+")


def parse_answer(text: str) -> Float[np.ndarray, "n 2"] | None:
    """The trajectory in an answer such as `… [<POS_INDICATOR>(1.20, 0.05), <POS_INDICATOR>(2.41, -0.11)]`.

    Only the first bracketed list of the first form that occurs counts, and numbers need a decimal point
    (without one the published script fails on the sample and drops it).

    Returns:
        Waypoints in metres, or None when the answer holds no readable trajectory.
    """
    found = next((match for pattern in _TRAJECTORIES if (match := pattern.search(text))), None)
    if found is None:
        return None
    points = [_DECIMAL.findall(point) for point in _POINT.findall(found.group())]
    if any(len(point) != 2 for point in points):
        return None
    return np.array(points, np.float64)


def read_published_folder(directory: Path) -> Predictions:
    """Reads a folder with one answer file per keyframe.

    Raises:
        UserError: the folder is empty, or a file is not a JSON list with an answer.
    """
    files = sorted(path for path in directory.iterdir() if path.is_file() and not path.suffix)
    if not files:
        raise UserError(
            f"{directory} holds no prediction: expected files named after tokens, without extension"
        )
    entries = []
    for path in files:
        answer = _read_answer(path)
        entries.append((path.name, answer, parse_answer(answer)))
    return sort_predictions(directory, entries)


def _read_answer(path: Path) -> str:
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))[0]["A"]
    except (json.JSONDecodeError, UnicodeDecodeError, IndexError, KeyError, TypeError):
        raise UserError(f'{path}: expected a JSON list whose first item has the answer under "A"') from None
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, str):
        raise UserError(f'{path}: the answer "A" must be a text, found {str(answer)[:60]}')
    return answer

"""Reading prediction files: every line is either used, or counted and listed with the reason.

A prediction file is JSON Lines, one object a keyframe:
`{"token": …, "waypoints": [[x, y], …6], "text": …, "status": "ok" | "unparsed"}`, metres in the ego frame.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax.console import UserError
from spacedrive_jax.data.records import NUM_WAYPOINTS

STATUSES = ("ok", "unparsed")


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A prediction file, sorted into what can be scored and what cannot.

    Attributes:
        path: the file.
        waypoints: token to the trajectory to score, metres, ego frame.
        text: token to the model's answer ("" where the file has none).
        unparsed: tokens whose answer held no trajectory.
        short: tokens with fewer than six waypoints.
        long: tokens with more than six waypoints; the first six are scored, as published.
        non_finite: tokens with a waypoint that is not finite.
        duplicates: tokens that occur more than once; the first line counts.
    """

    path: Path
    waypoints: Mapping[str, Float[np.ndarray, "T 2"]]
    text: Mapping[str, str]
    unparsed: tuple[str, ...]
    short: tuple[str, ...]
    long: tuple[str, ...]
    non_finite: tuple[str, ...]
    duplicates: tuple[str, ...]

    @property
    def tokens(self) -> frozenset[str]:
        """All tokens in the file, usable or not."""
        return frozenset(self.text)


def read_predictions(path: Path | str) -> Predictions:
    """Reads a prediction file.

    Raises:
        UserError: the file does not exist or is empty, or a line is not a prediction (the message names the
            line and what is wrong with it).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no prediction file {path}; write one with `python -m spacedrive_jax predict --out {path}`"
        )
    waypoints: dict[str, np.ndarray] = {}
    text: dict[str, str] = {}
    listed: dict[str, list[str]] = {
        name: [] for name in ("unparsed", "short", "long", "non_finite", "duplicates")
    }
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            entry = _parse_line(line, where=f"{path}, line {number}")
            token = entry["token"]
            if token in text:
                if token not in listed["duplicates"]:
                    listed["duplicates"].append(token)
                continue
            text[token] = entry["text"]
            trajectory = entry["waypoints"]
            if entry["status"] == "unparsed":
                listed["unparsed"].append(token)
                continue
            if len(trajectory) > NUM_WAYPOINTS:
                listed["long"].append(token)
            trajectory = trajectory[:NUM_WAYPOINTS]
            if len(trajectory) < NUM_WAYPOINTS:
                listed["short"].append(token)
            elif not np.isfinite(trajectory).all():
                listed["non_finite"].append(token)
            else:
                waypoints[token] = trajectory
    if not text:
        raise UserError(f"{path} holds no prediction")
    return Predictions(path, waypoints, text, **{name: tuple(tokens) for name, tokens in listed.items()})


def _parse_line(line: str, where: str) -> dict[str, Any]:
    """One checked line; `waypoints` becomes an (n, 2) float64 array (empty when unparsed)."""
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
    if status == "unparsed":
        return {"token": token, "text": text or "", "status": status, "waypoints": np.zeros((0, 2))}
    return {
        "token": token,
        "text": text or "",
        "status": status,
        "waypoints": _parse_waypoints(entry.get("waypoints"), where),
    }


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

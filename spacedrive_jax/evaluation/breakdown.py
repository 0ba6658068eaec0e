"""Scores by driving situation: command, speed and how sharply the recorded drive turns."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spacedrive_jax import exact
from spacedrive_jax.data.records import Record
from spacedrive_jax.evaluation.baselines import constant_velocity
from spacedrive_jax.evaluation.metrics import HorizonScores, summarize

COMMANDS = (
    "strictly_forward",
    "forward",
    "slightly_left",
    "left",
    "sharp_left",
    "slightly_right",
    "right",
    "sharp_right",
)
"""Where the eight released commands lead, by number (the published prompts say the other side's word)."""
SPEED_BOUNDS_MPS = (0.5, 5.0, 10.0)
TURN_BOUNDS_DEGREES = (5.0, 15.0, 45.0)


@dataclasses.dataclass(frozen=True)
class KeyframeFacts:
    """What situation a keyframe is.

    Attributes:
        token: the keyframe.
        scene: the scene it belongs to.
        command: number of the command in the prompt (the released rule).
        speed: present speed, m/s: the newest past displacement over its time; nan at a scene's start.
        turn: absolute change of the recorded heading over the next 3 s, degrees.
    """

    token: str
    scene: str
    command: int
    speed: float
    turn: float


def facts_of(record: Record) -> KeyframeFacts:
    """Reads a record's situation."""
    step = constant_velocity(record)[0]
    known = bool(record["past_mask"][0])
    return KeyframeFacts(
        token=record["token"],
        scene=record["scene_name"],
        command=int(record["command_released"]),
        speed=float(exact.norm(step) / 0.5) if known else float("nan"),
        turn=float(np.abs(np.rad2deg(record["waypoint_yaw"][-1]))),
    )


def break_down(horizons: HorizonScores, facts: Sequence[KeyframeFacts]) -> dict[str, dict[str, Any]]:
    """Scores per group of keyframes.

    Args:
        horizons: scores per sample.
        facts: the samples' situations, row for row.

    Returns:
        `command`, `speed` and `turn`, each from group name to `samples` and the metrics; groups without a
        sample are absent.
    """
    groups: Mapping[str, list[str]] = {
        "command": [_command_name(fact.command) for fact in facts],
        "speed": [_interval(fact.speed, SPEED_BOUNDS_MPS, "m/s") for fact in facts],
        "turn": [_interval(fact.turn, TURN_BOUNDS_DEGREES, "deg") for fact in facts],
    }
    order = [
        *COMMANDS,
        *_interval_names(SPEED_BOUNDS_MPS, "m/s"),
        *_interval_names(TURN_BOUNDS_DEGREES, "deg"),
    ]
    result: dict[str, dict[str, Any]] = {}
    for name, labels in groups.items():
        present = sorted(
            set(labels), key=lambda label: (order.index(label) if label in order else len(order), label)
        )
        result[name] = {}
        for label in present:
            rows = np.array([other == label for other in labels])
            result[name][label] = {"samples": int(rows.sum()), **summarize(horizons.rows(rows))}
    return result


def _command_name(command: int) -> str:
    return COMMANDS[command] if 0 <= command < len(COMMANDS) else f"command {command}"


def _interval_names(bounds: Sequence[float], unit: str) -> list[str]:
    inner = [f"{low:g}-{high:g} {unit}" for low, high in itertools.pairwise(bounds)]
    return [f"under {bounds[0]:g} {unit}", *inner, f"from {bounds[-1]:g} {unit}"]


def _interval(value: float, bounds: Sequence[float], unit: str) -> str:
    if np.isnan(value):
        return "unknown"
    return _interval_names(bounds, unit)[int(np.searchsorted(bounds, value, side="right"))]

"""How sure a score is: bootstrap intervals over scenes, and paired differences of two prediction files.

Keyframes of one scene are half a second apart and anything but independent, so whole scenes are drawn with
replacement (cluster bootstrap), not keyframes. The draws are seeded: the same scores give the same interval.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.data.schema import Record
from spacedrive_jax.evaluation.baselines import constant_velocity
from spacedrive_jax.evaluation.metrics import HorizonScores, summarize
from spacedrive_jax.evaluation.protocols import HORIZONS_S

# Scores by driving situation: command, speed and how sharply the recorded drive turns.


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
class Situation:
    """What situation a keyframe is."""

    token: str
    scene: str
    """The scene it belongs to."""
    command: int
    """Number of the command in the prompt (the released rule)."""
    speed: float
    """Present speed, m/s: the newest past displacement over its time; nan at a scene's start."""
    turn: float
    """Absolute change of the recorded heading over the next 3 s, degrees."""
    agents: int = 0
    """Annotated boxes."""


def situation_of(record: Record) -> Situation:
    """Reads a record's situation."""
    step = constant_velocity(record)[0]
    known = bool(record["past_mask"][0])
    return Situation(
        token=record["token"],
        scene=record["scene_name"],
        command=int(record["command_released"]),
        speed=float(exact.norm(step) / 0.5) if known else float("nan"),
        turn=float(np.abs(np.rad2deg(record["waypoint_yaw"][-1]))),
        agents=len(record["agent_boxes"]),
    )


def break_down(horizons: HorizonScores, situations: Sequence[Situation]) -> dict[str, dict[str, Any]]:
    """Scores per group of keyframes.

    Args:
        horizons: scores per sample.
        situations: the samples' situations, row for row.

    Returns:
        `command`, `speed` and `turn`, each from group name to `samples` and the metrics; groups without a
        sample are absent.
    """
    groups: Mapping[str, list[str]] = {
        "command": [_command_name(situation.command) for situation in situations],
        "speed": [_group_name(situation.speed, SPEED_BOUNDS_MPS, "m/s") for situation in situations],
        "turn": [_group_name(situation.turn, TURN_BOUNDS_DEGREES, "deg") for situation in situations],
    }
    order = [
        *COMMANDS,
        *_group_names(SPEED_BOUNDS_MPS, "m/s"),
        *_group_names(TURN_BOUNDS_DEGREES, "deg"),
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


def _group_names(bounds: Sequence[float], unit: str) -> list[str]:
    inner = [f"{low:g}-{high:g} {unit}" for low, high in itertools.pairwise(bounds)]
    return [f"under {bounds[0]:g} {unit}", *inner, f"from {bounds[-1]:g} {unit}"]


def _group_name(value: float, bounds: Sequence[float], unit: str) -> str:
    if np.isnan(value):
        return "unknown"
    return _group_names(bounds, unit)[int(np.searchsorted(bounds, value, side="right"))]


LEVEL = 0.95
RESAMPLES = 2000
COLUMNS = (*(f"{seconds}s" for seconds in HORIZONS_S), "avg")
_SCALE = {"l2": 1.0, "collision": 100.0, "intersection": 100.0}


def confidence(horizons: HorizonScores, scenes: Sequence[str], seed: int = 0) -> dict[str, Any] | None:
    """Percentile intervals of the means.

    Args:
        horizons: scores per sample.
        scenes: the samples' scenes, row for row.
        seed: of the draws.

    Returns:
        `level`, `resamples`, `scenes` and per metric and horizon `[low, high]` (None where nothing was
        measured), in the units of `summarize`; None when all samples are of one scene, which says nothing
        about others.
    """
    labels, scene = np.unique(np.asarray(scenes), return_inverse=True)
    if len(labels) < 2:
        return None
    draws = np.random.default_rng(seed).multinomial(
        len(labels), np.full(len(labels), 1 / len(labels)), size=RESAMPLES
    )
    result: dict[str, Any] = {"level": LEVEL, "resamples": RESAMPLES, "scenes": len(labels)}
    for metric, scale in _SCALE.items():
        means = _resampled_means(scale * getattr(horizons, metric), scene, draws)
        result[metric] = {
            column: _interval(values)
            for column, values in zip(COLUMNS, [*means.T, means.mean(axis=1)], strict=True)
        }
    return result


def _resampled_means(
    values: Float[np.ndarray, "S 3"], scene: np.ndarray, draws: np.ndarray
) -> Float[np.ndarray, "R 3"]:
    """Means of each draw; nan where a draw holds nothing that was measured."""
    known = ~np.isnan(values)
    sums, counts = (np.zeros((draws.shape[1], values.shape[1])) for _ in range(2))
    np.add.at(sums, scene, np.where(known, values, 0.0))
    np.add.at(counts, scene, known)
    with np.errstate(invalid="ignore"):
        return exact.matmul(draws, sums) / exact.matmul(draws, counts)


def _interval(values: Float[np.ndarray, "R"]) -> list[float] | None:
    measured = values[~np.isnan(values)]
    if not len(measured):
        return None
    tail = 100 * (1 - LEVEL) / 2
    return [float(bound) for bound in np.percentile(measured, [tail, 100 - tail])]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two prediction files on the keyframes that count for both."""

    file: str
    """The other file."""
    scenes: tuple[str, ...]
    """The common keyframes' scenes."""
    ours: HorizonScores
    """The first file's scores on them."""
    theirs: HorizonScores
    only_ours: int
    """Keyframes that count for the first file alone."""
    only_theirs: int
    """Keyframes that count for the other alone."""

    def to_json(self) -> dict[str, Any]:
        """Both files' scores, the difference (ours less theirs) and its interval, and who is nearer."""
        difference = HorizonScores(
            *(getattr(self.ours, metric) - getattr(self.theirs, metric) for metric in _SCALE)
        )
        return {
            "file": self.file,
            "samples": len(self.scenes),
            "only_here": self.only_ours,
            "only_there": self.only_theirs,
            "here": summarize(self.ours),
            "there": summarize(self.theirs),
            "difference": summarize(difference),
            "confidence": confidence(difference, self.scenes),
            "nearer_share": self._nearer(),
        }

    def _nearer(self) -> Mapping[str, float]:
        """Share of keyframes on which the first file has the smaller L2, ties counted half."""
        less = np.mean(self.ours.l2 < self.theirs.l2, axis=0)
        equal = np.mean(self.ours.l2 == self.theirs.l2, axis=0)
        return {column: float(value) for column, value in zip(COLUMNS, less + equal / 2, strict=False)}

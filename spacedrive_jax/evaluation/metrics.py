"""From scored steps to the numbers a table shows, and how sure they are.

Scores per step (arrays with one row a sample) come from `collision`; here they are combined per horizon by a
protocol's rules and averaged over samples, over all and by driving situation.

Keyframes of one scene are half a second apart and anything but independent, so for an interval whole scenes
are drawn with replacement (cluster bootstrap), not keyframes. The draws are seeded: the same scores give the
same interval.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from spacedrive_jax import exact
from spacedrive_jax.data.schema import Record
from spacedrive_jax.evaluation.collision import (
    DrivableArea,
    Obstacles,
    collides,
    leaves_road,
    off_road_cells,
    overlaps,
)
from spacedrive_jax.evaluation.predictions import constant_velocity
from spacedrive_jax.evaluation.protocols import (
    HORIZONS_S,
    STEPS_PER_SECOND,
    Combination,
    PolygonRule,
    Protocol,
    StepRule,
)

Table = dict[str, float | None]
"""`{"1s": …, "2s": …, "3s": …, "avg": …}`; None where nothing could be measured."""


@dataclasses.dataclass(frozen=True)
class StepScores:
    """What each step of each plan scored; S samples (or plans), T = 6 steps."""

    l2: Float[np.ndarray, "S T"]
    """Distance to the recorded waypoint, metres."""
    collision: Bool[np.ndarray, "S T"]
    """The ego box meets an obstacle (before any exclusion)."""
    recorded_collision: Bool[np.ndarray, "S T"]
    """The recorded drive's own box meets one at that step."""
    off_road: Bool[np.ndarray, "S T+1"]
    """The ego box leaves the drivable area, now (column 0) and at each waypoint."""
    has_map: Bool[np.ndarray, "S"]
    """Whether `off_road` was measured; False rows are meaningless there."""

    def rows(self, chosen: Bool[np.ndarray, "S"] | slice) -> StepScores:
        """The chosen rows."""
        fields = {field.name: getattr(self, field.name)[chosen] for field in dataclasses.fields(self)}
        return StepScores(**fields)


Drivable = UInt8[np.ndarray, "n n"] | DrivableArea
"""A raster on the rule's grid ([row = y][column = x]) for a `StepRule`, an area for a `PolygonRule`."""


def score_steps(
    waypoints: Float[np.ndarray, "M T 2"],
    recorded: Float[np.ndarray, "T 2"],
    obstacles: Obstacles,
    drivable: Drivable | None,
    rule: StepRule | PolygonRule,
) -> StepScores:
    """Scores M plans in one scene, step by step.

    Args:
        waypoints: those of M plans, metres, ego frame.
        recorded: recorded waypoints, all of them valid.
        obstacles: the agents around.
        drivable: the drivable area in the rule's form, None without a map.
        rule: how a step is tested.

    Returns:
        One row a plan.
    """
    count, steps = waypoints.shape[:2]
    # The recorded drive is scored like one more plan: its collisions exclude steps.
    everything = np.concatenate([waypoints, recorded[None]])
    off_road = np.zeros((count, steps + 1), bool)
    if isinstance(rule, PolygonRule):
        hits = overlaps(everything, obstacles, rule)
        if drivable is not None:
            assert not isinstance(drivable, np.ndarray)
            off_road = leaves_road(waypoints, drivable, rule)
    else:
        hits = collides(everything, obstacles, rule)
        if drivable is not None:
            assert isinstance(drivable, np.ndarray)
            off_road = off_road_cells(waypoints, drivable, rule) > 0
    return StepScores(
        l2=exact.norm(waypoints - recorded),
        collision=hits[:-1],
        recorded_collision=np.broadcast_to(hits[-1], (count, steps)),
        off_road=off_road,
        has_map=np.full(count, drivable is not None),
    )


def stack_scores(scores: Sequence[StepScores]) -> StepScores:
    """Rows of several `StepScores` one below the other."""
    return StepScores(
        **{
            field.name: np.concatenate([getattr(item, field.name) for item in scores])
            for field in dataclasses.fields(StepScores)
        }
    )


@dataclasses.dataclass(frozen=True)
class HorizonScores:
    """Scores per sample at each horizon (columns: 1, 2, 3 s)."""

    l2: Float[np.ndarray, "S 3"]
    """Metres."""
    collision: Float[np.ndarray, "S 3"]
    """0 or 1, or the share of colliding steps; nan where it cannot be judged."""
    intersection: Float[np.ndarray, "S 3"]
    """0 or 1, or the share of steps off the road; nan where it cannot be judged."""

    def rows(self, chosen: Bool[np.ndarray, "S"] | Int[np.ndarray, "K"]) -> HorizonScores:
        """The chosen rows."""
        return HorizonScores(self.l2[chosen], self.collision[chosen], self.intersection[chosen])


def horizon_scores(
    scores: StepScores,
    protocol: Protocol,
    exclude: bool = True,
    failed: Bool[np.ndarray, "S"] | None = None,
) -> HorizonScores:
    """Combines steps into horizons by the protocol's rules.

    Steps at which the recorded drive itself collides are not scored for collision, samples whose ego box is
    off the road already now not for intersection; `Protocol.unscorable` says what that means.

    Args:
        scores: step scores.
        protocol: rules for combining.
        exclude: False scores collision at all steps (the recorded drive against itself, for example).
        failed: rows of unusable answers, which collide and leave the road at every horizon.
    """
    nothing = np.nan if protocol.unscorable == "left_out" else 0.0
    collision = scores.collision.astype(np.float64)
    if exclude:
        collision[scores.recorded_collision] = nothing
    off_road = scores.off_road[:, 1:].astype(np.float64)
    off_road[scores.off_road[:, 0]] = nothing
    if failed is not None:
        collision[failed] = off_road[failed] = 1.0
    off_road[~scores.has_map] = np.nan
    columns: dict[str, list[np.ndarray]] = {"l2": [], "collision": [], "intersection": []}
    for seconds in HORIZONS_S:
        steps = seconds * STEPS_PER_SECOND
        columns["l2"].append(_combine(scores.l2[:, :steps], protocol.l2))
        columns["collision"].append(_combine(collision[:, :steps], protocol.collision))
        columns["intersection"].append(_combine(off_road[:, :steps], protocol.intersection))
    return HorizonScores(**{name: np.stack(values, axis=1) for name, values in columns.items()})


def _combine(steps: Float[np.ndarray, "S n"], how: Combination) -> Float[np.ndarray, "S"]:
    if how == "endpoint":
        return steps[:, -1]
    return steps.max(axis=1) if how == "any" else steps.mean(axis=1)


def summarize(horizons: HorizonScores) -> dict[str, Table]:
    """Means over samples: L2 in metres, collision and intersection in percent; avg is over 1, 2, 3 s.

    What cannot be judged is left out of its mean; None where nothing can.
    """
    return {
        "l2": _table(horizons.l2),
        "collision": _table(100 * horizons.collision),
        "intersection": _table(100 * horizons.intersection),
    }


def _table(values: Float[np.ndarray, "S 3"]) -> Table:
    means = [float(column.mean()) if len(column := part[~np.isnan(part)]) else None for part in values.T]
    known = [mean for mean in means if mean is not None]
    return {
        **{f"{seconds}s": mean for seconds, mean in zip(HORIZONS_S, means, strict=True)},
        "avg": sum(known) / len(known) if len(known) == len(means) else None,
    }


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

"""From scored steps to the numbers a table shows.

Scores per step (arrays with one row a sample) come from `collision` and `drivable`; here they are combined
per horizon by a protocol's rules and averaged over samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

from spacedrive_jax.evaluation.collision import Obstacles, collides
from spacedrive_jax.evaluation.drivable import off_road_cells
from spacedrive_jax.evaluation.protocols import HORIZONS_S, STEPS_PER_SECOND, Protocol, StepRule

Table = dict[str, float | None]
"""`{"1s": …, "2s": …, "3s": …, "avg": …}`; None where nothing could be measured."""


@dataclasses.dataclass(frozen=True)
class StepScores:
    """What each step of each trajectory scored; S samples (or trajectories), T = 6 steps.

    Attributes:
        l2: distance to the recorded waypoint, metres.
        collision: the ego box meets another vehicle (before any exclusion).
        reference_collision: the recorded drive's own box meets one at that step.
        off_road: the ego box covers non-drivable cells, now (column 0) and at each waypoint.
        has_map: whether `off_road` was measured; False rows are meaningless there.
    """

    l2: Float[np.ndarray, "S T"]
    collision: Bool[np.ndarray, "S T"]
    reference_collision: Bool[np.ndarray, "S T"]
    off_road: Bool[np.ndarray, "S T+1"]
    has_map: Bool[np.ndarray, "S"]

    def row(self, index: int) -> StepScores:
        """One row, still with its leading axis."""
        rows = {
            field.name: getattr(self, field.name)[index : index + 1] for field in dataclasses.fields(self)
        }
        return StepScores(**rows)


def score_steps(
    trajectories: Float[np.ndarray, "M T 2"],
    reference: Float[np.ndarray, "T 2"],
    obstacles: Obstacles,
    drivable: UInt8[np.ndarray, "n n"] | None,
    rule: StepRule,
) -> StepScores:
    """Scores M trajectories in one scene, step by step.

    Args:
        trajectories: planned waypoints, metres, ego frame.
        reference: recorded waypoints, all of them valid.
        obstacles: the vehicles around.
        drivable: drivable area on the rule's grid ([row = y][column = x]), None without a map.
        rule: how a step is laid on the grid.

    Returns:
        One row a trajectory.
    """
    count, steps = trajectories.shape[:2]
    # The recorded drive is scored like one more trajectory: its collisions exclude steps.
    hits = collides(np.concatenate([trajectories, reference[None]]), obstacles, rule)
    if drivable is None:
        off_road = np.zeros((count, steps + 1), bool)
    else:
        off_road = off_road_cells(trajectories, drivable, rule) > 0
    return StepScores(
        l2=np.linalg.norm(trajectories - reference, axis=-1),
        collision=hits[:-1],
        reference_collision=np.broadcast_to(hits[-1], (count, steps)),
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
    """Scores per sample at each horizon (columns: 1, 2, 3 s).

    Attributes:
        l2: metres.
        collision: 0 or 1, or the share of colliding steps.
        intersection: 0 or 1, or the share of steps off the road; nan without a map.
    """

    l2: Float[np.ndarray, "S 3"]
    collision: Float[np.ndarray, "S 3"]
    intersection: Float[np.ndarray, "S 3"]


def horizon_scores(scores: StepScores, protocol: Protocol, exclude: bool = True) -> HorizonScores:
    """Combines steps into horizons by the protocol's rules.

    Steps at which the recorded drive itself collides are not scored for collision. A sample whose ego box
    is off the road already now cannot count as an intersection but stays in the denominator.

    Args:
        scores: step scores.
        protocol: rules for combining.
        exclude: False scores collision at all steps (the recorded drive against itself, for example).
    """
    collision = scores.collision & ~scores.reference_collision if exclude else scores.collision
    off_road = scores.off_road[:, 1:] & ~scores.off_road[:, :1]
    columns: dict[str, list[np.ndarray]] = {"l2": [], "collision": [], "intersection": []}
    for seconds in HORIZONS_S:
        steps = seconds * STEPS_PER_SECOND
        error = scores.l2[:, :steps]
        columns["l2"].append(error.mean(axis=1) if protocol.l2 == "mean" else error[:, -1])
        columns["collision"].append(_combine(collision[:, :steps], protocol.collision))
        intersection = _combine(off_road[:, :steps], protocol.intersection)
        columns["intersection"].append(np.where(scores.has_map, intersection, np.nan))
    return HorizonScores(**{name: np.stack(values, axis=1) for name, values in columns.items()})


def _combine(steps: Bool[np.ndarray, "S n"], how: str) -> Float[np.ndarray, "S"]:
    return np.asarray(steps.any(axis=1) if how == "any" else steps.mean(axis=1), np.float64)


def summarize(horizons: HorizonScores) -> dict[str, Table]:
    """Means over samples: L2 in metres, collision and intersection in percent; avg is over 1, 2, 3 s.

    Samples without a map are left out of the intersection mean; None when no sample counts.
    """
    return {
        "l2": _table(horizons.l2),
        "collision": _table(100 * horizons.collision),
        "intersection": _table(100 * horizons.intersection),
    }


def _table(values: Float[np.ndarray, "S 3"]) -> Table:
    counted = values[~np.isnan(values).any(axis=1)]
    if not len(counted):
        return {**{f"{seconds}s": None for seconds in HORIZONS_S}, "avg": None}
    means = counted.mean(axis=0)
    return {
        **{f"{seconds}s": float(mean) for seconds, mean in zip(HORIZONS_S, means, strict=True)},
        "avg": float(means.mean()),
    }

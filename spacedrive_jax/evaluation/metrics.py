"""From scored steps to the numbers a table shows.

Scores per step (arrays with one row a sample) come from `collision` and `drivable`, or from `polygons`; here
they are combined per horizon by a protocol's rules and averaged over samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from spacedrive_jax import exact
from spacedrive_jax.evaluation.collision import DrivableArea, Obstacles, collides, leaves_road, overlaps
from spacedrive_jax.evaluation.protocols import (
    HORIZONS_S,
    STEPS_PER_SECOND,
    Combination,
    PolygonRule,
    Protocol,
    StepRule,
)
from spacedrive_jax.evaluation.rasters import off_road_cells

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

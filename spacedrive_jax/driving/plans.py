"""What a planner answers, and all the ways in which an answer can be none."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax.constants import NUM_WAYPOINTS

FARTHEST = 200.0
"""Metres; a waypoint 3 s ahead that is further away is nonsense, not a plan."""


class FailureKind(enum.StrEnum):
    """Why an answer was no plan."""

    NONSENSE = "nonsense"
    """Not six waypoints (an unparsed answer, a wrong shape, points hundreds of metres away)."""
    NOT_FINITE = "not finite"
    LATE = "late"
    """No answer within the time that the caller allows."""
    CRASH = "crash"
    """The policy raised an error."""


class PlanError(Exception):
    """An answer that cannot be driven. The drive goes on with the last plan; what failed is counted."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(kind, reason)  # both, so that it can be sent between processes
        self.kind, self.reason = kind, reason

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a planner wants to go, in the ego frame of the moment it was asked."""

    waypoints: Float[np.ndarray, "6 2"]
    """At 0.5 s steps, metres."""
    path: Float[np.ndarray, "R 2"] | None = None
    """At 1 m steps along the way, where the planner gives one."""
    text: str = ""
    """What a language model said."""


def checked_plan(waypoints: Any, path: Any = None, text: str = "") -> Plan:
    """A plan from whatever a policy answered.

    Raises:
        PlanError: it is none.
    """
    points = _points(waypoints, "waypoints")
    if len(points) != NUM_WAYPOINTS:
        raise PlanError(FailureKind.NONSENSE, f"{len(points)} waypoints, not {NUM_WAYPOINTS}")
    along = None if path is None or not len(path) else _points(path, "path")
    return Plan(points, along, text)


def _points(values: Any, name: str) -> Float[np.ndarray, "K 2"]:
    try:
        points = np.array(values, np.float64)
    except (TypeError, ValueError) as error:
        raise PlanError(FailureKind.NONSENSE, f"{name} are no numbers ({error})") from error
    if points.ndim != 2 or points.shape[1] != 2:
        raise PlanError(FailureKind.NONSENSE, f"{name} have shape {points.shape}, not (K, 2)")
    if not np.isfinite(points).all():
        raise PlanError(FailureKind.NOT_FINITE, f"{name} are not all finite")
    if len(points) and np.abs(points).max() > FARTHEST:
        raise PlanError(FailureKind.NONSENSE, f"{name} reach beyond {FARTHEST:.0f} m")
    return points

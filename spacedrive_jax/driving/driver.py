"""The one at the wheel: keeps the last plan in the world and turns it into controls, step by step.

A plan is what a policy answers; here are all the ways in which an answer can be none.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_WAYPOINTS
from spacedrive_jax.driving import bench2drive_control
from spacedrive_jax.driving.controllers import STEP_S, plan_reference, pure_pursuit, track
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.world.traffic import TIME_STEP
from spacedrive_jax.world.vehicle import WHEEL_BASE, Control, Limits, VehicleState

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


Controller = Literal["pure_pursuit", "lqr", "zoo", "simlingo", "hip_ad", "minddrive"]
"""Who turns plans into controls; the last four are published agents' (`bench2drive_control.PRESETS`)."""

PEDAL_STEER = math.radians(70.0)
"""Front wheel angle of CARLA's full steering (GUESS of the spec; the MKZ's largest)."""
DRAG = 0.15
"""Deceleration of a rolling car per m/s of speed without throttle, 1/s (this project's choice)."""
STOPPING = Control(-3.0, 0.0)
"""Without any plan the car is stopped."""


class Driver:
    """One vehicle's controller and the plan it follows."""

    def __init__(self, controller: Controller = "pure_pursuit", limits: Limits | None = None) -> None:
        """Starts without a plan.

        Raises:
            ConfigError: there is no such controller.
        """
        if controller not in get_args(Controller):
            raise ConfigError(f"no controller {controller!r}: choose {', '.join(get_args(Controller))}")
        self.controller, self.limits = controller, limits or Limits()
        self._pedals = (
            bench2drive_control.Controller(controller) if controller in bench2drive_control.PRESETS else None
        )
        self._waypoints: Float[np.ndarray, "7 2"] | None = None
        self._path: Float[np.ndarray, "R 2"] | None = None
        self._made = 0.0
        self.target: Float[np.ndarray, "2"] | None = None

    def follow(self, plan: Plan, vehicle: VehicleState, time: float) -> None:
        """Takes over a plan made at `time` from where the vehicle stands."""
        origin = np.concatenate([np.zeros((1, 2)), plan.waypoints])
        self._waypoints = to_global(origin, vehicle)
        self._path = None if plan.path is None else to_global(plan.path, vehicle)
        self._made = time

    def control(self, vehicle: VehicleState, time: float) -> Control:
        """What to ask of the actuators now."""
        if self._waypoints is None:
            return STOPPING
        points = to_vehicle(self._waypoints, vehicle)
        path = None if self._path is None else to_vehicle(self._path, vehicle)
        elapsed = time - self._made
        if self.controller == "lqr":
            reference = plan_reference(points, STEP_S, elapsed)
            tracking = track(vehicle.speed, vehicle.steer, reference)
            return Control(tracking.acceleration, vehicle.steer + tracking.steer_rate * TIME_STEP)
        if self._pedals is None:
            pursuit = pure_pursuit(vehicle.speed, points[1:], path, elapsed)
            return Control(pursuit.acceleration, exact.arctan(WHEEL_BASE * pursuit.curvature))
        ahead = _shifted(points, elapsed)
        target = None if self.target is None else to_vehicle(self.target[None], vehicle)[0]
        pedals = self._pedals.step(vehicle.speed, ahead, path, target)
        return pedals_to_control(pedals, vehicle.speed, self.limits)


def pedals_to_control(pedals: bench2drive_control.Controls, speed: float, limits: Limits) -> Control:
    """CARLA's pedals on this world's bicycle."""
    acceleration = pedals.throttle * limits.acceleration - pedals.brake * limits.braking
    if pedals.throttle == 0.0 and pedals.brake == 0.0:
        acceleration = -DRAG * speed
    return Control(acceleration, -pedals.steer * PEDAL_STEER)


def _shifted(points: Float[np.ndarray, "7 2"], elapsed: float) -> Float[np.ndarray, "6 2"]:
    """A plan's waypoints as seen `elapsed` seconds later: interpolated in time, held at its end."""
    times = STEP_S * np.arange(len(points))
    wanted = np.minimum(elapsed + STEP_S * np.arange(1, len(points)), times[-1])
    shifted = np.stack([np.interp(wanted, times, points[:, axis]) for axis in range(2)], axis=1)
    # Past its end the plan goes on as it last went.
    beyond = np.maximum(elapsed + STEP_S * np.arange(1, len(points)) - times[-1], 0.0)
    return shifted + beyond[:, None] * (points[-1] - points[-2]) / STEP_S


def to_global(points: Float[np.ndarray, "K 2"], vehicle: VehicleState) -> Float[np.ndarray, "K 2"]:
    """Points of the vehicle's frame in the world's."""
    cos, sin = exact.cos_sin(vehicle.yaw)
    x, y = points[:, 0], points[:, 1]
    return np.stack([vehicle.x + cos * x - sin * y, vehicle.y + sin * x + cos * y], axis=1)


def to_vehicle(points: Float[np.ndarray, "K 2"], vehicle: VehicleState) -> Float[np.ndarray, "K 2"]:
    """Points of the world's frame in the vehicle's."""
    cos, sin = exact.cos_sin(vehicle.yaw)
    x, y = points[:, 0] - vehicle.x, points[:, 1] - vehicle.y
    return np.stack([cos * x + sin * y, cos * y - sin * x], axis=1)

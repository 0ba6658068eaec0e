"""The one at the wheel: keeps the last plan in the world and turns it into controls, step by step.

A plan is what a policy answers; here are all the ways in which an answer can be none, and two trackers that
follow it. nuPlan's LQR tracker (`tracker/lqr.py`, `batch_lqr.py` of NAVSIM): speed first, then the steering
rate. Pure pursuit (Coulter, 1992): a plan's speed, and the circle to a point some way ahead on its path.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_WAYPOINTS, WAYPOINT_STEP
from spacedrive_jax.driving import bench2drive_control
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.world.traffic import TIME_STEP
from spacedrive_jax.world.vehicle import WHEEL_BASE, Control, Limits, VehicleState

FARTHEST = 200.0
"""Metres; a waypoint 3 s ahead that is further away is nonsense, not a plan."""

LQR_HORIZON = 10
LQR_STEP = 0.1
"""Seconds; the tracker looks `LQR_HORIZON` steps ahead."""
Q_SPEED, R_SPEED = 10.0, 1.0
Q_LATERAL, Q_HEADING, Q_STEER = 1.0, 10.0, 0.0
R_STEER_RATE = 1.0
STOPPING_SPEED = 0.2
"""m/s; below it, where the plan stands too, plain gains stop the vehicle."""
STOPPING_GAIN = 0.5

LOOK_AHEAD = (0.7, 2.5, 9.0)
"""Seconds, and least and most metres, to the point that pure pursuit steers for."""
SPEED_HORIZON = 0.75
"""Seconds in which the plan's speed is to be reached: the middle of its second segment."""


class Tracking(NamedTuple):
    """What the tracker asks of the actuators."""

    acceleration: float
    """m/s^2."""
    steer_rate: float
    """rad/s."""


def track(
    speed: float, steer: float, reference: Float[np.ndarray, "T 3"], wheel_base: float = WHEEL_BASE
) -> Tracking:
    """One step of the tracker.

    Args:
        speed: present speed, m/s.
        steer: present angle of the front wheels, radians.
        reference: x, y, heading in the present ego frame, `LQR_STEP` seconds apart, the first for now; more
            than `LQR_HORIZON` rows.
        wheel_base: metres.
    """
    steps = np.diff(reference[: LQR_HORIZON + 2], axis=0)
    speeds = exact.norm(steps) / LQR_STEP
    turns = (steps[:, 2] + math.pi) % (2 * math.pi) - math.pi
    wanted = float(speeds[min(LQR_HORIZON, len(speeds) - 1)])
    if wanted <= STOPPING_SPEED and speed <= STOPPING_SPEED:
        return Tracking(-STOPPING_GAIN * (speed - wanted), -STOPPING_GAIN * steer)
    reach = LQR_HORIZON * LQR_STEP
    acceleration = reach * Q_SPEED * (wanted - speed) / (reach * reach * Q_SPEED + R_SPEED)
    heading = float(reference[0, 2])
    # The vehicle's error in the reference's frame: to its left, and turned to its left.
    cos, sin = exact.cos_sin(heading)
    lateral = sin * float(reference[0, 0]) - cos * float(reference[0, 1])
    state = [lateral, -((heading + math.pi) % (2 * math.pi) - math.pi), steer]
    response = [0.0, 0.0, 0.0]
    for k in range(LQR_HORIZON):
        # Error dynamics of a bicycle about the reference, its speed as the acceleration above makes it.
        now = max(speed + acceleration * LQR_STEP * k, 0.0)
        curvature = float(turns[k]) / max(float(speeds[k]) * LQR_STEP, 0.01) if k < len(turns) else 0.0
        gain = now * LQR_STEP
        state = [
            state[0] + gain * state[1],
            state[1] + gain / wheel_base * state[2] - gain * curvature,
            state[2],
        ]
        response = [
            response[0] + gain * response[1],
            response[1] + gain / wheel_base * response[2],
            response[2] + LQR_STEP,
        ]
    weights = (Q_LATERAL, Q_HEADING, Q_STEER)
    cost = sum(q * r * r for q, r in zip(weights, response, strict=True)) + R_STEER_RATE
    rate = -sum(q * r * s for q, r, s in zip(weights, response, state, strict=True)) / cost
    return Tracking(acceleration, rate)


def plan_reference(
    waypoints: Float[np.ndarray, "T 2"], period: float, elapsed: float, rows: int = LQR_HORIZON + 2
) -> Float[np.ndarray, "K 3"]:
    """A plan as the tracker's reference: positions every `LQR_STEP`, headings along them.

    Args:
        waypoints: present ego frame; the plan's origin first.
        period: seconds between them.
        elapsed: seconds since the plan was made.
        rows: how many.
    """
    times = period * np.arange(len(waypoints))
    wanted = np.minimum(elapsed + LQR_STEP * np.arange(rows + 1), times[-1])
    points = np.stack([np.interp(wanted, times, waypoints[:, axis]) for axis in range(2)], axis=1)
    steps = np.diff(points, axis=0)
    headings, last = [], 0.0
    for x, y in steps:
        if x * x + y * y > 1e-6:
            last = exact.arctan2(float(y), float(x))
        headings.append(last)
    return np.column_stack([points[:-1], headings])


class Pursuit(NamedTuple):
    """What pure pursuit asks of a vehicle."""

    acceleration: float
    """m/s^2."""
    curvature: float
    """Of the rear axle's path, 1/m, positive to the left."""


def pure_pursuit(
    speed: float,
    waypoints: Float[np.ndarray, "T 2"],
    path: Float[np.ndarray, "R 2"] | None = None,
    elapsed: float = 0.0,
) -> Pursuit:
    """Follows a plan.

    The speed is the plan's between its first and second waypoint or later, never from the vehicle to the
    first: at rest a hair of localisation error in that segment decides between going and staying.

    Args:
        speed: present speed, m/s.
        waypoints: (6, 2) in the present ego frame.
        path: (R, 2) in the present ego frame where the plan gives one; it then decides the direction.
        elapsed: seconds since the plan was made.
    """
    waypoints = np.asarray(waypoints, np.float64)
    steps = np.diff(waypoints, axis=0)
    speeds = exact.norm(steps) / WAYPOINT_STEP
    middles = WAYPOINT_STEP * (np.arange(len(speeds)) + 1.5)
    wanted = float(np.interp(elapsed + SPEED_HORIZON, middles, speeds))
    acceleration = (wanted - speed) / SPEED_HORIZON
    if wanted < 0.2 and speed < 0.6:
        acceleration = min(acceleration, -1.0)  # a stop is reached, not approached for ever
    return Pursuit(acceleration, _curvature(speed, waypoints if path is None else path))


def _curvature(speed: float, points: np.ndarray) -> float:
    """Of the circle through the rear axle and the point at the look-ahead distance on the polyline.

    A vehicle far off its way may have all of it behind: the circle then leads around, back to it.
    """
    seconds, least, most = LOOK_AHEAD
    wanted = min(max(seconds * speed, least), most)
    points = np.asarray(points, np.float64)
    distances = exact.norm(points)
    ahead = np.flatnonzero((distances >= wanted) & (points[:, 0] > 0))
    if not len(ahead):
        behind, beyond = points[-1, 0] <= 0, np.flatnonzero(distances >= wanted)
        if distances[-1] < 1.0 or (behind and not len(beyond)):
            return 0.0  # a plan that goes nowhere says nothing about the direction
        target = int(beyond[0]) if behind else len(points) - 1
        y, wanted = points[target, 1], float(distances[target])
    else:
        last = int(ahead[0])
        start = points[last - 1] if last else np.zeros(2)
        _, y = _on_circle(start, points[last], wanted)
    return 2 * float(y) / (wanted * wanted)


def _on_circle(start: np.ndarray, end: np.ndarray, radius: float) -> tuple[float, float]:
    """Where the segment from inside a circle about the origin to outside it crosses the circle."""
    step_x, step_y = float(end[0] - start[0]), float(end[1] - start[1])
    a = step_x * step_x + step_y * step_y
    b = float(start[0]) * step_x + float(start[1]) * step_y
    c = float(exact.dot(start, start)) - radius * radius
    if a == 0.0 or c > 0:
        return float(end[0]), float(end[1])
    t = (-b + np.sqrt(max(b * b - a * c, 0.0))) / a
    return float(start[0]) + t * step_x, float(start[1]) + t * step_y


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


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided at one time: the plan, or why there was none."""

    time: float
    """Seconds since the start of the simulation."""
    vehicle: VehicleState
    plan: Plan | None
    failure: str = ""


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
            reference = plan_reference(points, WAYPOINT_STEP, elapsed)
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
    """A plan's waypoints as seen `elapsed` seconds later, interpolated in time."""
    times = WAYPOINT_STEP * np.arange(len(points))
    wanted = np.minimum(elapsed + WAYPOINT_STEP * np.arange(1, len(points)), times[-1])
    shifted = np.stack([np.interp(wanted, times, points[:, axis]) for axis in range(2)], axis=1)
    # Past its end the plan goes on as it last went.
    beyond = np.maximum(elapsed + WAYPOINT_STEP * np.arange(1, len(points)) - times[-1], 0.0)
    return shifted + beyond[:, None] * (points[-1] - points[-2]) / WAYPOINT_STEP


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

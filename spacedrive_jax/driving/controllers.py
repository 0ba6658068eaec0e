"""From a plan to controls: two trackers.

nuPlan's LQR tracker (`tracker/lqr.py`, `batch_lqr.py` of NAVSIM): speed first, then the steering rate.
Pure pursuit (Coulter, 1992): a plan's speed, and the circle to a point some way ahead on its path.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.world.vehicle import WHEEL_BASE

HORIZON = 10
STEP = 0.1
Q_SPEED, R_SPEED = 10.0, 1.0
Q_LATERAL, Q_HEADING, Q_STEER = 1.0, 10.0, 0.0
R_STEER_RATE = 1.0
STOPPING_SPEED = 0.2
"""m/s; below it, where the plan stands too, plain gains stop the vehicle."""
STOPPING_GAIN = 0.5


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
        reference: x, y, heading in the present ego frame, `STEP` seconds apart, the first for now; more than
            `HORIZON` rows.
        wheel_base: metres.
    """
    steps = np.diff(reference[: HORIZON + 2], axis=0)
    speeds = exact.norm(steps) / STEP
    turns = (steps[:, 2] + math.pi) % (2 * math.pi) - math.pi
    wanted = float(speeds[min(HORIZON, len(speeds) - 1)])
    if wanted <= STOPPING_SPEED and speed <= STOPPING_SPEED:
        return Tracking(-STOPPING_GAIN * (speed - wanted), -STOPPING_GAIN * steer)
    reach = HORIZON * STEP
    acceleration = reach * Q_SPEED * (wanted - speed) / (reach * reach * Q_SPEED + R_SPEED)
    heading = float(reference[0, 2])
    # The vehicle's error in the reference's frame: to its left, and turned to its left.
    cos, sin = exact.cos_sin(heading)
    lateral = sin * float(reference[0, 0]) - cos * float(reference[0, 1])
    state = [lateral, -((heading + math.pi) % (2 * math.pi) - math.pi), steer]
    response = [0.0, 0.0, 0.0]
    for k in range(HORIZON):
        # Error dynamics of a bicycle about the reference, its speed as the acceleration above makes it.
        now = max(speed + acceleration * STEP * k, 0.0)
        curvature = float(turns[k]) / max(float(speeds[k]) * STEP, 0.01) if k < len(turns) else 0.0
        gain = now * STEP
        state = [
            state[0] + gain * state[1],
            state[1] + gain / wheel_base * state[2] - gain * curvature,
            state[2],
        ]
        response = [
            response[0] + gain * response[1],
            response[1] + gain / wheel_base * response[2],
            response[2] + STEP,
        ]
    weights = (Q_LATERAL, Q_HEADING, Q_STEER)
    cost = sum(q * r * r for q, r in zip(weights, response, strict=True)) + R_STEER_RATE
    rate = -sum(q * r * s for q, r, s in zip(weights, response, state, strict=True)) / cost
    return Tracking(acceleration, rate)


def plan_reference(
    waypoints: Float[np.ndarray, "T 2"], period: float, elapsed: float
) -> Float[np.ndarray, "K 3"]:
    """A plan as the tracker's reference: positions every `STEP`, headings along them.

    Args:
        waypoints: present ego frame; the plan's origin first.
        period: seconds between them.
        elapsed: seconds since the plan was made.
    """
    times = period * np.arange(len(waypoints))
    wanted = np.minimum(elapsed + STEP * np.arange(HORIZON + 3), times[-1])
    points = np.stack([np.interp(wanted, times, waypoints[:, axis]) for axis in range(2)], axis=1)
    steps = np.diff(points, axis=0)
    headings, last = [], 0.0
    for x, y in steps:
        if x * x + y * y > 1e-6:
            last = exact.arctan2(float(y), float(x))
        headings.append(last)
    return np.column_stack([points[:-1], headings])


STEP_S = 0.5
"""Seconds between waypoints."""


class Pursuit(NamedTuple):
    """What pure pursuit asks of a vehicle."""

    acceleration: float
    """m/s^2."""
    curvature: float
    """Of the rear axle's path, 1/m, positive to the left."""


LOOK_AHEAD = (0.7, 2.5, 9.0)
"""Seconds, and least and most metres, to the point that pure pursuit steers for."""
SPEED_HORIZON = 0.75
"""Seconds in which the plan's speed is to be reached: the middle of its second segment."""


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
    speeds = exact.norm(steps) / STEP_S
    middles = STEP_S * (np.arange(len(speeds)) + 1.5)
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

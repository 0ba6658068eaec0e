"""Pure pursuit: a plan's speed, and the circle to a point some way ahead on its path (Coulter, 1992)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact

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
    """Of the circle through the rear axle and the point at the look-ahead distance on the polyline."""
    seconds, least, most = LOOK_AHEAD
    wanted = min(max(seconds * speed, least), most)
    points = np.asarray(points, np.float64)
    distances = exact.norm(points)
    ahead = np.flatnonzero((distances >= wanted) & (points[:, 0] > 0))
    if not len(ahead):
        x, y = points[-1]
        if distances[-1] < 1.0 or x <= 0:
            return 0.0  # a plan that goes nowhere says nothing about the direction
        wanted = float(distances[-1])
    else:
        last = int(ahead[0])
        start = points[last - 1] if last else np.zeros(2)
        x, y = _on_circle(start, points[last], wanted)
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

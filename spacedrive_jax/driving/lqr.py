"""nuPlan's LQR tracker (`tracker/lqr.py`, `batch_lqr.py` of NAVSIM): speed first, then the steering rate."""

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

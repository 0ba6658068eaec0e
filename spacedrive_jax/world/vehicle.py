"""The ego vehicle as a body: a kinematic bicycle about its rear axle, with the limits of its actuators."""

from __future__ import annotations

import dataclasses
import math

from spacedrive_jax import exact

WHEEL_BASE = 2.588
"""Metres, of the Renault Zoe that recorded nuScenes."""


@dataclasses.dataclass(frozen=True)
class Control:
    """What a driver asks for."""

    acceleration: float
    """m/s^2, negative to brake."""
    steer: float
    """Angle of the front wheels, radians, positive to the left."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the actuators can do.

    Steering angle and acceleration are this project's choice; nuPlan has
    lags of 0.2 s on the acceleration and 0.05 s on the steering (its `batch_kinematic_bicycle`).
    """

    steer: float = 0.55
    """Largest angle of the front wheels, radians."""
    steer_rate: float = 0.6
    """Radians per second."""
    braking: float = 7.0
    """m/s^2."""
    acceleration: float = 2.5
    """m/s^2."""
    acceleration_lag: float = 0.0
    """Time constant of a first-order lag, seconds; 0 for none."""
    steer_lag: float = 0.0
    """Likewise."""


@dataclasses.dataclass(frozen=True)
class VehicleState:
    """The rear axle's pose and what the actuators do."""

    x: float
    """Global metres."""
    y: float
    yaw: float
    """Radians, continuous (not wrapped)."""
    speed: float
    """Along the heading, never negative, m/s."""
    acceleration: float = 0.0
    steer: float = 0.0

    @property
    def curvature(self) -> float:
        """Of the rear axle's path, 1/m, positive to the left."""
        return exact.tan(self.steer) / WHEEL_BASE


def actuate(state: VehicleState, control: Control, seconds: float, limits: Limits) -> VehicleState:
    """The same place with the actuators moved towards what is asked for, as far as they get in `seconds`.

    A control that is not finite asks for nothing: the actuators stay.
    """
    acceleration, steer = state.acceleration, state.steer
    if math.isfinite(control.acceleration):
        acceleration = _lagged(acceleration, control.acceleration, seconds, limits.acceleration_lag)
        acceleration = min(max(acceleration, -limits.braking), limits.acceleration)
    if math.isfinite(control.steer):
        wanted = _lagged(steer, control.steer, seconds, limits.steer_lag)
        most = limits.steer_rate * seconds
        steer = min(max(wanted, steer - most), steer + most)
        steer = min(max(steer, -limits.steer), limits.steer)
    # Brakes stop the car, they do not drive it backwards: stopped within the step, exactly.
    acceleration = max(acceleration, -state.speed / seconds)
    return dataclasses.replace(state, acceleration=acceleration, steer=steer)


def _lagged(value: float, wanted: float, seconds: float, lag: float) -> float:
    return wanted if lag <= 0 else value + (wanted - value) * seconds / (seconds + lag)


def moved(state: VehicleState, seconds: float) -> VehicleState:
    """The state some seconds later with the actuators held (midpoint rule).

    Args:
        state: where it is, with its acceleration and steering angle.
        seconds: how long; a car that brakes stands from the moment it stops.
    """
    speed = max(state.speed + state.acceleration * seconds, 0.0)
    travelled = state.speed * seconds + 0.5 * state.acceleration * (seconds * seconds)
    if state.acceleration < 0 and speed == 0.0:
        travelled = min(travelled, 0.5 * state.speed * state.speed / -state.acceleration)
    travelled = max(travelled, 0.0)
    turned = travelled * state.curvature
    cos, sin = exact.cos_sin(state.yaw + turned / 2)
    return dataclasses.replace(
        state,
        x=state.x + travelled * cos,
        y=state.y + travelled * sin,
        yaw=state.yaw + turned,
        speed=speed,
    )

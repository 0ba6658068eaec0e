"""The kinematic bicycle on numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from spacedrive_jax.world.vehicle import WHEEL_BASE, Control, Limits, VehicleState, actuate, moved

STILL = VehicleState(1.0, 2.0, 0.5, 0.0)


def test_straight_with_constant_acceleration() -> None:
    state = moved(VehicleState(0.0, 0.0, math.pi / 2, 4.0, 2.0, 0.0), 0.5)
    assert state.x == pytest.approx(0.0, abs=1e-12)
    assert state.y == pytest.approx(4.0 * 0.5 + 0.5 * 2.0 * 0.25)
    assert state.speed == 5.0


def test_a_full_circle_comes_back_to_its_start() -> None:
    steer = 0.3
    radius = WHEEL_BASE / math.tan(steer)
    steps = 400
    state = VehicleState(0.0, 0.0, 0.0, 2 * math.pi * radius / (steps * 0.1), 0.0, steer)
    for _ in range(steps):
        state = moved(state, 0.1)
    assert state.yaw == pytest.approx(2 * math.pi)
    assert math.hypot(state.x, state.y) < 1e-3


def test_brakes_stop_the_car_and_do_not_reverse_it() -> None:
    state = actuate(VehicleState(0.0, 0.0, 0.0, 0.5, 0.0, 0.0), Control(-7.0, 0.0), 0.1, Limits())
    assert state.acceleration == -5.0
    state = moved(state, 0.1)
    assert state.speed == 0.0
    assert state.x == pytest.approx(0.025)
    assert moved(state, 5.0).x == state.x


@pytest.mark.parametrize(
    ("control", "acceleration", "steer"),
    [
        (Control(9.0, 9.0), 2.5, 0.06),
        (Control(-9.0, -9.0), -7.0, -0.06),
        (Control(1.0, 0.05), 1.0, 0.05),
        (Control(math.nan, math.inf), 0.3, 0.0),
    ],
)
def test_actuators_have_limits(control: Control, acceleration: float, steer: float) -> None:
    state = VehicleState(0.0, 0.0, 0.0, 20.0, 0.3, 0.0)
    after = actuate(state, control, 0.1, Limits())
    assert (after.acceleration, after.steer) == (pytest.approx(acceleration), pytest.approx(steer))


def test_the_steering_stops_at_its_stop() -> None:
    state = STILL
    for _ in range(30):
        state = actuate(state, Control(0.0, 3.0), 0.1, Limits())
    assert state.steer == 0.55


def test_lags_approach_what_is_asked_for() -> None:
    limits = Limits(acceleration_lag=0.2, steer_lag=0.05)
    state = dataclasses.replace(STILL, speed=5.0)
    state = actuate(state, Control(1.5, 0.03), 0.1, limits)
    assert state.acceleration == pytest.approx(0.5)
    assert state.steer == pytest.approx(0.02)

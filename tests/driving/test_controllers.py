"""Controllers on plans worked out by hand, and every one of them round a bend on the bicycle."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest

from spacedrive_jax.driving.bench2drive_control import Controls
from spacedrive_jax.driving.driver import (
    Controller,
    Driver,
    FailureKind,
    Plan,
    PlanError,
    checked_plan,
    pedals_to_control,
    plan_reference,
    pure_pursuit,
    to_global,
    to_vehicle,
    track,
)
from spacedrive_jax.driving.policies import arc
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.world.vehicle import Limits, VehicleState, actuate, moved

TIMES = 0.5 * np.arange(1, 7)


def straight(speed: float, acceleration: float = 0.0) -> np.ndarray:
    x = speed * TIMES + 0.5 * acceleration * TIMES**2
    return np.stack([x, np.zeros(6)], axis=1)


def test_pure_pursuit_starts_from_rest_however_the_first_segment_is_misjudged() -> None:
    plan = straight(0.0, 1.6)  # w1 = 0.2 m
    for error in (-0.13, 0.0, 0.13):
        asked = pure_pursuit(0.0, plan + np.array([error, 0.0]))
        assert asked.acceleration == pytest.approx(1.6)


def test_pure_pursuit_turns_around_to_a_way_that_lies_behind() -> None:
    """From beside a junction that the vehicle missed: the route leads off to the left, behind it."""
    away = np.stack([np.full(20, -4.0), 6.0 + np.arange(20)], axis=1)
    turn = pure_pursuit(8.0, straight(8.0), away).curvature
    assert turn == pytest.approx(2 * 6.0 / 52.0)  # the circle through the first point beyond the look-ahead
    assert pure_pursuit(8.0, straight(8.0), away * [1, -1]).curvature == pytest.approx(-turn)
    assert pure_pursuit(8.0, -straight(8.0)).curvature == 0.0  # straight back
    assert pure_pursuit(1.0, np.full((6, 2), -0.3)).curvature == 0.0  # nowhere
    assert pure_pursuit(8.0, np.full((6, 2), -1.5)).curvature == 0.0  # a stop that was driven past


def test_pure_pursuit_holds_a_speed_brakes_for_a_stop_and_stops() -> None:
    assert pure_pursuit(8.0, straight(8.0)).acceleration == pytest.approx(0.0)
    assert pure_pursuit(8.0, np.zeros((6, 2))).acceleration == pytest.approx(-8.0 / 0.75)
    assert pure_pursuit(0.3, np.zeros((6, 2))).acceleration <= -0.4


def test_pure_pursuit_knows_how_old_a_plan_is() -> None:
    plan = straight(4.0, 2.0)
    later = plan - [4.0 * 0.4 + 0.16, 0.0]  # 0.4 s on, at 4.8 m/s
    assert pure_pursuit(4.8, later, elapsed=0.4).acceleration == pytest.approx(2.0)


@pytest.mark.parametrize("curvature", [0.0, 0.05, -0.05])
def test_pure_pursuit_steers_the_circle_it_is_on(curvature: float) -> None:
    plan = arc(6.0 * TIMES, curvature)
    # Waypoints 3 m apart: the look-ahead point lies on a chord, inside the bend.
    assert pure_pursuit(6.0, plan).curvature == pytest.approx(curvature, rel=0.13, abs=1e-9)


def test_the_path_decides_the_direction_and_the_waypoints_the_speed() -> None:
    path = arc(np.arange(1.0, 21.0), 0.08)
    asked = pure_pursuit(6.0, straight(6.0), path)
    assert asked.acceleration == pytest.approx(0.0)
    assert asked.curvature == pytest.approx(0.08, rel=0.02)


def test_a_plan_that_goes_nowhere_asks_for_no_steering() -> None:
    assert pure_pursuit(2.0, np.full((6, 2), 0.05)).curvature == 0.0
    assert pure_pursuit(2.0, -straight(2.0)).curvature == 0.0


def test_lqr_follows_its_reference_and_stops_on_plain_gains() -> None:
    reference = plan_reference(np.concatenate([[[0.0, 0.0]], straight(5.0)]), 0.5, 0.0)
    assert reference.shape == (12, 3)
    on_it = track(5.0, 0.0, reference)
    assert on_it.acceleration == pytest.approx(0.0, abs=1e-9)
    assert on_it.steer_rate == pytest.approx(0.0, abs=1e-9)
    # One second, q 10 and r 1: (10 * error) / (10 + 1).
    assert track(4.0, 0.0, reference).acceleration == pytest.approx(10 / 11)
    right_of_it = reference + np.array([0.0, 0.5, 0.0])
    assert track(5.0, 0.0, right_of_it).steer_rate > 0.0
    still = np.zeros((12, 3))
    assert track(0.1, 0.2, still) == pytest.approx((-0.05, -0.1))


@pytest.mark.parametrize("controller", get_args(Controller))
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_every_controller_drives_a_bend(controller: Controller, side: float) -> None:
    """A quarter circle of 20 m at 5 m/s, replanned twice a second from the true place."""
    radius = 20.0
    driver, limits = Driver(controller), Limits()
    vehicle = VehicleState(0.0, 0.0, 0.0, 5.0)
    worst = 0.0
    for step in range(60):
        centre = np.array([0.0, side * radius])
        if step % 5 == 0:
            angle = math.atan2(vehicle.x, side * (centre[1] - vehicle.y)) if side else 0.0
            along = angle + 5.0 * TIMES / radius
            ways = angle + np.arange(1.0, 21.0) / radius
            points, path = (
                np.stack([radius * np.sin(each), side * radius * (1 - np.cos(each))], axis=1)
                for each in (along, ways)
            )
            driver.follow(Plan(to_vehicle(points, vehicle), to_vehicle(path, vehicle)), vehicle, step * 0.1)
        vehicle = moved(actuate(vehicle, driver.control(vehicle, step * 0.1), 0.1, limits), 0.1)
        worst = max(worst, abs(math.hypot(vehicle.x, vehicle.y - centre[1]) - radius))
    assert vehicle.yaw * side > 1.0
    assert 3.0 < vehicle.speed < 6.5
    assert worst < (0.6 if controller in ("pure_pursuit", "lqr") else 2.5)


def test_without_a_plan_the_car_is_stopped() -> None:
    assert Driver().control(VehicleState(0, 0, 0, 5.0), 0.0).acceleration == -3.0


@pytest.mark.usefixtures("unchecked")
def test_a_controller_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no controller"):
        Driver("autopilot")  # type: ignore[arg-type]


def test_pedals() -> None:
    limits = Limits()
    assert pedals_to_control(Controls(1.0, 0.0, 0.0), 5.0, limits).acceleration == 2.5
    assert pedals_to_control(Controls(0.0, 0.0, 1.0), 5.0, limits).acceleration == -7.0
    assert pedals_to_control(Controls(0.0, 0.0, 0.0), 4.0, limits).acceleration == pytest.approx(-0.6)
    assert pedals_to_control(Controls(0.0, 0.1, 0.0), 4.0, limits).steer == pytest.approx(-math.radians(7.0))


def test_frames() -> None:
    vehicle = VehicleState(3.0, -2.0, 0.7, 1.0)
    points = np.array([[1.0, 0.0], [0.0, 2.0]])
    np.testing.assert_allclose(to_vehicle(to_global(points, vehicle), vehicle), points, atol=1e-12)
    np.testing.assert_allclose(to_global(points, vehicle)[0], [3 + np.cos(0.7), -2 + np.sin(0.7)])


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (np.zeros((5, 2)), FailureKind.NONSENSE),
        (np.zeros((6, 3)), FailureKind.NONSENSE),
        ([], FailureKind.NONSENSE),
        (np.zeros((0, 2)), FailureKind.NONSENSE),  # what an unparsed answer holds
        (None, FailureKind.NONSENSE),
        (np.full((6, 2), 201.0), FailureKind.NONSENSE),
        (np.full((6, 2), np.nan), FailureKind.NOT_FINITE),
    ],
)
def test_answers_that_are_no_plan(answer: object, kind: FailureKind) -> None:
    with pytest.raises(PlanError) as caught:
        checked_plan(answer)
    assert caught.value.kind is kind
    assert checked_plan(straight(5.0), []).path is None

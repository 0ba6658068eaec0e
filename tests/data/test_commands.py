"""The published command rule against its golden numbers, the navigation rule against driven arcs."""

import numpy as np
import pytest

from spacedrive_jax.data.ego_status import (
    angle_class,
    navigation_command,
    released_command,
)
from tests.golden.verify.metrics import decided_by_rounding


def test_released_command_equals_golden(golden):
    case = np.load(golden / "commands" / "commands.npz")
    ends = case["gt_planning"][:, 5]
    kept = ~np.array([decided_by_rounding(end) for end in ends])
    # The bounds themselves are among the recorded endpoints: there the recording machine's last bit decided.
    assert kept.sum() > 200
    commands = [released_command(end) for end in ends[kept]]
    np.testing.assert_array_equal(commands, case["command"][kept])
    assert set(commands) == set(range(8))


@pytest.mark.parametrize(
    ("degrees", "command"),
    list(
        zip(
            (0.4, -0.4, 0.41, 2, -2, 2.01, 10, 20, 20.1, -2.01, -10, -20, -20.1),
            (0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 5, 6, 7),
            strict=True,
        )
    ),
)
def test_class_bounds_belong_to_the_inner_class(degrees, command):
    assert angle_class(degrees) == command


def past_of_arc(speed: float, turn_rate: float, ages: tuple[float, ...]) -> np.ndarray:
    """Past poses in the current ego frame of a vehicle on a circle."""
    poses = np.zeros((2, 4, 4))
    for index, age in enumerate(ages):
        yaw = -turn_rate * age
        if turn_rate:
            xy = speed / turn_rate * np.array([np.sin(yaw), 1 - np.cos(yaw)])
        else:
            xy = np.array([-speed * age, 0.0])
        poses[index] = np.eye(4)
        poses[index, :2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
        poses[index, :2, 3] = xy
    return poses


@pytest.mark.parametrize("turn_degrees", [0.0, 5.0, -5.0, 30.0, -30.0, 60.0, -60.0])
@pytest.mark.parametrize("known", [1, 2])
def test_navigation_follows_the_arc(turn_degrees, known):
    # On an arc the endpoint's direction is half the turn; left is positive and must be called left.
    past = past_of_arc(8.0, np.deg2rad(turn_degrees) / 3.0, (0.5, 1.0)[:known])
    command = navigation_command(past, np.arange(2) < known, np.array([0.5, 1.0]))
    assert command == angle_class(-turn_degrees / 2)
    assert (command >= 5) == (turn_degrees >= 5)


def test_navigation_without_past_or_motion_is_straight():
    seconds = np.array([0.5, 1.0])
    assert navigation_command(np.zeros((2, 4, 4)), np.zeros(2, bool), np.zeros(2)) == 0
    assert navigation_command(past_of_arc(0.1, 0.5, (0.5, 1.0)), np.ones(2, bool), seconds) == 0


def test_navigation_does_not_read_masked_poses():
    past = past_of_arc(8.0, 0.2, (0.5,))
    spoiled = past.copy()
    spoiled[1] = 1e6
    mask = np.array([True, False])
    assert navigation_command(past, mask, np.array([0.5, 0.0])) == navigation_command(
        spoiled, mask, np.array([0.5, -1.0])
    )


def test_navigation_reversing_points_backwards():
    past = past_of_arc(-5.0, 0.0, (0.5, 1.0))
    assert navigation_command(past, np.ones(2, bool), np.array([0.5, 1.0])) in (4, 7)

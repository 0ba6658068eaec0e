"""What a driver is told of the way, on routes made of straight lines and right angles."""

from __future__ import annotations

import numpy as np
import pytest

from spacedrive_jax.constants import NUM_PATH_POINTS
from spacedrive_jax.data.keyframe import EgoTrack, heading
from spacedrive_jax.data.keyframe_map import route_fields
from spacedrive_jax.data.route import RoadOption, Route


def l_shaped(turn: float = 1.0) -> Route:
    """100 m east, then 100 m north (south for -1), a quarter circle of 10 m between."""
    angles = np.linspace(0, np.pi / 2, 17)[1:-1]
    corner = np.stack([100 + 10 * np.sin(angles), turn * (10 - 10 * np.cos(angles))], axis=1)
    far = turn * np.linspace(10, 110, 101)
    east = np.stack([np.linspace(0, 100, 501), np.zeros(501)], axis=1)
    return Route(np.concatenate([east, corner, np.stack([np.full(101, 110.0), far], axis=1)]))


def pose(x: float, y: float, yaw: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
    matrix[:2, 3] = x, y
    return matrix


def track(*poses: np.ndarray) -> EgoTrack:
    times = 500_000 * np.arange(len(poses), dtype=np.int64)
    return EgoTrack(times, np.stack(poses), np.zeros((len(poses), 13)), True)


@pytest.mark.parametrize(("turn", "word"), [(1.0, RoadOption.LEFT), (-1.0, RoadOption.RIGHT)])
def test_a_turn_is_announced_fifty_metres_before_and_until_it_ends(turn: float, word: RoadOption) -> None:
    route = l_shaped(turn)
    ((first, last, found),) = route.turns
    assert found is word
    assert 93 < first < 99
    assert 116 < last < 122
    assert route.command(first - 50.5) is RoadOption.LANE_FOLLOW
    assert route.command(first - 49.5) is word
    assert route.command(last - 0.5) is word
    assert route.command(last + 0.5) is RoadOption.LANE_FOLLOW


def test_nodes_stand_every_eight_metres_and_at_the_end() -> None:
    route = l_shaped()
    assert route.nodes[:3] == [0.0, 8.0, 16.0]
    np.testing.assert_array_equal(np.diff(route.nodes)[:-1], 8.0)
    assert 0 < route.nodes[-1] - route.nodes[-2] <= 8.0
    assert route.nodes[-1] == float(route.lengths[-1])
    np.testing.assert_allclose(route.target_points(43.5), [[48, 0], [56, 0]], atol=1e-9)
    np.testing.assert_allclose(route.target_points(44.5), [[56, 0], [64, 0]], atol=1e-9)  # 4 m off: passed
    end = route.target_points(float(route.lengths[-1]) - 1)
    np.testing.assert_allclose(end, [[110, 110]] * 2, atol=1e-6)


def test_targets_are_in_the_ego_frame_and_the_past_has_its_own_commands() -> None:
    route = l_shaped()
    fields = route_fields(track(pose(20, 0, 0), pose(30, 0, 0), pose(52, 1, 0)), 2, route)
    assert fields["route_valid"]
    assert fields["command_route"] == RoadOption.LEFT
    np.testing.assert_array_equal(fields["past_command_route"], [4, 4])
    np.testing.assert_allclose(fields["target_points"], [[64 - 52, -1], [72 - 52, -1]], atol=1e-9)


def test_far_from_the_route_or_without_one_nothing_is_told() -> None:
    for where, route in ((pose(20, 30.5, 0), l_shaped()), (pose(0, 0, 0), None)):
        fields = route_fields(track(where), 0, route)
        assert not fields["route_valid"]
        assert fields["command_route"] == RoadOption.VOID
        assert not fields["target_points"].any()
    assert route_fields(track(pose(20, 29.5, 0)), 0, l_shaped())["route_valid"]


def test_a_stretch_that_leads_the_other_way_is_not_taken_for_the_way() -> None:
    out, back = np.linspace(0, 60, 61), np.linspace(60, 0, 61)
    there_and_back = np.concatenate([np.stack([out, 0 * out], 1), np.stack([back, 0 * back + 4], 1)])
    route = Route(there_and_back)
    assert route.project(np.array([20.0, 3.0]), 0.0)[0] == pytest.approx(20.0)
    assert route.project(np.array([20.0, 1.0]), np.pi)[0] == pytest.approx(104.0)


def test_the_path_goes_along_the_whole_scene_and_then_along_the_route() -> None:
    poses = [pose(x, 0.4, 0.0) for x in (80.0, 82.0, 84.0, 86.0)]  # 3 s would end at 86, the route goes on
    fields = route_fields(track(*poses), 0, l_shaped())
    assert fields["path"].shape == (NUM_PATH_POINTS, 2)
    assert fields["path_mask"].all()
    np.testing.assert_allclose(fields["path"][:6, 0], np.arange(1, 7), atol=1e-3)
    end = fields["path"][-1] + (80.0, 0.4)
    np.testing.assert_allclose(end[0], 110, atol=0.1)
    assert 14 < end[1] < 26
    alone = route_fields(track(*poses), 0, None)
    np.testing.assert_array_equal(alone["path_mask"], np.arange(1, NUM_PATH_POINTS + 1) <= 6)


def test_a_standing_vehicle_has_the_route_as_its_path() -> None:
    fields = route_fields(track(*[pose(20.0, 0.0, 0.0)] * 4), 1, l_shaped())
    assert fields["path_mask"].all()
    np.testing.assert_allclose(fields["path"][:, 0], np.arange(1, NUM_PATH_POINTS + 1), atol=1e-3)
    assert heading(pose(0, 0, 0.3)) == pytest.approx(0.3)

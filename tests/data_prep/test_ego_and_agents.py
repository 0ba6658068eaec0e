"""Ego and agent fields against the closed form of the tiny world's motion."""

import json

import numpy as np
import pytest

from data_prep.nuscenes.expansions import read_pose_messages
from data_prep.nuscenes.scenes import read_scenes
from data_prep.nuscenes.tables import read_tables
from spacedrive_jax.data.keyframe import (
    agent_fields,
    agent_tracks,
    box_velocity,
    can_bus_at,
    ego_fields,
    ego_track,
    future_rows,
    inverse,
    transforms,
)
from spacedrive_jax.errors import SpaceDriveError
from tests.data_prep.tiny_nuscenes import KEYFRAMES, START_US, STEP_US, TURN_RATE, VERSION, ego_at


@pytest.fixture
def scene(dataroot):
    return next(read_scenes(read_tables(dataroot, VERSION)))


def in_ego_frame(point, seconds):
    xy, heading = ego_at(seconds)
    cos, sin = np.cos(heading), np.sin(heading)
    return np.array([[cos, sin], [-sin, cos]]) @ (np.asarray(point) - xy)


@pytest.mark.parametrize("index", [0, 1, 3, KEYFRAMES - 1])
def test_waypoints_and_past_lie_on_the_driven_arc(scene, index):
    fields = ego_fields(ego_track(scene, None), index)
    now = 0.5 * index
    steps = np.arange(1, 7)
    mask = index + steps < KEYFRAMES
    expected = np.array([in_ego_frame(ego_at(now + 0.5 * step)[0], now) for step in steps])
    np.testing.assert_array_equal(fields["waypoint_mask"], mask)
    np.testing.assert_allclose(fields["waypoints"], np.where(mask[:, None], expected, 0), atol=1e-9)
    np.testing.assert_allclose(fields["waypoint_yaw"], np.where(mask, TURN_RATE * 0.5 * steps, 0), atol=1e-9)
    assert (fields["waypoints"][mask, 1] > 0).all(), "a left turn has positive y"
    times = np.where(mask, START_US + (index + steps) * STEP_US, 0)
    np.testing.assert_array_equal(fields["waypoint_timestamp_us"], times)
    for age in (1, 2):
        past = fields["past_to_ego"][age - 1]
        if age > index:
            assert not fields["past_mask"][age - 1]
            assert not past.any()
        else:
            assert fields["past_mask"][age - 1]
            np.testing.assert_allclose(past[:2, 3], in_ego_frame(ego_at(now - 0.5 * age)[0], now), atol=1e-9)
            assert fields["past_timestamp_us"][age - 1] == START_US + (index - age) * STEP_US


def test_past_status_is_the_status_of_the_past_keyframes(scene):
    can_bus = np.arange(KEYFRAMES * 13, dtype=np.float64).reshape(KEYFRAMES, 13)
    track = ego_track(scene, can_bus)
    rows = [ego_fields(track, index) for index in range(KEYFRAMES)]
    for index in range(2, KEYFRAMES):
        np.testing.assert_array_equal(rows[index]["past_can_bus"], can_bus[[index - 1, index - 2]])
        for name in ("command_released", "command_navigation"):
            expected = [rows[index - 1][name], rows[index - 2][name]]
            np.testing.assert_array_equal(rows[index][f"past_{name}"], expected)
    assert not rows[0]["past_can_bus"].any()
    # A left arc of 34 degrees in three seconds: 17 degrees to the endpoint.
    assert rows[1]["command_released"] == 3, "the published rule calls left right"
    assert rows[1]["command_navigation"] == 6
    assert rows[-1]["command_released"] == 0, "no future"


def test_poses_use_the_full_rotation():
    quaternion = np.array([0.9, 0.1, -0.05, 0.4])
    pose = transforms([[10.0, -5.0, 1.0]], [(quaternion / np.linalg.norm(quaternion)).tolist()])[0]
    np.testing.assert_allclose(inverse(pose) @ pose, np.eye(4), atol=1e-12)
    assert abs(pose[2, 0]) > 0.01


def test_can_bus_is_off_by_one(tiny, scene):
    times = np.array([START_US, START_US + 100_000, START_US - 10**7, START_US + 10**8])
    vectors = can_bus_at(tiny.can_messages(), times)
    # Messages come at -100, 100, 300 ms ...: orientation of the last at or before, the rest of the next.
    np.testing.assert_allclose(
        2 * np.arctan2(vectors[:, 3], vectors[:, 0]), [0.0, 0.01, 0.0, 0.19], atol=1e-12
    )
    np.testing.assert_allclose(vectors[:, 4], [1.1, 2.1, 0.1, 19.1])  # acceleration x
    np.testing.assert_allclose(vectors[:, 9], [1.2, 2.2, 0.2, 19.2])  # rotation rate z
    np.testing.assert_allclose(vectors[:, 10], [1.3, 2.3, 0.3, 19.3])  # velocity x


@pytest.mark.parametrize("content", ["{", '[{"utime": 1}]', '[{"utime": 2, "vel": 0}]'])
def test_broken_can_bus_file_is_named(dataroot, content):
    path = dataroot / "can_bus" / "scene-2001_pose.json"
    path.write_text(content)
    with pytest.raises(SpaceDriveError, match=r"scene-2001_pose\.json"):
        read_pose_messages(dataroot, "scene-2001")


def test_can_bus_of_another_time_is_refused(dataroot):
    path = dataroot / "can_bus" / "scene-2001_pose.json"
    messages = json.loads(path.read_text())
    times = [START_US, START_US + 500_000]
    assert len(read_pose_messages(dataroot, "scene-2001", times)) == len(messages)
    for row in messages:
        row["utime"] //= 1000
    path.write_text(json.dumps(messages))
    with pytest.raises(SpaceDriveError, match=r"are .* s off the keyframes of scene-2001: is `utime`"):
        read_pose_messages(dataroot, "scene-2001", times)


def test_agents_of_a_keyframe(scene):
    index = 2
    track = ego_track(scene, None)
    fields = agent_fields(agent_tracks(scene), scene.keyframes[index].annotations, track.ego_to_global[index])
    assert fields["agent_category"] == ["vehicle.car", "human.pedestrian.adult"]
    car, walker = fields["agent_boxes"]
    np.testing.assert_allclose(car[:2], in_ego_frame([102.0, 100.0], 1.0), atol=1e-9)
    np.testing.assert_allclose(car[3:6], [4.5, 1.9, 1.6])
    np.testing.assert_allclose(car[6], -TURN_RATE * 1.0, atol=1e-9)
    np.testing.assert_array_equal(fields["agent_lidar_points"], [5, 5])
    # The walker moves 0.5 m a keyframe along global x and is unseen at keyframe 4.
    heading = ego_at(1.0)[1]
    direction = np.array([np.cos(heading), -np.sin(heading)])
    np.testing.assert_allclose(fields["agent_velocity"][1], direction, atol=1e-9)
    np.testing.assert_array_equal(fields["agent_future_mask"][1], [True, False, False, False, False, False])
    np.testing.assert_allclose(fields["agent_future"][1, 0], 0.5 * direction, atol=1e-9)
    assert not fields["agent_future"][1, 1:].any()
    np.testing.assert_array_equal(fields["agent_future_mask"][0], [True] * 5 + [False])
    np.testing.assert_allclose(fields["agent_future"][0], 0, atol=1e-9)
    np.testing.assert_allclose(fields["agent_future_yaw"][0, :5], car[6], atol=1e-9)
    np.testing.assert_allclose(walker[6], -heading, atol=1e-9)


def test_keyframe_without_agents(scene):
    fields = agent_fields(agent_tracks(scene), (), np.eye(4))
    assert fields["agent_boxes"].shape == (0, 7)
    assert fields["agent_future"].shape == (0, 6, 2)
    assert fields["agent_token"] == []


def test_box_velocity_time_limits():
    centre = np.array([[0.0, 0, 0], [2.0, 0, 0], [4.0, 0, 0], [0, 0, 0]])
    previous, following = np.array([-1, 0, 1, -1]), np.array([1, 2, -1, -1])
    near = box_velocity(centre, np.array([0.0, 1.5, 3.0, 0.0]), previous, following)
    np.testing.assert_allclose(near[:3, 0], 4 / 3)
    assert np.isnan(near[3]).all(), "a single annotation has no velocity"
    far = box_velocity(centre, np.array([0.0, 1.6, 3.1, 0.0]), previous, following)
    np.testing.assert_array_equal(np.isnan(far[:, 0]), [True, True, False, True])


def test_future_stops_at_the_first_gap_for_good():
    # Seen at keyframes 0, 1, 3, 4: the gap at 2 ends the future of 0 and 1 though the chain goes on.
    rows = future_rows(np.array([0, 1, 3, 4]), np.array([1, 2, 3, -1]))
    np.testing.assert_array_equal(rows[:, :2], [[1, -1], [-1, -1], [3, -1], [-1, -1]])
    assert (rows[:, 2:] == -1).all()

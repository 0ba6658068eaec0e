"""Messages as records: what `predict` would read, and the commands of a past that the message tells."""

import numpy as np
import pytest

from spacedrive_jax.data.ego_status import mirrored_command
from spacedrive_jax.data.schema import blank_record, record_features
from spacedrive_jax.driving.protocol import act_message, image_size, partial_record
from spacedrive_jax.errors import DataError
from tests.driving.served import observation
from tests.record_factory import encode_jpeg, encode_png, make_record


def test_a_blank_record_has_every_feature():
    record = blank_record()
    assert record.keys() == record_features().keys()
    assert record["waypoint_mask"].tolist() == [False] * 6
    assert record["agent_boxes"].shape == (0, 7)
    assert record["images"] == [b""] * 6


def test_a_message_tells_what_its_record_said():
    past = np.zeros((2, 4, 4))
    past[:] = np.eye(4)
    past[:, 0, 3] = [-3.0, -6.5]
    record = make_record(
        np.random.default_rng(1),
        past_to_ego=past,
        can_bus=np.arange(13.0),
        past_can_bus=np.arange(26.0).reshape(2, 13),
        timestamp_us=7_500_000,
        past_timestamp_us=np.array([7_000_000, 6_500_000]),
        command_route=2,
        past_command_route=np.array([4, 2], np.int32),
        target_points=np.array([[12.0, -3.0], [20.0, -14.0]]),
        route_valid=True,
        exact_depth=[encode_png(np.full((45, 80), 9000, np.uint16))] * 6,
    )
    told = partial_record(act_message(record, 150, 7.5))
    for name in (
        *("camera_intrinsics", "camera_to_ego", "can_bus", "past_can_bus", "past_to_ego", "past_mask"),
        *("image_size", "timestamp_us", "past_timestamp_us", "command_route", "past_command_route"),
        *("target_points", "route_valid"),
    ):
        np.testing.assert_array_equal(told[name], record[name], err_msg=name)
    assert told["images"] == record["images"]
    assert told["exact_depth"] == record["exact_depth"]
    assert told["location"] == record["location"]
    assert not told["waypoint_mask"].any()


def test_without_a_route_the_command_is_void():
    told = partial_record(observation(command=None, target_points=None, past_command=None))
    assert told["command_route"] == -1
    assert not told["route_valid"]
    for void in (-1, 0):  # CARLA's, and no RoadOption at all: the lane is followed
        told = partial_record(observation(command=void, past_command=np.array([void, 2])))
        assert (told["command_route"], *told["past_command_route"]) == (4, 4, 2)


def test_the_past_is_masked_from_its_first_gap_on():
    told = partial_record(observation(past_mask=np.array([False, True, True, True])))
    assert told["past_mask"].tolist() == [False, False]
    assert not told["past_to_ego"].any()
    assert not told["past_can_bus"].any()
    assert told["command_navigation"] == 0


def turning(rate: float, speed: float = 5.0, count: int = 4) -> np.ndarray:
    """Poses 0.5 s, 1 s, ... ago of a car that turns left at a rate (rad/s), in its present frame."""
    poses = np.tile(np.eye(4), (count, 1, 1))
    for row in range(count):
        angle = -rate * 0.5 * (row + 1)
        radius = speed / rate
        c, s = np.cos(angle), np.sin(angle)
        poses[row, :2, :2] = [[c, -s], [s, c]]
        poses[row, :2, 3] = radius * s, radius * (1 - c)
    return poses


@pytest.mark.parametrize(("rate", "command"), [(0.3, 7), (-0.3, 4), (0.15, 6), (1e-6, 0)])
def test_commands_of_now_and_before_come_from_the_poses(rate, command):
    told = partial_record(observation(past_to_ego=turning(rate)))
    assert told["command_navigation"] == command
    # The same motion was there before: with four poses the past commands are the same, with two the older
    # one had no past to tell.
    assert told["past_command_navigation"].tolist() == [command, command]
    two = partial_record(observation(past_to_ego=turning(rate)[:2], past_mask=np.ones(2, bool)))
    assert two["past_command_navigation"].tolist() == [command, 0]
    assert told["command_released"] == mirrored_command(command)
    assert [mirrored_command(mirrored_command(one)) for one in range(8)] == list(range(8))


def test_size_of_a_picture_comes_from_its_header():
    for height, width in ((45, 80), (900, 1600), (1, 3)):
        picture = np.zeros((height, width, 3), np.uint8)
        assert image_size(encode_jpeg(picture), "x").tolist() == [height, width]
        assert image_size(encode_png(picture), "x").tolist() == [height, width]


@pytest.mark.parametrize(
    ("field", "place", "value", "said"),
    [
        ("camera_to_ego", (0, 0, 3), 1e308, "camera_to_ego holds 1e"),
        ("camera_to_ego", (2, 0, 0), 7.0, "no rotation"),
        ("camera_intrinsics", (1, 0, 0), -60.0, "intrinsics is"),
        ("can_bus", (10,), 1e6, "can_bus holds 1e"),
        ("past_to_ego", (0, 1, 3), 1e5, "past_to_ego holds 1e"),
        ("past_to_ego", (0, 1, 3), 300.0, "m away, more than 50 m"),
        ("past_to_ego", (1, 0, 0), -1.0, "no rotation|a mirror image"),
    ],
)
def test_numbers_that_cannot_be_are_refused(field, place, value, said):
    message = act_message(make_record(np.random.default_rng(1)), 1, 0.5)
    message[field] = message[field].copy()
    message[field][place] = value
    with pytest.raises(DataError, match=rf"^act: .*{said}"):
        partial_record(message)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        *(
            ({"past_seconds": past}, "must rise")
            for past in ([0.0, 0.5], [0.5, 0.5], [1.0, 0.5], [-0.5, -1.0])
        ),
        ({"command": 3.9}, "command must be a whole number"),
        ({"past_command": [1.5, 2.0]}, "holds no RoadOption numbers"),
        ({"step": 0.5}, "step must be a whole number"),
        ({"can_bus": [10**400] * 13}, "can_bus is not an array of numbers"),
        ({"lidar_to_ego": np.diag([1.0, -1.0, 1.0, 1.0])}, "lidar_to_ego is no pose"),
    ],
)
def test_what_a_client_mixes_up_is_named(changed, said):
    with pytest.raises(DataError, match=rf"^act: .*{said}"):
        partial_record(act_message(make_record(np.random.default_rng(1)), 1, 0.5) | changed)


def test_poses_of_a_past_that_is_not_known_may_be_anything():
    message = act_message(make_record(np.random.default_rng(1)), 1, 0.5)
    message |= {"past_mask": [False, False], "past_to_ego": np.zeros((2, 4, 4)), "past_seconds": [0.0, 0.0]}
    assert partial_record(message)["past_mask"].tolist() == [False, False]

import numpy as np
import pytest

from data_prep.inspect_record import write_ply
from spacedrive_jax.data import lidar
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.reporting.cameras import LIDAR_COLOUR, keyframe_points
from tests.record_factory import encode_jpeg, encode_png, make_record


def test_pixels_and_returns_of_one_wall_lie_on_it(tmp_path):
    image = np.full((45, 80, 3), (10, 200, 30), np.uint8)
    returns = np.zeros((3, lidar.POINT_FLOATS), np.float32)
    returns[:, 0], returns[:, 1] = 21.0, [-1, 0, 1]
    later = np.stack([np.eye(4)] * 6)
    later[:, 0, 3] = 2.0  # the cameras fire when the ego vehicle is 2 m further
    wall = encode_png(np.full((45, 80), 18 * 256, np.uint16))  # 1 m camera, 2 m drive, 18 m depth
    record = make_record(
        np.random.default_rng(0),
        images=[encode_jpeg(image)] * 6,
        exact_depth=[wall] + [b""] * 5,
        camera_ego_to_global=later,
        lidar=returns.tobytes(),
    )
    points, colours = keyframe_points(record)
    assert len(points) == 45 * 80 + 3
    np.testing.assert_allclose(points[:, 0], 21.0, atol=1e-4)
    assert points[:-3, 1].min() < -11
    assert points[:-3, 1].max() > 11
    np.testing.assert_array_equal(colours[-1], LIDAR_COLOUR)
    np.testing.assert_allclose(colours[:-3], (30, 200, 10) * np.ones((45 * 80, 1)), atol=4)

    write_ply(tmp_path / "cloud.ply", points, colours)
    header, body = (tmp_path / "cloud.ply").read_bytes().split(b"end_header\n", 1)
    assert f"element vertex {len(points)}".encode() in header
    assert len(body) == 15 * len(points)
    np.testing.assert_allclose(np.frombuffer(body[:12], "<f4"), points[0], rtol=1e-6)


def test_a_keyframe_without_depth_is_refused():
    with pytest.raises(SpaceDriveError, match="add-depth --full"):
        keyframe_points(make_record(np.random.default_rng(0)))

from __future__ import annotations

import numpy as np
import pytest

from spacedrive_jax.constants import EGO_CENTRE
from spacedrive_jax.evaluation.protocols import PROTOCOLS
from spacedrive_jax.reporting.birds_eye import draw_birds_eye
from spacedrive_jax.reporting.cameras import (
    decode_depth,
    ground_ribbon,
    lidar_points,
    project,
    project_segments,
)
from spacedrive_jax.reporting.figures import new_figure
from tests.record_factory import encode_png, make_record


def test_projection_by_hand() -> None:
    """A level camera 1 m ahead of the origin and 1.5 m up, focal length 60, centre (40, 22.5)."""
    record = make_record(np.random.default_rng(0))
    pixels, depth = project(np.array([[11.0, 0.0, 1.5], [11.0, 2.0, 0.0], [-5.0, 0.0, 0.0]]), record, 0)
    np.testing.assert_allclose(pixels[0], [40.0, 22.5])
    np.testing.assert_allclose(pixels[1], [40.0 - 60 * 2 / 10, 22.5 + 60 * 1.5 / 10])
    np.testing.assert_allclose(depth, [10.0, 10.0, -6.0])
    assert np.isnan(pixels[2]).all()


def test_projection_follows_the_ego_motion_to_the_camera_time() -> None:
    """Half a metre further at the time of the exposure: points are that much nearer."""
    moved = np.stack([np.eye(4)] * 6)
    moved[:, 0, 3] = 0.5
    record = make_record(np.random.default_rng(0), camera_ego_to_global=moved)
    _, depth = project(np.array([[11.0, 0.0, 1.5]]), record, 0)
    np.testing.assert_allclose(depth, [9.5])


def test_ribbon_is_as_wide_as_asked() -> None:
    waypoints = np.stack([np.arange(1.0, 7.0), np.zeros(6)], axis=1)
    left, right = ground_ribbon(waypoints, 2.0)
    np.testing.assert_allclose(left[:, 1], 1.0)
    np.testing.assert_allclose(right[:, 1], -1.0)
    np.testing.assert_allclose(left[[0, -1], 0], [0.0, 6.0])


@pytest.mark.parametrize("waypoints", [np.zeros((6, 2)), np.repeat([[1.0, 0], [2, 0], [2, 1]], 2, axis=0)])
def test_ribbon_of_a_stopping_vehicle_is_finite(waypoints: np.ndarray) -> None:
    for border in ground_ribbon(waypoints, 2.0):
        assert np.isfinite(border).all()


def test_depth_and_lidar_decode_to_metres() -> None:
    depth = encode_png(np.array([[0, 256], [512, 25600]], np.uint16))
    record = make_record(np.random.default_rng(0), exact_depth=[depth] + [b""] * 5)
    np.testing.assert_array_equal(decode_depth(record, 0), [[0, 1], [2, 100]])
    assert decode_depth(record, 1) is None
    assert lidar_points(record) is None
    lidar_to_ego = np.eye(4)
    lidar_to_ego[:3, 3] = [1.0, 0.0, 1.8]
    sweep = np.array([[2.0, 3.0, 0.0, 9.0, 9.0]], np.float32).tobytes()
    record = make_record(np.random.default_rng(0), lidar=sweep, lidar_to_ego=lidar_to_ego)
    np.testing.assert_allclose(lidar_points(record), [[3.0, 3.0, 1.8]])


def test_the_ego_box_is_where_the_vehicle_is():
    """The rear axle is the origin: one box for the drawings and for what the corrected protocol tests."""
    _, axes = new_figure(4, 4)
    draw_birds_eye(axes, make_record(np.random.default_rng(0)))
    boxes = [path.vertices for collection in axes.collections for path in collection.get_paths()]
    ego = next(box for box in boxes if len(box) == 5 and np.isclose(box[:, 1].max(), 3.442))
    np.testing.assert_allclose(ego.min(axis=0), [-0.925, -0.642])
    assert PROTOCOLS["corrected"].steps.ego_offset == EGO_CENTRE


def test_segments_are_cut_before_the_camera():
    """Along the axis of the camera of `test_projection_by_hand`, from behind it to 11 m ahead."""
    record = make_record(np.random.default_rng(0))
    starts = np.array([[-5.0, 2.0, 0.0], [-5.0, 2.0, 0.0]])
    ends = np.array([[11.0, 2.0, 0.0], [-1.0, 2.0, 0.0]])
    (segment,) = project_segments(starts, ends, record, 0)
    np.testing.assert_allclose(segment[0], [40.0 - 60 * 2 / 0.5, 22.5 + 60 * 1.5 / 0.5])
    np.testing.assert_allclose(segment[1], [40.0 - 60 * 2 / 10, 22.5 + 60 * 1.5 / 10])

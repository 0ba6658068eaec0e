import numpy as np
import pytest

from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data import lidar
from spacedrive_jax.data.depth_sources import DepthConfig, DepthDisturbance, disturbed, record_patch_depth
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from tests.models.depth.sweeps import sweep
from tests.record_factory import encode_png, make_record


def wall_ahead(distance: float) -> np.ndarray:
    across, up = np.meshgrid(np.linspace(-40, 40, 400), np.linspace(0, 20, 80))
    return np.stack([np.full(across.size, distance), across.ravel(), up.ravel()], axis=1)


def test_exact_depth_is_min_pooled_and_sky_is_far():
    depth = np.zeros((45, 80), np.uint16)  # 0: nothing hit
    depth[40, 79] = 7 * 256
    record = make_record(np.random.default_rng(0), exact_depth=[encode_png(depth)] * 6)
    pooled, used = record_patch_depth(record, (2, 2), DepthConfig(sources=("exact",), far=150.0))
    np.testing.assert_allclose(pooled[0], [[150.0, 150.0], [150.0, 7.0]])
    assert used == ["exact"] * 6


def test_what_lies_below_or_above_the_heights_is_left_out():
    # The cameras of these records stand 1.5 m high and look level, focal length 60 pixels: 10 m ahead a
    # surface 9 pixels below the horizon lies on the road, one 3 below it 1 m and one 12 above it 3.5 m high.
    record = make_record(np.random.default_rng(0))
    middle, height = record["camera_intrinsics"][0][1, 2], record["camera_to_ego"][0][2, 3]
    depth = np.zeros((45, 80), np.uint16)
    for pixels in (-12, 3, 9):
        depth[int(middle + pixels), 40] = 10 * 256
    record["exact_depth"] = [encode_png(depth)] * 6
    found = {}
    for heights in ((0.2, 2.5), (-0.2, 0.2), (3.0, 4.0), (4.5, 9.0)):
        config = DepthConfig(sources=("exact",), heights=heights, far=99.0)
        (pooled, *_), _ = record_patch_depth(record, (45, 80), config)
        found[heights] = (np.flatnonzero((pooled < 99.0).any(axis=1)) - int(middle)).tolist()
    assert height == 1.5
    assert found == {(0.2, 2.5): [3], (-0.2, 0.2): [9], (3.0, 4.0): [-12], (4.5, 9.0): []}
    with pytest.raises(ConfigError, match=r"take lidar out of data\.depth\.sources"):
        DepthConfig(heights=(0.2, 2.5))
    with pytest.raises(ConfigError, match="the first must be the lower one"):
        DepthConfig(sources=("exact",), heights=(2.5, 0.2))


def test_lidar_sees_a_wall_at_its_distance_from_the_camera():
    record = make_record(np.random.default_rng(0), lidar=sweep(wall_ahead(21.0)))
    points = lidar.points_in_cameras(record)[0]
    sparse = lidar.sparse_patch_depth(points, record["camera_intrinsics"][0], (45, 80), (4, 6))
    assert np.isfinite(sparse).any()
    np.testing.assert_allclose(lidar.densify(sparse), 20.0, atol=1e-3)  # the camera stands 1 m ahead


def test_lidar_follows_the_ego_motion_between_sweep_and_image():
    later = np.stack([np.eye(4)] * 6)
    later[:, 0, 3] = 3.0  # the cameras fire when the ego vehicle is 3 m further
    record = make_record(np.random.default_rng(0), lidar=sweep(wall_ahead(21.0)), camera_ego_to_global=later)
    np.testing.assert_allclose(lidar.points_in_cameras(record)[0][:, 2], 17.0, atol=1e-3)


def test_sources_are_tried_in_order_and_none_is_an_error():
    depth = [encode_png(np.full((45, 80), 5 * 256, np.uint16))] + [b""] * 5
    around = np.concatenate([wall_ahead(15.0) @ turn.T for turn in _quarter_turns()])
    record = make_record(np.random.default_rng(0), exact_depth=depth, lidar=sweep(around))
    _, used = record_patch_depth(record, (2, 3), DepthConfig())
    assert used == ["exact"] + ["lidar"] * 5
    with pytest.raises(SpaceDriveError, match="no depth for CAM_FRONT_RIGHT from exact:"):
        record_patch_depth(record, (2, 3), DepthConfig(sources=("exact",)))


def faulty(depth, token="a", **fault):
    return disturbed(depth, token, DepthConfig(far=100.0, disturb=DepthDisturbance(**fault)))


def test_depth_is_disturbed_as_asked():
    depth = np.random.default_rng(0).uniform(5.0, 50.0, (6, 4, 6)).astype(np.float32)
    assert faulty(depth, seed=3, cameras=("CAM_FRONT",)) is depth
    # The scale first, then the shift; never behind the camera, never beyond `far`.
    np.testing.assert_allclose(
        faulty(depth, scale=2.0, shift=-15.0), np.clip(2 * depth - 15, 0.1, 100.0), rtol=1e-6
    )
    noisy = faulty(np.full((6, 40, 40), 10.0, np.float32), noise=0.1)
    ratio = np.log(noisy / 10.0)
    np.testing.assert_allclose([ratio.mean(), ratio.std()], [0.0, 0.1], atol=3e-3)
    holes = faulty(np.full((6, 40, 40), 10.0, np.float32), holes=0.3)
    assert set(np.unique(holes)) == {10.0, 100.0}
    np.testing.assert_allclose((holes == 100.0).mean(), 0.3, atol=0.02)
    # A blur keeps what is even, and over the whole grid leaves its mean.
    np.testing.assert_allclose(faulty(np.full((6, 4, 6), 7.0, np.float32), blur=1.0), 7.0, rtol=1e-6)
    means = np.broadcast_to(depth.mean(axis=(1, 2), keepdims=True), depth.shape)
    np.testing.assert_allclose(faulty(depth, blur=1e3), means, rtol=1e-4)
    with pytest.raises(ConfigError, match="there is no camera CAM_FRNT"):
        DepthDisturbance(cameras=("CAM_FRNT",))


def test_faults_belong_to_the_keyframe_and_its_cameras():
    depth = np.full((6, 4, 6), 10.0, np.float32)
    fault = {"noise": 0.2, "holes": 0.3}
    first = faulty(depth, **fault)
    np.testing.assert_array_equal(first, faulty(depth, **fault))
    for other in (faulty(depth, token="b", **fault), faulty(depth, seed=1, **fault)):
        assert not np.array_equal(first, other)
    front = faulty(depth, cameras=("CAM_FRONT",), **fault)
    is_front = np.array([name == "CAM_FRONT" for name in CAMERAS])
    np.testing.assert_array_equal(front[is_front], first[is_front])
    np.testing.assert_array_equal(front[~is_front], depth[~is_front])
    record = make_record(
        np.random.default_rng(0), exact_depth=[encode_png(np.full((45, 80), 2560, np.uint16))] * 6
    )
    config = DepthConfig(sources=("exact",), disturb=DepthDisturbance(**fault))
    given, _ = record_patch_depth(record, (4, 6), config)
    np.testing.assert_array_equal(given, disturbed(depth, record["token"], config))


def _quarter_turns():
    for angle in np.arange(4) * np.pi / 2:
        cos, sin = np.cos(angle), np.sin(angle)
        yield np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])

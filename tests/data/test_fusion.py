import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spacedrive_jax.data.lidar import UNALIGNED, FusionConfig, align, apply, depth_pairs


def scene(seed: int, count: int = 500) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).uniform(np.log(3), np.log(60), count))


@settings(max_examples=25, deadline=None)
@given(
    scale=st.floats(0.4, 2.5),
    shift=st.floats(-0.5, 2.0),
    outliers=st.floats(0.0, 0.25),
    seed=st.integers(0, 99),
)
def test_scale_and_shift_are_found_under_noise_and_outliers(scale, shift, outliers, seed):
    rng = np.random.default_rng(seed)
    true = scene(seed)
    network = (true - shift) / scale
    seen = true * rng.normal(1.0, 0.02, true.size)
    hidden = rng.random(true.size) < outliers  # returns from behind what the camera sees
    seen[hidden] *= rng.uniform(1.5, 3.0, hidden.sum())
    usable = network > 0
    found = align(network[usable], seen[usable], FusionConfig(max_depth=1e3))
    corrected = apply(network[usable], found)
    assert np.median(np.abs(corrected / true[usable] - 1)) < 0.03


def test_too_few_returns_or_an_incredible_scale_leave_a_camera_unaligned():
    true = scene(0)
    assert align(true[:59], true[:59]) == UNALIGNED
    assert align(true[:60], true[:60]).points == 60 - int(np.sum(true[:60] >= 80))
    assert align(true / 20, true) == UNALIGNED


def test_a_flat_view_gets_a_scale_but_no_shift():
    flat = np.full(200, 8.0) + np.random.default_rng(0).normal(0, 0.1, 200)
    found = align(flat, 10.0 * flat / 8.0)
    assert found.shift == 0
    assert found.scale == pytest.approx(1.25)


def test_pairs_are_read_at_the_pixels_that_returns_fall_on():
    depth = np.arange(12.0).reshape(3, 4)
    intrinsics = np.array([[2.0, 0, 2], [0, 2.0, 1.5], [0, 0, 1]])
    points = np.array([[0.1, 0.1, 4.0], [-3.9, 0, 4.0], [0, 0, -4.0], [99.0, 0, 4.0], [0, 0, 0.5]])
    network, lidar = depth_pairs(depth, points, intrinsics)
    np.testing.assert_array_equal(network, [depth[1, 2], depth[1, 0]])
    np.testing.assert_array_equal(lidar, [4.0, 4.0])

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spacedrive_jax.geometry.patch_depth import pool_depth, windows

CASES = ["97x131_7x9", "10x10_4x4", "5x7_8x8", "100x150_5x7"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("pooling", "name"), [("min", "min"), ("median", "median"), ("mean", "avg")])
def test_pooling_equals_published(golden, case, pooling, name):
    depth = np.load(golden / "geometry" / "inputs.npz")[f"pool/{case}/depth"]
    expected = np.load(golden / "geometry" / "outputs.npz")[f"pool/{case}/{name}"]
    grid = expected.shape[-2:]
    host = pool_depth(depth, grid, pooling)
    device = jax.jit(lambda values: pool_depth(values, grid, pooling))(jnp.asarray(depth))
    tolerance = 1e-5 if pooling == "mean" else 0.0
    np.testing.assert_allclose(host, expected, atol=tolerance)
    np.testing.assert_allclose(device, expected, atol=tolerance)


@pytest.mark.parametrize(("size", "cells"), [(640, 23), (644, 23), (640, 24)])
def test_window_edges_round_half_to_even(golden, size, cells):
    bounds = np.load(golden / "geometry" / "outputs.npz")[f"pool_bounds/{size}to{cells}"]
    indices, valid = windows(size, cells)
    np.testing.assert_array_equal(indices[:, 0], bounds[:, 0])
    np.testing.assert_array_equal(valid.sum(-1), bounds[:, 1] - bounds[:, 0])

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spacedrive_jax.models.unprojection import pool_depth, windows

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


REDUCTIONS = {
    "min": np.min,
    "mean": np.mean,
    "median": lambda values: np.sort(values, axis=None)[(values.size - 1) // 2],  # the lower of two middles
}


def pooled_cell_by_cell(depth, grid, pooling):
    """The published loop: Python's round at the edges, 0 where a cell has no pixel."""
    pooled = np.zeros(grid)
    for row, column in np.ndindex(grid):
        top, bottom = (round(edge * depth.shape[0] / grid[0]) for edge in (row, row + 1))
        left, right = (round(edge * depth.shape[1] / grid[1]) for edge in (column, column + 1))
        window = depth[top:bottom, left:right]
        pooled[row, column] = REDUCTIONS[pooling](window) if window.size else 0
    return pooled


sides = st.integers(1, 40)


@settings(max_examples=30, deadline=None)
@given(size=st.tuples(sides, sides), grid=st.tuples(sides, sides), pooling=st.sampled_from(list(REDUCTIONS)))
def test_any_grid_equals_the_loop_over_cells(size, grid, pooling):
    depth = np.random.default_rng(0).uniform(1, 80, (2, 3, *size)).astype(np.float32)
    pooled = pool_depth(depth, grid, pooling)
    assert pooled.shape == (2, 3, *grid)
    for view in np.ndindex(2, 3):
        np.testing.assert_allclose(
            pooled[view], pooled_cell_by_cell(depth[view], grid, pooling), rtol=1e-6 * (pooling == "mean")
        )


@pytest.mark.parametrize("pooling", REDUCTIONS)
def test_the_jitted_program_does_not_grow_with_the_grid(pooling):
    def operations(grid):
        return len(
            jax.make_jaxpr(lambda depth: pool_depth(depth, grid, pooling))(jnp.zeros((2, 90, 90))).eqns
        )

    assert operations((3, 4)) == operations((20, 31))

"""The grid search against recorded look-ups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spacedrive_jax.models import coordinate_decoder as grids


def test_wrong_neighbours_are_the_published_ones(golden):
    published = np.load(golden / "pe" / "outputs.npz")
    indices = grids.neighbour_indices(grids.GridConfig())
    for column, name in enumerate(("x_minus", "x", "x_plus")):
        np.testing.assert_array_equal(indices[:, column], published[f"dec/trunc_index_{name}"])
    exact = np.arange(256)[:, None] + np.array([-1, 0, 1])
    assert (indices != exact).sum(axis=0).tolist() == [71, 16, 18]


@pytest.mark.parametrize("best", [(0, 0), (0, 255), (255, 7), (128, 128)])
def test_average_keeps_to_the_cells_around_the_best(best):
    grid = grids.GridConfig()
    scores = np.full(grid.shape, -1.0, np.float32)
    scores[best] = 1.0
    average = jax.jit(lambda scores: grids.neighbourhood_average(scores, grid, 10.0))
    found = np.asarray(average(jnp.asarray(scores.reshape(1, -1))))[0]
    index = grids.neighbour_indices(grid)
    inside = [(index[at] >= 0) & (index[at] < grid.cells) for at in best]
    value = np.where(inside[0][:, None] & inside[1], 0.0, -np.inf)
    for i, row in enumerate(index[best[0]]):
        for j, column in enumerate(index[best[1]]):
            if np.isfinite(value[i, j]):
                value[i, j] = scores[row, column] / 10.0
    weights = np.exp(value) / np.exp(value).sum()
    position = grids.neighbour_positions(grid)
    expected = [weights.sum(1) @ position[best[0]], weights.sum(0) @ position[best[1]], grid.height]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_average_is_the_same_with_and_without_compilation():
    grid = grids.GridConfig()
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(64, 256 * 256)), jnp.float32)

    def average(scores):
        return grids.neighbourhood_average(scores, grid, 1.0)

    compiled = jax.jit(average, compiler_options={"xla_backend_optimization_level": 3})(scores)
    with jax.disable_jit():
        plain = average(scores)
    np.testing.assert_allclose(compiled, plain, atol=1e-4)

"""Decoding a coordinate by looking its encoding up on a grid (paper table 4, grid inversion).

The plane z = 0 is cut into cells; the hidden state is compared with every cell's encoding. The answer is
the best cell, the softmax average of the 3x3 cells around it, or that of the whole grid.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Similarity = Literal["cosine", "l2"]
TEMPERATURE: dict[Similarity, float] = {"cosine": 1e-3, "l2": 0.1}
"""The published softmax temperatures; `l2` compares negative distances."""


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """The published grid: 256 x 256 cells of 0.4 m around the ego vehicle."""

    minimum: float = -51.2
    """Metres, both axes."""
    cell: float = 0.4
    """Metres."""
    cells: int = 256
    """Along each axis."""
    height: float = -5.0
    """z that the published look-up returns (the floor of its volume); the encodings are those of z = 0."""

    @property
    def shape(self) -> tuple[int, int]:
        """Cells along x and y."""
        return (self.cells, self.cells)


def grid_points(grid: GridConfig) -> Float[np.ndarray, "X Y 3"]:
    """The encoded points, z = 0, metres."""
    axis = (grid.minimum + np.arange(grid.cells) * grid.cell).astype(np.float32)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    return np.stack([x, y, np.zeros_like(x)], axis=-1)


def similarities(
    hidden: Float[Array, "... D"], table: Float[Array, "G D"], similarity: Similarity
) -> Float[Array, "... G"]:
    """Compares hidden states with the encodings of all cells, float32."""
    hidden, table = hidden.astype(jnp.float32), table.astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    if similarity == "cosine":
        return jnp.matmul(_unit(hidden), _unit(table).T, precision=highest)
    squared = (
        jnp.sum(jnp.square(hidden), axis=-1, keepdims=True)
        + jnp.sum(jnp.square(table), axis=-1)
        - 2 * jnp.matmul(hidden, table.T, precision=highest)
    )
    return -jnp.sqrt(jnp.maximum(squared, 0.0))


def _unit(vectors: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-8)


def best_cell(scores: Float[Array, "... G"], grid: GridConfig) -> Float[Array, "... 3"]:
    """The cell of highest score, metres."""
    index = jnp.argmax(scores, axis=-1)
    cell = jnp.stack([index // grid.cells, index % grid.cells], axis=-1)
    plane = _cell_position(cell, grid)
    return jnp.concatenate([plane, jnp.full_like(plane[..., :1], grid.height)], axis=-1)


def _cell_position(cell: Int[Array, "... 2"], grid: GridConfig) -> Float[Array, "... 2"]:
    return cell.astype(jnp.float32) * jnp.float32(grid.cell) + jnp.float32(grid.minimum)


def neighbourhood_average(
    scores: Float[Array, "... G"], grid: GridConfig, temperature: float
) -> Float[Array, "... 3"]:
    """Softmax average of the 3x3 cells around the best one; cells outside the grid do not count.

    The published code recovers a neighbour's index from its position in metres by a truncated float32
    division, which is one too small for some cells and so reads the score of a wrong neighbour. Its
    operations and their order are kept: the answer depends on them by up to half a cell.
    """
    best = best_cell(scores, grid)[..., :2]
    offsets = jnp.asarray([(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)], jnp.float32)
    positions = best[..., None, :] + jnp.float32(grid.cell) * offsets
    # A division by a constant becomes a product with its reciprocal under jit, which rounds differently.
    cell = jax.lax.optimization_barrier(jnp.full(positions.shape, grid.cell, jnp.float32))
    index = jnp.trunc((positions - jnp.float32(grid.minimum)) / cell).astype(jnp.int32)
    inside: Bool[Array, "... 9"] = jnp.all((index >= 0) & (index < grid.cells), axis=-1)
    flat = jnp.clip(index[..., 0] * grid.cells + index[..., 1], 0, scores.shape[-1] - 1)
    near = jnp.where(inside, jnp.take_along_axis(scores, flat, axis=-1), -jnp.inf)
    weights = jax.nn.softmax(near / temperature, axis=-1)
    plane = jnp.sum(weights[..., None] * positions, axis=-2)
    return jnp.concatenate([plane, jnp.full_like(plane[..., :1], grid.height)], axis=-1)


def full_average(
    scores: Float[Array, "... G"], grid: GridConfig, temperature: float
) -> Float[Array, "... 3"]:
    """Softmax average of the whole grid; differentiable, z = 0."""
    points = jnp.asarray(grid_points(grid).reshape(-1, 3))
    weights = jax.nn.softmax(scores / temperature, axis=-1)
    return jnp.matmul(weights, points, precision=jax.lax.Precision.HIGHEST)


def gumbel_cell(
    scores: Float[Array, "... G"], noise: Float[Array, "... G"], grid: GridConfig
) -> Float[Array, "... 3"]:
    """A sampled cell: the highest score plus Gumbel noise, z = 0 (the temperature does not matter here).

    Args:
        scores: similarities.
        noise: standard Gumbel, e.g. `jax.random.gumbel`.
        grid: the cells.
    """
    points = jnp.asarray(grid_points(grid).reshape(-1, 3))
    return points[jnp.argmax(scores + noise, axis=-1)]

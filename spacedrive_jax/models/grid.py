"""Decoding a coordinate by looking its encoding up on a grid (paper table 4, grid inversion).

The plane z = 0 is cut into cells; the hidden state is compared with every cell's encoding. The answer is
the best cell, the softmax average of the 3x3 cells around it, or that of the whole grid.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spacedrive_jax.bounds import ANY, POSITIVE, Bound, Bounds, check_bounds

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

    BOUNDS: ClassVar[Bounds] = {"minimum": ANY, "cell": POSITIVE, "cells": Bound(3, 8192), "height": ANY}

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model.decoder.grid")

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
    x, y = _best_indices(scores, grid)
    axis = jnp.asarray(neighbour_positions(grid)[:, 1])
    return jnp.stack([axis[x], axis[y], jnp.full(x.shape, grid.height)], axis=-1)


def _best_indices(
    scores: Float[Array, "... G"], grid: GridConfig
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    best = jnp.argmax(scores, axis=-1)
    return best // grid.cells, best % grid.cells


def neighbour_positions(grid: GridConfig) -> Float[np.ndarray, "X 3"]:
    """Along one axis: where the previous cell, a cell itself and the next one lie, metres."""
    cell = np.float32(grid.cell)
    centre = np.arange(grid.cells, dtype=np.float32) * cell + np.float32(grid.minimum)
    return centre[:, None] + cell * np.array([-1, 0, 1], np.float32)


def neighbour_indices(grid: GridConfig) -> Int[np.ndarray, "X 3"]:
    """Along one axis: whose score the published look-up reads for those three; it may be outside the grid.

    It recovers an index from metres by a truncated float32 division, which is one too small for some cells
    and so reads a wrong neighbour (71 of the 256 previous cells, 16 cells themselves, 18 next ones). The
    answer depends on it by up to half a cell. The operations, their order and their rounding are the
    published ones, and are done here, on the host: a compiler that fuses or contracts them rounds otherwise.
    """
    distance = neighbour_positions(grid) - np.float32(grid.minimum)
    return np.trunc(distance / np.float32(grid.cell)).astype(np.int32)


def neighbourhood_average(
    scores: Float[Array, "... G"], grid: GridConfig, temperature: float
) -> Float[Array, "... 3"]:
    """Softmax average of the 3x3 cells around the best one; cells outside the grid do not count.

    Whose scores are averaged: see `neighbour_indices`.
    """
    x, y = _best_indices(scores, grid)
    positions, indices = jnp.asarray(neighbour_positions(grid)), jnp.asarray(neighbour_indices(grid))
    near_x, near_y = indices[x][..., :, None], indices[y][..., None, :]
    inside: Bool[Array, "... 3 3"] = (near_x >= 0) & (near_x < grid.cells)
    inside &= (near_y >= 0) & (near_y < grid.cells)
    flat = jnp.clip(near_x * grid.cells + near_y, 0, scores.shape[-1] - 1)
    near = jnp.take_along_axis(scores, flat.reshape(*x.shape, 9), axis=-1).reshape(flat.shape)
    weights = jax.nn.softmax(jnp.where(inside, near, -jnp.inf) / temperature, axis=(-2, -1))
    plane = [
        jnp.sum(weights.sum(axis=-1) * positions[x], axis=-1),
        jnp.sum(weights.sum(axis=-2) * positions[y], axis=-1),
    ]
    return jnp.stack([*plane, jnp.full(x.shape, grid.height)], axis=-1)


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

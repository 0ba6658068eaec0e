"""The coordinate decoder psi: hidden state at an indicator to metres (paper section 3.3, table 4)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from spacedrive_jax.bounds import ANY, COUNT, POSITIVE, Bound, Bounds, check_bounds
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.coordinate_encoder import CoordinateEncoder, Linear
from spacedrive_jax.models.partitioning import FROM_WIDTH

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
        + jax.lax.broadcast_to_rank(jnp.sum(jnp.square(table), axis=-1), hidden.ndim)
        - 2 * jnp.matmul(hidden, table.T, precision=highest)
    )
    return -jnp.sqrt(jnp.maximum(squared, 0.0))


def _unit(vectors: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-8)


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


# Variational coordinate decoder (`use_vae_to_replace_mlp` of the published code, after GenAD).
#
# Two distributions over a latent vector per coordinate: the present one sees the hidden state, the future
# one the true coordinate as well. Training decodes a sample of the future one and pulls both together;
# inference decodes the present one.


LOG_SIGMA_RANGE = (-5.0, 5.0)
COORDINATES = 2
"""x and y: the VAE knows no height."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Diagonal normal distributions over the latent vector."""

    mean: Float[Array, "... Z"]
    log_sigma: Float[Array, "... Z"]

    def sample(self, noise: Float[Array, "... Z"] | None) -> Float[Array, "... Z"]:
        """Mean + sigma * noise; the mean without noise."""
        return self.mean if noise is None else self.mean + jnp.exp(self.log_sigma) * noise


def kl_divergence(future: Gaussian, present: Gaussian) -> Float[Array, "..."]:
    """KL(future || present), summed over the latent vector."""
    variance = jnp.exp(2 * future.log_sigma) + jnp.square(future.mean - present.mean)
    divergence = present.log_sigma - future.log_sigma - 0.5 + variance / (2 * jnp.exp(2 * present.log_sigma))
    return jnp.sum(divergence, axis=-1)


class Distribution(nnx.Module):
    """Four linear layers from an embedding to a `Gaussian` (the published ones are width-1 convolutions)."""

    def __init__(self, width: int, latent_size: int, *, rngs: nnx.Rngs) -> None:
        self.layer1 = Linear(width, 2 * width, kernel_metadata=FROM_WIDTH, rngs=rngs)
        self.layer2 = Linear(2 * width, 2 * width, kernel_metadata=FROM_WIDTH, rngs=rngs)
        self.layer3 = Linear(2 * width, width // 2, kernel_metadata=FROM_WIDTH, rngs=rngs)
        self.output = Linear(width // 2, 2 * latent_size, rngs=rngs)

    def __call__(self, x: Float[Array, "... W"]) -> Gaussian:
        """Embedding to distribution; the log of sigma is clipped to `LOG_SIGMA_RANGE`."""
        x = jax.nn.relu(self.layer1(x))
        x = jax.nn.relu(self.layer2(x))
        mean, log_sigma = jnp.split(self.output(self.layer3(x)), 2, axis=-1)
        return Gaussian(mean, jnp.clip(log_sigma, *LOG_SIGMA_RANGE))


class VaeDecoder(nnx.Module):
    """Hidden state at an indicator to x and y, through a sampled latent vector."""

    def __init__(
        self, model_width: int, latent_size: int = 32, *, with_current: bool = False, rngs: nnx.Rngs
    ) -> None:
        """Draws a fresh coordinate decoder.

        Args:
            model_width: D.
            latent_size: Z.
            with_current: hand the hidden state to the decoding layers beside the sample. The published
                layers then have two outputs more, which nothing reads.
            rngs: random streams (`params`).
        """
        self.with_current = with_current
        self.present = Distribution(model_width, latent_size, rngs=rngs)
        self.future = Distribution(model_width + COORDINATES, latent_size, rngs=rngs)
        inputs = latent_size + model_width * with_current
        self.layer1 = Linear(inputs, 2 * latent_size, rngs=rngs)
        self.layer2 = Linear(2 * latent_size, 4 * latent_size, rngs=rngs)
        self.output = Linear(4 * latent_size, COORDINATES * (1 + with_current), rngs=rngs)

    def __call__(
        self,
        hidden: Float[Array, "... D"],
        *,
        true_coordinates: Float[Array, "... 2"] | None = None,
        noise: Float[Array, "... Z"] | None = None,
    ) -> Float[Array, "... 3"]:
        """Decodes to metres; z is 0.

        Args:
            hidden: hidden states.
            true_coordinates: x and y: a sample of the future distribution is decoded (training); None decodes
                the present distribution (inference).
            noise: standard normal; None takes the distribution's mean, so that inference is repeatable.
        """
        hidden = hidden.astype(jnp.float32)
        latent = (
            self.present(hidden) if true_coordinates is None else self.future_given(hidden, true_coordinates)
        ).sample(noise)
        x = jnp.concatenate([latent, hidden], axis=-1) if self.with_current else latent
        x = jax.nn.relu(self.layer1(x))
        x = jax.nn.relu(self.layer2(x))
        plane = self.output(x)[..., :COORDINATES]
        return jnp.concatenate([plane, jnp.zeros_like(plane[..., :1])], axis=-1)

    def future_given(
        self, hidden: Float[Array, "... D"], true_coordinates: Float[Array, "... 2"]
    ) -> Gaussian:
        """The distribution that has seen the true coordinate."""
        return self.future(jnp.concatenate([hidden.astype(jnp.float32), true_coordinates], axis=-1))

    def divergence(
        self, hidden: Float[Array, "... D"], true_coordinates: Float[Array, "... 2"]
    ) -> Float[Array, "..."]:
        """KL(future || present) of every coordinate: the published `loss_vae_gen` is its mean."""
        return kl_divergence(
            self.future_given(hidden, true_coordinates), self.present(hidden.astype(jnp.float32))
        )


DecoderKind = Literal["mlp", "linear", "vae", "grid_cosine", "grid_l2", "grid_full"]


@dataclasses.dataclass(frozen=True)
class CoordinateDecoderConfig:
    """How hidden states become metres."""

    kind: DecoderKind = "mlp"
    """`mlp`: Linear -> ReLU -> Linear (the paper's); `linear`: one layer; `vae`: a latent sample; `grid_*`:
    the grid is searched for the nearest encoding by cosine or distance and averaged over the 3x3 cells
    around it, or over the whole grid by cosine. A grid has nothing to learn: train it with
    `position_loss` `cosine` or `embedding_l2`."""
    whole_trajectory: bool = False
    """Read all waypoints from the first indicator (paper table 4); `mlp` and `linear` only."""
    latent_size: int = 32
    """Z of the VAE."""
    with_current: bool = False
    """Hand the hidden state to the VAE's decoding layers beside the sample."""
    grid: GridConfig = GridConfig()
    output_scale: float = 1.0
    """Metres per unit of the last layer's output (`mlp` and `linear`). The published 1 makes weights of the
    size of 1 grow until they say 20 m, which takes hundreds of steps at the rates that suit everything else:
    training from scratch starts faster with 10."""

    BOUNDS: ClassVar[Bounds] = {"latent_size": COUNT, "output_scale": POSITIVE}

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model.decoder")
        if self.whole_trajectory and self.kind not in ("mlp", "linear"):
            raise ConfigError(
                f"model.decoder.whole_trajectory is for the kinds mlp and linear, not model.decoder.kind "
                f"{self.kind}"
            )
        if self.output_scale != 1.0 and self.kind not in ("mlp", "linear"):
            raise ConfigError(
                f"model.decoder.output_scale {self.output_scale} is for the kinds mlp and linear, not "
                f"model.decoder.kind {self.kind}"
            )

    @property
    def is_grid(self) -> bool:
        """Whether coordinates are looked up on the grid."""
        return self.kind.startswith("grid")


class MlpDecoder(nnx.Module):
    """Linear(D, D) -> ReLU -> Linear(D, 3), or one Linear(D, 3)."""

    def __init__(
        self,
        model_width: int,
        *,
        layers: Literal[1, 2] = 2,
        points: int = 1,
        output_scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws a fresh coordinate decoder.

        Args:
            model_width: D.
            layers: one or two.
            points: points read from one hidden state.
            output_scale: metres per unit of the last layer's output.
            rngs: random streams (`params`).
        """
        self.points, self.output_scale = points, output_scale
        self.hidden = (
            Linear(model_width, model_width, kernel_metadata=FROM_WIDTH, rngs=rngs) if layers == 2 else None
        )
        self.output = Linear(model_width, 3 * points, rngs=rngs)

    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... 3"] | Float[Array, "... T 3"]:
        """Regresses x, y, z in metres (only x and y are supervised), float32; T points if it has many."""
        hidden = hidden.astype(jnp.float32)
        if self.hidden is not None:
            hidden = jax.nn.relu(self.hidden(hidden))
        decoded = self.output_scale * self.output(hidden)
        return decoded if self.points == 1 else decoded.reshape(*decoded.shape[:-1], self.points, 3)


class GridDecoder(nnx.Module):
    """Searches the grid for the encoding that the hidden state resembles; nothing to learn."""

    def __init__(self, config: CoordinateDecoderConfig) -> None:
        self.config = config

    def __call__(self, hidden: Float[Array, "... D"], encoder: CoordinateEncoder) -> Float[Array, "... 3"]:
        """Metres; see `neighbourhood_average` and `full_average` for the rules and for z."""
        grid, temperature = self.config.grid, TEMPERATURE[self.similarity]
        scores = self.scores(hidden, encoder)
        if self.config.kind == "grid_full":
            return full_average(scores, grid, temperature)
        return neighbourhood_average(scores, grid, temperature)

    @property
    def similarity(self) -> Similarity:
        """What hidden states and encodings are compared by."""
        return "l2" if self.config.kind == "grid_l2" else "cosine"

    def scores(self, hidden: Float[Array, "... D"], encoder: CoordinateEncoder) -> Float[Array, "... G"]:
        """How much hidden states resemble the encoding of every cell."""
        table = encoder(jnp.asarray(grid_points(self.config.grid).reshape(-1, 3)))
        return similarities(hidden, table, self.similarity)


CoordinateDecoder = MlpDecoder | VaeDecoder | GridDecoder


def make_decoder(
    config: CoordinateDecoderConfig, model_width: int, num_waypoints: int, *, rngs: nnx.Rngs
) -> CoordinateDecoder:
    """Draws the coordinate decoder that a config names."""
    if config.is_grid:
        return GridDecoder(config)
    if config.kind == "vae":
        return VaeDecoder(model_width, config.latent_size, with_current=config.with_current, rngs=rngs)
    points = num_waypoints if config.whole_trajectory else 1
    return MlpDecoder(
        model_width,
        layers=1 if config.kind == "linear" else 2,
        points=points,
        output_scale=config.output_scale,
        rngs=rngs,
    )

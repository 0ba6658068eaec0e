"""The coordinate decoder psi: hidden state at an indicator to metres (paper section 3.3, table 4)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from spacedrive_jax.positional import grid as grids
from spacedrive_jax.positional.coordinates import CoordinateEncoder
from spacedrive_jax.positional.grid import GridConfig
from spacedrive_jax.positional.vae import VaeDecoder
from spacedrive_jax.vlm.logical_axes import FROM_WIDTH

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

    @property
    def is_grid(self) -> bool:
        """Whether coordinates are looked up on the grid."""
        return self.kind.startswith("grid")


class MlpDecoder(nnx.Module):
    """Linear(D, D) -> ReLU -> Linear(D, 3), or one Linear(D, 3)."""

    def __init__(
        self, model_width: int, *, layers: Literal[1, 2] = 2, points: int = 1, rngs: nnx.Rngs
    ) -> None:
        """Draws a fresh decoder.

        Args:
            model_width: D.
            layers: one or two.
            points: points read from one hidden state.
            rngs: random streams (`params`).
        """
        self.points = points
        self.hidden = (
            nnx.Linear(model_width, model_width, kernel_metadata=FROM_WIDTH, rngs=rngs)
            if layers == 2
            else None
        )
        self.output = nnx.Linear(model_width, 3 * points, rngs=rngs)

    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... 3"] | Float[Array, "... T 3"]:
        """Regresses x, y, z in metres (only x and y are supervised), float32; T points if it has many."""
        hidden = hidden.astype(jnp.float32)
        if self.hidden is not None:
            hidden = jax.nn.relu(self.hidden(hidden))
        decoded = self.output(hidden)
        return decoded if self.points == 1 else decoded.reshape(*decoded.shape[:-1], self.points, 3)


class GridDecoder(nnx.Module):
    """Searches the grid for the encoding that the hidden state resembles; nothing to learn."""

    def __init__(self, config: CoordinateDecoderConfig) -> None:
        self.config = config

    def __call__(self, hidden: Float[Array, "... D"], encoder: CoordinateEncoder) -> Float[Array, "... 3"]:
        """Metres; see `spacedrive_jax.positional.grid` for the rules and for z."""
        grid, temperature = self.config.grid, grids.TEMPERATURE[self.similarity]
        scores = self.scores(hidden, encoder)
        if self.config.kind == "grid_full":
            return grids.full_average(scores, grid, temperature)
        return grids.neighbourhood_average(scores, grid, temperature)

    @property
    def similarity(self) -> grids.Similarity:
        """What hidden states and encodings are compared by."""
        return "l2" if self.config.kind == "grid_l2" else "cosine"

    def scores(self, hidden: Float[Array, "... D"], encoder: CoordinateEncoder) -> Float[Array, "... G"]:
        """How much hidden states resemble the encoding of every cell."""
        table = encoder(jnp.asarray(grids.grid_points(self.config.grid).reshape(-1, 3)))
        return grids.similarities(hidden, table, self.similarity)


CoordinateDecoder = MlpDecoder | VaeDecoder | GridDecoder


def make_decoder(
    config: CoordinateDecoderConfig, model_width: int, num_waypoints: int, *, rngs: nnx.Rngs
) -> CoordinateDecoder:
    """Draws the decoder that a config names."""
    if config.is_grid:
        return GridDecoder(config)
    if config.kind == "vae":
        return VaeDecoder(model_width, config.latent_size, with_current=config.with_current, rngs=rngs)
    points = num_waypoints if config.whole_trajectory else 1
    return MlpDecoder(model_width, layers=1 if config.kind == "linear" else 2, points=points, rngs=rngs)

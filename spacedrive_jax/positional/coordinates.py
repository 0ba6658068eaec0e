"""The universal coordinate encoder phi with its scale alpha, and the encoder of the ego status."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from spacedrive_jax.positional import sincos
from spacedrive_jax.positional.frequencies import fone_frequencies, nerf_frequencies
from spacedrive_jax.vlm.logical_axes import FROM_WIDTH

EncoderKind = Literal["sincos", "nerf", "fone", "mlp"]


@dataclasses.dataclass(frozen=True)
class CoordinateEncoderConfig:
    """How 3D points become embeddings (paper section 3.2, tables 4, 5 and E)."""

    kind: EncoderKind = "sincos"
    """`sincos` (the paper's), `nerf`, `fone`, or `mlp`: a learned Linear(3, D) -> ReLU -> Linear(D, D)."""
    base: float = 20000.0
    """Ratio of the sin-cos frequencies; octaves for `nerf` (10 in its paper); base of the digits for
    `fone`."""
    frequency_scaling: float = 1.0
    """Multiplies the frequencies of `sincos` and `fone`."""
    fone_width: int = 24
    """Channels that `fone` fills; the rest of the model width stays zero."""
    learnable_frequencies: bool = False
    """Learn a table of frequencies for each axis, starting at the fixed one (not in the paper, which names
    it as future work)."""
    alpha: float = 0.1
    """Initial scale of every encoding; the learned `mlp` has no scale."""
    learnable_alpha: bool = True
    """Learn alpha (one scalar shared by patches, past positions and text) or keep it fixed."""


def frequency_table(config: CoordinateEncoderConfig, model_width: int) -> Float[np.ndarray, "F"]:
    """The fixed frequencies of a wave encoding, radians per metre, shared by the axes."""
    width = sincos.axis_width(model_width)
    if config.kind == "nerf":
        return nerf_frequencies(width, config.base)
    if config.kind == "fone":
        return fone_frequencies(config.fone_width, config.base, config.frequency_scaling)
    return sincos.frequencies(width, config.base, config.frequency_scaling)


class CoordinateEncoder(nnx.Module):
    """phi: one encoder for patches, past ego positions and coordinates in the text."""

    def __init__(
        self, config: CoordinateEncoderConfig, model_width: int, *, rngs: nnx.Rngs | None = None
    ) -> None:
        """Builds the encoder.

        Args:
            config: kind and scale.
            model_width: D.
            rngs: random streams (`params`), which only the learned `mlp` draws from.
        """
        self.config = config
        self.model_width = model_width
        self.alpha = nnx.Param(jnp.asarray(config.alpha, jnp.float32)) if config.learnable_alpha else None
        learned = config.kind == "mlp"
        table = frequency_table(config, model_width)
        self.frequencies = nnx.Param(jnp.tile(table, (3, 1))) if config.learnable_frequencies else None
        streams = rngs if rngs is not None else nnx.Rngs(0)
        self.hidden = nnx.Linear(3, model_width, rngs=streams) if learned else None
        self.output = nnx.Linear(model_width, model_width, rngs=streams) if learned else None

    def __call__(self, points: Float[Array, "... 3"]) -> Float[Array, "... D"]:
        """Encodes and scales by alpha: (..., 3) metres in the ego frame -> (..., D) float32."""
        return self.scale * self.waves(points) if self.hidden is None else self.learned(points)

    def past(self, points: Float[Array, "... 3"]) -> Float[Array, "... D"]:
        """Past ego positions keep the scaled waves even where an `mlp` encodes all else, as published."""
        return self.scale * self.waves(points)

    @property
    def scale(self) -> Float[Array, ""] | float:
        """The factor on every encoding."""
        return self.config.alpha if self.alpha is None else self.alpha[...]

    def waves(self, points: Float[Array, "... 3"]) -> Float[Array, "... D"]:
        """The unscaled wave encoding."""
        table = (
            jnp.asarray(frequency_table(self.config, self.model_width))
            if self.frequencies is None
            else self.frequencies[...]
        )
        return sincos.encode(points, table, self.model_width)

    def learned(self, points: Float[Array, "... 3"]) -> Float[Array, "... D"]:
        """The learned encoding."""
        assert self.hidden is not None
        assert self.output is not None
        return self.output(jax.nn.relu(self.hidden(points.astype(jnp.float32))))


class EgoStatusEncoder(nnx.Module):
    """The ego feature token: a two-layer MLP over the 74 ego status numbers (SpaceDrive+)."""

    def __init__(self, status_size: int, model_width: int, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(status_size, model_width, rngs=rngs)
        self.output = nnx.Linear(model_width, model_width, kernel_metadata=FROM_WIDTH, rngs=rngs)

    def __call__(self, status: Float[Array, "... E"]) -> Float[Array, "... D"]:
        """(..., 74) ego status -> (..., D) float32."""
        return self.output(jax.nn.relu(self.hidden(status.astype(jnp.float32))))

"""The universal coordinate encoder phi with its scale alpha, and the coordinate decoder psi."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from spacedrive_jax.positional import sincos


@dataclasses.dataclass(frozen=True)
class CoordinateEncoderConfig:
    """How 3D points become embeddings (paper section 3.2, tables 5 and E)."""

    base: float = 20000.0
    """Ratio of the sin-cos frequencies."""
    alpha: float = 0.1
    """Initial scale of every encoding."""
    learnable_alpha: bool = True
    """Learn alpha (one scalar shared by patches, past positions and text) or keep it fixed."""


class CoordinateEncoder(nnx.Module):
    """phi: one encoder for patches, past ego positions and coordinates in the text."""

    def __init__(self, config: CoordinateEncoderConfig, model_width: int) -> None:
        self.config = config
        self.model_width = model_width
        alpha = jnp.asarray(config.alpha, jnp.float32)
        self.alpha = nnx.Param(alpha) if config.learnable_alpha else None

    def __call__(self, points: Float[Array, "... 3"]) -> Float[Array, "... D"]:
        """Scales the encoding by alpha: (..., 3) metres in the ego frame -> (..., D) float32."""
        table = sincos.frequencies(sincos.axis_width(self.model_width), self.config.base)
        alpha = self.config.alpha if self.alpha is None else self.alpha[...]
        return alpha * sincos.encode(points, jnp.asarray(table), self.model_width)


class CoordinateDecoder(nnx.Module):
    """psi: Linear(D, D) -> ReLU -> Linear(D, 3), hidden state at an indicator to metres (section 3.3)."""

    def __init__(self, model_width: int, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(model_width, model_width, rngs=rngs)
        self.output = nnx.Linear(model_width, 3, rngs=rngs)

    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... 3"]:
        """Regresses x, y, z in metres (only x and y are supervised), float32."""
        return self.output(jax.nn.relu(self.hidden(hidden.astype(jnp.float32))))


class EgoStatusEncoder(nnx.Module):
    """The ego feature token: a two-layer MLP over the 74 ego status numbers (SpaceDrive+)."""

    def __init__(self, status_size: int, model_width: int, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(status_size, model_width, rngs=rngs)
        self.output = nnx.Linear(model_width, model_width, rngs=rngs)

    def __call__(self, status: Float[Array, "... E"]) -> Float[Array, "... D"]:
        """(..., 74) ego status -> (..., D) float32."""
        return self.output(jax.nn.relu(self.hidden(status.astype(jnp.float32))))

"""The two losses: next-token cross-entropy and Huber on waypoints (paper section 3.4)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.config import TrainConfig
from spacedrive_jax.model import SpaceDrive


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """Scalars of one batch."""

    total: Float[Array, ""]
    language: Float[Array, ""]
    """Sum of the supervised tokens' cross-entropy over the batch size, as the published code reduces it."""
    position: Float[Array, ""]
    """Mean Huber loss over the valid waypoints' x and y, metres; exactly 0 when there is none."""
    displacement: Float[Array, ""]
    """Mean distance between predicted and true waypoints, metres: to watch, not to train on."""


def losses(
    model: SpaceDrive, batch: DrivingBatch, config: TrainConfig, dropout_key: jax.Array | None
) -> Losses:
    """Runs the model on a batch with answers and scores it.

    Only the hidden states that predict a supervised token meet the vocabulary: with 152k ids the logits of
    the whole sequence would dwarf everything else.
    """
    outputs = model(batch, dropout_key=dropout_key)
    predicting = jnp.take_along_axis(outputs.hidden, batch.target_places[..., None], axis=1)
    logits = model.vlm.decoder.logits(predicting)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.target_ids)
    language = jnp.sum(cross_entropy * batch.target_mask) / batch.size

    error = outputs.waypoints[..., :2] - batch.waypoints
    mask = batch.waypoint_mask[..., None]
    count = jnp.maximum(jnp.sum(mask), 1)
    huber = optax.huber_loss(error, delta=config.huber_delta)
    position = jnp.sum(huber * mask) / (2 * count)
    displacement = jnp.sum(safe_norm(error) * batch.waypoint_mask) / count
    total = config.language_weight * language + config.position_weight * position
    return Losses(total, language, position, jax.lax.stop_gradient(displacement))


def safe_norm(vectors: Float[Array, "... C"]) -> Float[Array, "..."]:
    """Euclidean norm whose gradient at zero is zero instead of nan."""
    squared = jnp.sum(jnp.square(vectors), axis=-1)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)

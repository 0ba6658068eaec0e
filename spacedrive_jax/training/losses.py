"""The two losses: next-token cross-entropy and the position loss on coordinates (paper section 3.4)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from spacedrive_jax.batch import DrivingBatch, TokenType
from spacedrive_jax.config import TrainConfig
from spacedrive_jax.constants import CAN_BUS_SIZE, NUM_PAST, STATUS_SIZE
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.coordinate_decoder import VaeDecoder
from spacedrive_jax.models.partitioning import constrain
from spacedrive_jax.models.spacedrive import Outputs, SpaceDrive
from spacedrive_jax.models.spacedrive_config import ModelConfig

# Cross-entropy over a large vocabulary: only where there are labels, in chunks, the vocabulary sharded.


CHUNK = 128
"""Places per sample whose logits are in memory at once (152k ids: 78 MB of float32 a sample)."""


def label_cross_entropy(
    logits_of: Callable[[Float[Array, "B m D"]], Float[Array, "B m vocabulary"]],
    hidden: Float[Array, "B M D"],
    target_ids: Int[Array, "B M"],
    *,
    chunk: int = CHUNK,
) -> Float[Array, "B M"]:
    """Cross-entropy of every labelled place.

    The logits of a chunk are computed again in the backward pass instead of being kept. The label's logit is
    picked by comparison, not by index, so that nothing has to be gathered where the vocabulary is sharded.

    Args:
        logits_of: the language-model head.
        hidden: final-normed hidden states of the places that predict a label.
        target_ids: the labels.
        chunk: places per sample at once.
    """

    def entropy(hidden: Float[Array, "B m D"], ids: Int[Array, "B m"]) -> Float[Array, "B m"]:
        logits = constrain(logits_of(hidden), "batch", None, "vocab")
        is_label = jnp.arange(logits.shape[-1])[None, None] == ids[..., None]
        label = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - label

    count = target_ids.shape[1]
    if count <= chunk:
        return entropy(hidden, target_ids)
    # Filled up to whole chunks; what comes of the filling is cut off.
    pad = -count % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    ids = jnp.pad(target_ids, ((0, 0), (0, pad)))

    def chunks(values: Array) -> Array:
        return jnp.moveaxis(values.reshape(values.shape[0], -1, chunk, *values.shape[2:]), 1, 0)

    step = jax.checkpoint(entropy, prevent_cse=False)
    _, pieces = jax.lax.scan(lambda _, piece: (None, step(*piece)), None, (chunks(hidden), chunks(ids)))
    return jnp.moveaxis(pieces, 0, 1).reshape(target_ids.shape[0], -1)[:, :count]


EMBEDDING_LOSSES = ("cosine", "embedding_l2")

_norm = functools.partial(optax.safe_norm, min_norm=0.0, axis=-1)
"""Of vectors along the last axis; its gradient at zero is zero instead of nan."""

_PAST_STATES = NUM_PAST * (1 + CAN_BUS_SIZE)
_ACCELERATION = _PAST_STATES + 1 + 4  # behind the command and the orientation (`constants.CAN_BUS_SIZE`)
PAST_MOTION = np.ones(STATUS_SIZE, bool)
"""Which numbers of the ego status `without_past_motion` withholds: all but the present command, orientation,
rotation rate and velocity."""
PAST_MOTION[_PAST_STATES : _PAST_STATES + 1 + CAN_BUS_SIZE] = False
PAST_MOTION[_ACCELERATION : _ACCELERATION + 3] = True

SPEED_CHANGE = 0.5
"""Metres by which a plan's fourth half-second is shorter than its first where it brakes, and longer where it
speeds up: 1 m/s."""


def speed_change(waypoints: Float[Array, "B T 2"]) -> Float[Array, " B"]:
    """How much longer a plan's fourth half-second is than its first, metres."""
    return _norm(waypoints[:, 3] - waypoints[:, 2]) - _norm(waypoints[:, 0])


def without_past_motion(batch: DrivingBatch, key: jax.Array, share: float) -> DrivingBatch:
    """A batch of which a share of the samples does not know its past, nor its present acceleration.

    Such a sample's status is what a vehicle without memory has (zeros for past states and poses), so a model
    knows it from the first keyframe of a scene.

    Args:
        batch: of any size.
        key: decides which samples.
        share: of the samples, 0 to 1.
    """
    dropped = jax.random.bernoulli(key, share, (batch.size,))
    status = jnp.where(dropped[:, None] & jnp.asarray(PAST_MOTION)[None], 0.0, batch.ego_status)
    past = jnp.where(dropped[:, None, None], 0.0, batch.past_positions)
    return dataclasses.replace(batch, ego_status=status, past_positions=past)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """Scalars of one batch, on devices or fetched to the host."""

    total: Float[Any, ""]
    language: Float[Any, ""]
    """Sum of the supervised tokens' cross-entropy over the batch size, as published (fidelity Q32)."""
    position: Float[Any, ""]
    """Mean position loss over the valid coordinates' x and y; exactly 0 when there is none."""
    path: Float[Any, ""]
    """The same over the path points, those beyond the recorded future left out; 0 without a path."""
    divergence: Float[Any, ""]
    """What the `vae` decoder adds; 0 for the others."""
    displacement: Float[Any, ""]
    """Mean distance between predicted and true coordinates, metres: to watch, not to train on."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Supervised:
    """The coordinates that have a position loss, on devices or fetched to the host."""

    indices: Int[Any, "B C"]
    """Indicators to decode at."""
    true_coordinates: Float[Any, "B R 2"]
    """Metres. R = C, or R = T where one indicator is held against the whole trajectory."""
    mask: Bool[Any, "B R"]

    def followed_by(self, other: Supervised) -> Supervised:
        """These coordinates and then the other's."""
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), self, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counted:
    """What the means over coordinates divide by in a piece of a batch, so that the pieces' mean is the whole
    batch's: its valid coordinates over the number of pieces.

    Divided by its own count, a piece with one valid waypoint would weigh as much as one that has them all.
    """

    waypoints: Float[Array, ""]
    path: Float[Array, ""]
    decoded: Float[Array, ""]
    """Those of both that the `vae` decoder has a divergence of."""

    @classmethod
    def of(cls, model: SpaceDrive, batch: DrivingBatch, config: TrainConfig, pieces: int) -> Counted:
        """Counts a whole batch that is worked out in pieces."""
        waypoints, path = select(model, batch, config), select_path(batch)
        both = waypoints if path is None else waypoints.followed_by(path)
        none = jnp.zeros((batch.size, 1), bool)
        masks = waypoints.mask, none if path is None else path.mask, both.mask[:, : both.indices.shape[1]]
        return cls(*(jnp.maximum(jnp.sum(mask), 1) / pieces for mask in masks))


def losses(
    model: SpaceDrive,
    batch: DrivingBatch,
    config: TrainConfig,
    dropout_key: jax.Array | None,
    *,
    noise: Float[Array, "B C Z"] | None = None,
    sees_true_coordinates: bool = True,
    counted: Counted | None = None,
) -> Losses:
    """Runs the model on a batch with answers and scores it.

    Only the hidden states that predict a supervised token meet the vocabulary: with 152k ids the logits of
    the whole sequence would dwarf everything else.

    Args:
        model: the model.
        batch: a batch with answers.
        config: which losses, and their weights.
        dropout_key: key of the adapters' dropout and the `vae` decoder's noise; None for neither.
        noise: the `vae` decoder's standard normal noise, instead of the key's.
        sees_true_coordinates: the `vae` decodes its future distribution; False scores its inference.
        counted: what the means over coordinates divide by; None for the batch's own valid ones.

    Raises:
        ConfigError: the config's decoder and losses do not fit each other.
    """
    check_choices(model.config, config)
    counted = Counted.of(model, batch, config, pieces=1) if counted is None else counted
    waypoints, path = select(model, batch, config), select_path(batch)
    supervised = waypoints if path is None else waypoints.followed_by(path)
    vae = isinstance(model.decoder, VaeDecoder)
    drawn_for = supervised.true_coordinates[:, : supervised.indices.shape[1]] if vae else None
    if vae and noise is None and dropout_key is not None:
        shape = (*supervised.indices.shape, model.config.decoder.latent_size)
        dropout_key, noise_key = jax.random.split(dropout_key)
        noise = jax.random.normal(noise_key, shape)
    outputs = model(
        batch,
        dropout_key=dropout_key,
        indices=supervised.indices,
        true_coordinates=drawn_for if sees_true_coordinates else None,
        noise=noise,
    )
    language = cross_entropy(model, batch, outputs.hidden, config.indicator_weight)
    count = None if path is None else waypoints.indices.shape[1]
    weight = None
    if (config.braking_weight, config.accelerating_weight) != (1.0, 1.0):
        change = speed_change(batch.waypoints)
        weight = jnp.where(change < -SPEED_CHANGE, config.braking_weight, 1.0)
        weight = jnp.where(change > SPEED_CHANGE, config.accelerating_weight, weight)
    position = position_loss(
        model, _part(outputs, slice(count)), waypoints, config, counted.waypoints, weight
    )
    along_path = jnp.zeros(())
    if path is not None:
        along_path = position_loss(model, _part(outputs, slice(count, None)), path, config, counted.path)
    divergence = jnp.zeros(())
    if isinstance(model.decoder, VaeDecoder) and drawn_for is not None:
        per_coordinate = model.decoder.divergence(outputs.at_indicators, drawn_for)
        divergence = _mean(per_coordinate, supervised.mask[:, : per_coordinate.shape[1]], counted.decoded)
    error = _norm(_part(outputs, slice(count)).coordinates[..., :2] - waypoints.true_coordinates)
    displacement = jax.lax.stop_gradient(_mean(error, waypoints.mask, counted.waypoints))
    total = (
        config.language_weight * language
        + config.position_weight * position
        + config.path_weight * along_path
        + config.vae_weight * divergence
    )
    return Losses(total, language, position, along_path, divergence, displacement)


def _part(outputs: Outputs, coordinates: slice) -> Outputs:
    """The outputs at some of the coordinates."""
    return dataclasses.replace(
        outputs,
        at_indicators=outputs.at_indicators[:, coordinates],
        coordinates=outputs.coordinates[:, coordinates],
    )


def cross_entropy(
    model: SpaceDrive, batch: DrivingBatch, hidden: Float[Array, "B S D"], indicator_weight: float
) -> Float[Array, ""]:
    """Next-token cross-entropy, summed over the supervised tokens, over the batch size."""
    predicting = jnp.take_along_axis(hidden, batch.target_indices[..., None], axis=1)
    per_token = label_cross_entropy(model.vlm.decoder.logits, predicting, batch.target_ids)
    if indicator_weight != 1.0:
        per_token *= jnp.where(batch.target_ids == model.indicator_id, indicator_weight, 1.0)
    return jnp.sum(per_token * batch.target_mask.astype(per_token.dtype)) / batch.size


def select(model: SpaceDrive, batch: DrivingBatch, config: TrainConfig) -> Supervised:
    """Chooses the coordinates that `config.supervision` names."""
    if config.supervision == "all":
        # Every supervised indicator; its coordinate is that of the position token behind it.
        indices = batch.target_indices + 1
        mask = batch.target_mask & (batch.target_ids == model.indicator_id)
        is_coordinate = batch.token_type_ids == TokenType.COORDINATE
        before = jnp.cumsum(is_coordinate | (batch.token_type_ids == TokenType.TARGET_POINT), axis=1)
        row = jnp.take_along_axis(before, indices, axis=1)
        row = jnp.clip(row, 0, batch.coordinates.shape[1] - 1)
        true_coordinates = jnp.take_along_axis(batch.coordinates, row[..., None], axis=1)[..., :2]
        return Supervised(indices, true_coordinates, mask)
    if config.supervision == "first" or model.config.decoder.whole_trajectory:
        mask = jnp.broadcast_to(batch.waypoint_mask[:, :1], batch.waypoint_mask.shape)
        return Supervised(batch.waypoint_indices[:, :1], batch.waypoints, mask)
    return Supervised(batch.waypoint_indices, batch.waypoints, batch.waypoint_mask)


def select_path(batch: DrivingBatch) -> Supervised | None:
    """The path points, where the batch has any."""
    if batch.path_indices is None or batch.path is None or batch.path_mask is None:
        return None
    return Supervised(batch.path_indices, batch.path, batch.path_mask)


def position_loss(
    model: SpaceDrive,
    outputs: Outputs,
    supervised: Supervised,
    config: TrainConfig,
    count: Float[Array, ""],
    weight: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """Sum over the valid coordinates, in metres or between embeddings, each sample's times its weight; over
    how many count (`Counted`).
    """
    if config.position_loss in EMBEDDING_LOSSES:
        true_coordinates = jnp.pad(supervised.true_coordinates, ((0, 0), (0, 0), (0, 1)))
        # As published, the true encodings are targets: alpha learns from the inputs alone.
        target = jax.lax.stop_gradient(model.encoder(true_coordinates))
        hidden = outputs.at_indicators.astype(jnp.float32)
        if config.position_loss == "cosine":
            return _mean(1 - _cosine(hidden, target), supervised.mask, count, weight)
        return _mean(jnp.mean(jnp.square(hidden - target), axis=-1), supervised.mask, count, weight)
    error = outputs.coordinates[..., :2] - supervised.true_coordinates
    if config.position_loss == "l1":
        per_axis = jnp.abs(error)
    elif config.position_loss == "l2":
        per_axis = jnp.square(error)
    else:
        per_axis = optax.huber_loss(error, delta=config.huber_delta)
    return _mean(jnp.mean(per_axis, axis=-1), supervised.mask, count, weight)


def check_choices(model: ModelConfig, config: TrainConfig) -> None:
    """Refuses a decoder and losses that cannot train each other.

    Raises:
        ConfigError: naming the two fields.
    """
    decoder = model.decoder
    in_embedding = config.position_loss in EMBEDDING_LOSSES
    if decoder.is_grid and not in_embedding:
        raise ConfigError(
            f"model.decoder.kind {decoder.kind} searches a grid and has no gradient in metres (nor does the "
            f"published code train it so): set train.position_loss to cosine or embedding_l2, not "
            f"{config.position_loss}"
        )
    if in_embedding and not decoder.is_grid:
        raise ConfigError(
            f"train.position_loss {config.position_loss} would leave model.decoder.kind {decoder.kind} "
            "untrained: choose huber, l1 or l2, or a grid_* decoder"
        )
    if model.path_points and config.supervision != "planning":
        raise ConfigError(
            f"model.path_points {model.path_points} needs train.supervision planning, not "
            f"{config.supervision}"
        )
    if decoder.whole_trajectory and (
        config.supervision != "planning" or decoder.kind not in ("mlp", "linear")
    ):
        raise ConfigError(
            "model.decoder.whole_trajectory needs model.decoder.kind mlp or linear and train.supervision "
            f"planning, not {decoder.kind} and {config.supervision}"
        )


def _mean(
    values: Float[Array, "B C"],
    mask: Bool[Array, "B C"],
    count: Float[Array, ""],
    weight: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    if weight is not None:
        values = values * weight[:, None]
    return jnp.sum(jnp.where(mask, values, 0.0)) / count


def _cosine(a: Float[Array, "... D"], b: Float[Array, "... D"]) -> Float[Array, "..."]:
    lengths = _norm(a) * _norm(b)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(lengths, 1e-8)

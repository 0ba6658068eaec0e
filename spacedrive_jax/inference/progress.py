"""The state of a generation, and what both ways of generating share."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.model import SpaceDrive
from spacedrive_jax.vlm.cache import KVCache

Seen = Bool[Array, "B vocabulary"] | None
"""Ids that a sample's prompt and answer have so far; None where nothing asks for them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated for each sample; G = max_new_tokens + 1."""

    token_ids: Int[Array, "B G"]
    """Raw argmax ids, those discarded behind an indicator included; padding behind `lengths`."""
    lengths: Int[Array, " B"]
    coordinates: Float[Array, "B G 3"]
    """The coordinate decoded at each discarded place, metres, ego frame; zeros elsewhere."""
    is_coordinate: Bool[Array, "B G"]
    in_one_pass: Bool[Array, " B"]
    """Answered by the frame alone, without a token-by-token step."""
    trajectory: Float[Array, "B T 3"] | None = None
    """Where one token stands for the whole trajectory: decoded at the first coordinate, if there is one;
    metres, ego frame."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """An answer in the making; the fields that `Generation` has too mean the same."""

    cache: KVCache
    """Holds the prompt and all `count` tokens fed."""
    hidden: Float[Array, "B D"]
    """Final-normed hidden state of the last token fed: the next id is read from it."""
    after_indicator: Bool[Array, " B"]
    """The last token fed was an indicator: the next id is discarded and a coordinate decoded."""
    finished: Bool[Array, " B"]
    count: Int[Array, " B"]
    token_ids: Int[Array, "B G"]
    coordinates: Float[Array, "B G 3"]
    is_coordinate: Bool[Array, "B G"]
    first_indicator: Float[Array, "B D"]
    """The hidden state that the first coordinate was decoded from; zeros before."""
    seen: Seen


def start(
    model: SpaceDrive,
    batch: DrivingBatch,
    tokenizer: DrivingTokenizer,
    max_new_tokens: int,
    repetition_penalty: float,
) -> Progress:
    """Runs the prompts; nothing is generated yet."""
    size, total = batch.size, max_new_tokens + 1
    hidden, cache = prefill(model, batch, model.embeddings(batch), total)
    return Progress(
        cache=cache,
        hidden=jnp.take_along_axis(hidden, (batch.lengths - 1)[:, None, None], axis=1)[:, 0],
        after_indicator=jnp.zeros(size, bool),
        finished=jnp.zeros(size, bool),
        count=jnp.zeros(size, jnp.int32),
        token_ids=jnp.full((size, total), tokenizer.padding, jnp.int32),
        coordinates=jnp.zeros((size, total, 3), jnp.float32),
        is_coordinate=jnp.zeros((size, total), bool),
        first_indicator=jnp.zeros((size, hidden.shape[-1]), hidden.dtype),
        seen=prompt_ids_seen(model, batch, repetition_penalty),
    )


def prefill(
    model: SpaceDrive, batch: DrivingBatch, embeddings: Float[Array, "B S D"], room: int
) -> tuple[Float[Array, "B S D"], KVCache]:
    """Hidden states of right-padded embeddings, and a cache with room for more tokens behind them."""
    positions = jnp.swapaxes(batch.positions, 0, 1)
    return model.vlm.prefill(embeddings, positions, lengths=batch.lengths, room=room)


def decode_coordinate(model: SpaceDrive, hidden: Float[Array, "... D"]) -> Float[Array, "... 3"]:
    """The coordinate that an indicator's hidden state stands for, metres, ego frame; the first waypoint
    where it stands for the whole trajectory.
    """
    if model.config.decoder.whole_trajectory:
        return model.decode_coordinates(hidden[..., None, :])[..., 0, :]
    return model.decode_coordinates(hidden)


def position_embedding(model: SpaceDrive, at_indicator: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """What position input feeds behind a generated indicator, from its hidden state.

    As published: the decoded coordinate's encoding with z = 0. A hidden state that a grid would be searched
    for is an encoding already and is fed as it is. With the semantic embedding, the coordinate fed is
    decoded without it, unlike the one that is answered.
    """
    if model.config.decoder.is_grid:
        return at_indicator
    point = decode_coordinate(model, model.without_semantics(at_indicator))
    return model.embed_coordinates(point * jnp.array([1.0, 1.0, 0.0]))


def prompt_ids_seen(model: SpaceDrive, batch: DrivingBatch, repetition_penalty: float) -> Seen:
    """The prompts' ids, those of inserted ego tokens among them; None without a penalty."""
    if repetition_penalty == 1.0:
        return None
    nothing = jnp.zeros((batch.size, model.config.vlm.decoder.vocab_size), bool)
    valid = jnp.arange(batch.token_ids.shape[1]) < batch.lengths[:, None]
    return mark_seen(nothing, batch.token_ids, valid)


def mark_seen(seen: Seen, token_ids: Int[Array, "B K"], valid: Bool[Array, "B K"]) -> Seen:
    """Adds the valid ids."""
    if seen is None:
        return None
    places = jnp.where(valid, token_ids, seen.shape[-1])  # out of range where invalid: dropped
    return seen.at[jnp.arange(len(seen))[:, None], places].set(True, mode="drop")


def penalise(
    scores: Float[Array, "B vocabulary"], seen: Seen, penalty: float
) -> Float[Array, "B vocabulary"]:
    """Lowers the scores of ids already seen: positive ones divided, negative ones multiplied."""
    if seen is None:
        return scores
    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)

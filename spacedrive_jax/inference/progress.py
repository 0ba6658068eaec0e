"""The state of a generation, and what both ways of generating share."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.constants import NUM_WAYPOINTS
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.models.attention import KVCache
from spacedrive_jax.models.spacedrive import SpaceDrive

Seen = Bool[Array, "B vocabulary"] | None
"""Ids that a sample's prompt and answer have so far; None where nothing asks for them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
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
    coordinates: Float[Array, "B G T 3"]
    """What was decoded at each position token (`token_coordinates`), zeros elsewhere."""
    is_position: Bool[Array, "B G"]
    seen: Seen


def start(
    model: SpaceDrive,
    batch: DrivingBatch,
    tokenizer: DrivingTokenizer,
    max_new_tokens: int,
    repetition_penalty: float,
) -> DecodeState:
    """Runs the prompts; nothing is generated yet."""
    embeddings, deepstack = model.decoder_inputs(batch)
    room = max_new_tokens + 1
    hidden, cache = prefill(model, batch.position_ids, batch.lengths, embeddings, deepstack, room)
    last = jnp.take_along_axis(hidden, (batch.lengths - 1)[:, None, None], axis=1)[:, 0]
    return nothing_generated(model, batch, tokenizer, cache, last, max_new_tokens, repetition_penalty)


def nothing_generated(
    model: SpaceDrive,
    batch: DrivingBatch,
    tokenizer: DrivingTokenizer,
    cache: KVCache,
    hidden: Float[Array, "B D"],
    max_new_tokens: int,
    repetition_penalty: float,
) -> DecodeState:
    """Prompts that have been run, without a token of their answers.

    Args:
        model: the model.
        batch: the prompts.
        tokenizer: gives the special ids.
        cache: holds the prompts.
        hidden: of each prompt's last token.
        max_new_tokens: longest answer.
        repetition_penalty: as in `generate`.
    """
    size, total = batch.size, max_new_tokens + 1
    return DecodeState(
        cache=cache,
        hidden=hidden,
        after_indicator=jnp.zeros(size, bool),
        finished=jnp.zeros(size, bool),
        count=jnp.zeros(size, jnp.int32),
        token_ids=jnp.full((size, total), tokenizer.padding, jnp.int32),
        coordinates=jnp.zeros((size, total, coordinates_per_token(model), 3), jnp.float32),
        is_position=jnp.zeros((size, total), bool),
        seen=prompt_ids_seen(model, batch, repetition_penalty),
    )


def prefill(
    model: SpaceDrive,
    position_ids: Int[Array, "B 3 S"],
    lengths: Int[Array, " B"],
    embeddings: Float[Array, "B S D"],
    deepstack: Float[Array, "depths B S D"] | None,
    room: int,
) -> tuple[Float[Array, "B S D"], KVCache]:
    """Hidden states of right-padded embeddings, and a cache with room for more tokens behind them.

    Raises:
        ConfigError: the whole would be longer than the rotary angles hold.
    """
    model.config.vlm.decoder.check_length(embeddings.shape[1] + room - 1, "prompt and answer")
    axes_first = jnp.swapaxes(position_ids, 0, 1)
    return model.vlm.decoder.prefill(embeddings, axes_first, lengths=lengths, deepstack=deepstack, room=room)


def coordinates_per_token(model: SpaceDrive) -> int:
    """T: coordinates that one position token stands for."""
    return NUM_WAYPOINTS if model.config.decoder.whole_trajectory else 1


def token_coordinates(model: SpaceDrive, hidden: Float[Array, "... D"]) -> Float[Array, "... T 3"]:
    """What an indicator's hidden state stands for, metres, ego frame: one coordinate, or all waypoints where
    one token stands for them.
    """
    if model.config.decoder.whole_trajectory:
        return model.decode_coordinates(hidden[..., None, :])
    return model.decode_coordinates(hidden)[..., None, :]


def coordinate_indices(
    token_ids: Int[Array | np.ndarray, "B G"], lengths: Int[Array | np.ndarray, " B"], indicator: int
) -> Bool[Array, "B G"]:
    """Where a finished answer has its coordinates: behind the first indicator of every run.

    As published, by the raw ids, discarded ones included: an indicator in a discarded place starts no run of
    its own, and what was decoded further down a run does not count. One that ends the answer has no place
    for a coordinate. The published code finds a run's first indicator by rolling the answer round by one
    place, so an answer that begins and ends with an indicator loses its first coordinate (fidelity Q35);
    with one indicator alone nothing is rolled.

    Args:
        token_ids: raw ids, as `Generation` has them.
        lengths: of the answers.
        indicator: the indicator's id.
    """
    indices = jnp.arange(token_ids.shape[1])[None]
    is_indicator = (token_ids == indicator) & (indices < lengths[:, None])
    ends_with_one = jnp.take_along_axis(is_indicator, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
    before = jnp.concatenate([ends_with_one, is_indicator[:, :-1]], axis=1)
    several = is_indicator.sum(axis=1, keepdims=True) > 1
    first_of_run = is_indicator & ~(before & several)
    behind = jnp.pad(first_of_run[:, :-1], ((0, 0), (1, 0)))
    return behind & (indices < lengths[:, None])


def position_embedding(model: SpaceDrive, at_indicator: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """What position input feeds behind a generated indicator, from its hidden state.

    As published: the decoded coordinate's encoding with z = 0. A hidden state that a grid would be searched
    for is an encoding already and is fed as it is. With the semantic embedding, the coordinate fed is
    decoded without it, unlike the one that is answered.
    """
    if model.config.decoder.is_grid:
        return at_indicator
    first = token_coordinates(model, model.without_semantics(at_indicator))[..., 0, :]
    plane = jax.lax.broadcast_to_rank(jnp.array([1.0, 1.0, 0.0]), first.ndim)
    return model.embed_coordinates(first * plane)


def prompt_ids_seen(model: SpaceDrive, batch: DrivingBatch, repetition_penalty: float) -> Seen:
    """The prompts' ids, those of inserted ego tokens among them; None without a penalty."""
    if repetition_penalty == 1.0:
        return None
    nothing = jnp.zeros((batch.size, model.config.vlm.decoder.vocab_size), bool)
    valid = jnp.arange(batch.token_ids.shape[1])[None] < batch.lengths[:, None]
    return mark_seen(nothing, batch.token_ids, valid)


def scatter_rows(
    rows: Shaped[Array, "B G ..."], indices: Int[Array, "B K"], values: Shaped[Array, "B K ..."]
) -> Shaped[Array, "B G ..."]:
    """Sets values in each sample's own row; indices behind the row's end are dropped.

    `rows.at[arange(B)[:, None], indices].set(values)` says the same, as `jnp.put_along_axis` does, but not to
    the partitioner, which then sends all samples' values to every device.
    """
    return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(rows, indices, values)


def mark_seen(seen: Seen, token_ids: Int[Array, "B K"], valid: Bool[Array, "B K"]) -> Seen:
    """Adds the valid ids."""
    if seen is None:
        return None
    indices = jnp.where(valid, token_ids, seen.shape[-1])  # out of range where invalid: dropped
    return scatter_rows(seen, indices, jnp.ones_like(valid))


def apply_repetition_penalty(
    scores: Float[Array, "B vocabulary"], seen: Seen, penalty: float
) -> Float[Array, "B vocabulary"]:
    """Lowers the scores of ids already seen: positive ones divided, negative ones multiplied."""
    if seen is None:
        return scores
    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)

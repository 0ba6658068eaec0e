"""Greedy text generation with a cache: one prefill, then a loop of single-token steps, all jittable."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spacedrive_jax.models.language_model import KVCache, LanguageModel


class _Progress(NamedTuple):
    """The loop's state: tokens so far, the last one of each sample, who has stopped, the cache."""

    step: Int[Array, ""]
    tokens: Int[Array, "B T"]
    last: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    cache: KVCache


def continue_greedily(
    decoder: LanguageModel,
    embeddings: Float[Array, "B S D"],
    position_ids: Int[Array, "3 B S"],
    *,
    rope_delta: Int[Array, " B"],
    lengths: Int[Array, " B"],
    deepstack: Float[Array, "depths B S D"] | None,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Int[Array, "B T"]:
    """Continues embedded prompts with the most likely token each time.

    Args:
        decoder: The language model.
        embeddings: Of right-padded prompts.
        position_ids: Theirs.
        rope_delta: Offset of each sample's generated positions.
        lengths: Valid tokens per prompt.
        deepstack: See `LanguageModel`.
        max_new_tokens: T, tokens to generate per sample at most.
        stop_ids: Ids that end a sample (the id itself is kept).
        pad_id: What stands behind the end of a sample that stopped.

    Returns:
        The new ids.
    """
    batch = len(embeddings)
    stops = jnp.asarray(stop_ids, jnp.int32)

    def choose(hidden: Float[Array, "B D"]) -> Int[Array, " B"]:
        return jnp.argmax(decoder.logits(hidden), axis=-1).astype(jnp.int32)

    def put(progress: _Progress, choice: Int[Array, " B"], cache: KVCache) -> _Progress:
        token = jnp.where(progress.stopped, pad_id, choice)
        return _Progress(
            step=progress.step + 1,
            tokens=progress.tokens.at[:, progress.step].set(token),
            last=token,
            stopped=progress.stopped | jnp.isin(token, stops),
            cache=cache,
        )

    def proceed(progress: _Progress) -> _Progress:
        next_positions = jnp.broadcast_to(progress.cache.lengths + rope_delta, (3, batch))[..., None]
        next_embeddings = decoder.embed(progress.last[:, None])
        hidden, cache = decoder(next_embeddings, next_positions, cache=progress.cache)
        assert cache is not None
        return put(progress, choose(hidden[:, 0]), cache)

    hidden, filled = decoder.prefill(
        embeddings, position_ids, lengths=lengths, deepstack=deepstack, room=max_new_tokens
    )
    last_hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    nothing = _Progress(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
        last=jnp.zeros((batch,), jnp.int32),
        stopped=jnp.zeros((batch,), bool),
        cache=filled,
    )
    first = put(nothing, choose(last_hidden), filled)
    done = jax.lax.while_loop(
        lambda progress: (progress.step < max_new_tokens) & ~progress.stopped.all(), proceed, first
    )
    return done.tokens

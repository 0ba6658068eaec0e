"""Greedy text generation with a cache: one prefill, then a compiled loop of single-token steps."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.language_model import KVCache
from spacedrive_jax.models.vision_language import VisionLanguageModel


def generate(
    model: VisionLanguageModel,
    token_ids: Int[np.ndarray, "B S"],
    *,
    max_new_tokens: int,
    images: Float[Array, "B N P C"] | None = None,
    image_grid: tuple[int, int] | None = None,
    lengths: Int[np.ndarray, " B"] | None = None,
    stop_ids: tuple[int, ...] = (),
    pad_id: int = 0,
) -> Int[np.ndarray, "B T"]:
    """Continues prompts with the most likely token each time.

    Args:
        model: The model.
        token_ids: Right-padded prompts on the host, one run of image tokens per image.
        max_new_tokens: T, tokens to generate per sample at most.
        images: Flattened patches of each sample's N images; see `VisionLanguageModel.encode_images`.
        image_grid: Patch rows and columns of every image.
        lengths: Valid tokens per prompt; None when all are.
        stop_ids: Ids that end a sample (the id itself is kept).
        pad_id: What stands behind the end of a sample that stopped.

    Returns:
        The new ids, without the prompt.

    Raises:
        ConfigError: If `max_new_tokens` is not positive, a prompt is empty, or images and ids do not fit.
    """
    token_ids = np.asarray(token_ids)
    valid = np.full(len(token_ids), token_ids.shape[1]) if lengths is None else np.asarray(lengths)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if (valid < 1).any() or (valid > token_ids.shape[1]).any():
        raise ConfigError(f"prompt lengths {valid.tolist()} must lie in 1..{token_ids.shape[1]}")
    images_per_sample = 0 if images is None else images.shape[1]
    position_ids, deltas = model.position_ids(token_ids, images_per_sample, image_grid, lengths=valid)
    graph, state = nnx.split(model)
    return np.asarray(
        _generate(
            graph,
            state,
            jnp.asarray(token_ids, jnp.int32),
            images,
            jnp.asarray(position_ids),
            jnp.asarray(deltas),
            jnp.asarray(valid, jnp.int32),
            image_grid=image_grid,
            max_new_tokens=max_new_tokens,
            stop_ids=tuple(stop_ids),
            pad_id=pad_id,
        )
    )


class _Progress(NamedTuple):
    """The loop's state: tokens so far, the last one of each sample, who has stopped, the cache."""

    step: Int[Array, ""]
    tokens: Int[Array, "B T"]
    last: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    cache: KVCache


@functools.partial(jax.jit, static_argnames=("graph", "image_grid", "max_new_tokens", "stop_ids", "pad_id"))
def _generate(
    graph: nnx.GraphDef,
    state: nnx.State,
    token_ids: Int[Array, "B S"],
    images: Float[Array, "B N P C"] | None,
    position_ids: Int[Array, "3 B S"],
    deltas: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    image_grid: tuple[int, int] | None,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Int[Array, "B T"]:
    model: VisionLanguageModel = nnx.merge(graph, state)
    decoder = model.decoder
    batch = len(token_ids)
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
        next_positions = jnp.broadcast_to(progress.cache.lengths + deltas, (3, batch))[..., None]
        embeddings = decoder.embed(progress.last[:, None])
        hidden, cache = decoder(embeddings, next_positions, cache=progress.cache)
        assert cache is not None
        return put(progress, choose(hidden[:, 0]), cache)

    features = None if images is None else model.encode_image_batch(images, image_grid)
    embeddings = model.embed(token_ids, features)
    hidden, filled = model.prefill(embeddings, position_ids, lengths=lengths, room=max_new_tokens)
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

"""Greedy token-by-token generation in which an indicator is answered with a coordinate.

After the indicator token is fed, its hidden state is decoded to metres; the id predicted there is kept in
the raw output but not fed: the position token takes its place (`reference_behaviour`, Generation).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.model import SpaceDrive
from spacedrive_jax.vlm.cache import KVCache


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


def generate(
    model: SpaceDrive, batch: DrivingBatch, tokenizer: DrivingTokenizer, max_new_tokens: int
) -> Generation:
    """Continues every prompt of a batch until it ends its turn; jit it over `batch`.

    A sample stops at `<|im_end|>` or after `max_new_tokens`, neither tested on a discarded id, so it can
    reach one token more.
    """
    size, prompt = batch.token_ids.shape
    total = max_new_tokens + 1
    config = model.config
    empty = KVCache.empty(config.vlm.decoder, config.compute, batch=size, capacity=prompt + total)
    hidden, cache = model.vlm.decode(
        model.embeddings(batch), jnp.swapaxes(batch.positions, 0, 1), lengths=batch.lengths, cache=empty
    )
    last = jnp.take_along_axis(hidden, (batch.lengths - 1)[:, None, None], axis=1)[:, 0]
    rows = jnp.arange(size)
    state: dict[str, Any] = {
        "cache": cache,
        "hidden": last,
        "after_indicator": jnp.zeros(size, bool),
        "finished": jnp.zeros(size, bool),
        "count": jnp.zeros(size, jnp.int32),
        "ids": jnp.full((size, total), tokenizer.padding, jnp.int32),
        "coordinates": jnp.zeros((size, total, 3), jnp.float32),
        "is_coordinate": jnp.zeros((size, total), bool),
    }

    def step(state: dict[str, Any]) -> dict[str, Any]:
        active, discarded = ~state["finished"], state["after_indicator"]
        chosen = jnp.argmax(model.vlm.decoder.logits(state["hidden"]), axis=-1).astype(jnp.int32)
        coordinate = model.decoder(state["hidden"])
        place = jnp.where(active, state["count"], total)  # out of range where finished: dropped
        decoded = active & discarded
        ids = state["ids"].at[rows, place].set(chosen, mode="drop")
        coordinates = (
            state["coordinates"]
            .at[rows, place]
            .set(jnp.where(decoded[:, None], coordinate, 0.0), mode="drop")
        )
        is_coordinate = state["is_coordinate"].at[rows, place].set(decoded, mode="drop")
        count = state["count"] + active
        ended = (chosen == tokenizer.turn_end) | (count >= max_new_tokens)
        finished = state["finished"] | (active & ~discarded & ended)

        fed = jnp.where(discarded, tokenizer.position, chosen)
        embedding = model.vlm.embed(fed[:, None])
        if config.position_input:
            encoded = model.encoder(coordinate * jnp.array([1.0, 1.0, 0.0]))[:, None]
            embedding = jnp.where(discarded[:, None, None], encoded.astype(embedding.dtype), embedding)
        cache = state["cache"]
        positions = jnp.broadcast_to((cache.lengths + batch.position_offset)[None, :, None], (3, size, 1))
        hidden, cache = model.vlm.decode(
            embedding, positions, lengths=(~finished).astype(jnp.int32), cache=cache
        )
        return {
            "cache": cache,
            "hidden": hidden[:, 0],
            "after_indicator": ~discarded & (chosen == tokenizer.indicator),
            "finished": finished,
            "count": count,
            "ids": ids,
            "coordinates": coordinates,
            "is_coordinate": is_coordinate,
        }

    end = jax.lax.while_loop(lambda state: ~jnp.all(state["finished"]), step, state)
    return Generation(end["ids"], end["count"], end["coordinates"], end["is_coordinate"])


def answer_text(
    tokenizer: DrivingTokenizer,
    token_ids: Int[np.ndarray, " G"],
    coordinates: Float[np.ndarray, "G 3"],
    is_coordinate: Bool[np.ndarray, " G"],
) -> str:
    """One sample's answer as text, each coordinate printed as `(x, y)` with two decimals behind its
    indicator, special tokens spelled out, as the published code writes it.

    Args:
        tokenizer: decodes the ids.
        token_ids: the generated ids, cut to their length.
        coordinates: metres.
        is_coordinate: where they stand.
    """
    pieces: list[str] = []
    run: list[int] = []
    for token, point, decoded in zip(token_ids.tolist(), coordinates, is_coordinate, strict=True):
        if decoded:
            pieces += [tokenizer.decode(run), f"({point[0]:.2f}, {point[1]:.2f})"]
            run = []
        else:
            run.append(token)
    return "".join([*pieces, tokenizer.decode(run)])

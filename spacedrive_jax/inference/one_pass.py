"""Planning in one pass: prompt and expected answer in a single forward, checked afterwards.

A planning answer has a fixed frame around its coordinates, `Here is the planning trajectory [... ].`, so all
of its tokens are known beforehand. They are run together with the prompt. Where the most likely id at every
text place is the frame's own, greedy generation would have fed exactly these tokens, and the coordinates
decoded at the indicators are the ones it would have decoded. (Speculative decoding, Leviathan et al. 2023,
with the frame as the draft.) Where a sample says something else, its cache is cut back to that place and
generation goes on from there token by token.

With position input on, what stands at a position token depends on the coordinate before it: the frame is
then cut behind every indicator, and the pieces are run one after the other over the cache, six short steps
for six waypoints.

Where an answer reasons in words first, these are generated token by token, and the frame is run behind them
over the cache they left (`continue_frame`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.inference.progress import (
    DecodeState,
    Seen,
    apply_repetition_penalty,
    coordinates_per_token,
    mark_seen,
    nothing_generated,
    position_embedding,
    prefill,
    scatter_rows,
    token_coordinates,
)
from spacedrive_jax.models.attention import KVCache
from spacedrive_jax.models.spacedrive import SpaceDrive

TIE_MARGIN = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.5}
"""By `compute.dtype`. Where the best two scores are closer, rounding could let one pass and token by token
differ (they sum in another order), so the place counts as not explained by the frame."""


def run_frame(
    model: SpaceDrive,
    batch: DrivingBatch,
    tokenizer: DrivingTokenizer,
    frame: tuple[int, ...],
    max_new_tokens: int,
    repetition_penalty: float,
) -> DecodeState:
    """Runs prompts with the frame behind them and keeps what each sample agrees with.

    Args:
        model: the model.
        batch: prompts.
        tokenizer: gives the special ids.
        frame: the answer's ids, a position token behind every indicator, the end of the turn last; no
            longer than `max_new_tokens`.
        max_new_tokens: longest answer.
        repetition_penalty: as in `generate`.

    Returns:
        Finished samples with their whole answer, and unfinished ones cut back to the first place at which
        they differ (to the prompt where that is a near tie, so that no rounding of this pass decides it).
    """
    hidden, cache = _hidden_states(model, batch, tokenizer, frame, max_new_tokens + 1)
    prompts = dataclasses.replace(cache, lengths=batch.lengths)
    nothing = nothing_generated(
        model, batch, tokenizer, prompts, hidden[:, 0], max_new_tokens, repetition_penalty
    )
    return _agreed(model, tokenizer, frame, hidden, nothing, jnp.ones(batch.size, bool), repetition_penalty)


def continue_frame(
    model: SpaceDrive,
    batch: DrivingBatch,
    tokenizer: DrivingTokenizer,
    frame: tuple[int, ...],
    progress: DecodeState,
    drafted: Bool[Array, " B"],
    repetition_penalty: float,
) -> DecodeState:
    """Runs the frame behind what some samples have said, and keeps what each of them agrees with.

    Args:
        model: the model.
        batch: prompts.
        tokenizer: gives the special ids.
        frame: the rest of the answer's ids, as in `run_frame`.
        progress: what was said so far.
        drafted: whose answer the frame goes on with; the others stay as they are. There must be room for the
            frame in their answers.
        repetition_penalty: as in `generate`.

    Returns:
        As `run_frame`; a sample that is cut back at a near tie stands where it stood.
    """
    fed = frame[:-1]
    pieces = _cut_behind_indicators(fed, tokenizer.indicator) if model.config.position_input else [fed]
    behind = [False] + [True] * (len(pieces) - 1)
    rest, cache = _run_pieces(
        model, batch, tokenizer, pieces, behind, progress.cache, progress.hidden, drafted
    )
    hidden = jnp.concatenate([progress.hidden[:, None], rest], axis=1)
    before = dataclasses.replace(progress, cache=dataclasses.replace(cache, lengths=progress.cache.lengths))
    return _agreed(model, tokenizer, frame, hidden, before, drafted, repetition_penalty)


def _agreed(
    model: SpaceDrive,
    tokenizer: DrivingTokenizer,
    frame: tuple[int, ...],
    hidden: Float[Array, "B F D"],
    before: DecodeState,
    drafted: Bool[Array, " B"],
    repetition_penalty: float,
) -> DecodeState:
    """What of the frame the drafted samples agree with, behind what they have said before.

    Args:
        model: the model.
        tokenizer: gives the special ids.
        frame: ids.
        hidden: predicts each of them.
        before: the answers so far; the cache holds the frame too, behind its lengths.
        drafted: the samples whose answers grow.
        repetition_penalty: as in `generate`.
    """
    length = len(frame)
    expected = jnp.asarray(frame, jnp.int32)[None]
    discarded = np.asarray(frame)[None] == tokenizer.position
    position_indices = np.flatnonzero(discarded)
    scores = model.vlm.decoder.logits(hidden)
    chosen, margin = _choose(scores, before.seen, repetition_penalty)

    is_tie = margin < TIE_MARGIN[model.config.compute.dtype]
    differs = is_tie | ((chosen != expected) & ~discarded)
    agrees = ~jnp.any(differs, axis=1)
    first = jnp.argmax(differs, axis=1)
    tied = jnp.take_along_axis(is_tie, first[:, None], axis=1)[:, 0]
    count = jnp.where(agrees, length, jnp.where(tied, 0, first)).astype(jnp.int32)
    count = jnp.where(drafted, count, 0)

    frame_indices = jnp.arange(length)[None]
    kept = frame_indices < count[:, None]
    coordinates = jnp.zeros((*hidden.shape[:2], coordinates_per_token(model), 3), jnp.float32)
    coordinates = coordinates.at[:, position_indices].set(
        token_coordinates(model, hidden[:, position_indices])
    )
    is_position = kept & discarded
    # Out of range where it is not kept: dropped.
    indices = jnp.where(kept, before.count[:, None] + frame_indices, before.token_ids.shape[1])
    last = jnp.minimum(count, length - 1)
    here = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return DecodeState(
        cache=dataclasses.replace(before.cache, lengths=before.cache.lengths + count),
        hidden=jnp.where(drafted[:, None], here, before.hidden),
        after_indicator=jnp.where(drafted, jnp.asarray(discarded)[0, last], before.after_indicator),
        finished=before.finished | (drafted & agrees),
        count=before.count + count,
        token_ids=scatter_rows(before.token_ids, indices, chosen),
        coordinates=scatter_rows(
            before.coordinates, indices, jnp.where(is_position[..., None, None], coordinates, 0.0)
        ),
        is_position=scatter_rows(before.is_position, indices, is_position),
        seen=mark_seen(before.seen, chosen, kept),
    )


def _choose(
    scores: Float[Array, "B F vocabulary"], seen: Seen, penalty: float
) -> tuple[Int[Array, "B F"], Float[Array, "B F"]]:
    """The best id at every place and how far it leads; a penalty sees the ids chosen before."""

    def best(scores: Float[Array, "... vocabulary"]) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
        ids = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        vocabulary = jax.lax.broadcast_to_rank(jnp.arange(scores.shape[-1]), scores.ndim)
        others = jnp.where(vocabulary == ids[..., None], -jnp.inf, scores)
        return ids, jnp.max(scores, axis=-1) - jnp.max(others, axis=-1)

    if seen is None:
        return best(scores)

    def step(
        seen: Bool[Array, "B vocabulary"], scores: Float[Array, "B vocabulary"]
    ) -> tuple[Bool[Array, "B vocabulary"], tuple[Array, Array]]:
        ids, margin = best(apply_repetition_penalty(scores, seen, penalty))
        return scatter_rows(seen, ids[:, None], jnp.ones((len(ids), 1), bool)), (ids, margin)

    _, (ids, margin) = jax.lax.scan(step, seen, jnp.swapaxes(scores, 0, 1))
    return ids.T, margin.T


def _hidden_states(
    model: SpaceDrive,
    batch: DrivingBatch,
    tokenizer: DrivingTokenizer,
    frame: tuple[int, ...],
    room: int,
) -> tuple[Float[Array, "B F D"], KVCache]:
    """The hidden state that predicts each of the frame's tokens, and the cache that holds all of them."""
    fed = frame[:-1]  # nothing is predicted from the end of the turn
    pieces = _cut_behind_indicators(fed, tokenizer.indicator) if model.config.position_input else [fed]
    hidden, cache = _run_with_prompt(model, batch, pieces[0], room)
    if len(pieces) == 1:
        return hidden, cache

    everyone = jnp.ones(batch.size, bool)
    behind = [True] * (len(pieces) - 1)
    rest, cache = _run_pieces(model, batch, tokenizer, pieces[1:], behind, cache, hidden[:, -1], everyone)
    return jnp.concatenate([hidden, rest], axis=1), cache


def _run_pieces(
    model: SpaceDrive,
    batch: DrivingBatch,
    tokenizer: DrivingTokenizer,
    pieces: Sequence[tuple[int, ...]],
    behind_indicator: Sequence[bool],
    cache: KVCache,
    last: Float[Array, "B D"],
    growing: Bool[Array, " B"],
) -> tuple[Float[Array, "B W D"], KVCache]:
    """Hidden states of pieces of text run one after the other over the cache, and the cache.

    Args:
        model: the model.
        batch: prompts.
        tokenizer: gives the padding.
        pieces: ids; W in all.
        behind_indicator: which of them begin with a coordinate's encoding.
        cache: what stands before the first.
        last: hidden state of the token before the first.
        growing: samples whose cache counts the pieces.
    """
    valid = np.array([len(piece) for piece in pieces], np.int32)
    width = int(valid.max())
    padded = np.array([list(piece) + [tokenizer.padding] * (width - len(piece)) for piece in pieces])

    def run_piece(
        carry: tuple[KVCache, Float[Array, "B D"]],
        piece: tuple[Int[Array, " W"], Int[Array, ""], Bool[Array, ""]],
    ) -> tuple[tuple[KVCache, Float[Array, "B D"]], Float[Array, "B W D"]]:
        cache, before = carry
        ids, count, encoded_first = piece
        embeddings = model.vlm.embed(jnp.broadcast_to(ids, (batch.size, width)))
        if any(behind_indicator):
            encoded = position_embedding(model, before).astype(embeddings.dtype)
            encoded = jnp.where(encoded_first, encoded, embeddings[:, 0])
            embeddings = embeddings.at[:, 0].set(encoded)
        position_ids = (cache.lengths + batch.rope_delta)[:, None] + jnp.arange(width)[None]
        hidden, grown = model.vlm.decoder(
            embeddings,
            jnp.broadcast_to(position_ids, (3, *position_ids.shape)),
            lengths=jnp.where(growing, count, 0),
            cache=cache,
        )
        assert grown is not None
        return (grown, jnp.take(hidden, count - 1, axis=1)), hidden

    (cache, _), hidden = jax.lax.scan(
        run_piece,
        (cache, last),
        (jnp.asarray(padded, jnp.int32), jnp.asarray(valid), jnp.asarray(behind_indicator)),
    )
    parts = [hidden[index, :, :count] for index, count in enumerate(valid)]
    return jnp.concatenate(parts, axis=1), cache


def _cut_behind_indicators(ids: tuple[int, ...], indicator: int) -> list[tuple[int, ...]]:
    ends = [index + 1 for index, token in enumerate(ids) if token == indicator]
    bounds = [0, *ends, len(ids)]
    return [ids[start:stop] for start, stop in itertools.pairwise(bounds)]


def _run_with_prompt(
    model: SpaceDrive, batch: DrivingBatch, piece: tuple[int, ...], room: int
) -> tuple[Float[Array, "B V D"], KVCache]:
    """One forward over prompts with a piece of text right behind each.

    Returns:
        Hidden states of each prompt's last token and of the piece's, V together; the cache, with room for
        `room` tokens behind the longest prompt.
    """
    width = len(piece)
    behind = batch.lengths[:, None] + jnp.arange(width)[None]
    text = model.vlm.embed(jnp.broadcast_to(jnp.asarray(piece, jnp.int32), (batch.size, width)))
    embeddings, deepstack = model.decoder_inputs(batch)
    embeddings = jnp.pad(embeddings, ((0, 0), (0, width), (0, 0)))
    if deepstack is not None:
        deepstack = jnp.pad(deepstack, ((0, 0), (0, 0), (0, width), (0, 0)))
    position_ids = jnp.pad(batch.position_ids, ((0, 0), (0, 0), (0, width)))
    counted = jnp.broadcast_to((behind + batch.rope_delta[:, None])[:, None], (batch.size, 3, width))
    counted = counted.astype(position_ids.dtype)
    position_ids = jax.vmap(lambda row, at, new: row.at[:, at].set(new))(position_ids, behind, counted)
    embeddings = scatter_rows(embeddings, behind, text)
    lengths = batch.lengths + width
    hidden, cache = prefill(model, position_ids, lengths, embeddings, deepstack, room - width)
    indices = batch.lengths[:, None] - 1 + jnp.arange(width + 1)[None]
    return jnp.take_along_axis(hidden, indices[..., None], axis=1), cache

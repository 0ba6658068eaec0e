"""Greedy generation in which an indicator is answered with a coordinate.

After the indicator token is fed, its hidden state is decoded to metres; the id predicted there is kept in
the raw output but not fed: the position token takes its place. Which of the coordinates count is read from
the finished answer (`coordinate_indices`), as the published code does. An answer
whose frame is known can be run in one pass first (`one_pass`); what the frame does not explain is generated
token by token, here.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.config import Config
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.inference.answers import Generation, answer_limit, expected_draft
from spacedrive_jax.inference.one_pass import continue_frame, run_frame
from spacedrive_jax.inference.progress import (
    DecodeState,
    apply_repetition_penalty,
    coordinate_indices,
    mark_seen,
    position_embedding,
    scatter_rows,
    start,
    token_coordinates,
)
from spacedrive_jax.models.partitioning import activations_on
from spacedrive_jax.models.spacedrive import SpaceDrive
from spacedrive_jax.training.sharding import replicated


@dataclasses.dataclass(frozen=True)
class _Program:
    """What a compiled program for answers depends on."""

    graph: nnx.GraphDef
    mesh: Mesh
    ids: tuple[int, ...]
    """Of the tokenizer, as far as answers are made of them."""
    max_new_tokens: int
    repetition_penalty: float
    frame: tuple[int, ...] | None
    opening: int
    tokenizer: DrivingTokenizer = dataclasses.field(compare=False)


def answering_step(
    graph: nnx.GraphDef,
    mesh: Mesh,
    tokenizer: DrivingTokenizer,
    max_new_tokens: int,
    *,
    repetition_penalty: float = 1.0,
    frame: tuple[int, ...] | None = None,
    opening: int = 0,
) -> jax.stages.Wrapped:
    """`generate`, jitted: trainables, frozen weights and a batch of prompts on a mesh to answers.

    Asked for again it is the same function, which compiles nothing anew; so do models of one kind share it.

    Args:
        graph: of the model.
        mesh: where the arrays live; every host gets all answers.
        tokenizer: see `generate`, as for the rest.
        max_new_tokens: likewise.
        repetition_penalty: likewise.
        frame: likewise.
        opening: likewise.
    """
    ids = (tokenizer.turn_end, tokenizer.indicator, tokenizer.position, tokenizer.padding)
    return _jitted(_Program(graph, mesh, ids, max_new_tokens, repetition_penalty, frame, opening, tokenizer))


def planning_step(
    graph: nnx.GraphDef, mesh: Mesh, config: Config, tokenizer: DrivingTokenizer
) -> jax.stages.Wrapped:
    """`answering_step` for a run's planning questions: its expected answer in one pass, else token by token.

    Args:
        graph: of the model.
        mesh: where the arrays live.
        config: of the run: what is expected of an answer, and how long one may be.
        tokenizer: the run's.

    Raises:
        ConfigError: see `expected_draft`.
    """
    draft, limit = expected_draft(config, tokenizer), answer_limit(config)
    frame, opening = (None, 0) if draft is None else (draft.frame, draft.opening)
    return answering_step(graph, mesh, tokenizer, limit, frame=frame, opening=opening)


@functools.lru_cache(maxsize=4)
def _jitted(program: _Program) -> jax.stages.Wrapped:
    # The answers are small: every host gets them whole, and the first one writes them.
    @functools.partial(jax.jit, out_shardings=replicated(program.mesh))
    def answer(trainable: nnx.State, frozen: nnx.State, batch: DrivingBatch) -> Generation:
        with activations_on(program.mesh):
            return generate(
                nnx.merge(program.graph, trainable, frozen),
                batch,
                program.tokenizer,
                program.max_new_tokens,
                repetition_penalty=program.repetition_penalty,
                frame=program.frame,
                opening=program.opening,
            )

    return answer


def generate(
    model: SpaceDrive,
    batch: DrivingBatch,
    tokenizer: DrivingTokenizer,
    max_new_tokens: int,
    *,
    repetition_penalty: float = 1.0,
    frame: tuple[int, ...] | None = None,
    opening: int = 0,
) -> Generation:
    """Continues every prompt of a batch until it ends its turn; jit it over `batch`.

    A sample stops at the end of its turn or after `max_new_tokens`, neither tested on a discarded id, so it
    can reach one token more.

    Args:
        model: the model.
        batch: prompts that end in the assistant's header.
        tokenizer: gives the special ids.
        max_new_tokens: longest answer.
        repetition_penalty: divides positive and multiplies negative scores of ids that the prompt or the
            answer (discarded ids included) already has (Keskar et al. 2019); 1 for none.
        frame: the expected answer's ids (`expected_draft`): run in one pass, and whatever a sample says
            differently is generated token by token. None goes token by token throughout. The result is the
            same. Not tried: a frame longer than `max_new_tokens`, which cannot end, and any frame where
            coordinates are written as digits.
        opening: the answer has words of its own before the frame: they are generated token by token, and
            where a sample has said the frame's first `opening` ids the rest is run in one pass behind them.

    Raises:
        ConfigError: a limit or penalty that makes no sense.
    """
    if max_new_tokens < 1 or repetition_penalty <= 0:
        raise ConfigError(
            f"max_new_tokens must be at least 1 and repetition_penalty positive, got {max_new_tokens} and "
            f"{repetition_penalty}"
        )
    drafted = frame is not None and len(frame) <= max_new_tokens and model.config.coordinate_tokens

    def proceed(progress: DecodeState) -> DecodeState:
        return _step(model, batch, tokenizer, max_new_tokens, repetition_penalty, progress)

    if drafted and not opening:
        assert frame is not None
        progress = run_frame(model, batch, tokenizer, frame, max_new_tokens, repetition_penalty)
        in_frame = progress.finished
    else:
        progress = start(model, batch, tokenizer, max_new_tokens, repetition_penalty)
        in_frame = progress.finished  # none is
    if drafted and opening:
        assert frame is not None
        first, rest = jnp.asarray(frame[:opening], jnp.int32), frame[opening:]

        def waits(progress: DecodeState) -> Bool[Array, " B"]:
            has_room = progress.count + len(rest) <= max_new_tokens
            return ~progress.finished & _ends_in(progress, first) & has_room

        def speak(progress: DecodeState) -> DecodeState:
            waiting = waits(progress)
            spoken = proceed(dataclasses.replace(progress, finished=progress.finished | waiting))
            return dataclasses.replace(
                spoken,
                finished=spoken.finished & ~waiting,
                hidden=jnp.where(waiting[:, None], progress.hidden, spoken.hidden),
                after_indicator=spoken.after_indicator & ~waiting,
            )

        progress = jax.lax.while_loop(lambda now: jnp.any(~now.finished & ~waits(now)), speak, progress)
        waiting = waits(progress)
        progress = continue_frame(model, batch, tokenizer, rest, progress, waiting, repetition_penalty)
        in_frame = waiting & progress.finished

    end = jax.lax.while_loop(lambda progress: ~jnp.all(progress.finished), proceed, progress)
    counts = end.is_position & coordinate_indices(end.token_ids, end.count, tokenizer.indicator)
    coordinates = jnp.where(counts[..., None, None], end.coordinates, 0.0)
    whole = model.config.decoder.whole_trajectory
    return Generation(
        token_ids=end.token_ids,
        lengths=end.count,
        coordinates=coordinates[..., 0, :],
        is_coordinate=counts,
        is_position=end.is_position,
        in_one_pass=in_frame,
        waypoints=coordinates[jnp.arange(batch.size), jnp.argmax(counts, axis=1)] if whole else None,
    )


def _ends_in(progress: DecodeState, ids: Int[Array, " K"]) -> Bool[Array, " B"]:
    """Whose answer's last tokens are these, none of them discarded."""
    indices = progress.count[:, None] - len(ids) + jnp.arange(len(ids))[None]
    at = jnp.maximum(indices, 0)
    same = jnp.take_along_axis(progress.token_ids, at, axis=1) == ids[None]
    discarded = jnp.take_along_axis(progress.is_position, at, axis=1)
    return jnp.all(same & ~discarded & (indices >= 0), axis=1)


def _step(
    model: SpaceDrive,
    batch: DrivingBatch,
    tokenizer: DrivingTokenizer,
    max_new_tokens: int,
    repetition_penalty: float,
    progress: DecodeState,
) -> DecodeState:
    """Chooses one id for every unfinished sample and feeds it, or the position token in its place."""
    active, discarded = ~progress.finished, progress.after_indicator
    scores = apply_repetition_penalty(
        model.vlm.decoder.logits(progress.hidden), progress.seen, repetition_penalty
    )
    chosen = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    coordinates = token_coordinates(model, progress.hidden)
    # Out of range where finished: dropped.
    indices = jnp.where(active, progress.count, progress.token_ids.shape[1])[:, None]
    decoded = active & discarded
    count = progress.count + active.astype(jnp.int32)
    ended = (chosen == tokenizer.turn_end) | (count >= max_new_tokens)
    finished = progress.finished | (active & ~discarded & ended)

    embedding = model.vlm.embed(jnp.where(discarded, tokenizer.position, chosen)[:, None])
    if model.config.position_input:
        encoded = position_embedding(model, progress.hidden)[:, None]
        embedding = jnp.where(discarded[:, None, None], encoded.astype(embedding.dtype), embedding)
    position_ids = (progress.cache.lengths + batch.rope_delta)[None, :, None]
    hidden, cache = model.vlm.decoder(
        embedding,
        jnp.broadcast_to(position_ids, (3, batch.size, 1)),
        lengths=(~finished).astype(jnp.int32),
        cache=progress.cache,
    )
    assert cache is not None
    return DecodeState(
        cache=cache,
        hidden=hidden[:, 0],
        after_indicator=~discarded & (chosen == tokenizer.indicator) & model.config.coordinate_tokens,
        finished=finished,
        count=count,
        token_ids=scatter_rows(progress.token_ids, indices, chosen[:, None]),
        coordinates=scatter_rows(
            progress.coordinates, indices, jnp.where(decoded[:, None, None], coordinates, 0.0)[:, None]
        ),
        is_position=scatter_rows(progress.is_position, indices, decoded[:, None]),
        seen=mark_seen(progress.seen, chosen[:, None], active[:, None]),
    )

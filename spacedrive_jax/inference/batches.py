"""Prompts of any number through a trained model, a batch at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from spacedrive_jax.batch import DrivingBatch, prompt_length, without_padding
from spacedrive_jax.data.loader import evaluation_batches
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.inference.answers import Generation
from spacedrive_jax.inference.generate import generate
from spacedrive_jax.inference.open_model import TrainedModel
from spacedrive_jax.models.partitioning import activations_on
from spacedrive_jax.training.sharding import local_rows, place_rows, replicated


@dataclasses.dataclass(frozen=True)
class Asking:
    """How prompts are answered; see `generate`."""

    batch_size: int
    max_new_tokens: int
    repetition_penalty: float = 1.0
    frame: tuple[int, ...] | None = None
    """The expected answer, to be run in one pass."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """The answers to one batch."""

    first: int
    """Place of its first sample among all."""
    count: int
    """How many of its samples count."""
    length: int
    """Tokens that its prompts were cut to."""
    generated: Generation
    """On the host."""


def answered_batches(
    trained: TrainedModel,
    samples: Sequence[DrivingBatch],
    tokenizer: DrivingTokenizer,
    asking: Asking,
    *,
    length: int = 0,
) -> Iterator[Answered]:
    """Answers all samples in order.

    One batch behind: while the devices are at work on it, the next one is prepared. On several hosts each
    prepares what its devices hold, and all get all answers.

    Args:
        trained: the model.
        samples: prompts.
        tokenizer: the model's.
        asking: how they are answered.
        length: tokens that prompts are cut to at least. It only grows from batch to batch, so that few
            lengths are compiled for.
    """
    mesh, size = trained.mesh, asking.batch_size

    # The answers are small: every host gets them whole, and the first one writes them.
    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def answer(trainable: nnx.State, frozen: nnx.State, batch: DrivingBatch) -> Generation:
        with activations_on(mesh):
            return generate(
                nnx.merge(trained.graph, trainable, frozen),
                batch,
                tokenizer,
                asking.max_new_tokens,
                repetition_penalty=asking.repetition_penalty,
                frame=asking.frame,
            )

    rows, running, first = local_rows(size, mesh), None, 0
    for part, count in evaluation_batches(samples, size, rows):
        length = max(length, largest_of_hosts(prompt_length(part)))
        placed = place_rows(without_padding(part, length), rows, size, mesh)
        previous = running
        running = Answered(first, count, length, answer(trained.trainable, trained.frozen, placed))
        first += count
        if previous is not None:
            yield dataclasses.replace(previous, generated=jax.device_get(previous.generated))
    if running is not None:
        yield dataclasses.replace(running, generated=jax.device_get(running.generated))


def largest_of_hosts(number: int) -> int:
    """The largest of what every host has; all have to ask."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))

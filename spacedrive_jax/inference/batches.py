"""Prompts of any number through a trained model, a batch at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
from flax import nnx

from spacedrive_jax.batch import DrivingBatch, prompt_length, without_padding
from spacedrive_jax.data.loader import evaluation_batches
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.inference.answers import Generation
from spacedrive_jax.inference.generate import generate
from spacedrive_jax.inference.open_model import TrainedModel
from spacedrive_jax.models.partitioning import activations_on
from spacedrive_jax.training.sharding import place_batch


@dataclasses.dataclass(frozen=True)
class Asking:
    """How prompts are answered; see `generate`."""

    batch_size: int
    max_new_tokens: int
    repetition_penalty: float = 1.0
    frame: tuple[int, ...] | None = None
    """The expected answer, to be run in one pass."""


def answered_batches(
    trained: TrainedModel,
    samples: Sequence[DrivingBatch],
    tokenizer: DrivingTokenizer,
    asking: Asking,
    *,
    length: int = 0,
) -> Iterator[tuple[DrivingBatch, int, Generation]]:
    """Answers all samples in order.

    One batch behind: while the devices are at work on it, the next one is prepared.

    Args:
        trained: the model.
        samples: prompts.
        tokenizer: the model's.
        asking: how they are answered.
        length: tokens that prompts are cut to at least. It only grows from batch to batch, so that few
            lengths are compiled for.

    Yields:
        A batch, its prompts cut, how many of its samples count, and their answers on the host.
    """

    @jax.jit
    def answer(trainable: nnx.State, frozen: nnx.State, batch: DrivingBatch) -> Generation:
        with activations_on(trained.mesh):
            return generate(
                nnx.merge(trained.graph, trainable, frozen),
                batch,
                tokenizer,
                asking.max_new_tokens,
                repetition_penalty=asking.repetition_penalty,
                frame=asking.frame,
            )

    running = None
    for whole, count in evaluation_batches(samples, asking.batch_size):
        length = max(length, prompt_length(whole))
        batch = without_padding(whole, length)
        placed = place_batch(batch, trained.mesh)
        previous, running = running, (batch, count, answer(trained.trainable, trained.frozen, placed))
        if previous is not None:
            yield (*previous[:2], jax.device_get(previous[2]))
    if running is not None:
        yield (*running[:2], jax.device_get(running[2]))

"""A trained model held ready: samples in, plans out, in batches of a few sizes that were compiled before.

`predict` goes through a split; a policy (server, closed loop) asks now and then, for one car or for several.
Both build samples and read answers with the same functions.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from spacedrive_jax.batch import LENGTH_STEP, DrivingBatch, stack, without_padding
from spacedrive_jax.config import Config
from spacedrive_jax.console import note
from spacedrive_jax.data.conversation import question_turn
from spacedrive_jax.data.depth_cache import CachedDepth
from spacedrive_jax.data.ego_status import insert_ego_tokens
from spacedrive_jax.data.prompts import COMMAND_WORDS, ROUTE_WORDS
from spacedrive_jax.data.schema import Record
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.inference.answers import Generation, prediction_line

Answer = Callable[[DrivingBatch], Generation]
"""Batch on the host in, generation on the host out."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the model says about one keyframe."""

    waypoints: Float[np.ndarray, "T 2"]
    """Metres, ego frame, 0.5 s apart; T is 6, or 0 where the answer could not be read."""
    path: Float[np.ndarray, "R 2"]
    """Metres, ego frame, 1 m apart; R is 0 where the model gives none or the answer could not be read."""
    text: str
    status: str
    """`ok` or `unparsed`."""


class BatchPlanner:
    """Answers batches of samples; safe to call from several threads, one batch at a time."""

    def __init__(
        self, config: Config, builder: SampleBuilder, answer: Answer, sizes: Sequence[int], length: int
    ) -> None:
        """Prepares a planner; see `open_planner`.

        Args:
            config: of the run.
            builder: without answers.
            answer: the compiled planning step.
            sizes: batch sizes to fill up to, rising.
            length: tokens that prompts are cut to.
        """
        self.config = config
        self.builder = builder
        self.sizes = tuple(sizes)
        self.length = length
        self._answer = answer
        self._lock = threading.Lock()

    @property
    def most(self) -> int:
        """Samples that one call takes."""
        return self.sizes[-1]

    def sample(self, record: Record, cached: CachedDepth | None = None) -> DrivingBatch:
        """A record's prompt, images and ego status; callable from any thread.

        Args:
            record: a keyframe.
            cached: a network's depth of it, where the run's `data.depth` asks for one.

        Raises:
            SpaceDriveError: the record lacks something, or its prompt is longer than the planner's prompts.
        """
        sample = self.builder(record, 0, cached)
        if int(sample.lengths) > self.length:
            raise ConfigError(
                f"the prompt has {int(sample.lengths)} tokens, more than the {self.length} that the planner "
                "was compiled for"
            )
        return sample

    def plan(self, samples: Sequence[DrivingBatch]) -> list[Plan]:
        """Plans of one to `most` samples, in order."""
        count = len(samples)
        size = next(size for size in self.sizes if size >= count)
        batch = without_padding(stack([*samples, *[samples[-1]] * (size - count)]), self.length)
        with self._lock:
            generated = self._answer(batch)
        return [self._read(generated, row) for row in range(count)]

    def warm_up(self, record: Record, cached: CachedDepth | None = None) -> None:
        """Compiles for every batch size, with a record whose images and matrices are whole."""
        sample = self.sample(record, cached)
        for size in self.sizes:
            note(f"compiling for {size} at a time, prompts of {self.length} tokens")
            self.plan([sample] * size)

    def _read(self, generated: Generation, row: int) -> Plan:
        line = prediction_line(self.builder, "", generated, row)
        waypoints, path = (
            np.asarray(line.get(name, []), np.float64).reshape(-1, 2) for name in ("waypoints", "path")
        )
        return Plan(waypoints, path, line["text"], line["status"])


def longest_prompt(builder: SampleBuilder, record: Record) -> int:
    """Tokens of the longest prompt that a record can have, whatever its command, in steps of `LENGTH_STEP`.

    Args:
        builder: of the run.
        record: its texts and numbers as long as they may become; pictures do not matter.
    """
    rows, columns = builder.images.token_grid
    lengths = []
    commands_of = ROUTE_WORDS if builder.data.command == "route" else range(len(COMMAND_WORDS))
    for number in commands_of:
        names = ("command_released", "command_navigation", "command_route")
        commands = {name: np.int32(number) for name in names}
        turn = question_turn(
            record | commands,
            builder.data.command,
            ego_in_words=builder.model.ego_status == "language",
            target_points=builder.data.target_points,
            reasons=builder.thinks,
        )
        chat = builder.family.chat.apply_chat_template(
            builder.tokenizer, [turn], rows * columns, add_generation_prompt=True
        )
        chat, _ = insert_ego_tokens(builder.tokenizer, chat, builder.model.ego_status)
        lengths.append(len(chat.token_ids))
    return min(-(-max(lengths) // LENGTH_STEP) * LENGTH_STEP, builder.data.sequence_length)


def doubled_sizes(least: int, most: int) -> list[int]:
    """Batch sizes from `least` up to `most`, each twice the one before."""
    sizes = [least]
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    return sizes

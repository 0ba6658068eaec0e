"""Trajectories for a whole split: a checkpoint and records in, JSON Lines out.

Prompts of any number go through a trained model a batch at a time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from spacedrive_jax.batch import DrivingBatch, prompt_length, without_padding
from spacedrive_jax.config import Config, change, depth_advice, to_plain
from spacedrive_jax.console import progress
from spacedrive_jax.data.loader import Samples, evaluation_batches
from spacedrive_jax.data.records import Records, keyframe_index, open_records
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.inference.answers import (
    Generation,
    answer_file_of_hosts,
    answer_limit,
    expected_draft,
    prediction_line,
)
from spacedrive_jax.inference.generate import answering_step
from spacedrive_jax.inference.open_model import (
    TrainedModel,
    name_checkpoint,
    name_inputs,
    open_config,
    open_trained_model,
)
from spacedrive_jax.training.hosts import hosts_of_run
from spacedrive_jax.training.sharding import check_batch_size, local_rows, mesh_here, place_rows


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How prompts are answered; see `generate`."""

    batch_size: int
    max_new_tokens: int
    repetition_penalty: float = 1.0
    frame: tuple[int, ...] | None = None
    """The expected answer, to be run in one pass."""
    opening: int = 0
    """Words come before the frame, see `generate`."""


@dataclasses.dataclass(frozen=True)
class GeneratedBatch:
    """The answers to one batch."""

    first: int
    """Place of its first sample among all."""
    count: int
    """How many of its samples count."""
    length: int
    """Tokens that its prompts were cut to."""
    generated: Generation
    """On the host."""


def generate_batches(
    trained: TrainedModel,
    samples: Sequence[DrivingBatch],
    tokenizer: DrivingTokenizer,
    generation: GenerationConfig,
    *,
    length: int = 0,
) -> Iterator[GeneratedBatch]:
    """Answers all samples in order.

    One batch behind: while the devices are at work on it, the next ones are prepared, by as many threads or
    processes as `data.read_threads` and `data.worker_processes` of the run say. On several hosts each
    prepares what its devices hold, and all get all answers.

    Args:
        trained: the model.
        samples: prompts.
        tokenizer: the model's.
        generation: how they are answered.
        length: tokens that prompts are cut to at least. It only grows from batch to batch, so that few
            lengths are compiled for.
    """
    mesh, size = trained.mesh, generation.batch_size
    answer = answering_step(
        trained.graph,
        mesh,
        tokenizer,
        generation.max_new_tokens,
        repetition_penalty=generation.repetition_penalty,
        frame=generation.frame,
        opening=generation.opening,
    )
    rows, running, first = local_rows(size, mesh), None, 0
    for part, count in evaluation_batches(samples, size, rows, data=trained.config.data):
        length = max(length, largest_of_hosts(prompt_length(part)))
        placed = place_rows(without_padding(part, length), rows, size, mesh)
        previous = running
        running = GeneratedBatch(first, count, length, answer(trained.trainable, trained.frozen, placed))
        first += count
        if previous is not None:
            yield dataclasses.replace(previous, generated=jax.device_get(previous.generated))
    if running is not None:
        yield dataclasses.replace(running, generated=jax.device_get(running.generated))


def largest_of_hosts(number: int) -> int:
    """The largest of what every host has; all have to ask. The devices are not, so none waits for them."""
    return max(int(each) for each in hosts_of_run().exchange(str(number).encode()))


Decoding = Literal["one-pass", "token-by-token"]
"""How answers are generated: the whole framed answer in one forward, falling back where a sample leaves the
frame, or one token after the other. Both give the same answers."""


PlanningTask = Literal["planning", "think_before_planning"]
"""The trajectory alone, or words before it."""


@dataclasses.dataclass(frozen=True)
class PredictResult:
    """What was written."""

    file: Path
    samples: int
    """Answered by this call; a resumed one counts what was left."""
    unparsed: int
    """Answers without exactly six waypoints."""
    in_one_pass: int
    """Trajectories that needed no token-by-token step."""
    seconds: float
    """From the second batch on, so that compiling does not count; all of it if there is but one."""
    made_of: Mapping[str, Any]
    """What the answers depend on: checkpoint, records, split, how they were asked for."""


def predict(
    checkpoint: Path,
    records_dir: Path,
    split: str,
    out: Path,
    *,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    decoding: Decoding = "one-pass",
    repetition_penalty: float = 1.0,
    average: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    mesh: Mesh | None = None,
    tokens: Sequence[str] = (),
    limit: int | None = None,
    task: PlanningTask | None = None,
    changes: Mapping[str, Any] | None = None,
) -> PredictResult:
    """Predicts the keyframes of a split.

    Args:
        checkpoint: see `open_trained_model`.
        records_dir: records folder.
        split: `train`, `val` or `all`.
        out: JSON Lines file: token, waypoints (6 x [x, y], metres, ego frame), text, status, and path (R x
            [x, y]) where the model gives one.
        batch_size: samples a step; the last batch is filled up.
        max_new_tokens: longest answer; None for `answer_limit`.
        decoding: how; it changes the time, not the answers.
        repetition_penalty: see `generate`; 1 for none.
        average: predict with the moving average of the weights instead of the last ones.
        resume: go on with an interrupted prediction, see `answer_file`.
        overwrite: replace `out`.
        mesh: to predict on; None for `mesh_here`. On several hosts each prepares its share and the first
            writes the file.
        tokens: only these keyframes, in this order; none for all.
        limit: only the first so many; None for all.
        task: whether to ask for words before the trajectory (`reasons` of a line); None asks as the run was
            trained.
        changes: fields of the run's `data` that are otherwise now than in training, e.g.
            `{"data.depth.disturb.scale": 1.1}`; None for none.

    Raises:
        ConfigError: `changes` names another field than one of `data`.
        SpaceDriveError: something is missing, the run keeps no average, or `out` exists or was begun
            otherwise.
    """
    config = _config_now(checkpoint, task, changes)
    mesh = mesh_here(config.mesh) if mesh is None else mesh
    check_batch_size(batch_size, mesh)
    builder = SampleBuilder(config.data, config.model, answer=False)
    records = open_records(records_dir, split)
    depth = builder.open_depth(records, advice=depth_advice(config))
    wanted = indices_of(records, tokens) if tokens else list(range(len(records)))[:limit]
    longest = answer_limit(config) if max_new_tokens is None else max_new_tokens
    draft = expected_draft(config, builder.tokenizer) if decoding == "one-pass" else None
    generation = GenerationConfig(
        batch_size, longest, repetition_penalty, *(() if draft is None else (draft.frame, draft.opening))
    )
    metadata: dict[str, Any] = {
        "checkpoint": name_checkpoint(checkpoint),
        "inputs": name_inputs(config, depth),
        "records": records.fingerprint,
        "split": split,
        "average": average,
        "asking": dataclasses.asdict(generation),
        # What is not said is as it always was, so that what an earlier version began goes on.
        **({"keyframes": list(tokens) or limit} if len(wanted) < len(records) or tokens else {}),
        **({"changes": {name: to_plain(value) for name, value in changes.items()}} if changes else {}),
        **({"task": "think_before_planning"} if builder.thinks else {}),
    }
    unparsed, in_one_pass, timed = 0, 0, 0
    with answer_file_of_hosts(
        out, metadata, batch_size=batch_size, resume=resume, overwrite=overwrite
    ) as file:
        samples = Samples(records, builder, wanted[file.done :], depth)
        trained = open_trained_model(checkpoint, average=average, mesh=mesh)
        started = time.monotonic()
        with progress(total=len(wanted), initial=file.done, desc=f"predict {split}", unit="sample") as bar:
            answers = generate_batches(trained, samples, builder.tokenizer, generation, length=file.length)
            for number, answered in enumerate(answers):
                count, generated = answered.count, answered.generated
                in_one_pass += int(generated.in_one_pass[:count].sum())
                indices = samples.indices[answered.first : answered.first + count]
                lines = [
                    prediction_line(builder, records[index]["token"], generated, row)
                    for row, index in enumerate(indices)
                ]
                unparsed += sum(line["status"] != "ok" for line in lines)
                file.write(lines, answered.length)
                bar.update(count)
                if number == 0 and len(samples) > count:
                    started = time.monotonic()
                else:
                    timed += count
    seconds = (time.monotonic() - started) * len(samples) / max(timed, 1)
    return PredictResult(out, len(samples), unparsed, in_one_pass, seconds, metadata)


def _config_now(checkpoint: Path, task: PlanningTask | None, changes: Mapping[str, Any] | None) -> Config:
    """The run's config, as this prediction asks with it."""
    config = open_config(checkpoint)
    if changes:
        check_changes(changes)
        config = change(config, config.name, dict(changes))
    if task is not None:
        config = change(config, config.name, {"data.conversation.tasks": task})
    return config


def check_changes(fields: Mapping[str, Any]) -> None:
    """Refuses to change anything of a trained model but how it sees its data.

    Args:
        fields: dotted names of a config.

    Raises:
        ConfigError: one is not of `data`.
    """
    for name in fields:
        if not name.startswith("data."):
            raise ConfigError(f"{name} cannot be changed for predictions alone: only fields of data can")


def indices_of(records: Records, tokens: Sequence[str]) -> list[int]:
    """Where keyframes stand in a split.

    Args:
        records: the split.
        tokens: of the keyframes.

    Raises:
        DataError: one is not there, or is asked for twice.
    """
    if len(set(tokens)) < len(tokens):
        raise DataError(f"--token names a keyframe twice: {', '.join(tokens)}")
    return [keyframe_index(records, token) for token in tokens]

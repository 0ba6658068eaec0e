"""What a trained model answers for a whole split: a checkpoint and records in, JSON Lines out.

Prompts of any number go through the model a batch at a time. They ask for trajectories, or for OmniDrive's
counterfactual test: what would happen on another trajectory. Its language data has candidate trajectories
for a keyframe (`eval_cf`), each with its risks; `score-counterfactual` compares those with the risks that the
answers name.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from spacedrive_jax.batch import DrivingBatch, TokenType, prompt_length, without_padding
from spacedrive_jax.config import Config, change, depth_advice, to_plain
from spacedrive_jax.console import progress
from spacedrive_jax.data.conversation import counterfactual_prompt
from spacedrive_jax.data.depth_cache import DepthCache
from spacedrive_jax.data.language_data import LanguageData
from spacedrive_jax.data.loader import Samples, evaluation_batches
from spacedrive_jax.data.prompts import counterfactual_text
from spacedrive_jax.data.records import Records, keyframe_index, open_records
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.inference.answers import (
    Generation,
    answer_file_of_hosts,
    answer_limit,
    answer_text,
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
from spacedrive_jax.io import local
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


@dataclasses.dataclass(frozen=True)
class QuestionsResult:
    """What was written."""

    file: Path
    questions: int
    """Asked by this call; a resumed one counts what was left."""
    keyframes: int
    without_candidates: int
    """Keyframes that the language data asks nothing about."""
    seconds: float


@dataclasses.dataclass(frozen=True)
class Question:
    """One candidate trajectory of one keyframe."""

    index: int
    """Row of the keyframe in its records split."""
    token: str
    trajectory: str


@dataclasses.dataclass
class Prompts(Sequence[DrivingBatch]):
    """The prompts of questions; `index` of a sample counts questions."""

    records: Records
    builder: SampleBuilder
    questions: list[Question]
    depth: DepthCache | None = None
    """A network's depth of the keyframes, where the run's `data.depth` asks for it."""

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, number: int) -> DrivingBatch:  # type: ignore[override]
        question = self.questions[number]
        record = self.records[question.index]
        talk = counterfactual_prompt(
            record, question.trajectory, coordinate_tokens=self.builder.model.coordinate_tokens
        )
        cached = self.depth.read(record["token"]) if self.depth is not None else None
        sample = self.builder.sample(record, talk, number, cached)
        model = self.builder.model
        if model.position_input and model.position_input_training == "zeros":
            # As published: what a coordinate feeds at test time is fed in answers, not in prompts.
            token_type_ids = np.where(
                sample.token_type_ids == TokenType.COORDINATE, TokenType.TEXT, sample.token_type_ids
            ).astype(np.int32)
            return dataclasses.replace(sample, token_type_ids=token_type_ids)
        return sample


def answer_counterfactual(
    checkpoint: Path,
    records_dir: Path,
    split: str,
    language_data: Path | None,
    out: Path,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 100,
    repetition_penalty: float = 1.0,
    average: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    mesh: Mesh | None = None,
) -> QuestionsResult:
    """Asks about every candidate trajectory of a split's keyframes.

    Args:
        checkpoint: see `open_trained_model`.
        records_dir: records folder.
        split: `train`, `val` or `all`.
        language_data: folder with `eval_cf`; None takes that of the checkpoint's config.
        out: JSON Lines file, a question a line: token, Q, A.
        batch_size: questions a step.
        max_new_tokens: longest answer.
        repetition_penalty: see `generate`.
        average: answer with the moving average of the weights.
        resume: go on with an interrupted call, see `answer_file`.
        overwrite: replace `out`.
        mesh: to answer on; None for `mesh_here`.

    Raises:
        SpaceDriveError: something is missing, the language data asks nothing about this split, or `out`
            exists or was begun otherwise.
    """
    config = open_config(checkpoint)
    mesh = mesh_here(config.mesh) if mesh is None else mesh
    check_batch_size(batch_size, mesh)
    records = open_records(records_dir, split)
    questions, without = _questions(records, _folder(language_data, config))
    builder = SampleBuilder(config.data, config.model, answer=False)
    depth = builder.open_depth(records, advice=depth_advice(config))
    generation = GenerationConfig(batch_size, max_new_tokens, repetition_penalty)
    metadata = {
        "checkpoint": name_checkpoint(checkpoint),
        "inputs": name_inputs(config, depth),
        "records": records.fingerprint,
        "split": split,
        "questions": len(questions),
        "average": average,
        "asking": dataclasses.asdict(generation),
    }
    started = time.monotonic()
    with answer_file_of_hosts(
        out, metadata, batch_size=batch_size, resume=resume, overwrite=overwrite
    ) as file:
        prompts = Prompts(records, builder, questions[file.done :], depth)
        trained = open_trained_model(checkpoint, average=average, mesh=mesh)
        with progress(
            total=len(questions), initial=file.done, desc=f"ask about {split}", unit="question"
        ) as bar:
            answers = generate_batches(trained, prompts, builder.tokenizer, generation, length=file.length)
            for answered in answers:
                asked = prompts.questions[answered.first : answered.first + answered.count]
                lines = [
                    {
                        "token": question.token,
                        "Q": counterfactual_text(question.trajectory),
                        "A": _answer(builder, answered.generated, row),
                    }
                    for row, question in enumerate(asked)
                ]
                file.write(lines, answered.length)
                bar.update(answered.count)
    keyframes = len({question.token for question in questions})
    return QuestionsResult(out, len(prompts), keyframes, without, time.monotonic() - started)


def _folder(given: Path | None, config: Config) -> LanguageData:
    named = config.data.conversation.language_data
    if given is None and named is None:
        raise ConfigError(
            "the counterfactual test needs OmniDrive's language data: give --language-data FOLDER"
        )
    root = local((named or "") if given is None else given)
    if not (root / "eval_cf").is_dir():
        raise ConfigError(f"{root} has no folder eval_cf with the counterfactual test: give --language-data")
    return LanguageData(root)


def _questions(records: Records, data: LanguageData) -> tuple[list[Question], int]:
    """All questions about a split, and the keyframes without any."""
    questions, without = [], 0
    for index in range(len(records)):
        token = records[index]["token"]
        candidates = data.counterfactual_test(token)
        without += not candidates
        questions += [Question(index, token, candidate.trajectory) for candidate in candidates]
    if not questions:
        raise DataError(
            f"{data.root / 'eval_cf'} holds nothing about these {len(records)} keyframes: is it of another "
            "split or data set?"
        )
    return questions, without


def _answer(builder: SampleBuilder, generated: Generation, row: int) -> str:
    """An answer as text, without the end of its turn."""
    length = int(generated.lengths[row])
    ids, coordinates, is_coordinate = (
        np.asarray(values[row, :length])
        for values in (generated.token_ids, generated.coordinates, generated.is_coordinate)
    )
    ended = length and ids[-1] == builder.tokenizer.turn_end and not generated.is_position[row, length - 1]
    said = slice(length - 1 if ended else length)
    whole = None if generated.waypoints is None else np.asarray(generated.waypoints[row])
    return answer_text(builder.tokenizer, ids[said], coordinates[said], is_coordinate[said], whole)

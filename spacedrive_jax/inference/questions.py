"""The counterfactual test: what would happen on another trajectory, asked about every candidate.

OmniDrive's language data has candidate trajectories for a keyframe (`eval_cf`), each with its risks;
`score-counterfactual` compares those with the risks that the answers name.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from spacedrive_jax.batch import DrivingBatch, TokenType
from spacedrive_jax.config import Config, depth_advice
from spacedrive_jax.console import progress
from spacedrive_jax.data.conversation import counterfactual_prompt
from spacedrive_jax.data.depth_cache import DepthCache
from spacedrive_jax.data.language_data import LanguageData
from spacedrive_jax.data.prompts import counterfactual_text
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.inference.answers import Generation, answer_file_of_hosts, answer_text
from spacedrive_jax.inference.open_model import (
    name_checkpoint,
    name_inputs,
    open_config,
    open_trained_model,
)
from spacedrive_jax.inference.predict import GenerationConfig, generate_batches
from spacedrive_jax.io import local
from spacedrive_jax.training.sharding import check_batch_size, mesh_here


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

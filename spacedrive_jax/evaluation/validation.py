"""Validation while a run trains: losses, and planning in one pass scored as the paper scores it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from spacedrive_jax.batch import DrivingBatch, prompt_length, without_padding
from spacedrive_jax.config import Config, depth_advice, to_plain
from spacedrive_jax.console import note
from spacedrive_jax.constants import NUM_WAYPOINTS
from spacedrive_jax.data.loader import Samples, evaluation_batches, records_sources
from spacedrive_jax.data.records import Records, complete_futures, open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.data.survey import check_validated
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.evaluation.evaluate import obstacles_of
from spacedrive_jax.evaluation.metrics import (
    StepScores,
    horizon_scores,
    score_steps,
    stack_scores,
    summarize,
)
from spacedrive_jax.evaluation.protocols import OMNIDRIVE, StepRule
from spacedrive_jax.inference.answers import prediction_line
from spacedrive_jax.inference.generate import planning_step
from spacedrive_jax.inference.open_model import name_inputs
from spacedrive_jax.inference.predict import largest_of_hosts
from spacedrive_jax.models.partitioning import activations_on
from spacedrive_jax.training import train as training
from spacedrive_jax.training.losses import losses
from spacedrive_jax.training.sharding import local_rows, place_rows, replicated
from spacedrive_jax.training.state import abstract_state


def train(config: Config, **options: Any) -> training.TrainResult:
    """Trains a run with the validation that `train.validate_every` asks for.

    Args:
        config: the whole run.
        options: those of `spacedrive_jax.training.train.train`, whose errors hold too.
    """
    return training.train(config, validation=Validation.where_possible, **options)


class _NothingToValidateError(ConfigError):
    """The records have no keyframe to validate on."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """The validated keyframes of one records folder."""

    answered: Samples
    """With answers, for the losses."""
    asked: Samples
    """Prompts of the same keyframes."""


class Validation:
    """A fixed part of `val`, and the two compiled programs that a validation runs over it.

    The metrics are `validation/loss` and its parts as in training (without dropout), `validation/l2` in
    metres and `validation/collision` in percent (absent where no agent is annotated), both the average over
    1, 2 and 3 s under the omnidrive protocol, `validation/unparsed`, the share of answers without a
    trajectory, which count as standing still, and `validation/seconds`.
    """

    @classmethod
    def where_possible(cls, config: Config, mesh: Mesh, *, keep: bool = True) -> Validation | None:
        """A validation; None, and a line in the log, where the records have no keyframe for one.

        Raises:
            SpaceDriveError: one does not fit the config's shapes, or lacks an image or depth.
        """
        try:
            return cls(config, mesh, keep=keep)
        except _NothingToValidateError as error:
            note(f"note: this run is not validated, and names no best checkpoint: {error}")
            return None

    def __init__(self, config: Config, mesh: Mesh, *, keep: bool = True) -> None:
        """Chooses the keyframes; compiles nothing yet.

        Args:
            config: of the run.
            mesh: its devices.
            keep: leave beside the records which keyframes have a whole future.

        Raises:
            SpaceDriveError: the records have no `val`, no keyframe of it has a whole future, or one does not
                fit the config's shapes, or lacks an image or depth.
        """
        self._config, self._mesh = config, mesh
        self._size = config.train.batch_size // config.train.grad_accum_steps
        self._parts = _parts(config, keep)
        self.digest = _digest(config, self._parts)
        # Threads: worker processes would take longer to start than a validation takes.
        self._data = dataclasses.replace(config.data, worker_processes=0)
        self._builder = self._parts[0].asked.builder
        self._length = 0
        graph, _, _ = abstract_state(config, mesh)
        self._plan = planning_step(graph, mesh, config, self._builder.tokenizer)

        @functools.partial(jax.jit, out_shardings=replicated(mesh))
        def measure(trainable: nnx.State, frozen: nnx.State, batch: DrivingBatch) -> dict[str, jax.Array]:
            with activations_on(mesh):
                parts = losses(nnx.merge(graph, trainable, frozen), batch, config.train, None)
            values = {"loss": parts.total, "loss_language": parts.language, "loss_position": parts.position}
            values |= {"loss_path": parts.path} if config.model.path_points else {}
            is_vae = config.model.decoder.kind == "vae"
            return values | ({"loss_divergence": parts.divergence} if is_vae else {})

        self._measure = measure
        check_validated([part.answered for part in self._parts])

    def __call__(self, trainable: nnx.State, frozen: nnx.State) -> dict[str, float]:
        """Validates numbers.

        Args:
            trainable: what training changes.
            frozen: the rest.
        """
        started = time.monotonic()
        values = self._losses(trainable, frozen)
        scores, failed, annotated = self._scores(trainable, frozen)
        table = summarize(horizon_scores(scores, OMNIDRIVE))
        values["unparsed"] = float(np.mean(failed))
        for name in ("l2", *(["collision"] if annotated else [])):
            average = table[name]["avg"]
            assert average is not None
            values[name] = average
        values["seconds"] = time.monotonic() - started
        return {f"validation/{name}": value for name, value in values.items()}

    def _losses(self, trainable: nnx.State, frozen: nnx.State) -> dict[str, float]:
        rows, weight = local_rows(self._size, self._mesh), 0
        total: dict[str, float] = {}
        for part in self._parts:
            for batch, count in evaluation_batches(part.answered, self._size, rows, data=self._data):
                # Rows that only fill a batch up count for nothing.
                counts = np.asarray(rows) < count
                batch = dataclasses.replace(
                    batch,
                    target_mask=batch.target_mask & counts[:, None],
                    waypoint_mask=batch.waypoint_mask & counts[:, None],
                    path_mask=None if batch.path_mask is None else batch.path_mask & counts[:, None],
                )
                placed = place_rows(batch, rows, self._size, self._mesh)
                found = jax.device_get(self._measure(trainable, frozen, placed))
                # The language loss is a sum over the batch's size, the others are means over what counts.
                rest = float(found["loss"]) - self._config.train.language_weight * float(
                    found["loss_language"]
                )
                found["loss_language"] = float(found["loss_language"]) * self._size / count
                found["loss"] = rest + self._config.train.language_weight * found["loss_language"]
                for name, value in found.items():
                    total[name] = total.get(name, 0.0) + float(value) * count
                weight += count
        return {name: value / weight for name, value in total.items()}

    def _scores(self, trainable: nnx.State, frozen: nnx.State) -> tuple[StepScores, list[bool], bool]:
        rows, scored, failed, annotated = local_rows(self._size, self._mesh), [], [], False
        for part in self._parts:
            first = 0
            for batch, count in evaluation_batches(part.asked, self._size, rows, data=self._data):
                self._length = max(self._length, largest_of_hosts(prompt_length(batch)))
                cut = without_padding(batch, self._length)
                placed = place_rows(cut, rows, self._size, self._mesh)
                generated = jax.device_get(self._plan(trainable, frozen, placed))
                for row, index in enumerate(part.asked.indices[first : first + count]):
                    line = prediction_line(self._builder, "", generated, row)
                    planned = line["status"] == "ok"
                    waypoints = np.asarray(line["waypoints"], np.float64) if planned else _STANDING
                    record = part.asked.records.source[index]
                    annotated |= bool(len(record["agent_boxes"]))
                    scored.append(_score(record, waypoints))
                    failed.append(not planned)
                first += count
        return stack_scores(scored), failed, annotated


_STANDING = np.zeros((NUM_WAYPOINTS, 2))


def _score(record: Record, waypoints: np.ndarray) -> StepScores:
    rule = OMNIDRIVE.steps
    assert isinstance(rule, StepRule)
    return score_steps(waypoints[None], record["waypoints"], obstacles_of(record), None, rule)


def _digest(config: Config, parts: list[_Part]) -> str:
    """SHA-256 of all that validated numbers depend on beside the model: keyframes, records, what is made of
    them and asked, and, where the loss decides, how it is made.
    """
    data = {name: value for name, value in to_plain(config.data).items() if name not in _NO_MATTER}
    data["depth"] = {name: value for name, value in data["depth"].items() if name != "cache"}
    validated = {
        "data": data,
        "inputs": [name_inputs(config, part.asked.depth) for part in parts],
        "keyframes": [[part.asked.records.fingerprint, part.asked.indices] for part in parts],
    }
    if config.train.best_by == "loss":
        train = to_plain(config.train)
        validated["loss"] = {name: train[name] for name in _OF_THE_LOSS}
    return hashlib.sha256(json.dumps(validated, sort_keys=True).encode()).hexdigest()


_NO_MATTER = (
    "records",
    "tokenizer",
    "sequence_length",
    "max_targets",
    "max_coordinates",
    "read_threads",
    "prefetch_batches",
    "worker_processes",
    "cache_in_memory",
    "drop_without_future",
)
"""Fields of `data` that no validated number depends on, or not by the name of a folder."""
_OF_THE_LOSS = (
    "path_weight",
    "language_weight",
    "position_weight",
    "huber_delta",
    "position_loss",
    "supervision",
    "braking_weight",
    "accelerating_weight",
    "vae_weight",
    "indicator_weight",
)


def _parts(config: Config, keep: bool) -> list[_Part]:
    """`train.validate_keyframes` of the folders' keyframes with a whole future, evenly spaced."""
    data, model = config.data, config.model
    with_answers, prompts = SampleBuilder(data, model), SampleBuilder(data, model, answer=False)
    opened: list[Records] = []
    for folder, _ in records_sources(data.records):
        if "val" in open_records(folder, "all").splits:
            opened.append(open_records(folder, "val"))
    if not opened:
        raise _NothingToValidateError(
            f"train.validate_every {config.train.validate_every} needs keyframes of split val, which "
            f"{data.records} has none of (--train.validate-every 0 says so)"
        )
    whole = [
        (number, int(row))
        for number, each in enumerate(opened)
        for row in np.flatnonzero(complete_futures(each, keep=keep))
    ]
    if not whole:
        raise _NothingToValidateError(
            f"train.validate_every {config.train.validate_every} needs keyframes with a whole future, and "
            f"split val of {data.records} has none (--train.validate-every 0 says so)"
        )
    places = np.unique(
        np.linspace(0, len(whole) - 1, min(len(whole), config.train.validate_keyframes)).round().astype(int)
    )
    chosen = [whole[place] for place in places]
    parts = []
    for number, records in enumerate(opened):
        rows = [row for folder, row in chosen if folder == number]
        if rows:
            depth = with_answers.open_depth(records, advice=depth_advice(config))
            parts.append(
                _Part(Samples(records, with_answers, rows, depth), Samples(records, prompts, rows, depth))
            )
    return parts

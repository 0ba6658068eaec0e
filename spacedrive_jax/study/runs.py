"""The runs of a plan, one after the other, each gone on with where it stopped; a row of results for each.

Results are JSON Lines, appended row by row and flushed: a row is there whole or not at all, and is known by
what it measured (`Run.identity`), so that a plan which grew keeps what was measured before.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax import __version__
from spacedrive_jax.config import Config, change
from spacedrive_jax.console import note
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.errors import DataError, SpaceDriveError
from spacedrive_jax.evaluation.evaluate import evaluate
from spacedrive_jax.evaluation.prediction_files import read_predictions
from spacedrive_jax.evaluation.protocols import protocol_named
from spacedrive_jax.evaluation.validation import train
from spacedrive_jax.inference.open_model import open_vlm
from spacedrive_jax.inference.predict import predict
from spacedrive_jax.interop.exporting import export_hf
from spacedrive_jax.io import (
    LineFile,
    convert,
    folder_lock,
    parse_json,
    read_json_lines,
    read_text,
    remove_partials,
    to_json,
    write_json,
    write_text,
)
from spacedrive_jax.study.plan import Plan, Run, name_of_base
from spacedrive_jax.study.readout import read_back
from spacedrive_jax.training.checkpoints import steps_of

RESULTS = "results.jsonl"
PROTOCOL = "omnidrive"
"""Under which open-loop runs are scored: the paper's."""
SPLIT = "val"
METRICS = "metrics.jsonl"
RUNS = "runs"
PREDICTED_TOGETHER = 32
"""Keyframes a step."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What one run measured; a line of the results."""

    plan: str
    run: str
    """Its identity."""
    cell: dict[str, str]
    """Factor to level."""
    seed: int
    data: str
    """Fingerprint of the records; empty where none are needed."""
    measures: dict[str, float | None]
    groups: dict[str, dict[str, list[float]]]
    """Metric to group (scene, or block of points) to sum and count."""
    curves: dict[str, list[list[float | None]]]
    seconds: float
    version: str


def read_rows(file: Path) -> list[Row]:
    """The rows of a results file; a last line that was cut off is left out.

    Raises:
        DataError: a line is not a row, or a run has two.
    """
    if not file.is_file():
        return []
    whole, _, _ = read_text(file).rpartition("\n")
    places = ((f"{file}, line {number}:", line) for number, line in enumerate(whole.splitlines(), 1))
    rows = [convert(parse_json(line, place), Row, place) for place, line in places]
    names = [row.run for row in rows]
    if len(set(names)) < len(names):
        raise DataError(f"{file} has two rows of one run: remove one of them")
    return rows


def _drop_cut_line(file: Path) -> None:
    """What an interrupted study left behind the last whole row would run into the next one."""
    whole, end, cut = read_text(file).rpartition("\n") if file.is_file() else ("", "", "")
    if cut:
        write_text(file, whole + end)


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a study has come."""

    rows: list[Row]
    """Of the plan's runs that are finished, in the plan's order."""
    unfinished: list[str]
    """The others, by cell and seed."""


def describe_run(run: Run) -> str:
    """Its levels and its seed in a line."""
    return ", ".join([*(f"{name} {level}" for name, level in run.cell.items()), f"seed {run.seed}"])


def fingerprint_of(plan: Plan, records: str | None) -> str:
    """Of the records that a plan's runs need; empty where they need none.

    Raises:
        SpaceDriveError: they are not there.
    """
    if plan.measure == "readout":
        return ""
    return open_records(records or plan.base.data.records, SPLIT).fingerprint


def progress_of(plan: Plan, rows: Sequence[Row], data: str) -> Progress:
    """Which of a plan's runs have a row."""
    found = {row.run: row for row in rows}
    done, missing = [], []
    for run in plan.runs():
        row = found.get(run.identity(plan.measure, data, plan.pretrained(run.seed)))
        if row is None:
            missing.append(describe_run(run))
        else:
            done.append(row)
    return Progress(done, missing)


def reported(plan: Plan, rows: Sequence[Row]) -> Progress:
    """Which of a plan's runs a results file has, by plan, cell and seed: of whichever settings the plan had
    when they were made.
    """
    found = {(frozenset(row.cell.items()), row.seed): row for row in rows if row.plan == plan.name}
    done, missing = [], []
    for run in plan.runs():
        row = found.get((frozenset(run.cell.items()), run.seed))
        if row is None:
            missing.append(describe_run(run))
        else:
            done.append(row)
    return Progress(done, missing)


def run_plan(
    plan: Plan,
    out: Path,
    *,
    records: str | None = None,
    resume: bool = False,
    minutes: float | None = None,
    runs: Path | None = None,
    after: Callable[[Progress], None] | None = None,
) -> Progress:
    """Makes a plan's runs that have no row yet.

    Args:
        plan: the study.
        out: folder of the results.
        records: folder to train and score on; None for the base's.
        resume: go on with a study that the folder holds.
        minutes: begin no further run after so many; None for no bound.
        runs: folder of what is trained; None for OUT/runs. Plans that share it train what they share once.
        after: called behind every run.

    Raises:
        SpaceDriveError: the folder holds a study and `resume` is not given, or a run fails.
    """
    data = fingerprint_of(plan, records)
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        file = out / RESULTS
        rows = read_rows(file)
        if rows and not resume:
            raise SpaceDriveError(f"{file} holds {len(rows)} finished runs: --resume goes on with them")
        remove_partials(out)
        _drop_cut_line(file)
        started = time.monotonic()
        lines = LineFile(file)
        try:
            for run in plan.runs(records):
                pretrained = plan.pretrained(run.seed, records)
                name = run.identity(plan.measure, data, pretrained)
                if any(row.run == name for row in rows):
                    continue
                if minutes is not None and time.monotonic() - started > 60 * minutes:
                    break
                note(f"{plan.name}: {describe_run(run)}")
                row = _measure(plan, run, name, data, runs or out / RUNS, pretrained)
                lines.write(to_json(dataclasses.asdict(row)))
                rows.append(row)
                if after is not None:
                    after(progress_of(plan, rows, data))
        finally:
            lines.close()
        return progress_of(plan, rows, data)


def _measure(plan: Plan, run: Run, name: str, data: str, runs: Path, pretrained: Config | None) -> Row:
    started = time.monotonic()
    found: Mapping[str, Any]
    if plan.measure == "readout":
        found = read_back(run.config, run.readout)
    else:
        trained = runs / run.identity(plan.measure, data, pretrained, trained=True)
        asked = f"-{name}" if run.at_test else ""
        base = None if pretrained is None else runs / name_of_base(pretrained, data)
        found = _open_loop(run, trained, f"predictions{asked}.jsonl", base, pretrained)
    return Row(
        plan=plan.name,
        run=name,
        cell=dict(run.cell),
        seed=run.seed,
        data=data,
        measures=found["measures"],
        groups={metric: dict(groups) for metric, groups in found["groups"].items()},
        curves=found["curves"],
        seconds=round(time.monotonic() - started, 1),
        version=__version__,
    )


def _open_loop(
    run: Run, folder: Path, answers: str, base: Path | None, pretrained: Config | None
) -> Mapping[str, Any]:
    """Trains, predicts and scores one run, going on with what an interrupted call left."""
    config = run.config
    if pretrained is not None and base is not None:
        weights = base / "exported"
        if not weights.exists():
            _train(change(pretrained, pretrained.name, {"run_dir": str(base)}))
            # As a bare vision-language model: what runs start from has other settings than they.
            export_hf(open_vlm(base), weights)
        config = change(config, config.name, {"model.weights": str(weights)})
    config = change(config, config.name, {"run_dir": str(folder)})
    loss = _train(config)
    predictions = folder / answers
    if not predictions.exists():
        predict(
            folder,
            Path(config.data.records),
            SPLIT,
            predictions,
            batch_size=PREDICTED_TOGETHER,
            # Digits take more tokens than the published limit allows, and would be cut.
            max_new_tokens=None if config.model.coordinate_tokens else config.data.max_targets,
            resume=True,
            changes=run.at_test,
        )
    records = open_records(config.data.records, SPLIT)
    # As published, answers without a trajectory would be left out; between cells that would favour the one
    # that answers less.
    protocol = dataclasses.replace(protocol_named(PROTOCOL), failures="counted")
    evaluation = evaluate(records, read_predictions(predictions, "forward-left"), [protocol])[PROTOCOL]
    scored = predictions.with_suffix(".json")
    write_json(
        scored.with_name(scored.name.replace("predictions", "evaluation")), evaluation.to_json(), indent=2
    )
    scores = evaluation.prediction
    values = {name: np.asarray(getattr(scores.horizons, name)).mean(axis=1) for name in ("l2", "collision")}
    values["lateral"] = _lateral(predictions, records, scores.tokens)
    return {
        "measures": {name: float(np.mean(value)) for name, value in values.items()}
        | {"loss": loss, "unparsed": scores.failures / len(scores.situations)},
        "groups": {name: _by_scene(value, scores.scenes) for name, value in values.items()},
        "curves": {
            "L2 by horizon, m": [
                [s, float(m)] for s, m in zip((1, 2, 3), scores.horizons.l2.mean(axis=0), strict=True)
            ]
        },
    }


def _train(config: Config) -> float:
    """Trains a run to its end, from where it stands; the last loss that it logged.

    Raises:
        SpaceDriveError: it was stopped.
    """
    there = steps_of(config.directory)
    if max(there, default=0) < config.train.steps and not train(config, resume=True).finished:
        raise SpaceDriveError(f"{config.directory} was stopped: --resume goes on with the study")
    losses = [entry["loss"] for _, entry in read_json_lines(config.directory / METRICS) if "loss" in entry]
    return float(losses[-1])


def _lateral(predictions: Path, records: Records, tokens: Sequence[str]) -> Float[np.ndarray, " K"]:
    """Mean distance to the side between planned and recorded waypoints, metres, of every keyframe; an answer
    that cannot be read counts as standing still.
    """
    planned = {line["token"]: line["waypoints"] for _, line in read_json_lines(predictions)}
    truth = {record["token"]: record["waypoints"] for record in map(records.__getitem__, range(len(records)))}
    return np.array(
        [
            np.mean(
                np.abs((np.asarray(planned[token])[:, 1] if planned[token] else 0.0) - truth[token][:, 1])
            )
            for token in tokens
        ]
    )


def _by_scene(values: Float[np.ndarray, " K"], scenes: Sequence[str]) -> Mapping[str, list[float]]:
    """Sum and count of what was measured in every scene; sums to six digits behind the point."""
    found: dict[str, list[float]] = {}
    for value, scene in zip(values.tolist(), scenes, strict=True):
        entry = found.setdefault(scene, [0.0, 0.0])
        if not np.isnan(value):
            entry[0], entry[1] = entry[0] + value, entry[1] + 1
    return {scene: [round(total, 6), count] for scene, (total, count) in sorted(found.items())}

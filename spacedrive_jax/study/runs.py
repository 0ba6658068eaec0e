"""The runs of a plan, one after the other, each gone on with where it stopped; a row of results for each.

Results are JSON Lines, appended row by row and flushed: a row is there whole or not at all, and is known by
what it measured (`Run.identity`), so that a plan which grew keeps what was measured before.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from spacedrive_jax import __version__
from spacedrive_jax.config import Config, change
from spacedrive_jax.console import note
from spacedrive_jax.data.records import open_records
from spacedrive_jax.errors import DataError, SpaceDriveError
from spacedrive_jax.evaluation.validation import train
from spacedrive_jax.folders import folder_lock
from spacedrive_jax.inference.open_model import open_vlm
from spacedrive_jax.interop.exporting import export_hf
from spacedrive_jax.io import LineFile, read_text, remove_partials, write_text
from spacedrive_jax.json_files import convert, parse_json, read_json_lines, to_json
from spacedrive_jax.study.measures import (
    SPLIT,
    Measured,
    closed_loop,
    counterfactual,
    forgotten,
    open_loop,
    write_language_data,
)
from spacedrive_jax.study.plan import Plan, Run, name_of_base
from spacedrive_jax.study.readout import read_back
from spacedrive_jax.training.checkpoints import steps_of

RESULTS = "results.jsonl"
METRICS = "metrics.jsonl"
RUNS = "runs"


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
    """Metric to group (scene, drive, or block of points) to sum and count."""
    curves: dict[str, list[list[float | None]]]
    seconds: float
    version: str


def read_rows(file: Path) -> list[Row]:
    """The rows of a results file; a last line that was cut off is left out, as are blank ones.

    Raises:
        DataError: a line is not a row, or a run has two.
    """
    if not file.is_file():
        return []
    whole, _ = _whole_lines(file)
    places = ((f"{file}, line {number}:", line) for number, line in enumerate(whole.splitlines(), 1))
    rows = [convert(parse_json(line, place), Row, place) for place, line in places if line.strip()]
    names = [row.run for row in rows]
    if len(set(names)) < len(names):
        raise DataError(f"{file} has two rows of one run: remove one of them")
    return rows


def _drop_cut_line(file: Path) -> None:
    """What an interrupted study left behind the last whole row would run into the next one."""
    if file.is_file():
        whole, ends = _whole_lines(file)
        if not ends:
            write_text(file, whole)


def _whole_lines(file: Path) -> tuple[str, bool]:
    """The text of a file without a last line that was cut off, and whether that is all it holds.

    A last line that is a row is whole, though an editor, or whoever put files together, left its end out.
    """
    text = read_text(file)
    whole, end, last = text.rpartition("\n")
    if not last.strip():
        return text, True
    try:
        parse_json(last, file)
    except DataError:
        return whole + end, False
    return text + "\n", False


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
        row = found.get(run.identity(plan.measure, data, plan.pretrained(run.seed), plan.drives))
        if row is None:
            missing.append(describe_run(run))
        else:
            done.append(row)
    return Progress(done, missing)


def reported(plan: Plan, rows: Sequence[Row], data: str | None = None) -> Progress:
    """Which of a plan's runs a results file has, by plan, cell and seed: of whichever settings the plan had
    when they were made, of the present ones where there are several.

    Args:
        plan: the study.
        rows: of the file.
        data: fingerprint of the records whose rows are meant; None where all are of the same.

    Raises:
        DataError: the rows were made on several sets of records, or two are of one cell and seed and neither
            of the present settings: a mean over them would be of nothing.
    """
    rows = [row for row in rows if row.plan == plan.name and data in (None, row.data)]
    sets = sorted({row.data for row in rows})
    if len(sets) > 1:
        raise DataError(
            f"the results of {plan.name} were made on {len(sets)} sets of records (fingerprints "
            f"{', '.join(each[:12] or 'none' for each in sets)}): --records DIR says whose rows are meant"
        )
    done, missing = [], []
    for run in plan.runs():
        found = [row for row in rows if (row.cell, row.seed) == (run.cell, run.seed)]
        if len(found) > 1:
            pretrained = plan.pretrained(run.seed)
            found = [
                row
                for row in found
                if row.run == run.identity(plan.measure, row.data, pretrained, plan.drives)
            ]
            if not found:
                raise DataError(
                    f"the results of {plan.name} have several rows of {describe_run(run)}, none of the "
                    "plan's present settings: remove all but one"
                )
        if found:
            done += found
        else:
            missing.append(describe_run(run))
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
                name = run.identity(plan.measure, data, pretrained, plan.drives)
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
    if plan.measure == "readout":
        read = read_back(run.config, run.readout)
        found = Measured(read["measures"], read["groups"], read["curves"])
    else:
        found = _trained(plan, run, name, data, runs, pretrained)
    return Row(
        plan=plan.name,
        run=name,
        cell=dict(run.cell),
        seed=run.seed,
        data=data,
        measures=dict(found.measures),
        groups={metric: dict(groups) for metric, groups in found.groups.items()},
        curves=dict(found.curves),
        seconds=round(time.monotonic() - started, 1),
        version=__version__,
    )


def _trained(plan: Plan, run: Run, name: str, data: str, runs: Path, pretrained: Config | None) -> Measured:
    """Trains a run and measures it, going on with what an interrupted call left."""
    folder = runs / run.identity(plan.measure, data, pretrained, trained=True)
    config = change(run.config, run.config.name, {"run_dir": str(folder)})
    base = None
    if pretrained is not None:
        base = runs / name_of_base(pretrained, data)
        weights = base / "exported"
        if not weights.exists():
            _train(change(pretrained, pretrained.name, {"run_dir": str(base)}))
            # As a bare vision-language model: what runs start from has other settings than they.
            export_hf(open_vlm(base), weights)
        config = change(config, config.name, {"model.weights": str(weights)})
    if plan.measure == "counterfactual":
        texts = runs / f"counterfactual-{data[:16]}"
        write_language_data(config.data.records, texts)
        config = change(config, config.name, {"data.conversation.language_data": str(texts)})
        loss = _train(config)
        return Measured({"loss": loss}, {}).beside(counterfactual(config, folder, texts))
    loss = _train(config)
    asked = f"-{name}" if run.at_test else ""
    closed = plan.drives is not None
    found = open_loop(config, folder, f"predictions{asked}.jsonl", run.at_test, finely=closed)
    found = Measured({"loss": loss}, {}).beside(found)
    if plan.drives is not None:
        found = found.beside(closed_loop(folder, folder / f"drives-{name}", run.at_test, plan.drives))
    if pretrained is not None and base is not None:
        found = found.beside(forgotten(config, folder, pretrained, base))
    return found


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

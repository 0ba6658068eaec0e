"""From several run directories to one page: their scores with paired intervals, curves, and what differs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spacedrive_jax.console import progress
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.evaluation.evaluate import evaluate
from spacedrive_jax.evaluation.prediction_files import read_predictions
from spacedrive_jax.evaluation.predictions import Predictions
from spacedrive_jax.evaluation.protocols import protocol_named
from spacedrive_jax.io import is_bucket, write_text
from spacedrive_jax.reporting.build import WrittenReport
from spacedrive_jax.reporting.curves import LINE_COLORS, compared_curves
from spacedrive_jax.reporting.page import (
    ComparedRun,
    ComparisonPage,
    ScoreRow,
    flatten,
    render_comparison,
)
from spacedrive_jax.reporting.run_files import RunFiles, read_run

DEFAULT_PROTOCOL = "omnidrive"
ABSENT = "–"


def write_comparison(
    run_dirs: Sequence[Path],
    records: Path | None = None,
    split: str | None = None,
    out: Path | None = None,
    protocol: str = DEFAULT_PROTOCOL,
    workers: int = 1,
) -> WrittenReport:
    """Writes a page that compares runs; the others are held against the first.

    Args:
        run_dirs: run directories, two or more.
        records: records folder to score all of them on; the first run's by default.
        split: split to score on; the first run's by default, else val.
        out: the page; `compare.html` in the first run's directory by default.
        protocol: how predictions are scored.
        workers: processes that share the keyframes.

    Raises:
        SpaceDriveError: a directory is no run or given twice, or a file in it is damaged.
    """
    if len({directory.resolve() for directory in run_dirs}) < len(run_dirs):
        raise ConfigError("a run is given twice: name each run directory once")
    files = [read_run(directory) for directory in run_dirs]
    out = out or run_dirs[0] / "compare.html"
    if not is_bucket(out) and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist")
    names = _names(run_dirs)
    colors = dict(zip(names, itertools.cycle(LINE_COLORS), strict=False))
    notices: list[str] = []
    scores: list[ScoreRow] = []
    differences: list[ScoreRow] = []
    why = ""
    try:
        opened = _open_records(files[0], records, split)
        by_run = _predictions(files, names, notices)
        scores, differences = _score(opened, by_run, colors, protocol, workers)
    except SpaceDriveError as error:
        why = f"{error}."
    curves = {name: (colors[name], run.steps) for name, run in zip(names, files, strict=True)}
    page = ComparisonPage(
        title=", ".join(names),
        runs=[
            ComparedRun(name, colors[name], str(run.directory))
            for name, run in zip(names, files, strict=True)
        ],
        notices=notices,
        protocol=protocol,
        scores=scores,
        why_no_scores=why,
        differences=differences,
        curves=compared_curves(curves),
        config=_config_differences([run.config for run in files]),
    )
    write_text(out, render_comparison(page))
    return WrittenReport(out, (*notices, *([why] if why else [])))


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as tell them apart."""
    parts = [directory.resolve().parts for directory in run_dirs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _open_records(first: RunFiles, given: Path | None, split: str | None) -> Records:
    if given is None and not first.predicted.get("records"):
        raise ConfigError(f"{first.directory / 'run.json'} names no records: give --records DIR")
    directory = given or first.resolve(str(first.predicted["records"]))
    return open_records(directory, split or str(first.predicted.get("split", "val")))


def _predictions(
    files: Sequence[RunFiles], names: Sequence[str], notices: list[str]
) -> dict[str, Predictions]:
    """Each run's predictions; a run without any is named and left out of the scores.

    Raises:
        ConfigError: the first run, which the others are held against, has none.
    """
    found: dict[str, Predictions] = {}
    for name, run in zip(names, files, strict=True):
        path = run.predictions
        if path.is_file():
            found[name] = read_predictions(path)
        elif not found and name == names[0]:
            raise ConfigError(
                f"{run.directory} has no predictions: `predict --checkpoint {run.directory}` first"
            )
        else:
            notices.append(f"{name} has no predictions ({path.name}) and is not scored.")
    return found


def _score(
    records: Records,
    by_run: Mapping[str, Predictions],
    colors: Mapping[str, str],
    protocol: str,
    workers: int,
) -> tuple[list[ScoreRow], list[ScoreRow]]:
    rule = protocol_named(protocol)
    first = next(iter(by_run))
    scores, differences = [], []
    for name, predictions in by_run.items():
        result = evaluate(
            records,
            predictions,
            [rule],
            compare=None if name == first else by_run[first],
            workers=workers,
            track=lambda rows, name=name: progress(  # type: ignore[misc]
                rows, total=len(records), desc=f"score {name}", unit="keyframe"
            ),
        )[protocol].to_json()
        scores.append(ScoreRow(name, colors[name], result["samples"], result, result["confidence"]))
        against: Mapping[str, Any] | None = result["comparison"]
        if against is not None:
            differences.append(
                ScoreRow(name, colors[name], against["samples"], against["difference"], against["confidence"])
            )
    return scores, differences


def _config_differences(configs: Sequence[Mapping[str, Any] | None]) -> dict[str, list[str]]:
    """Dotted fields whose values differ between the runs that keep a config."""
    flat = [dict(flatten(config or {})) for config in configs]
    fields = sorted({name for config in flat for name in config} - {"name", "run_dir"})
    rows = {field: [config.get(field, ABSENT) for config in flat] for field in fields}
    return {field: values for field, values in rows.items() if len(set(values)) > 1}

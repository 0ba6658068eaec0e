"""From run directories to a page: one run's report, or several runs side by side.

Of one run it finds the parts, checks that they belong together and writes the page; of several, their scores
with paired intervals, curves, and what differs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spacedrive_jax.console import progress
from spacedrive_jax.data.loader import records_sources
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.records_folder import read_provenance
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.evaluation.evaluate import evaluate
from spacedrive_jax.evaluation.prediction_files import TO_EGO, predictions_sha256, read_predictions
from spacedrive_jax.evaluation.predictions import Predictions
from spacedrive_jax.evaluation.protocols import protocol_named
from spacedrive_jax.io import is_bucket, place, write_text
from spacedrive_jax.reporting.cameras import depth_scale
from spacedrive_jax.reporting.cases import SplitErrors, choose_cases, make_case, measure_split
from spacedrive_jax.reporting.figures import LINE_COLORS, compared_curves, horizon_plot, training_curves
from spacedrive_jax.reporting.page import (
    METRICS,
    ComparedRun,
    ComparisonPage,
    Page,
    ScoreRow,
    Tile,
    flatten,
    interval,
    render_comparison,
    render_page,
)
from spacedrive_jax.reporting.run_files import RunDepth, RunFiles, open_run_depth, read_run

DEFAULT_SPLIT = "val"
UNJUDGED = {"collision": "no annotations", "intersection": "no map"}
"""What a metric without a value lacks as a rule; the notes below the table say what it is here."""


@dataclasses.dataclass(frozen=True)
class WrittenReport:
    """A report on disk."""

    file: Path
    notices: tuple[str, ...]
    """What is missing or must be known, as said on the page."""


def write_report(
    run_dir: Path,
    records: Path | None = None,
    predictions: Path | None = None,
    split: str | None = None,
    highlights: Sequence[str] = (),
    out: Path | None = None,
) -> WrittenReport:
    """Writes a run's page.

    Args:
        run_dir: a run directory; its `run.json` names what the other arguments leave open.
        records: records folder.
        predictions: prediction file.
        split: split to show.
        highlights: tokens of keyframes to show besides the best, median and worst.
        out: the page; `run_dir/report.html` by default.

    Raises:
        ConfigError: the directory is no run, a file in it is damaged, or something named by an argument does
            not exist.
    """
    files = read_run(run_dir, predictions)
    out = out or run_dir / "report.html"
    if not is_bucket(out) and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist")
    notices = list(files.missing)
    opened = _open_records(files, records, split or str(files.predicted.get("split", DEFAULT_SPLIT)), notices)
    predicted = _open_predictions(files, predictions, notices)
    measured, run_depth = None, None
    if opened is not None:
        run_depth = open_run_depth(opened, files.config, notices)
        measured = measure_split(
            opened, predicted, lambda rows: progress(rows, desc="report", unit="keyframe")
        )
        notices += _check_match(opened, files, predicted, measured)
    elif highlights:
        raise ConfigError("--highlight needs records: give --records DIR")
    page = _make_page(files, opened, predicted, measured, highlights, notices, run_depth)
    write_text(out, render_page(page))
    return WrittenReport(out, tuple(notices))


def _open_records(files: RunFiles, given: Path | None, split: str, notices: list[str]) -> Records | None:
    if given is not None:
        return open_records(given, split)
    named = files.predicted.get("records")
    if not named:
        notices.append("No records are named in run.json and --records is not given: no keyframe is shown.")
        return None
    directory = files.resolve(str(named))
    if not directory.is_dir():
        notices.append(f"The records folder {named} named in run.json is not here: no keyframe is shown.")
        return None
    return open_records(directory, split)


def _open_predictions(files: RunFiles, given: Path | None, notices: list[str]) -> Predictions | None:
    path = files.predictions if given is None else given
    if given is None and not path.is_file():
        notices.append(f"There is no prediction file {path.name}: no predicted path is shown.")
        return None
    digest = predictions_sha256(path)
    scored = [each for each in files.evaluations if digest and each.get("predictions_sha256") == digest]
    axes = {each["axes"] for each in scored if each.get("axes") in TO_EGO}
    if len(axes) > 1:
        notices.append(f"{path.name} was scored in several axes: it is shown as forward-left.")
    return read_predictions(path, axes.pop() if len(axes) == 1 else "forward-left")


def _check_match(
    records: Records, files: RunFiles, predictions: Predictions | None, measured: SplitErrors
) -> list[str]:
    """Sentences about records, scores and predictions that do not belong together."""
    notices = []
    if predictions is not None and predictions.tokens and predictions.tokens <= set(predictions.unparsed):
        notices.append(
            f"None of the {len(predictions.tokens)} predictions holds a trajectory: all are unparsed. After "
            "few steps of training that is to be expected."
        )
    elif predictions is not None and "prediction" not in measured.errors:
        notices.append(
            f"None of the {len(predictions.tokens)} predictions belongs to a keyframe with a whole future in "
            f"split {records.split} of {records.directory}."
        )
    shown = None if predictions is None else predictions_sha256(predictions.path)
    for evaluation in files.evaluations:
        scored = evaluation.get("predictions_sha256")
        if predictions is not None and None not in (shown, scored) and scored != shown:
            notices.append(
                f"The {evaluation['protocol']} scores are of other predictions than {predictions.path} "
                "holds now: evaluate again."
            )
        fingerprint = evaluation["records"].get("fingerprint")
        if fingerprint != records.fingerprint:
            notices.append(
                f"The {evaluation['protocol']} scores were computed on other records (fingerprint "
                f"{fingerprint}) than the keyframes shown ({records.fingerprint})."
            )
        elif evaluation["records"].get("split") != records.split:
            notices.append(
                f"The {evaluation['protocol']} scores are of split {evaluation['records'].get('split')}, the "
                f"keyframes shown are of split {records.split}."
            )
    trained_on = files.provenance.get("records_fingerprint")
    if trained_on not in (None, records.fingerprint) and not _among(files.provenance.get("records"), records):
        notices.append(
            f"The run was trained on other records (fingerprint {trained_on}) than the keyframes shown "
            f"({records.fingerprint})."
        )
    if measured.images.rendered:
        notices.append(
            "Camera images the dataset has no file for are drawn by a renderer: "
            + measured.images.describe(read_provenance(records.directory))
            + f" in split {records.split}."
        )
    return notices


def _among(trained_on: object, records: Records) -> bool:
    """Whether a run was trained on several folders of records, these among them."""
    try:
        folders = [folder for folder, _ in records_sources(str(trained_on))]
    except ConfigError:  # one folder with a comma in its name, which is gone
        return False
    return len(folders) > 1 and str(place(records.directory).resolve()) in folders


def _make_page(
    files: RunFiles,
    records: Records | None,
    predictions: Predictions | None,
    measured: SplitErrors | None,
    highlights: Sequence[str],
    notices: Sequence[str],
    run_depth: RunDepth | None,
) -> Page:
    cases = []
    if records is not None and measured is not None:
        cases = [
            make_case(title, token, records, measured, predictions, files.config, run_depth)
            for title, token in choose_cases(measured, highlights)
        ]
    predicted = measured is not None and "prediction" in measured.errors
    return Page(
        title=str((files.config or {}).get("name") or files.directory.resolve().name),
        summary=_summary(files, predicted=predictions),
        notices=notices,
        evaluations=files.evaluations,
        horizon=horizon_plot(measured.errors) if measured is not None and predicted else None,
        cases=cases,
        depth_scale=depth_scale() if any(case.strip and case.has_depth for case in cases) else None,
        curves=training_curves(files.steps),
        config=None if files.config is None else dict(flatten(files.config)),
        provenance=_provenance(files, records, predictions, measured),
    )


def _summary(files: RunFiles, *, predicted: Predictions | None) -> list[Tile]:
    tiles = []
    if files.steps:
        last = files.steps[-1]
        tiles.append(Tile("Steps", f"{int(last['step']):,}"))
        if "loss" in last:
            tiles.append(Tile("Last loss", f"{last['loss']:.4g}"))
    if files.evaluations:
        shown = next(
            (item for item in files.evaluations if item["protocol"] == "omnidrive"), files.evaluations[0]
        )
        confidence = shown.get("confidence") or {}
        for metric, (name, unit) in METRICS.items():
            value, bounds = shown[metric]["avg"], confidence.get(metric, {}).get("avg")
            tiles.append(
                Tile(
                    f"{name}, average ({shown['protocol']})",
                    UNJUDGED.get(metric, "not judged") if value is None else f"{value:.2f} {unit}",
                    f"95 %: {interval(bounds)}" if bounds and value is not None else "",
                )
            )
        coverage = shown["coverage"]
        tiles.append(Tile("Scored keyframes", f"{coverage['counted']} of {coverage['eligible']}"))
    if predicted is not None:
        tiles.append(Tile("Unparsed answers", f"{len(predicted.unparsed)} of {len(predicted.tokens)}"))
    return tiles


def _provenance(
    files: RunFiles,
    records: Records | None,
    predictions: Predictions | None,
    measured: SplitErrors | None,
) -> dict[str, str]:
    rows = {f"run.json: {name}": value for name, value in flatten(files.provenance)}
    rows["run directory"] = str(files.directory)
    if records is not None and measured is not None:
        rows["records shown"] = f"{records.directory}, split {records.split}, {len(records)} keyframes"
        rows["records fingerprint"] = records.fingerprint
        provenance = read_provenance(records.directory)
        rows["dataset version"] = str(provenance.get("source", {}).get("version", "not recorded"))
        rows["licence of the data"] = str(provenance.get("licence", "not recorded"))
        rows["camera images"] = measured.images.describe(provenance)
    if predictions is not None:
        rows["predictions shown"] = f"{predictions.path}, {len(predictions.tokens)} keyframes"
    return rows


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
    names = _run_names(run_dirs)
    colors = dict(zip(names, itertools.cycle(LINE_COLORS), strict=False))
    notices: list[str] = []
    scores: list[ScoreRow] = []
    differences: list[ScoreRow] = []
    why = ""
    try:
        opened = _records_to_compare(files[0], records, split)
        by_run = _predictions_of(files, names, notices)
        scores, differences = _score_runs(opened, by_run, colors, protocol, workers)
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


def _run_names(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as tell them apart."""
    parts = [directory.resolve().parts for directory in run_dirs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _records_to_compare(first: RunFiles, given: Path | None, split: str | None) -> Records:
    if given is None and not first.predicted.get("records"):
        raise ConfigError(f"{first.directory / 'run.json'} names no records: give --records DIR")
    directory = given or first.resolve(str(first.predicted["records"]))
    return open_records(directory, split or str(first.predicted.get("split", "val")))


def _predictions_of(
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


def _score_runs(
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

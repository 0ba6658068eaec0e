"""From a run directory to its report: finds the parts, checks that they belong together, writes the page."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from spacedrive_jax.console import progress
from spacedrive_jax.data.loader import records_sources
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.records_folder import read_provenance
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.evaluation.prediction_files import TO_EGO, read_predictions
from spacedrive_jax.evaluation.predictions import Predictions
from spacedrive_jax.io import is_bucket, place, read_bytes, write_text
from spacedrive_jax.reporting.cameras import depth_scale
from spacedrive_jax.reporting.cases import SplitErrors, choose_cases, make_case, measure_split
from spacedrive_jax.reporting.curves import horizon_plot, training_curves
from spacedrive_jax.reporting.page import METRICS, Page, Tile, flatten, interval, render_page
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
    digest = _digest(path)
    scored = [each for each in files.evaluations if digest and each.get("predictions_sha256") == digest]
    axes = {each["axes"] for each in scored if each.get("axes") in TO_EGO}
    if len(axes) > 1:
        notices.append(f"{path.name} was scored in several axes: it is shown as forward-left.")
    return read_predictions(path, axes.pop() if len(axes) == 1 else "forward-left")


def _digest(path: Path) -> str | None:
    """SHA-256 of a prediction file, by which `evaluate` names it; None for a folder."""
    return hashlib.sha256(read_bytes(path)).hexdigest() if path.is_file() else None


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
    shown = None if predictions is None else _digest(predictions.path)
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

"""The page of a run of drives: scores against other runs, every kind, films and curves of what went wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spacedrive_jax.driving.drive import RESULTS, interval, read_summary
from spacedrive_jax.driving.results import read_drive, read_records, read_trace
from spacedrive_jax.errors import DataError
from spacedrive_jax.io import write_text
from spacedrive_jax.reporting.drive_pictures import film, scatter, strip, views_strip
from spacedrive_jax.reporting.page import render_drives

MOST_FILMS = 12
"""The worst drives are shown; a page with all of them would take minutes to open."""
PAGE = "drives.html"


@dataclasses.dataclass(frozen=True)
class RunRow:
    """One run in the table."""

    name: str
    drives: int
    driving_score: float
    driving_interval: Sequence[float] | None
    success_rate: float
    pdm_score: float
    pdm_interval: Sequence[float] | None
    parts: Mapping[str, float]
    failures: Mapping[str, int]
    open_loop_l2: float | None = None
    """Metres, of plans made where the script drove (`driving.episode.open_loop`)."""
    difference: tuple[float, Sequence[float] | None, int] | None = None
    """Of the driving score to the first run on the drives that both have: mean, interval, drives."""


@dataclasses.dataclass(frozen=True)
class FilmRow:
    """One drive that went wrong."""

    title: str
    status: str
    score: float
    infractions: Sequence[str]
    film: str
    """An SVG that moves by itself."""
    curves: str
    """An SVG of speed, steering and acceleration over time."""
    views: str
    """Data address of the six views when it went wrong; empty where the policy did not look."""
    wrong_at: float | None
    """Seconds into the drive."""


@dataclasses.dataclass(frozen=True)
class DrivesPage:
    """All that the page says."""

    title: str
    rows: Sequence[RunRow]
    kinds: Sequence[tuple[str, Mapping[str, Mapping[str, float]]]]
    """Per kind, run to its scores."""
    films: Sequence[FilmRow]
    imperfect: int
    scatter: str
    """An SVG of all runs, open against closed loop."""


def write_page(folder: Path, others: Sequence[Path] = ()) -> Path:
    """Writes `drives.html` into a run of drives.

    Args:
        folder: of the run.
        others: runs to hold it against, on the same scenarios.

    Raises:
        DataError: one of the folders is no finished run of drives.
    """
    runs = [folder, *others]
    names = _names(runs)
    summaries = [read_summary(run) for run in runs]
    rows = run_rows(folder, others)
    kinds = dict.fromkeys(kind for summary in summaries for kind in summary.get("kinds", {}))
    table = [
        (
            kind,
            {
                name: summary.get("kinds", {}).get(kind, {})
                for name, summary in zip(names, summaries, strict=True)
            },
        )
        for kind in kinds
    ]
    films, imperfect = _films(folder)
    dots = [
        (row.name, row.open_loop_l2, row.driving_score, row.driving_interval)
        for row in rows
        if row.open_loop_l2 is not None
    ]
    page = DrivesPage(f"Drives of {names[0]}", rows, table, films, imperfect, scatter(dots))
    path = folder / PAGE
    write_text(path, render_drives(page))
    return path


def run_rows(folder: Path, others: Sequence[Path] = ()) -> list[RunRow]:
    """A row for every run that drove, the first what the others are held against.

    Args:
        folder: of the run.
        others: runs on the same scenarios.

    Raises:
        DataError: one of the folders is no finished run of drives.
    """
    runs = [folder, *others]
    summaries = [read_summary(run) for run in runs]
    scores = [_scores(run) for run in runs]
    return [
        _row(name, summary, own, scores[0] if number else None)
        for number, (name, summary, own) in enumerate(zip(_names(runs), summaries, scores, strict=True))
        if summary["drives"]
    ]


def score_table(rows: Sequence[RunRow]) -> str:
    """Rows as lines for a terminal, the best driving score first."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  driving score        success, %  PDM score"]
    for row in sorted(rows, key=lambda row: -row.driving_score):
        between = row.driving_interval
        shown = "" if between is None else f" [{between[0]:.1f}, {between[1]:.1f}]"
        score = f"{row.driving_score:.1f}{shown}"
        lines.append(f"{row.name:{width}}  {score:19}  {row.success_rate:10.1f}  {row.pdm_score:9.1f}")
    return "\n".join(lines)


def _names(runs: Sequence[Path]) -> list[str]:
    """What runs are called: the last parts of their paths, as many as tell them apart."""
    for count in range(1, 6):
        names = ["/".join(run.resolve().parts[-count:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return names


def _scores(folder: Path) -> dict[str, float]:
    """Driving score of every drive by its folder's name."""
    found = {}
    for path in sorted((folder / "drives").glob("*/result.json")):
        value = read_drive(path)
        if "scores" in value:
            found[path.parent.name] = float(value["scores"]["score_composed"])
    return found


def _row(
    name: str, summary: Mapping[str, Any], own: Mapping[str, float], first: Mapping[str, float] | None
) -> RunRow:
    difference = None
    if first is not None:
        common = sorted(set(own) & set(first))
        if common:
            steps = np.array([own[drive] - first[drive] for drive in common])
            difference = float(steps.mean()), interval(steps), len(common)
    return RunRow(
        name=name,
        drives=summary["drives"],
        driving_score=summary["driving_score"],
        driving_interval=summary["driving_score_interval"],
        success_rate=summary["success_rate"],
        pdm_score=summary["pdm_score"],
        pdm_interval=summary["pdm_score_interval"],
        parts=summary["pdm_parts"],
        failures=summary["failures"],
        open_loop_l2=summary["open_loop_l2"],
        difference=difference,
    )


def _films(folder: Path) -> tuple[list[FilmRow], int]:
    """The worst drives, and how many were not perfect."""
    records = read_records(folder / RESULTS)
    wrong = [record for record in records if record["status"] != "Perfect"]
    wrong.sort(key=lambda record: (record["scores"]["score_composed"], record["index"]))
    rows = []
    by_number = {path.name.split("-")[0]: path for path in (folder / "drives").iterdir()}
    for record in wrong[:MOST_FILMS]:
        drive = by_number.get(f"{record['index']:04d}")
        if drive is None:
            raise DataError(
                f"{folder / RESULTS} has drive {record['index']}, drives/ lacks its folder: drive it again"
            )
        trace = read_trace(drive / "trace.json")
        texts = [
            text
            for kind, found in record["infractions"].items()
            for text in found
            if kind != "min_speed_infractions"
        ]
        rows.append(
            FilmRow(
                drive.name,
                record["status"],
                record["scores"]["score_composed"],
                texts,
                film(trace),
                strip(trace),
                views_strip(drive),
                trace.get("wrong_at"),
            )
        )
    return rows, len(wrong)

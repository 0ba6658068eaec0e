"""The report as one HTML text: no script, no network, everything embedded.

The pages are jinja2 templates (`templates/`) with autoescape on: whatever a run's files say is shown as text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from spacedrive_jax import __version__
from spacedrive_jax.evaluation.protocols import PROTOCOLS
from spacedrive_jax.reporting.cases import Case
from spacedrive_jax.reporting.figures import COLORS

METRICS = {"l2": ("L2", "m"), "collision": ("Collision", "%"), "intersection": ("Off road", "%")}
COLUMNS = ("1s", "2s", "3s", "avg")
ROW_NAMES = {
    "standing_still": "standing still",
    "constant_velocity": "constant velocity",
    "mean_trajectory": "mean trajectory",
    "ground_truth": "recorded drive",
}
COVERAGE_WORDS = {
    "unparsed": "unparsed (the answer holds no trajectory)",
    "short": "with too few waypoints",
    "long": "with more waypoints than are scored",
    "non_finite": "with waypoints that are no numbers",
    "duplicates": "given twice",
}
"""What the counts of an evaluation's coverage mean, where the name does not say it."""
SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        "base-uri 'none'",
        "form-action 'none'",
    )
)
"""What a browser may do with the page: show its own pictures and styles. No script, no request outside,
should text of a run's files ever reach it as markup."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """A headline figure."""

    label: str
    value: str
    """The figure with its unit."""
    detail: str = ""
    """A smaller line below, such as an interval."""


@dataclasses.dataclass(frozen=True)
class Page:
    """Everything that the page of a run shows."""

    title: str
    summary: Sequence[Tile]
    """Headline figures."""
    notices: Sequence[str]
    """What is missing or must be known, one sentence each."""
    evaluations: Sequence[Mapping[str, Any]]
    """Objects written by `evaluate`."""
    horizon: str | None
    """Data address of the error-over-horizon figure, None without predictions and records."""
    cases: Sequence[Case]
    """Keyframes to show."""
    depth_scale: str | None
    """Data address of the colours of the depth, None where no keyframe is shown."""
    curves: Sequence[tuple[str, str]]
    """(title, data address) per training panel."""
    config: Mapping[str, str] | None
    """The resolved configuration as dotted names, None when absent."""
    provenance: Mapping[str, str]
    """Label to text."""


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """One run in a table of several."""

    name: str
    color: str
    """`#rrggbb`, its own in all figures."""
    samples: int
    """Keyframes counted."""
    scores: Mapping[str, Any]
    """Metric to horizon to value."""
    confidence: Mapping[str, Any] | None
    """Metric to horizon to interval, None where there is none."""


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """A run on a page of several: its name, its colour and its folder."""

    name: str
    color: str
    directory: str


@dataclasses.dataclass(frozen=True)
class ComparisonPage:
    """Everything that the page of several runs shows."""

    title: str
    runs: Sequence[ComparedRun]
    notices: Sequence[str]
    """What is missing or must be known, one sentence each."""
    protocol: str
    """Under which they are scored."""
    scores: Sequence[ScoreRow]
    """A row a run, the one the others are held against first; empty where they cannot be scored."""
    why_no_scores: str
    differences: Sequence[ScoreRow]
    """A row for each other run: what it differs by on the keyframes both answered."""
    curves: Sequence[tuple[str, str]]
    """(title, data address) per training panel."""
    config: Mapping[str, Sequence[str]]
    """Fields that differ, with each run's value."""


def render_page(page: Page) -> str:
    """The whole page of a run."""
    return _environment().get_template("run.html.jinja").render(page=page, notices=page.notices)


def render_comparison(page: ComparisonPage) -> str:
    """The whole page of several runs."""
    return _environment().get_template("compare.html.jinja").render(page=page, notices=page.notices)


def render_drives(page: Any) -> str:
    """The page of a run of drives (`reporting.drives.DrivesPage`)."""
    return _environment().get_template("drives.html.jinja").render(page=page, notices=())


def render_study(page: Any) -> str:
    """The page of a study (`study.report.StudyPage`)."""
    return _environment().get_template("study.html.jinja").render(page=page, notices=())


def flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested mappings as dotted names with their values as text."""
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from flatten(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(item)


def interval(bounds: Sequence[float] | None, unit: str = "") -> str:
    """A 95 % interval in words; empty where there is none."""
    if not bounds:
        return ""
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}" + (f" {unit}" if unit else "")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spacedrive_jax.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "policy": markupsafe.Markup(SECURITY_POLICY),  # ours, and its quotes need no escape
        "colors": COLORS,
        "version": __version__,
        "metrics": METRICS,
        "columns": COLUMNS,
        "row_names": ROW_NAMES,
        "protocols": {name: protocol.description for name, protocol in PROTOCOLS.items()},
    }
    environment.filters |= {"number": _number, "range": interval, "score_notes": _score_notes}
    return environment


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _score_notes(evaluation: Mapping[str, Any]) -> str:
    """What was counted, and what a reader must know, in sentences."""
    coverage = evaluation["coverage"]
    sentences = [
        f"Scored {coverage['counted']} of {coverage['eligible']} keyframes that have a whole recorded future "
        f"({100 * coverage['share']:.1f} %); the split has {coverage['records']}."
    ]
    listed = [
        f"{item['count']} {COVERAGE_WORDS.get(name, name.replace('_', ' '))}"
        for name, item in coverage.items()
        if isinstance(item, Mapping) and item.get("count")
    ]
    if listed:
        sentences.append(f"Answers: {', '.join(listed)}.")
    confidence = evaluation.get("confidence")
    if confidence:
        sentences.append(
            f"Small: the {100 * confidence['level']:.0f} % interval of the average, over "
            f"{confidence['scenes']} scenes drawn anew."
        )
    sentences += evaluation.get("notes", ())
    sentences.append("The recorded drive is scored against itself with no step excluded from collision.")
    return " ".join(sentences)

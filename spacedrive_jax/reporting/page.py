"""The report as one HTML text: no script, no network, everything embedded."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spacedrive_jax.reporting.cases import Case
from spacedrive_jax.reporting.style import STYLESHEET

METRICS = {"l2": ("L2", "m"), "collision": ("Collision", "%"), "intersection": ("Off road", "%")}
COLUMNS = ("1s", "2s", "3s", "avg")
ROW_NAMES = {
    "prediction": "this run",
    "standing_still": "standing still",
    "constant_velocity": "constant velocity",
    "mean_trajectory": "mean trajectory",
    "ground_truth": "recorded drive",
}


@dataclasses.dataclass(frozen=True)
class Page:
    """Everything a page shows.

    Attributes:
        title: the run's name.
        summary: headline figures, label to text.
        notices: what is missing or must be known, one sentence each.
        evaluations: objects written by `evaluate`.
        horizon: data address of the error-over-horizon figure, None without predictions and records.
        cases: keyframes to show.
        curves: (title, data address) per training panel.
        config: the resolved configuration, None when absent.
        provenance: label to text.
    """

    title: str
    summary: Mapping[str, str]
    notices: Sequence[str]
    evaluations: Sequence[Mapping[str, Any]]
    horizon: str | None
    cases: Sequence[Case]
    curves: Sequence[tuple[str, str]]
    config: Mapping[str, Any] | None
    provenance: Mapping[str, str]


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


def render_page(page: Page) -> str:
    """The whole page."""
    sections = [
        _section("scores", "Open-loop scores", _scores(page.evaluations)),
        _section("horizon", "Error over the horizon", _horizon(page.horizon)),
        _section("cases", "Keyframes", "".join(map(_case, page.cases)) or _absent("No keyframe is shown.")),
        _section("training", "Training", _curves(page.curves)),
        _section("config", "Configuration", _config(page.config)),
        _section("provenance", "Where this comes from", _definitions(page.provenance)),
    ]
    title = html.escape(page.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{SECURITY_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLESHEET}</style></head><body>"
        f'<header><p class="kicker">SpaceDrive run report</p><h1>{title}</h1>{_tiles(page.summary)}'
        "</header>"
        f"<main>{_notices(page.notices)}{''.join(sections)}</main></body></html>\n"
    )


def flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested mappings as dotted names with their values as text."""
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from flatten(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(item)


def _section(anchor: str, title: str, body: str) -> str:
    return f'<section id="{anchor}"><h2>{html.escape(title)}</h2>{body}</section>'


def _absent(text: str) -> str:
    return f'<p class="absent">{html.escape(text)}</p>'


def _tiles(summary: Mapping[str, str]) -> str:
    tiles = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>"
        for label, value in summary.items()
    )
    return f'<dl class="tiles">{tiles}</dl>' if tiles else ""


def _notices(notices: Sequence[str]) -> str:
    if not notices:
        return ""
    items = "".join(f"<li>{html.escape(notice)}</li>" for notice in notices)
    return f'<aside class="notices"><h2>Missing or to be known</h2><ul>{items}</ul></aside>'


def _scores(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return _absent("There is no evaluation to show.")
    return "".join(map(_score_table, evaluations))


def _score_table(evaluation: Mapping[str, Any]) -> str:
    groups = "".join(
        f'<th colspan="{len(COLUMNS)}" scope="colgroup">{name} ({unit})</th>'
        for name, unit in METRICS.values()
    )
    columns = "".join(f'<th scope="col"{_edge(column)}>{column}</th>' for _ in METRICS for column in COLUMNS)
    rows = {"prediction": evaluation, **evaluation["baselines"]}
    body = "".join(_score_row(name, scores) for name, scores in rows.items())
    coverage = evaluation["coverage"]
    lists = [
        f"{item['count']} {name.replace('_', ' ')}"
        for name, item in coverage.items()
        if isinstance(item, Mapping) and item.get("count")
    ]
    counted = (
        f"Scored {coverage['counted']} of {coverage['eligible']} keyframes that have a whole recorded future "
        f"({100 * coverage['share']:.1f} %); the split has {coverage['records']}."
    )
    if lists:
        counted += f" Not scored or noteworthy: {', '.join(lists)}."
    recorded = "The recorded drive is scored against itself with no step excluded from collision."
    notes = " ".join([counted, *evaluation.get("notes", ()), recorded])
    return (
        f"<h3>Protocol <code>{html.escape(str(evaluation['protocol']))}</code></h3>"
        f'<div class="scroll"><table><thead><tr><th rowspan="2" scope="col">planner</th>'
        f'<th rowspan="2" scope="col">samples</th>{groups}</tr><tr>{columns}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="note">{html.escape(notes)}</p>'
    )


def _score_row(name: str, scores: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<td{_edge(column)}>{_number(scores[metric][column])}</td>"
        for metric in METRICS
        for column in COLUMNS
    )
    emphasis = ' class="run"' if name == "prediction" else ""
    label = html.escape(ROW_NAMES.get(name, name.replace("_", " ")))
    samples = html.escape(str(scores["samples"]))
    return f'<tr{emphasis}><th scope="row">{label}</th><td>{samples}</td>{cells}</tr>'


def _edge(column: str) -> str:
    return ' class="first"' if column == COLUMNS[0] else ' class="avg"' if column == "avg" else ""


def _number(value: float | None) -> str:
    return "&ndash;" if value is None else html.escape(f"{value:.2f}")


def _horizon(figure: str | None) -> str:
    if figure is None:
        return _absent("Not shown: it needs the records and a prediction file.")
    source = html.escape(figure)
    return f'<img class="figure" src="{source}" alt="Mean displacement error at each of the six waypoints">'


def _case(case: Case) -> str:
    facts = " &middot; ".join(
        f"<span>{html.escape(name)} <b>{html.escape(value)}</b></span>" for name, value in case.facts.items()
    )
    front = (
        f'<img src="{html.escape(case.front)}" alt="Front view with the recorded and the predicted path">'
        if case.front
        else _absent("The front camera has no pixels in the records.")
    )
    strip = (
        f'<img class="strip" src="{html.escape(case.strip)}" alt="Six camera views with depth">'
        if case.strip
        else _absent("No camera has pixels in the records.")
    )
    answer = f"<blockquote>{html.escape(case.answer)}</blockquote>" if case.answer else ""
    return (
        f'<article><h3>{html.escape(case.title)}</h3><p class="facts">{facts}</p>'
        f'<div class="case"><figure>{front}<figcaption><i class="key predicted"></i>predicted '
        f'<i class="key recorded"></i>recorded &middot; camera images: {html.escape(case.images)}'
        f"</figcaption>{answer}</figure>"
        f'<figure><img src="{html.escape(case.birds_eye)}" alt="Bird\'s-eye view of the keyframe">'
        "<figcaption>From above: "
        "drivable area pale grey, road users grey with their recorded paths, ego vehicle black</figcaption>"
        "</figure></div>"
        f"<details open><summary>Six views and depth</summary>{strip}"
        f'<p class="note">{html.escape(case.depth)}</p></details></article>'
    )


def _curves(curves: Sequence[tuple[str, str]]) -> str:
    if not curves:
        return _absent("No training log to show.")
    images = "".join(
        f'<img src="{html.escape(figure)}" alt="{html.escape(title)} over steps">' for title, figure in curves
    )
    return f'<div class="curves">{images}</div>'


def _config(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return _absent("No configuration to show.")
    table = _definitions(dict(flatten(config)))
    return f"<details><summary>The whole resolved configuration</summary>{table}</details>"


def _definitions(values: Mapping[str, str]) -> str:
    if not values:
        return _absent("Nothing is recorded.")
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
        for name, value in values.items()
    )
    return f'<div class="scroll"><table class="plain"><tbody>{rows}</tbody></table></div>'

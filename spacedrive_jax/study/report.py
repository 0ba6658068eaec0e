"""A study's page, in Markdown and in HTML, from the plan and its rows alone: findings first."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from spacedrive_jax.io import write_text
from spacedrive_jax.reporting.figures import (
    INK,
    MUTED,
    PREDICTION,
    TRUTH,
    new_figure,
    save_figure,
    styled,
    to_svg,
)
from spacedrive_jax.reporting.page import render_study
from spacedrive_jax.study.analysis import Answer, CellScore, answers, cell_scores, compared
from spacedrive_jax.study.plan import Plan, RankClaim
from spacedrive_jax.study.runs import Progress, Row

METRICS = {
    "l2": ("L2, average of 1 to 3 s", "m"),
    "lateral": ("error to the side", "m"),
    "lost": ("driving score lost", "points"),
    "collision": ("collision rate", "share"),
    "error": ("error of the point read back", "m"),
    "off the road": ("off the road", "share"),
    "along": ("error along the way", "m"),
    "lateral on turns": ("error to the side on turns", "m"),
    "lost pdm": ("PDM score lost", "points"),
    "wrong words": ("wrong words of answers", "share"),
    "forgotten": ("more wrong words than before", "share"),
    "misjudged": ("misjudged trajectories", "share"),
    "missed": ("unsafe ones called safe", "share"),
    "false alarm": ("safe ones called unsafe", "share"),
}
"""What the metrics by scene or drive are called, and their units."""
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a94a0", "#1f2a37")
STYLES = ("-", "--", ":")
MARKERS = ("o", "^", "s")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class StudyPage:
    """Everything that the page shows."""

    title: str
    findings: Sequence[Table]
    plots: Sequence[tuple[str, str]]
    """Title and data address."""
    scores: Sequence[Table]
    methods: Sequence[str]


def write_pages(plan: Plan, progress: Progress, out: Path, name: str = "report") -> Path:
    """Writes NAME.html, which needs nothing else, and NAME.md with its plots beside it.

    Args:
        plan: the study.
        progress: its finished runs.
        out: folder.
        name: of the files.

    Returns:
        The HTML page.
    """
    found = answers(plan, progress.rows)
    figures = _figures(found, progress.rows)
    pictures = []
    # Letters as text, not as outlines: a fifth of the size.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        page = StudyPage(
            title=plan.title,
            findings=[_findings(found)],
            plots=[(title, to_svg(figure)) for title, figure in figures],
            scores=_score_tables(plan, progress.rows),
            methods=_methods(plan, progress),
        )
        for number, (title, figure) in enumerate(figures, 1):
            picture = out / f"{name}-{number}.svg"
            save_figure(figure, picture)
            pictures.append((title, picture.name))
    write_text(out / f"{name}.md", _markdown(page, pictures))
    html = out / f"{name}.html"
    write_text(html, render_study(page))
    return html


def _findings(found: Sequence[Answer]) -> Table:
    head = ["claim", "answer", "effect [95 %]", "matters from", "smallest that could be seen", "from"]
    return Table(head, [_finding(each) for each in found])


def _finding(found: Answer) -> list[str]:
    claim, effect = found.claim, found.effect
    if effect is None:
        return [claim.text, found.verdict, "–", f"{claim.margin:g} {claim.unit}".rstrip(), "–", "–"]
    low, high = effect.interval
    return [
        claim.text,
        found.verdict,
        f"{effect.mean:+.3f} [{low:+.3f}, {high:+.3f}] {claim.unit}".rstrip(),
        f"{claim.margin:g} {claim.unit}".rstrip(),
        f"{effect.smallest:.3f} {claim.unit}".rstrip(),
        f"{effect.seeds} runs, {effect.groups} {_group_word(claim.outcome)}"
        if isinstance(claim, RankClaim)
        else f"{effect.seeds} seeds, {effect.groups} {_group_word(claim.metric)}",
    ]


def _group_word(metric: str) -> str:
    return "blocks" if metric == "error" else "drives" if metric.startswith("lost") else "scenes"


def _score_tables(plan: Plan, rows: Sequence[Row]) -> list[Table]:
    metrics = _metrics(rows)
    if not metrics:
        return []
    scores = {metric: cell_scores(rows, metric) for metric in metrics}
    factors = [factor.name for factor in plan.factors]
    names = [f"{METRICS.get(metric, (metric, ''))[0]} [95 %]" for metric in metrics]
    body = []
    for place, score in enumerate(scores[metrics[0]]):
        cells = [score.cell[name] for name in factors]
        body.append(
            [*cells, *(_with_interval(scores[metric][place]) for metric in metrics), str(score.seeds)]
        )
    tables = [Table([*factors, *names, "seeds"], body)]
    for title in next(iter(scores.values()))[0].curves:
        first = scores[metrics[0]][0].curves[title]
        lines = [
            [*(score.cell[name] for name in factors), *(_number(y) for _, y in score.curves[title])]
            for score in scores[metrics[0]]
        ]
        tables.append(Table([*factors, *(f"{title.split(',')[0]}, {x:g}" for x, _ in first)], lines))
    return tables


def _metrics(rows: Sequence[Row]) -> list[str]:
    """Metrics that every row has by group, in the order of `METRICS`."""
    shared = {name for name in rows[0].groups if all(name in row.groups for row in rows)} if rows else set()
    return [*(name for name in METRICS if name in shared), *sorted(shared - set(METRICS))]


def _with_interval(score: CellScore) -> str:
    return f"{score.mean:.3f} [{score.interval[0]:.3f}, {score.interval[1]:.3f}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _methods(plan: Plan, progress: Progress) -> list[str]:
    rows = progress.rows
    planned = len(rows) + len(progress.unfinished)
    seconds = sum(row.seconds for row in rows)
    said = [
        f"{len(rows)} of {planned} planned runs are finished, in {seconds / 60:.1f} minutes together"
        + (f" ({seconds / len(rows):.1f} s each)." if rows else "."),
        "An effect is the mean of the cell that the claim calls worse less that of the better one, paired by "
        "seed and by scene (or block of points). Its interval comes from 2,000 draws of seeds and of scenes "
        "with replacement; with few seeds it is somewhat too narrow. The answer is yes where the interval "
        "lies above zero, no where it lies below the effect that matters, else cannot tell. The smallest "
        "effect that could be seen is 2.8 standard errors of the draws (80 % power at the 5 % level).",
    ]
    if any(isinstance(claim, RankClaim) for claim in plan.claims):
        said.append(
            "A rank correlation is Spearman's, over runs: +1 where who has less of one has less of the "
            "other. Its interval comes from 2,000 draws of cells, each with all of its seeds, of scenes "
            "and of drives."
        )
    if progress.unfinished:
        said.append(f"Not finished: {'; '.join(progress.unfinished)}.")
    if plan.missing:
        said.append(f"Asked for, and not covered here: {'; '.join(plan.missing)}.")
    if rows:
        data = sorted({row.data[:16] for row in rows if row.data})
        said.append(
            f"Version {rows[0].version}; "
            + (f"records {', '.join(data)}." if data else "no records are needed.")
        )
    return said


@styled
def _figures(answered: Sequence[Answer], rows: Sequence[Row]) -> list[tuple[str, Figure]]:
    metrics = _metrics(rows)
    if not metrics:
        return []
    figures = []
    for metric in (metrics[0], *(["lost"] if "lost" in metrics[1:] else [])):
        title, unit = METRICS.get(metric, (metric, ""))
        scores = cell_scores(rows, metric)
        name = f"{title[0].upper()}{title[1:]}, {unit}: mean and 95 % interval"
        figures.append((name, _whiskers(scores, f"{title}, {unit}")))
    # Three horizons are read from the table.
    drawn = [name for name, points in scores[0].curves.items() if len(points) > 3]
    figures += [(name.capitalize(), _curves(scores, name)) for name in drawn]
    found = [each for each in answered if each.effect is not None]
    ranked = [each for each in found if isinstance(each.claim, RankClaim)]
    if ranked and isinstance(ranked[0].claim, RankClaim):
        figures.append((ranked[0].claim.text, _scatter(ranked[0].claim, rows)))
        figures.append(("Rank correlations, with 95 % interval", _effects(ranked, "rank correlation")))
    units = list(dict.fromkeys(each.claim.unit for each in found if not isinstance(each.claim, RankClaim)))
    for unit in units:
        of_unit = [each for each in found if each.claim.unit == unit and each not in ranked]
        title = "Effects: how much worse, with 95 % interval" + (f" ({unit})" if len(units) > 1 else "")
        figures.append((title, _effects(of_unit, f"effect, {unit}")))
    return figures


def _scatter(claim: RankClaim, rows: Sequence[Row]) -> Figure:
    """Every run by a metric and an outcome."""
    figure, axes = new_figure(7.0, 4.2)
    chosen = compared(claim, rows)
    first, second = (cell_scores(chosen, metric) for metric in (claim.metric, claim.outcome))
    for number, (score, outcome) in enumerate(zip(first, second, strict=True)):
        runs = [row for row in chosen if row.cell == score.cell]
        values = [
            [sum(each[0] for each in row.groups[metric].values()) for row in runs]
            for metric in (claim.metric, claim.outcome)
        ]
        counts = [
            [sum(each[1] for each in row.groups[metric].values()) for row in runs]
            for metric in (claim.metric, claim.outcome)
        ]
        xs, ys = ([v / c for v, c in zip(*both, strict=True)] for both in zip(values, counts, strict=True))
        marker = MARKERS[number // len(PALETTE) % len(MARKERS)]
        name = ", ".join(level for factor, level in outcome.cell.items() if factor not in claim.among)
        color = PALETTE[number % len(PALETTE)]
        axes.plot(xs, ys, marker, color=color, label=name, markersize=4.5, alpha=0.85)
    for set_label, metric in ((axes.set_xlabel, claim.metric), (axes.set_ylabel, claim.outcome)):
        set_label(", ".join(filter(None, METRICS.get(metric, (metric, "")))))
    axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _whiskers(scores: Sequence[CellScore], label: str) -> Figure:
    figure, axes = new_figure(7.0, 0.8 + 0.28 * len(scores))
    places = range(len(scores))
    means = [score.mean for score in scores]
    reach = [
        [max(score.mean - score.interval[0], 0.0) for score in scores],
        [max(score.interval[1] - score.mean, 0.0) for score in scores],
    ]
    axes.errorbar(means, list(places), xerr=reach, fmt="o", color=PREDICTION, ecolor=MUTED, capsize=2)
    axes.set_yticks(list(places), [_cell_name(score.cell) for score in scores], color=INK)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    if means and min(means) > 0 and max(means) > 20 * min(means):
        axes.set_xscale("log")
    return figure


def _effects(found: Sequence[Answer], label: str) -> Figure:
    figure, axes = new_figure(7.0, 0.8 + 0.28 * len(found))
    axes.axvline(0.0, color=MUTED, linewidth=0.8)
    for place, each in enumerate(found):
        assert each.effect is not None
        low, high = each.effect.interval
        axes.plot([low, high], [place, place], color=MUTED)
        axes.plot([each.effect.mean], [place], "o", color=PREDICTION)
        axes.plot([each.claim.margin], [place], "|", color=TRUTH, markersize=9)
    names = [f"{textwrap.shorten(each.claim.text, 70, placeholder=' …')}: {each.verdict}" for each in found]
    axes.set_yticks(range(len(found)), names, color=INK, fontsize=6.5)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel(f"{label} (yellow: what matters)")
    return figure


def _curves(scores: Sequence[CellScore], name: str) -> Figure:
    figure, axes = new_figure(7.0, 3.6)
    for number, score in enumerate(scores):
        points = [(x, y) for x, y in score.curves[name] if y is not None]
        style = STYLES[number // len(PALETTE) % len(STYLES)]
        color = PALETTE[number % len(PALETTE)]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, style, color=color, label=_cell_name(score.cell), marker="o", markersize=2.5)
    axes.set_ylabel(name)
    values = [y for score in scores for _, y in score.curves[name] if y]
    if values and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _cell_name(cell: Mapping[str, str]) -> str:
    return ", ".join(cell.values())


def _markdown(page: StudyPage, pictures: Sequence[tuple[str, str]]) -> str:
    parts = [f"# {page.title}", "## Findings", *map(_markdown_table, page.findings)]
    parts += [f"![{title}]({file})" for title, file in pictures]
    if page.scores:
        parts += ["## Every cell", *map(_markdown_table, page.scores)]
    parts += ["## How it was measured", *page.methods]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(table.head), "|" + "---|" * len(table.head), *map(line, table.rows)])

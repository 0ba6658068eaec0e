"""What a study's rows say: paired differences with intervals over scenes and seeds, an answer to every claim.

Runs of two cells are paired by seed, their keyframes (or points) by scene (or block): both saw the same
data in the same order. Seeds and scenes are drawn with replacement, each on its own (crossed bootstrap); with
three seeds the interval is somewhat too narrow, which the page says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.evaluation.metrics import LEVEL, RESAMPLES
from spacedrive_jax.study.plan import Claim, Plan, RankClaim
from spacedrive_jax.study.runs import Row

POWER = 1.96 + 0.84
"""Standard errors that an effect must have to be found with 80 % power at the 5 % level."""


@dataclasses.dataclass(frozen=True)
class Effect:
    """A difference of two cells' means, or a rank correlation over runs."""

    mean: float
    interval: tuple[float, float]
    """95 %."""
    smallest: float
    """The smallest effect that the study would have found with 80 % power."""
    seeds: int
    """Seeds; runs, of a rank correlation."""
    groups: int
    """Of the metric; of the outcome, of a rank correlation."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a study says about a claim."""

    claim: Claim | RankClaim
    verdict: str
    """`yes`, `yes, but less than matters`, `no`, `cannot tell` or `not run`."""
    effect: Effect | None


@dataclasses.dataclass(frozen=True)
class CellScore:
    """One cell's mean over seeds, with its interval."""

    cell: Mapping[str, str]
    mean: float
    interval: tuple[float, float]
    seeds: int
    curves: Mapping[str, Sequence[tuple[float, float | None]]]
    """Means over the seeds."""


def cell_scores(rows: Sequence[Row], metric: str) -> list[CellScore]:
    """The mean of every cell, in the order of the rows."""
    found = []
    for cell in _cells(rows):
        chosen = [row for row in rows if row.cell == cell]
        sums, counts = _tables(chosen, metric)
        mean, drawn = _bootstrap(sums, counts)
        found.append(CellScore(cell, mean, _interval(drawn), len(chosen), _mean_curves(chosen)))
    return found


def answer(claim: Claim | RankClaim, rows: Sequence[Row]) -> Answer:
    """The answer to a claim by the rule of its class."""
    found = rank_correlation(claim, rows) if isinstance(claim, RankClaim) else effect_of(claim, rows)
    if found is None:
        return Answer(claim, "not run", None)
    low, high = found.interval
    if low > 0:
        verdict = "yes" if high >= claim.margin else "yes, but less than matters"
    else:
        verdict = "no" if high < claim.margin else "cannot tell"
    return Answer(claim, verdict, found)


def answers(plan: Plan, rows: Sequence[Row]) -> list[Answer]:
    """The answers to all claims of a plan."""
    return [answer(claim, rows) for claim in plan.claims]


def effect_of(claim: Claim, rows: Sequence[Row]) -> Effect | None:
    """Mean of `worse` less mean of `better`, paired by seed and by the levels that the claim does not name;
    None where no pair is there.
    """
    better, worse = (_matching(rows, cell, claim.metric) for cell in (claim.better, claim.worse))
    pairs = [(better[key], worse[key]) for key in better if key in worse]
    if not pairs:
        return None
    # All pairs of one seed are one draw: what differs between them is the plan's, not chance.
    seeds = sorted({row.seed for row, _ in pairs})
    names = sorted({name for pair in pairs for row in pair for name in row.groups[claim.metric]})
    sums, counts = np.zeros((2, len(seeds), len(names))), np.zeros((2, len(seeds), len(names)))
    for pair in pairs:
        for side, row in enumerate(pair):
            for name, (total, count) in row.groups[claim.metric].items():
                sums[side, seeds.index(row.seed), names.index(name)] += total
                counts[side, seeds.index(row.seed), names.index(name)] += count
    (first, first_drawn), (second, second_drawn) = (_bootstrap(sums[side], counts[side]) for side in (0, 1))
    drawn = second_drawn - first_drawn
    return Effect(
        mean=second - first,
        interval=_interval(drawn),
        smallest=POWER * float(np.nanstd(drawn)),
        seeds=len(seeds),
        groups=len(names),
    )


def rank_correlation(claim: RankClaim, rows: Sequence[Row]) -> Effect | None:
    """Spearman's correlation of a metric and an outcome over runs, by the rule of `RankClaim`; None of fewer
    than three cells.
    """
    chosen = compared(claim, rows)
    cells = _cells(chosen)
    if len(cells) < 3:
        return None
    rng = np.random.default_rng(0)
    tables = [_tables(chosen, metric) for metric in (claim.metric, claim.outcome)]
    means = [_means(*table, np.ones((1, table[0].shape[1])))[0] for table in tables]
    drawn = [
        _means(*table, rng.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES))
        for table in tables
        for groups in [table[0].shape[1]]
    ]
    members = [np.array([place for place, row in enumerate(chosen) if row.cell == cell]) for cell in cells]
    found = np.full(RESAMPLES, np.nan)
    for draw, picked in enumerate(rng.integers(len(cells), size=(RESAMPLES, len(cells)))):
        places = np.concatenate([members[cell] for cell in picked])
        found[draw] = spearman(drawn[0][draw, places], drawn[1][draw, places])
    return Effect(
        mean=spearman(*means),
        interval=_interval(found),
        smallest=POWER * float(np.nanstd(found)),
        seeds=len(chosen),
        groups=tables[1][0].shape[1],
    )


def compared(claim: RankClaim, rows: Sequence[Row]) -> list[Row]:
    """The rows that a rank claim is about."""
    return [
        row
        for row in rows
        if {claim.metric, claim.outcome} <= set(row.groups)
        and all(row.cell.get(name) == level for name, level in claim.among.items())
    ]


def spearman(first: Float[np.ndarray, " M"], second: Float[np.ndarray, " M"]) -> float:
    """Spearman's rank correlation, ties by their mean rank; nan where one of both is the same everywhere."""
    ranks = []
    for values in (first, second):
        # What rounds otherwise elsewhere must not become another rank.
        _, place, counts = np.unique(np.round(values, 9), return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
        ranks.append(rank - rank.mean())
    size = float(np.sqrt(exact.dot(ranks[0], ranks[0]) * exact.dot(ranks[1], ranks[1])))
    return float(exact.dot(ranks[0], ranks[1])) / size if size else float("nan")


def _means(
    sums: Float[np.ndarray, "M G"], counts: Float[np.ndarray, "M G"], of_group: np.ndarray
) -> Float[np.ndarray, "R M"]:
    """Every run's mean over groups, each counted as often as a draw has it."""
    times = of_group.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return exact.matmul(times, sums.T) / exact.matmul(times, counts.T)


def _matching(
    rows: Sequence[Row], cell: Mapping[str, str], metric: str
) -> dict[tuple[int, tuple[tuple[str, str], ...]], Row]:
    """Rows of a cell's levels, by seed and the rest of their levels."""
    return {
        (row.seed, tuple((name, level) for name, level in sorted(row.cell.items()) if name not in cell)): row
        for row in rows
        if metric in row.groups and all(row.cell.get(name) == level for name, level in cell.items())
    }


def _tables(rows: Sequence[Row], metric: str) -> tuple[Float[np.ndarray, "S G"], Float[np.ndarray, "S G"]]:
    names = sorted({name for row in rows for name in row.groups[metric]})
    cells = [[row.groups[metric].get(name, [0.0, 0.0]) for name in names] for row in rows]
    table = np.asarray(cells, np.float64)
    return table[..., 0], table[..., 1]


def _bootstrap(
    sums: Float[np.ndarray, "S G"], counts: Float[np.ndarray, "S G"]
) -> tuple[float, Float[np.ndarray, " R"]]:
    """The mean, and what it would be for other seeds and groups: the same draws for tables of one shape."""
    rng = np.random.default_rng(0)
    seeds, groups = sums.shape
    of_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES).astype(np.float64)
    of_group = rng.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES).astype(np.float64)

    def drawn(table: Float[np.ndarray, "S G"]) -> Float[np.ndarray, " R"]:
        return exact.dot(exact.matmul(of_seed, table), of_group)

    with np.errstate(invalid="ignore", divide="ignore"):
        return float(sums.sum() / counts.sum()), drawn(sums) / drawn(counts)


def _interval(drawn: Float[np.ndarray, " R"]) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def _cells(rows: Sequence[Row]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for row in rows:
        if row.cell not in found:
            found.append(row.cell)
    return found


def _mean_curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, float | None]]]:
    curves: dict[str, list[tuple[float, float | None]]] = {}
    for name in rows[0].curves:
        points = zip(*(row.curves[name] for row in rows), strict=True)
        curves[name] = [
            (
                float(point[0][0] or 0.0),
                None if any(y is None for _, y in point) else float(np.mean([y for _, y in point])),
            )
            for point in points
        ]
    return curves

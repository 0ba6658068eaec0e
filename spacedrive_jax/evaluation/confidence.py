"""How sure a score is: bootstrap intervals over scenes, and paired differences of two prediction files.

Keyframes of one scene are half a second apart and anything but independent, so whole scenes are drawn with
replacement (cluster bootstrap), not keyframes. The draws are seeded: the same scores give the same interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.evaluation.metrics import HorizonScores, summarize
from spacedrive_jax.evaluation.protocols import HORIZONS_S

LEVEL = 0.95
RESAMPLES = 2000
COLUMNS = (*(f"{seconds}s" for seconds in HORIZONS_S), "avg")
_SCALE = {"l2": 1.0, "collision": 100.0, "intersection": 100.0}


def confidence(horizons: HorizonScores, scenes: Sequence[str], seed: int = 0) -> dict[str, Any] | None:
    """Percentile intervals of the means.

    Args:
        horizons: scores per sample.
        scenes: the samples' scenes, row for row.
        seed: of the draws.

    Returns:
        `level`, `resamples`, `scenes` and per metric and horizon `[low, high]` (None where nothing was
        measured), in the units of `summarize`; None when all samples are of one scene, which says nothing
        about others.
    """
    labels, scene = np.unique(np.asarray(scenes), return_inverse=True)
    if len(labels) < 2:
        return None
    draws = np.random.default_rng(seed).multinomial(
        len(labels), np.full(len(labels), 1 / len(labels)), size=RESAMPLES
    )
    result: dict[str, Any] = {"level": LEVEL, "resamples": RESAMPLES, "scenes": len(labels)}
    for metric, scale in _SCALE.items():
        means = _resampled_means(scale * getattr(horizons, metric), scene, draws)
        result[metric] = {
            column: _interval(values)
            for column, values in zip(COLUMNS, [*means.T, means.mean(axis=1)], strict=True)
        }
    return result


def _resampled_means(
    values: Float[np.ndarray, "S 3"], scene: np.ndarray, draws: np.ndarray
) -> Float[np.ndarray, "R 3"]:
    """Means of each draw; nan where a draw holds nothing that was measured."""
    known = ~np.isnan(values)
    sums, counts = (np.zeros((draws.shape[1], values.shape[1])) for _ in range(2))
    np.add.at(sums, scene, np.where(known, values, 0.0))
    np.add.at(counts, scene, known)
    with np.errstate(invalid="ignore"):
        return exact.matmul(draws, sums) / exact.matmul(draws, counts)


def _interval(values: Float[np.ndarray, "R"]) -> list[float] | None:
    measured = values[~np.isnan(values)]
    if not len(measured):
        return None
    tail = 100 * (1 - LEVEL) / 2
    return [float(bound) for bound in np.percentile(measured, [tail, 100 - tail])]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two prediction files on the keyframes that count for both.

    Attributes:
        file: the other file.
        scenes: the common keyframes' scenes.
        ours: the first file's scores on them.
        theirs: the other file's.
        only_ours: keyframes that count for the first file alone.
        only_theirs: keyframes that count for the other alone.
    """

    file: str
    scenes: tuple[str, ...]
    ours: HorizonScores
    theirs: HorizonScores
    only_ours: int
    only_theirs: int

    def to_json(self) -> dict[str, Any]:
        """Both files' scores, the difference (ours less theirs) and its interval, and who is nearer."""
        difference = HorizonScores(
            *(getattr(self.ours, metric) - getattr(self.theirs, metric) for metric in _SCALE)
        )
        return {
            "file": self.file,
            "samples": len(self.scenes),
            "only_here": self.only_ours,
            "only_there": self.only_theirs,
            "here": summarize(self.ours),
            "there": summarize(self.theirs),
            "difference": summarize(difference),
            "confidence": confidence(difference, self.scenes),
            "nearer_share": self._nearer(),
        }

    def _nearer(self) -> Mapping[str, float]:
        """Share of keyframes on which the first file has the smaller L2, ties counted half."""
        less = np.mean(self.ours.l2 < self.theirs.l2, axis=0)
        equal = np.mean(self.ours.l2 == self.theirs.l2, axis=0)
        return {column: float(value) for column, value in zip(COLUMNS, less + equal / 2, strict=False)}

"""Scoring a prediction file on a records folder: one pass over the records, any number of protocols."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from spacedrive_jax.data.records import Records
from spacedrive_jax.data.records_folder import read_provenance
from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.baselines import COMPARED, GROUND_TRUTH, PREDICTION, Planners, gather_planners
from spacedrive_jax.evaluation.metrics import HorizonScores, horizon_scores, stack_scores, summarize
from spacedrive_jax.evaluation.predictions import Coverage, Predictions, cover
from spacedrive_jax.evaluation.protocols import PolygonRule, Protocol
from spacedrive_jax.evaluation.scoring import KeyframeScores, score_split
from spacedrive_jax.evaluation.statistics import Comparison, Situation, break_down, confidence


@dataclasses.dataclass(frozen=True)
class PlannerScores:
    """One planner's scores under one protocol.

    Attributes:
        facts: the keyframes counted, in record order.
        horizons: their scores, row for row.
        failures: how many of them are unusable answers counted as failures.
        with_map: how many of them have a drivable area.
    """

    facts: tuple[Situation, ...]
    horizons: HorizonScores
    failures: int
    with_map: int

    @property
    def tokens(self) -> tuple[str, ...]:
        """The keyframes counted."""
        return tuple(fact.token for fact in self.facts)

    @property
    def scenes(self) -> tuple[str, ...]:
        """Their scenes."""
        return tuple(fact.scene for fact in self.facts)

    def to_json(self) -> dict[str, Any]:
        """`samples`, `l2`, `collision`, `intersection`."""
        return {"samples": len(self.facts), **summarize(self.horizons)}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that one protocol says about a prediction file.

    Attributes:
        protocol: the protocol.
        prediction: the file's scores.
        baselines: scores of planners without a model on all eligible keyframes; `ground_truth` is the
            recorded drive against itself with no collision step excluded, so its collisions are those
            of the boxes and annotations, and its L2 is 0.
        comparison: the file against another one, where asked for.
        coverage: what was counted.
        notes: what a reader must know about these numbers, in sentences.
    """

    protocol: Protocol
    prediction: PlannerScores
    baselines: Mapping[str, PlannerScores]
    comparison: Comparison | None
    coverage: Coverage
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object the command prints and writes."""
        steps = self.protocol.steps
        return {
            "protocol": self.protocol.name,
            "pedestrians": isinstance(steps, PolygonRule) and steps.pedestrians,
            **self.prediction.to_json(),
            "failures": self.prediction.failures,
            "confidence": confidence(self.prediction.horizons, self.prediction.scenes),
            "coverage": self.coverage.to_json(),
            "baselines": {name: scores.to_json() for name, scores in self.baselines.items()},
            "breakdown": break_down(self.prediction.horizons, self.prediction.facts),
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "notes": list(self.notes),
        }


def evaluate(
    records: Records,
    predictions: Predictions,
    protocols: Sequence[Protocol],
    *,
    compare: Predictions | None = None,
    workers: int = 1,
    track: Callable[[Iterable[KeyframeScores]], Iterable[KeyframeScores]] = iter,
) -> dict[str, Evaluation]:
    """Scores predictions and baselines on every eligible keyframe of a split.

    Args:
        records: the split to score on.
        predictions: what a model planned.
        protocols: protocols to score under; those with the same step rule share the work.
        compare: what another model planned.
        workers: processes that share the keyframes; the result does not depend on it.
        track: wraps the loop over keyframes (a progress bar).

    Returns:
        Protocol name to its evaluation.

    Raises:
        DataError: no prediction can be counted.
    """
    files = {PREDICTION: predictions} | ({} if compare is None else {COMPARED: compare})
    planners = gather_planners(records, files)
    rules = list(dict.fromkeys(protocol.steps for protocol in protocols))
    keyframes = list(track(score_split(records, planners, rules, workers)))
    return {
        protocol.name: _evaluate_protocol(records, planners, keyframes, protocol) for protocol in protocols
    }


def _evaluate_protocol(
    records: Records, planners: Planners, keyframes: Sequence[KeyframeScores], protocol: Protocol
) -> Evaluation:
    # v1.0-test ships no annotations; a split without a single box says nothing about collisions.
    annotated = any(keyframe.facts.agents for keyframe in keyframes)
    planned = _combine(planners, keyframes, protocol, annotated)
    seen = {keyframe.facts.token for keyframe in keyframes}
    eligible = {keyframe.facts.token for keyframe in keyframes if keyframe.eligible}
    for name, file in planners.files.items():
        if not planned[name].facts:
            unparsed = len(seen.intersection(file.unparsed))
            raise DataError(
                f"none of the {len(file.tokens)} predictions in {file.path} can be scored on split "
                f"{records.split!r} of {records.directory}, which has {len(eligible)} keyframes with a "
                f"whole future ({len(file.tokens & seen)} predicted tokens are in the split"
                + (f", {unparsed} of them unparsed: their answers hold no trajectory)" if unparsed else ")")
                + ("; check --records and --split" if unparsed < len(file.tokens) else "")
            )
    prediction = planned.pop(PREDICTION)
    other = planned.pop(COMPARED, None)
    coverage = cover(
        records,
        planners.files[PREDICTION],
        seen,
        eligible,
        counted=len(prediction.facts),
        with_map=prediction.with_map,
    )
    notes = (
        *planners.notes,
        *_agent_notes(annotated),
        *_map_notes(coverage),
        *_failure_notes(prediction, coverage, protocol),
    )
    comparison = None
    if other is not None:
        comparison = compare_planners(prediction, other, str(planners.files[COMPARED].path))
    return Evaluation(protocol, prediction, planned, comparison, coverage, notes)


def _combine(
    planners: Planners, keyframes: Sequence[KeyframeScores], protocol: Protocol, annotated: bool
) -> dict[str, PlannerScores]:
    """Every planner's scores by the protocol's rules."""
    eligible = [keyframe for keyframe in keyframes if keyframe.eligible]
    if not eligible:
        raise DataError("no keyframe of the split has a whole future (six more keyframes in its scene)")
    steps = stack_scores([keyframe.steps[protocol.steps] for keyframe in eligible])
    owner = np.array([name for keyframe in eligible for name in keyframe.planners])
    failed = np.array([failure for keyframe in eligible for failure in keyframe.failed])
    facts = [keyframe.facts for keyframe in eligible for _ in keyframe.planners]
    usable = np.ones_like(failed) if protocol.failures == "counted" else ~failed
    result = {}
    for name in planners.names:
        rows = (owner == name) & usable
        mine = steps.rows(rows)
        horizons = horizon_scores(mine, protocol, exclude=name != GROUND_TRUTH, failed=failed[rows])
        if not annotated:
            horizons = dataclasses.replace(horizons, collision=np.full_like(horizons.collision, np.nan))
        result[name] = PlannerScores(
            facts=tuple(facts[row] for row in np.flatnonzero(rows)),
            horizons=horizons,
            failures=int(failed[rows].sum()),
            with_map=int(mine.has_map.sum()),
        )
    return result


def compare_planners(ours: PlannerScores, theirs: PlannerScores, file: str) -> Comparison:
    """Pairs two planners' scores keyframe by keyframe.

    Raises:
        DataError: no keyframe counts for both.
    """
    place = {token: row for row, token in enumerate(theirs.tokens)}
    pairs = [(row, place[token]) for row, token in enumerate(ours.tokens) if token in place]
    if not pairs:
        raise DataError(f"--compare {file}: it shares no scored keyframe with the predictions")
    here, there = np.array(pairs).T
    return Comparison(
        file=file,
        scenes=tuple(ours.scenes[row] for row in here),
        ours=ours.horizons.rows(here),
        theirs=theirs.horizons.rows(there),
        only_ours=len(ours.facts) - len(pairs),
        only_theirs=len(theirs.facts) - len(pairs),
    )


def _failure_notes(prediction: PlannerScores, coverage: Coverage, protocol: Protocol) -> list[str]:
    if protocol.failures == "dropped":
        return []
    notes = []
    if prediction.failures:
        notes.append(
            f"{prediction.failures} unusable answers count as colliding and off the road, with the L2 of "
            f"standing still."
        )
    if coverage.missing:
        notes.append(
            f"{len(coverage.missing)} keyframes have no answer at all and are not counted: the score is of "
            f"the others."
        )
    return notes


def _agent_notes(annotated: bool) -> list[str]:
    if annotated:
        return []
    return ["No collision: no keyframe of the split has an annotated agent (as of v1.0-test, for example)."]


def _map_notes(coverage: Coverage) -> list[str]:
    if coverage.with_map == coverage.counted:
        return []
    if coverage.with_map == 0:
        return [
            "No intersection: the counted keyframes have no drivable area (convert with the maps in place)."
        ]
    return [
        f"Intersection is the mean over the {coverage.with_map} of {coverage.counted} counted keyframes "
        f"that have a drivable area."
    ]


def describe_source(records: Records) -> dict[str, Any]:
    """Where the scored keyframes came from: folder, split, fingerprint, dataset version."""
    source = read_provenance(records.directory).get("source", {})
    return {
        "directory": str(records.directory),
        "split": records.split,
        "fingerprint": records.fingerprint,
        "version": source.get("version"),
    }

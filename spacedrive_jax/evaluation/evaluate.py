"""Scoring a prediction file on a records folder: one pass over the records, any number of protocols.

Keyframes are scored step by step, in one process or several.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.records_folder import read_provenance
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.collision import (
    VEHICLE_CATEGORIES,
    Grid,
    Obstacles,
    drivable_area,
    drivable_rasters,
)
from spacedrive_jax.evaluation.metrics import (
    Comparison,
    Drivable,
    HorizonScores,
    Situation,
    StepScores,
    break_down,
    confidence,
    horizon_scores,
    score_steps,
    situation_of,
    stack_scores,
    summarize,
)
from spacedrive_jax.evaluation.predictions import (
    COMPARED,
    GROUND_TRUTH,
    PREDICTION,
    Coverage,
    Planners,
    Predictions,
    cover,
    gather_planners,
)
from spacedrive_jax.evaluation.protocols import PolygonRule, Protocol, StepRule
from spacedrive_jax.parallel import ordered_map

Rule = StepRule | PolygonRule

CHUNK_KEYFRAMES = 400
"""Keyframes a process scores at a time; less than two such chunks are not worth a second process."""


@dataclasses.dataclass(frozen=True)
class KeyframeScores:
    """All planners' scores on one keyframe."""

    situation: Situation
    """What the breakdowns and intervals need to know about the keyframe."""
    planners: tuple[str, ...] = ()
    """Who answered, row for row of `steps`."""
    failed: tuple[bool, ...] = ()
    """Whose answer was unusable."""
    steps: Mapping[Rule, StepScores] = dataclasses.field(default_factory=dict)
    """Scores by rule; empty when the keyframe is not eligible (some future pose is missing)."""

    @property
    def eligible(self) -> bool:
        """Whether all six future poses exist."""
        return bool(self.steps)


def obstacles_of(record: Record, *, pedestrians: bool = False) -> Obstacles:
    """The record's vehicles at the six future steps, ego frame; its pedestrians too if asked."""
    chosen = np.array(
        [
            category in VEHICLE_CATEGORIES or (pedestrians and category.startswith("human.pedestrian."))
            for category in record["agent_category"]
        ],
        bool,
    )
    boxes = record["agent_boxes"][chosen]
    return Obstacles(
        centre=boxes[:, None, :2] + record["agent_future"][chosen],
        yaw=record["agent_future_yaw"][chosen],
        size=boxes[:, 3:5],
        mask=np.asarray(record["agent_future_mask"], bool)[chosen],
    )


def score_keyframe(record: Record, planners: Planners, rules: Sequence[Rule]) -> KeyframeScores:
    """Scores every planner's answer for one keyframe under every rule."""
    if not np.all(record["waypoint_mask"]):
        return KeyframeScores(situation_of(record))
    plans = planners.plans(record)
    waypoints = np.stack([plan.waypoints for plan in plans.values()])
    grids = [Grid(rule.resolution) for rule in rules if isinstance(rule, StepRule)]
    rasters = drivable_rasters(record, grids) if grids else None
    steps = {}
    for rule in rules:
        if isinstance(rule, PolygonRule):
            drivable: Drivable | None = drivable_area(record)
            obstacles = obstacles_of(record, pedestrians=rule.pedestrians)
        else:
            drivable = rasters[Grid(rule.resolution)] if rasters else None
            obstacles = obstacles_of(record)
        steps[rule] = score_steps(waypoints, record["waypoints"], obstacles, drivable, rule)
    return KeyframeScores(
        situation_of(record), tuple(plans), tuple(plan.failed for plan in plans.values()), steps
    )


def score_split(
    records: Records, planners: Planners, rules: Sequence[Rule], workers: int = 1
) -> Iterator[KeyframeScores]:
    """Scores all keyframes of a split in order.

    Args:
        records: the split.
        planners: whose answers to score.
        rules: how to test a step.
        workers: processes to share the keyframes; the result does not depend on it.
    """
    if workers <= 1 or len(records) < 2 * CHUNK_KEYFRAMES:
        for index in range(len(records)):
            yield score_keyframe(records[index], planners, rules)
        return
    starts = range(0, len(records), CHUNK_KEYFRAMES)
    chunks = [range(start, min(start + CHUNK_KEYFRAMES, len(records))) for start in starts]
    task = functools.partial(_score_chunk, records.directory, records.split, planners, tuple(rules))
    for chunk in ordered_map(task, chunks, workers):
        yield from chunk


def _score_chunk(
    directory: Path, split: str, planners: Planners, rules: Sequence[Rule], indices: range
) -> list[KeyframeScores]:
    cv2.setNumThreads(1)
    records = open_records(directory, split)
    return [score_keyframe(records[index], planners, rules) for index in indices]


@dataclasses.dataclass(frozen=True)
class PlannerScores:
    """One planner's scores under one protocol."""

    situations: tuple[Situation, ...]
    """The keyframes counted, in record order."""
    horizons: HorizonScores
    """Their scores, row for row."""
    failures: int
    """How many of them are unusable answers counted as failures."""
    with_map: int
    """How many of them have a drivable area."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """The keyframes counted."""
        return tuple(situation.token for situation in self.situations)

    @property
    def scenes(self) -> tuple[str, ...]:
        """Their scenes."""
        return tuple(situation.scene for situation in self.situations)

    def to_json(self) -> dict[str, Any]:
        """`samples`, `l2`, `collision`, `intersection`."""
        return {"samples": len(self.situations), **summarize(self.horizons)}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that one protocol says about a prediction file."""

    protocol: Protocol
    prediction: PlannerScores
    """The file's scores."""
    baselines: Mapping[str, PlannerScores]
    """Scores of planners without a model on all eligible keyframes; `ground_truth` is the recorded drive
    against itself with no collision step excluded, so its collisions are those of the boxes and annotations,
    and its L2 is 0."""
    comparison: Comparison | None
    """The file against another one, where asked for."""
    coverage: Coverage
    """What was counted."""
    notes: tuple[str, ...]
    """What a reader must know about these numbers, in sentences."""

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
            "breakdown": break_down(self.prediction.horizons, self.prediction.situations),
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
    annotated = any(keyframe.situation.agents for keyframe in keyframes)
    by_planner = _combine(planners, keyframes, protocol, annotated)
    seen = {keyframe.situation.token for keyframe in keyframes}
    eligible = {keyframe.situation.token for keyframe in keyframes if keyframe.eligible}
    for name, file in planners.files.items():
        if not by_planner[name].situations:
            unusable = {
                "unparsed: their answers hold no trajectory": file.unparsed,
                "with fewer than six waypoints": file.short,
                "with a waypoint that is not finite": file.non_finite,
            }
            counts = {what: len(seen.intersection(tokens)) for what, tokens in unusable.items()}
            said = "".join(f", {count} of them {what}" for what, count in counts.items() if count)
            raise DataError(
                f"none of the {len(file.tokens)} predictions in {file.path} can be scored on split "
                f"{records.split!r} of {records.directory}, which has {len(eligible)} keyframes with a "
                f"whole future ({len(file.tokens & seen)} predicted tokens are in the split{said})"
                + ("; check --records and --split" if sum(counts.values()) < len(file.tokens) else "")
            )
    prediction = by_planner.pop(PREDICTION)
    other = by_planner.pop(COMPARED, None)
    coverage = cover(
        records,
        planners.files[PREDICTION],
        seen,
        eligible,
        counted=len(prediction.situations),
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
    return Evaluation(protocol, prediction, by_planner, comparison, coverage, notes)


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
    situations = [keyframe.situation for keyframe in eligible for _ in keyframe.planners]
    usable = np.ones_like(failed) if protocol.failures == "counted" else ~failed
    result = {}
    for name in planners.names:
        rows = (owner == name) & usable
        mine = steps.rows(rows)
        horizons = horizon_scores(mine, protocol, exclude=name != GROUND_TRUTH, failed=failed[rows])
        if not annotated:
            horizons = dataclasses.replace(horizons, collision=np.full_like(horizons.collision, np.nan))
        result[name] = PlannerScores(
            situations=tuple(situations[row] for row in np.flatnonzero(rows)),
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
        only_ours=len(ours.situations) - len(pairs),
        only_theirs=len(theirs.situations) - len(pairs),
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

"""Scoring the keyframes of a split, step by step, in one process or several."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.evaluation.baselines import Planners
from spacedrive_jax.evaluation.collision import VEHICLE_CATEGORIES, Obstacles
from spacedrive_jax.evaluation.metrics import Drivable, StepScores, score_steps
from spacedrive_jax.evaluation.polygons import drivable_area
from spacedrive_jax.evaluation.protocols import PolygonRule, StepRule
from spacedrive_jax.evaluation.rasters import Grid, drivable_rasters
from spacedrive_jax.evaluation.statistics import Situation, situation_of
from spacedrive_jax.parallel import ordered_map

Rule = StepRule | PolygonRule

CHUNK_KEYFRAMES = 400
"""Keyframes a process scores at a time; less than two such chunks are not worth a second process."""


@dataclasses.dataclass(frozen=True)
class KeyframeScores:
    """All planners' scores on one keyframe.

    Attributes:
        facts: what the breakdowns and intervals need to know about the keyframe.
        planners: who answered, row for row of `steps`.
        failed: whose answer was unusable.
        steps: scores by rule; empty when the keyframe is not eligible (some future pose is missing).
    """

    facts: Situation
    planners: tuple[str, ...] = ()
    failed: tuple[bool, ...] = ()
    steps: Mapping[Rule, StepScores] = dataclasses.field(default_factory=dict)

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

"""Scoring a prediction file on a records folder: one pass over the records, any number of protocols."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax.console import UserError
from spacedrive_jax.data.records import Record, Records, open_records, read_provenance
from spacedrive_jax.evaluation.baselines import constant_velocity, mean_trajectory, standing_still
from spacedrive_jax.evaluation.collision import VEHICLE_CATEGORIES, Obstacles
from spacedrive_jax.evaluation.coverage import Coverage, cover, read_splits
from spacedrive_jax.evaluation.drivable import drivable_rasters
from spacedrive_jax.evaluation.metrics import (
    HorizonScores,
    StepScores,
    horizon_scores,
    score_steps,
    stack_scores,
    summarize,
)
from spacedrive_jax.evaluation.predictions import Predictions
from spacedrive_jax.evaluation.protocols import Protocol, StepRule
from spacedrive_jax.evaluation.rasters import Grid

PREDICTION = "prediction"
GROUND_TRUTH = "ground_truth"

Planner = Callable[[Record], "Float[np.ndarray, 'T 2'] | None"]
"""A record to its planned waypoints, or None where the planner has none."""


@dataclasses.dataclass(frozen=True)
class PlannerScores:
    """One planner's scores under one protocol.

    Attributes:
        tokens: the keyframes counted, in record order.
        horizons: their scores, row for row.
    """

    tokens: tuple[str, ...]
    horizons: HorizonScores

    def to_json(self) -> dict[str, Any]:
        """`samples`, `l2`, `collision`, `intersection`."""
        return {"samples": len(self.tokens), **summarize(self.horizons)}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that one protocol says about a prediction file.

    Attributes:
        protocol: the protocol.
        prediction: the file's scores.
        baselines: scores of planners without a model on all eligible keyframes; `ground_truth` is the
            recorded drive against itself with no collision step excluded, so its collisions are those
            of the rasters and annotations, and its L2 is 0.
        coverage: what was counted.
        notes: what a reader must know about these numbers, in sentences.
    """

    protocol: Protocol
    prediction: PlannerScores
    baselines: Mapping[str, PlannerScores]
    coverage: Coverage
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object the command prints and writes."""
        return {
            "protocol": self.protocol.name,
            **self.prediction.to_json(),
            "coverage": self.coverage.to_json(),
            "baselines": {name: scores.to_json() for name, scores in self.baselines.items()},
            "notes": list(self.notes),
        }


def obstacles_of(record: Record) -> Obstacles:
    """The record's vehicles at the six future steps, ego frame."""
    vehicle = np.array([category in VEHICLE_CATEGORIES for category in record["agent_category"]], bool)
    boxes = record["agent_boxes"][vehicle]
    return Obstacles(
        centre=boxes[:, None, :2] + record["agent_future"][vehicle],
        yaw=record["agent_future_yaw"][vehicle],
        size=boxes[:, 3:5],
        mask=np.asarray(record["agent_future_mask"], bool)[vehicle],
    )


def evaluate(
    records: Records,
    predictions: Predictions,
    protocols: Sequence[Protocol],
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Evaluation]:
    """Scores predictions and baselines on every eligible keyframe of a split.

    Args:
        records: the split to score on.
        predictions: what a model planned.
        protocols: protocols to score under; those with the same step rule share the work.
        track: wraps the loop over record indices (a progress bar).

    Returns:
        Protocol name to its evaluation.

    Raises:
        UserError: no prediction can be counted.
    """
    planners, notes = _planners(records, predictions)
    rules = list(dict.fromkeys(protocol.steps for protocol in protocols))
    step_scores: dict[tuple[str, StepRule], list[StepScores]] = {}
    tokens: dict[str, list[str]] = {name: [] for name in planners}
    seen: set[str] = set()
    eligible: set[str] = set()
    for index in track(range(len(records))):
        record = records[index]
        seen.add(record["token"])
        if not np.all(record["waypoint_mask"]):
            continue
        eligible.add(record["token"])
        plans = {name: plan for name, planner in planners.items() if (plan := planner(record)) is not None}
        for name in plans:
            tokens[name].append(record["token"])
        for rule, scores in _score_record(record, np.stack(list(plans.values())), rules).items():
            for row, name in enumerate(plans):
                step_scores.setdefault((name, rule), []).append(scores.row(row))
    if not tokens[PREDICTION]:
        raise UserError(
            f"none of the {len(predictions.tokens)} predictions in {predictions.path} can be scored on split "
            f"{records.split!r} of {records.directory}, which has {len(eligible)} keyframes with a whole "
            f"future ({len(predictions.tokens & seen)} predicted tokens are in the split); "
            f"check --records and --split"
        )
    stacked = {key: stack_scores(rows) for key, rows in step_scores.items()}
    with_map = int(stacked[PREDICTION, rules[0]].has_map.sum())
    coverage = cover(records, predictions, seen, eligible, len(tokens[PREDICTION]), with_map)
    notes += _map_notes(coverage)
    result = {}
    for protocol in protocols:
        planned = {
            name: PlannerScores(
                tuple(tokens[name]),
                horizon_scores(stacked[name, protocol.steps], protocol, exclude=name != GROUND_TRUTH),
            )
            for name in planners
        }
        prediction = planned.pop(PREDICTION)
        result[protocol.name] = Evaluation(protocol, prediction, planned, coverage, tuple(notes))
    return result


def _score_record(
    record: Record, plans: Float[np.ndarray, "M T 2"], rules: Sequence[StepRule]
) -> dict[StepRule, StepScores]:
    obstacles = obstacles_of(record)
    grids = {rule: Grid(rule.resolution) for rule in rules}
    drivable = drivable_rasters(record, list(grids.values()))
    return {
        rule: score_steps(plans, record["waypoints"], obstacles, drivable[grid] if drivable else None, rule)
        for rule, grid in grids.items()
    }


def _planners(records: Records, predictions: Predictions) -> tuple[dict[str, Planner], list[str]]:
    """The prediction file and the baselines as planners, and notes about baselines that are missing."""
    planners: dict[str, Planner] = {
        PREDICTION: lambda record: predictions.waypoints.get(record["token"]),
        "standing_still": lambda record: standing_still(),
        "constant_velocity": constant_velocity,
    }
    notes = []
    if "train" in read_splits(records):
        train = open_records(records.directory, "train")
        try:
            mean = mean_trajectory(train[index] for index in range(len(train)))
        except UserError as error:
            notes.append(f"No mean trajectory baseline: {error}.")
        else:
            planners["mean_trajectory"] = lambda record: mean
            notes.append(f"The mean trajectory is that of the {len(train)} keyframes of the train split.")
            if records.split != "val":
                notes.append("The mean trajectory was made from keyframes that are also scored here.")
    else:
        notes.append("No mean trajectory baseline: the records folder has no train split.")
    planners[GROUND_TRUTH] = lambda record: record["waypoints"]
    return planners, notes


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

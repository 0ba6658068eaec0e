"""What is scored side by side on a keyframe: prediction files, planners without a model, the recording."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from spacedrive_jax.constants import NUM_WAYPOINTS
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import DataError, SpaceDriveError
from spacedrive_jax.evaluation.predictions import Predictions, read_splits

# Planners without a model. A number that does not beat these says little (open-loop scores flatter them).


STEP_S = 0.5


def standing_still() -> Float[np.ndarray, "T 2"]:
    """The ego vehicle stays where it is."""
    return np.zeros((NUM_WAYPOINTS, 2))


def constant_velocity(record: Record) -> Float[np.ndarray, "T 2"]:
    """The last displacement goes on: same speed, same direction, waypoints at the nominal 0.5 s.

    Velocity is the displacement from the previous keyframe's ego position to the present one over the
    true time between them, so the direction is that of the displacement, not the vehicle's heading. At the
    start of a scene, where no previous keyframe exists, the vehicle stands still.

    Args:
        record: a keyframe; only its past is read.

    Returns:
        Waypoints in metres, ego frame.

    Raises:
        DataError: the previous keyframe is not earlier than this one.
    """
    if not record["past_mask"][0]:
        return standing_still()
    seconds = (int(record["timestamp_us"]) - int(record["past_timestamp_us"][0])) * 1e-6
    if seconds <= 0:
        raise DataError(f"record {record['token']}: past_timestamp_us is not before timestamp_us")
    velocity = -record["past_to_ego"][0, :2, 3] / seconds
    return velocity * (STEP_S * np.arange(1, NUM_WAYPOINTS + 1))[:, None]


def mean_trajectory(records: Iterable[Record]) -> Float[np.ndarray, "T 2"]:
    """The mean of the valid waypoints, step by step.

    Args:
        records: the training split (never the one that is scored).

    Raises:
        DataError: some step has no valid waypoint in any record.
    """
    total = np.zeros((NUM_WAYPOINTS, 2))
    count = np.zeros((NUM_WAYPOINTS, 1), np.int64)
    for record in records:
        mask = np.asarray(record["waypoint_mask"], bool)[:, None]
        total += np.where(mask, record["waypoints"], 0.0)
        count += mask
    if not count.all():
        raise DataError("a waypoint step is valid in none of the training records")
    return total / count


PREDICTION = "prediction"
COMPARED = "compared"
GROUND_TRUTH = "ground_truth"

MEAN_KEYFRAMES = 3000
"""At most so many train keyframes make the mean trajectory: reading all 28,130 of nuScenes takes minutes."""


class Plan(NamedTuple):
    """One planner's answer for one keyframe."""

    waypoints: Float[np.ndarray, "T 2"]
    """Metres, ego frame; those of standing still where the answer is unusable."""
    failed: bool
    """The planner answered, but not with six finite waypoints."""


@dataclasses.dataclass(frozen=True)
class Planners:
    """All planners of one evaluation; plain data, so that processes can share it."""

    files: Mapping[str, Predictions]
    """Name to prediction file."""
    mean: Float[np.ndarray, "T 2"] | None
    """The mean trajectory of the train split, None where there is none."""
    notes: tuple[str, ...] = ()
    """What a reader must know about the baselines, in sentences."""

    @property
    def names(self) -> tuple[str, ...]:
        """The planners in the order of a table."""
        mean = () if self.mean is None else ("mean_trajectory",)
        return (*self.files, "standing_still", "constant_velocity", *mean, GROUND_TRUTH)

    def plans(self, record: Record) -> dict[str, Plan]:
        """Every planner's answer for a keyframe with a whole future; files may have none."""
        answers: dict[str, Plan] = {}
        for name, file in self.files.items():
            if record["token"] in file.waypoints:
                answers[name] = Plan(file.waypoints[record["token"]], failed=False)
            elif record["token"] in file.unusable:
                answers[name] = Plan(standing_still(), failed=True)
        answers["standing_still"] = Plan(standing_still(), failed=False)
        answers["constant_velocity"] = Plan(constant_velocity(record), failed=False)
        if self.mean is not None:
            answers["mean_trajectory"] = Plan(self.mean, failed=False)
        answers[GROUND_TRUTH] = Plan(record["waypoints"], failed=False)
        return answers


def gather_planners(records: Records, files: Mapping[str, Predictions]) -> Planners:
    """The prediction files and the baselines the records folder allows."""
    if "train" not in read_splits(records):
        return Planners(files, None, ("No mean trajectory baseline: the records folder has no train split.",))
    train = open_records(records.directory, "train")
    chosen = range(0, len(train), math.ceil(len(train) / MEAN_KEYFRAMES))
    try:
        mean = mean_trajectory(train[index] for index in chosen)
    except SpaceDriveError as error:
        return Planners(files, None, (f"No mean trajectory baseline: {error}.",))
    part = f"{len(chosen)} evenly spaced of the " if len(chosen) < len(train) else "the "
    notes = [f"The mean trajectory is that of {part}{len(train)} keyframes of the train split."]
    if records.split != "val":
        notes.append("The mean trajectory was made from keyframes that are also scored here.")
    return Planners(files, mean, tuple(notes))

"""What is scored side by side on a keyframe: prediction files, planners without a model, the recording."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from spacedrive_jax.console import UserError
from spacedrive_jax.data.records import Record, Records, open_records
from spacedrive_jax.evaluation.baselines import constant_velocity, mean_trajectory, standing_still
from spacedrive_jax.evaluation.coverage import read_splits
from spacedrive_jax.evaluation.predictions import Predictions

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
    """All planners of one evaluation; plain data, so that processes can share it.

    Attributes:
        files: name to prediction file.
        mean: the mean trajectory of the train split, None where there is none.
        notes: what a reader must know about the baselines, in sentences.
    """

    files: Mapping[str, Predictions]
    mean: Float[np.ndarray, "T 2"] | None
    notes: tuple[str, ...] = ()

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
    except UserError as error:
        return Planners(files, None, (f"No mean trajectory baseline: {error}.",))
    part = f"{len(chosen)} evenly spaced of the " if len(chosen) < len(train) else "the "
    notes = [f"The mean trajectory is that of {part}{len(train)} keyframes of the train split."]
    if records.split != "val":
        notes.append("The mean trajectory was made from keyframes that are also scored here.")
    return Planners(files, mean, tuple(notes))

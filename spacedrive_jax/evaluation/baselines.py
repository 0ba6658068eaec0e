"""Planners without a model. A number that does not beat these says little (open-loop scores flatter them)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from spacedrive_jax.console import UserError
from spacedrive_jax.data.records import NUM_WAYPOINTS, Record

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
        UserError: the previous keyframe is not earlier than this one.
    """
    if not record["past_mask"][0]:
        return standing_still()
    seconds = (int(record["timestamp_us"]) - int(record["past_timestamp_us"][0])) * 1e-6
    if seconds <= 0:
        raise UserError(f"record {record['token']}: past_timestamp_us is not before timestamp_us")
    velocity = -record["past_to_ego"][0, :2, 3] / seconds
    return velocity * (STEP_S * np.arange(1, NUM_WAYPOINTS + 1))[:, None]


def mean_trajectory(records: Iterable[Record]) -> Float[np.ndarray, "T 2"]:
    """The mean of the valid waypoints, step by step.

    Args:
        records: the training split (never the one that is scored).

    Raises:
        UserError: some step has no valid waypoint in any record.
    """
    total = np.zeros((NUM_WAYPOINTS, 2))
    count = np.zeros((NUM_WAYPOINTS, 1), np.int64)
    for record in records:
        mask = np.asarray(record["waypoint_mask"], bool)[:, None]
        total += np.where(mask, record["waypoints"], 0.0)
        count += mask
    if not count.all():
        raise UserError("a waypoint step is valid in none of the training records")
    return total / count

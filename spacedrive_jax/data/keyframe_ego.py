"""Ego-vehicle fields of a record: past poses, future waypoints, CAN bus, commands.

Everything is derived from the scene's ego poses at LIDAR_TOP time. Waypoints are positions of the ego
origin in the current ego frame with its full 3-D rotation (fidelity Q39).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from spacedrive_jax import exact
from spacedrive_jax.constants import CAN_BUS_SIZE, NUM_PAST, NUM_WAYPOINTS
from spacedrive_jax.data.ego_status import navigation_command, released_command
from spacedrive_jax.data.keyframe import Scene, heading, inverse, transforms
from spacedrive_jax.data.schema import Record

_PSEUDO_BOX_BOTTOM = np.array([0.0, 0.0, -0.78])
"""The published planning labels follow the bottom centre of a 1.56 m high box around the ego origin."""


CAN_MOTION_FIELDS = ("accel", "rotation_rate", "vel")
"""Of a pose message, behind its orientation."""


@dataclasses.dataclass(frozen=True)
class EgoTrack:
    """The ego vehicle over one scene, one row per keyframe."""

    timestamp_us: Int[np.ndarray, " K"]
    ego_to_global: Float[np.ndarray, "K 4 4"]
    can_bus: Float[np.ndarray, "K 13"]
    can_bus_valid: bool


def ego_track(scene: Scene, can_bus: Float[np.ndarray, "K 13"] | None) -> EgoTrack:
    """Collects the scene's ego poses at LIDAR_TOP time; `can_bus` None means the scene has no CAN data."""
    lidars = [keyframe.lidar for keyframe in scene.keyframes]
    return EgoTrack(
        timestamp_us=np.array([keyframe.timestamp_us for keyframe in scene.keyframes], np.int64),
        ego_to_global=transforms(
            [lidar.ego_translation for lidar in lidars], [lidar.ego_rotation for lidar in lidars]
        ),
        can_bus=np.zeros((len(lidars), CAN_BUS_SIZE)) if can_bus is None else can_bus,
        can_bus_valid=can_bus is not None,
    )


def past_poses(
    track: EgoTrack, index: int
) -> tuple[Float[np.ndarray, "2 4 4"], Bool[np.ndarray, "2"], Int[np.ndarray, "2"]]:
    """Ego poses of the previous two keyframes in the ego frame of keyframe `index`.

    Returns:
        past-to-ego transforms, newest first, zeros where the scene has no such keyframe; which of them
        exist; their times in microseconds, zero where masked.
    """
    count = min(index, NUM_PAST)
    earlier = index - 1 - np.arange(count)
    past_to_ego = np.zeros((NUM_PAST, 4, 4))
    past_to_ego[:count] = exact.matmul(inverse(track.ego_to_global[index]), track.ego_to_global[earlier])
    times = np.zeros(NUM_PAST, np.int64)
    times[:count] = track.timestamp_us[earlier]
    return past_to_ego, np.arange(NUM_PAST) < count, times


def future_poses(
    track: EgoTrack, index: int
) -> tuple[Float[np.ndarray, "6 4 4"], Bool[np.ndarray, "6"], Int[np.ndarray, "6"]]:
    """Ego poses of the next six keyframes in the ego frame of keyframe `index`; zeros where masked."""
    later = np.arange(index + 1, min(index + 1 + NUM_WAYPOINTS, len(track.timestamp_us)))
    future_to_ego = np.zeros((NUM_WAYPOINTS, 4, 4))
    future_to_ego[: len(later)] = exact.matmul(
        inverse(track.ego_to_global[index]), track.ego_to_global[later]
    )
    times = np.zeros(NUM_WAYPOINTS, np.int64)
    times[: len(later)] = track.timestamp_us[later]
    return future_to_ego, np.arange(NUM_WAYPOINTS) < len(later), times


def command_released_at(track: EgoTrack, index: int) -> int:
    """The published command of keyframe `index`, from its last waypoint."""
    future_to_ego, _, _ = future_poses(track, index)
    last = future_to_ego[-1]
    x, y, _ = exact.transform(_PSEUDO_BOX_BOTTOM, last)
    return released_command(np.array([x, y, heading(last)]))


def command_navigation_at(track: EgoTrack, index: int) -> int:
    """The command of keyframe `index` that only the past decides."""
    past_to_ego, mask, times = past_poses(track, index)
    return navigation_command(past_to_ego, mask, (track.timestamp_us[index] - times) * 1e-6)


def ego_fields(track: EgoTrack, index: int) -> Record:
    """All record fields about the ego vehicle at keyframe `index` (see `record_features`)."""
    past_to_ego, past_mask, past_times = past_poses(track, index)
    future_to_ego, waypoint_mask, waypoint_times = future_poses(track, index)
    earlier = [index - 1 - step for step in range(int(past_mask.sum()))]  # newest first
    released = [command_released_at(track, past) for past in earlier]
    navigation = [command_navigation_at(track, past) for past in earlier]

    def of_past(values: np.ndarray) -> np.ndarray:
        padded = np.zeros((NUM_PAST, *values.shape[1:]), values.dtype)
        padded[: len(earlier)] = values
        return padded

    return {
        "ego_to_global": track.ego_to_global[index],
        "past_to_ego": past_to_ego,
        "past_mask": past_mask,
        "past_timestamp_us": past_times,
        "can_bus": track.can_bus[index],
        "can_bus_valid": track.can_bus_valid,
        "past_can_bus": of_past(track.can_bus[earlier]),
        "command_released": command_released_at(track, index),
        "command_navigation": command_navigation_at(track, index),
        "past_command_released": of_past(np.array(released, np.int32)),
        "past_command_navigation": of_past(np.array(navigation, np.int32)),
        "waypoints": future_to_ego[:, :2, 3],
        "waypoint_yaw": heading(future_to_ego),
        "waypoint_mask": waypoint_mask,
        "waypoint_timestamp_us": waypoint_times,
    }


def can_bus_at(
    messages: Sequence[Mapping[str, Any]], timestamps_us: Int[np.ndarray, " K"]
) -> Float[np.ndarray, "K 13"]:
    """The CAN-bus vector at each keyframe.

    orientation quaternion w x y z | acceleration xyz (m/s^2) | rotation rate xyz (rad/s) | velocity xyz
    (m/s). As published (fidelity Q38), the orientation is of the last message at or
    before the keyframe, but the other nine numbers are of the first message after it (the last one when
    none follows; the first message serves for both when all are later).

    Args:
        messages: pose messages in time order, at least one.
        timestamps_us: keyframe times.
    """
    times = np.array([message["utime"] for message in messages], np.int64)
    after = np.searchsorted(times, timestamps_us, side="right")
    before = np.maximum(after - 1, 0)
    after = np.minimum(after, len(messages) - 1)
    orientation = np.array([message["orientation"] for message in messages], np.float64)
    motion = [np.array([message[field] for message in messages], np.float64) for field in CAN_MOTION_FIELDS]
    return np.concatenate([orientation[before], *(values[after] for values in motion)], axis=1)

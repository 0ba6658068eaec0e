"""The thirteen CAN-bus numbers of a keyframe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from spacedrive_jax.console import UserError

_MOTION_FIELDS = ("accel", "rotation_rate", "vel")


def pose_file(dataroot: Path, scene_name: str) -> Path:
    """Where the CAN bus expansion keeps a scene's pose messages."""
    return Path(dataroot) / "can_bus" / f"{scene_name}_pose.json"


def read_pose_messages(dataroot: Path, scene_name: str) -> list[Mapping[str, Any]] | None:
    """Reads the scene's 50 Hz pose messages, or None when the scene has none.

    Some official scenes were recorded without CAN data, and the CAN bus expansion is a separate download.

    Raises:
        UserError: the file exists but is not a list of pose messages in time order.
    """
    path = pose_file(dataroot, scene_name)
    if not path.is_file():
        return None
    try:
        messages = json.loads(path.read_bytes())
        times = [message["utime"] for message in messages]
        for message in messages:
            shapes = [np.shape(message[field]) for field in ("orientation", *_MOTION_FIELDS)]
            if shapes != [(4,), (3,), (3,), (3,)]:
                raise ValueError(f"message at utime {message['utime']} has fields of shapes {shapes}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a list of CAN pose messages with utime, orientation, accel, rotation_rate, vel "
            f"({type(error).__name__}: {error}); fetch it again or remove it"
        ) from None
    if times != sorted(times):
        raise UserError(f"{path}: messages are not in time order")
    return messages or None


def can_bus_at(
    messages: Sequence[Mapping[str, Any]], timestamps_us: Int[np.ndarray, " K"]
) -> Float[np.ndarray, "K 13"]:
    """The CAN-bus vector at each keyframe.

    orientation quaternion w x y z | acceleration xyz (m/s^2) | rotation rate xyz (rad/s) | velocity xyz
    (m/s). As published (nuscenes_fields spec, stage B), the orientation is of the last message at or
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
    motion = [np.array([message[field] for message in messages], np.float64) for field in _MOTION_FIELDS]
    return np.concatenate([orientation[before], *(values[after] for values in motion)], axis=1)

"""The pose messages of the CAN bus expansion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spacedrive_jax.console import UserError
from spacedrive_jax.data.keyframe_ego import CAN_MOTION_FIELDS


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
            shapes = [np.shape(message[field]) for field in ("orientation", *CAN_MOTION_FIELDS)]
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

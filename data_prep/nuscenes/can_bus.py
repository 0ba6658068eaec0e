"""The CAN bus expansion: its pose messages and its route files.

A route is the lane centre that a scene drives along, and 50 m around it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from data_prep.nuscenes.rows import Microseconds, Motion, Quaternion, decode_rows
from spacedrive_jax.data.route import Route
from spacedrive_jax.errors import DataError
from spacedrive_jax.io import MEBIBYTE, read_bytes
from spacedrive_jax.json_files import read_json

MOST_BYTES = 256 * MEBIBYTE
"""Twenty seconds of 50 Hz messages have half a megabyte."""


class PoseMessage(msgspec.Struct, frozen=True, gc=False):
    """One message of the vehicle's localisation."""

    utime: Microseconds
    orientation: Quaternion
    accel: Motion
    """m/s^2."""
    rotation_rate: Motion
    """rad/s."""
    vel: Motion
    """m/s."""


def pose_file(dataroot: Path, scene_name: str) -> Path:
    """Where the CAN bus expansion keeps a scene's pose messages."""
    return Path(dataroot) / "can_bus" / f"{scene_name}_pose.json"


def read_pose_messages(dataroot: Path, scene_name: str) -> list[Mapping[str, Any]] | None:
    """Reads the scene's 50 Hz pose messages, or None when the scene has none.

    Some official scenes were recorded without CAN data, and the CAN bus expansion is a separate download.

    Raises:
        DataError: the file exists but is not a list of pose messages in time order, or a value cannot be.
    """
    path = pose_file(dataroot, scene_name)
    if not path.exists():
        return None
    try:
        messages = decode_rows(read_bytes(path, most=MOST_BYTES), PoseMessage, path, "utime")
    except DataError as error:
        raise DataError(f"not CAN pose messages: {error}; fetch the file again or remove it") from error
    for earlier, later in itertools.pairwise(messages):
        if later.utime < earlier.utime:
            raise DataError(f"{path}: messages are not in time order (utime {later.utime})")
    return [msgspec.structs.asdict(message) for message in messages] or None


MOST_ROUTE_BYTES = 16 * MEBIBYTE
"""A kilometre of 0.2 m steps has a fifth of a megabyte."""


def route_file(dataroot: Path, scene_name: str) -> Path:
    """Where the CAN bus expansion keeps a scene's route."""
    return Path(dataroot) / "can_bus" / f"{scene_name}_route.json"


def read_route(dataroot: Path, scene_name: str) -> Route | None:
    """Reads a scene's route, or None when the scene has none (the expansion is a separate download).

    Raises:
        DataError: the file exists but is not a list of at least two different points.
    """
    path = route_file(dataroot, scene_name)
    if not path.exists():
        return None
    values = read_json(path, most=MOST_ROUTE_BYTES)
    try:
        points = np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        points = np.zeros(0)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise DataError(f"{path} is not a list of [x, y] points in metres; fetch it again or remove it")
    if len(points) < 2 or not (points != points[0]).any():
        raise DataError(f"{path} has no two different points; fetch it again or remove it")
    return Route(points)

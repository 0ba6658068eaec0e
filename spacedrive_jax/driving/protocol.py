"""What an `act` message must hold, and the record it stands for: the keyframe as far as a car can know it.

The message is a partial record. What it lacks (future, agents, map) is empty in the record, so that the very
transform that `predict` uses builds the sample.

    {kind: "reset", route_id: text}        -> {kind: "reset", route_id}
    {kind: "act", step, time_s, images...} -> {waypoints, path, text, status, server_timing}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.constants import CAMERAS, CAN_BUS_SIZE, NUM_CAMERAS, NUM_PAST
from spacedrive_jax.data.ego_status import mirrored_command, navigation_command
from spacedrive_jax.data.frame import MOST_OFFSET, MOST_SPEED, check_calibration, check_pose
from spacedrive_jax.data.images import picture_intrinsics, picture_size
from spacedrive_jax.data.route import RoadOption
from spacedrive_jax.data.schema import Record, blank_record
from spacedrive_jax.errors import DataError

PAST_SECONDS = (0.5, 1.0, 1.5, 2.0)
"""How long ago the poses of `past_to_ego` were, unless `past_seconds` says otherwise."""
MOST_PAST = len(PAST_SECONDS)
LEAST_APART = 1e-3
"""Seconds between two poses; a step of a simulator takes more."""
MOST_IMAGE_SIDE = 8192
LOCATION_LENGTH = 32
DEFAULT_LOCATION = "carla"


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array field."""

    shape: tuple[int | None, ...]
    required: bool = True
    most: float = 1e5
    """No number is larger, either way: metres, pixels, m/s, rad/s, seconds."""


_ARRAYS: Mapping[str, _Array] = {
    "camera_intrinsics": _Array((NUM_CAMERAS, 3, 3), most=1e6),
    "camera_to_ego": _Array((NUM_CAMERAS, 4, 4), most=100),
    "can_bus": _Array((CAN_BUS_SIZE,), most=1000),
    "past_can_bus": _Array((NUM_PAST, CAN_BUS_SIZE), most=1000),
    "past_to_ego": _Array((None, 4, 4), most=1000),
    "past_mask": _Array((None,)),
    "past_seconds": _Array((None,), required=False),
    "past_command": _Array((NUM_PAST,), required=False),
    "target_points": _Array((2, 2), required=False),
    "lidar_to_ego": _Array((4, 4), required=False, most=100),
}
FIELDS = frozenset(
    ("kind", "step", "time_s", "images", "exact_depth", "lidar", "command", "location", *_ARRAYS)
)
"""All that an `act` message may hold."""


def partial_record(message: Mapping[str, Any]) -> Record:
    """The record that an `act` message stands for.

    Args:
        message: as unpacked from the wire. `images` are six encoded pictures in the order of `CAMERAS`;
            matrices are those of the record (metres, ego frame x forward y left); `past_to_ego` has the poses
            of `PAST_SECONDS`, at least two, newest first, and serves the commands of the past too where it
            has four; `target_points` are the route's next two nodes in the ego frame; `command` and
            `past_command` are RoadOption numbers.

    Raises:
        DataError: a field is missing, unknown, of another shape, not finite, or not what it stands for; the
            message names it.
    """
    unknown = sorted(str(name) for name in set(message) - FIELDS)
    if unknown:
        raise DataError(f"act has unknown fields: {', '.join(unknown[:5])}")
    arrays = {name: _array(message, name, spec) for name, spec in _ARRAYS.items()}
    check_calibration(arrays["camera_intrinsics"], arrays["camera_to_ego"], "act")
    images = _pictures(message, "images")
    time_us = round(_number(message, "time_s", least=0.0, most=1e9) * 1e6)
    known = min(len(arrays["past_to_ego"]), MOST_PAST)
    seconds = np.asarray(PAST_SECONDS) if arrays["past_seconds"] is None else arrays["past_seconds"]
    lengths = {len(arrays["past_to_ego"]), len(arrays["past_mask"])}
    if len(lengths) > 1 or known < NUM_PAST or len(seconds) < known:
        raise DataError(
            f"act: past_to_ego, past_mask and past_seconds must have the same {NUM_PAST} to {MOST_PAST} rows"
        )
    mask = np.logical_and.accumulate(arrays["past_mask"][:known].astype(bool))
    used = seconds[:known][mask]
    if (np.diff(used, prepend=0.0) < LEAST_APART).any():
        raise DataError(
            f"act: past_seconds {np.asarray(seconds).tolist()} must rise: how long ago each pose was, the "
            "newest first, seconds"
        )
    for index in np.flatnonzero(mask):
        check_pose(
            arrays["past_to_ego"][index], f"act: past_to_ego[{index}]", MOST_SPEED * float(seconds[index])
        )
    if arrays["lidar_to_ego"] is not None:
        check_pose(arrays["lidar_to_ego"], "act: lidar_to_ego", MOST_OFFSET)
    poses = np.where(mask[:, None, None], arrays["past_to_ego"][:known], 0.0)
    past = [_navigation_at(poses, mask, seconds, index) for index in range(NUM_PAST + 1)]
    record = blank_record() | {
        "token": f"step {_whole(message, 'step', least=0, most=2**31 - 1)}",
        "location": _location(message),
        "timestamp_us": time_us,
        "images": images,
        "image_size": np.stack([image_size(data, f"images[{row}]") for row, data in enumerate(images)]),
        "camera_intrinsics": arrays["camera_intrinsics"],
        "camera_to_ego": arrays["camera_to_ego"],
        "camera_timestamp_us": np.full(NUM_CAMERAS, time_us, np.int64),
        "camera_ego_to_global": np.tile(np.eye(4), (NUM_CAMERAS, 1, 1)),
        "ego_to_global": np.eye(4),
        "past_to_ego": poses[:NUM_PAST],
        "past_mask": mask[:NUM_PAST],
        "past_timestamp_us": np.where(
            mask[:NUM_PAST], time_us - np.round(seconds[:NUM_PAST] * 1e6).astype(np.int64), 0
        ),
        "can_bus": arrays["can_bus"],
        "can_bus_valid": True,
        "past_can_bus": np.where(mask[:NUM_PAST, None], arrays["past_can_bus"], 0.0),
        "command_navigation": past[0],
        "past_command_navigation": np.array(past[1:], np.int32) * mask[:NUM_PAST],
        # Nothing knows where the car will be in 3 s; the published words are those of navigation, mirrored.
        "command_released": mirrored_command(past[0]),
        "past_command_released": np.array([mirrored_command(one) for one in past[1:]], np.int32)
        * mask[:NUM_PAST],
        "drivable_source": "none",
        "lidar": _bytes(message, "lidar"),
        "lidar_to_ego": np.eye(4) if arrays["lidar_to_ego"] is None else arrays["lidar_to_ego"],
    }
    if "exact_depth" in message:
        record["exact_depth"] = _pictures(message, "exact_depth")
    return record | _route_fields(message, arrays, record)


def _route_fields(message: Mapping[str, Any], arrays: Mapping[str, Any], record: Record) -> Record:
    """What the message says of the route."""
    command = message.get("command")
    if command is not None:
        command = _whole(message, "command", least=-1, most=6)
    targets, past = arrays["target_points"], arrays["past_command"]
    given: dict[str, Any] = {"command_route": np.int32(RoadOption.VOID)}
    given["route_valid"] = command is not None and targets is not None
    if command is not None:
        given["command_route"] = np.int32(RoadOption.LANE_FOLLOW if command < 1 else command)
    if past is not None:
        if not ((past >= -1) & (past <= 6) & (past == np.round(past))).all():
            raise DataError(f"act: past_command {past.tolist()} holds no RoadOption numbers")
        given["past_command_route"] = (
            np.where(past < 1, RoadOption.LANE_FOLLOW, past).astype(np.int32) * record["past_mask"]
        )
    if targets is not None:
        given["target_points"] = targets
    return given


def act_message(record: Record, step: int, time_s: float) -> dict[str, Any]:
    """An `act` message that says what a record says of the present and the past."""
    message = {
        "kind": "act",
        "step": step,
        "time_s": time_s,
        "camera_intrinsics": picture_intrinsics(record),
        "camera_to_ego": np.asarray(record["camera_to_ego"], np.float64),
        **{name: np.asarray(record[name], np.float64) for name in ("can_bus", "past_can_bus", "past_to_ego")},
        "images": list(record["images"]),
        "past_mask": np.asarray(record["past_mask"], bool),
        "location": str(record["location"])[:LOCATION_LENGTH],
    }
    if all(record["exact_depth"]):
        message["exact_depth"] = list(record["exact_depth"])
    if record["lidar"]:
        message |= {"lidar": record["lidar"], "lidar_to_ego": np.asarray(record["lidar_to_ego"], np.float64)}
    for name, sent in (
        ("command_route", "command"),
        ("past_command_route", "past_command"),
        ("target_points", "target_points"),
    ):
        if record["route_valid"]:
            value = record[name]
            message[sent] = int(value) if sent == "command" else np.asarray(value)
    return message


def _navigation_at(
    poses: Float[np.ndarray, "K 4 4"], mask: np.ndarray, seconds: np.ndarray, index: int
) -> int:
    """`navigation_command` now (0) or at one of the past poses, from the two poses before it."""
    if index == 0:
        older, known, here = poses[:NUM_PAST], mask[:NUM_PAST], 0.0
    else:
        if not mask[index - 1]:
            return 0
        to_then = exact.rigid_inverse(poses[index - 1])
        older = exact.matmul(to_then, poses[index : index + NUM_PAST])
        known = mask[index : index + NUM_PAST]
        here = float(seconds[index - 1])
    padded = np.zeros((NUM_PAST, 4, 4))
    padded[: len(older)] = older
    present = np.zeros(NUM_PAST, bool)
    present[: len(known)] = known
    ago = np.ones(NUM_PAST)
    ago[: len(older)] = seconds[index : index + len(older)] - here
    return navigation_command(padded, present, ago)


def _array(message: Mapping[str, Any], name: str, spec: _Array) -> Any:
    value = message.get(name)
    if value is None:
        if spec.required:
            raise DataError(f"act lacks {name}")
        return None
    if isinstance(value, list):
        try:
            value = np.asarray(value, np.float64)
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"act: {name} is not an array of numbers") from None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise DataError(f"act: {name} is not an array of numbers")
    wanted = spec.shape
    if value.ndim != len(wanted) or any(
        side is not None and side != given for side, given in zip(wanted, value.shape, strict=True)
    ):
        written = "x".join("K" if side is None else str(side) for side in wanted)
        raise DataError(f"act: {name} has shape {'x'.join(map(str, value.shape))}, not {written}")
    value = value.astype(np.float64)
    if not np.isfinite(value).all():
        raise DataError(f"act: {name} holds values that are not finite")
    if np.abs(value).max(initial=0.0) > spec.most:
        raise DataError(
            f"act: {name} holds {np.abs(value).max():.4g}, which cannot be (at most {spec.most:g})"
        )
    return value


def _number(message: Mapping[str, Any], name: str, *, least: float, most: float) -> float:
    value = message.get(name)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise DataError(f"act: {name} must be a number from {least} to {most:g}, not {str(value)[:40]!r}")
    return value


def _whole(message: Mapping[str, Any], name: str, *, least: int, most: int) -> int:
    value = _number(message, name, least=least, most=most)
    if value != int(value):
        raise DataError(f"act: {name} must be a whole number, not {value!r}")
    return int(value)


def _pictures(message: Mapping[str, Any], name: str) -> list[bytes]:
    value = message.get(name)
    pictures = value if isinstance(value, list) else []
    if len(pictures) != NUM_CAMERAS or not all(isinstance(one, bytes) for one in pictures):
        raise DataError(f"act: {name} must be {NUM_CAMERAS} encoded pictures (bytes): {', '.join(CAMERAS)}")
    return pictures


def _bytes(message: Mapping[str, Any], name: str) -> bytes:
    value = message.get(name, b"")
    if not isinstance(value, bytes):
        raise DataError(f"act: {name} must be bytes")
    return value


def _location(message: Mapping[str, Any]) -> str:
    value = message.get("location", DEFAULT_LOCATION)
    if not isinstance(value, str) or not value.isprintable() or len(value) > LOCATION_LENGTH or "<" in value:
        raise DataError(f"act: location must be a plain text of at most {LOCATION_LENGTH} letters")
    return value or DEFAULT_LOCATION


def image_size(data: bytes, what: str) -> np.ndarray:
    """(2,) height and width that the header of a JPEG or PNG gives, int32.

    Raises:
        DataError: it is neither, or of a size no camera has.
    """
    found = picture_size(data)
    if found is None or not all(1 <= side <= MOST_IMAGE_SIDE for side in found):
        raise DataError(f"act: {what} is no JPEG or PNG picture with sides up to {MOST_IMAGE_SIDE}")
    return np.array(found, np.int32)

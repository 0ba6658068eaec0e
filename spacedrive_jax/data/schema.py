"""The record's schema: names, shapes and types of the features of one keyframe, and what holds one to it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from spacedrive_jax.constants import (
    CAN_BUS_SIZE,
    NUM_CAMERAS,
    NUM_PAST,
    NUM_PATH_POINTS,
    NUM_TARGET_POINTS,
    NUM_WAYPOINTS,
)
from spacedrive_jax.errors import DataError

DATASET_NAME = "nuscenes_keyframes"
DATASET_VERSION = "1.0.0"

DRIVABLE_EXTENT = 50.0
"""The drivable rasters span [-50, 50) m in x and y of the yaw-only ego frame."""
DRIVABLE_CELLS = 200
DRIVABLE_FINE_CELLS = 1000

DEPTH_SCALE = 256.0
"""`exact_depth` images are 16-bit PNGs of round(metres * 256), 0 where unknown (KITTI's convention)."""


def record_features() -> tfds.features.FeaturesDict:
    """The feature names, shapes and types of one record.

    Returns:
        The tfds features. N = 6 cameras in the order of `CAMERAS`; A agents in the order of the sample's
        annotations; byte features are left exactly as written (encoded images are not decoded).
    """
    feature = tfds.features

    def tensor(*shape: int | None, dtype: Any) -> Any:
        # Stored as raw bytes: the default encoding rounds float64 to float32, which in global coordinates
        # is a tenth of a millimetre, and parses large integer arrays slowly.
        encoding = tfds.features.Encoding.NONE if dtype is np.object_ else tfds.features.Encoding.BYTES
        return feature.Tensor(shape=shape, dtype=dtype, encoding=encoding)

    def blobs(length: int | None) -> Any:
        return feature.Sequence(feature.Tensor(shape=(), dtype=np.object_), length=length)

    return feature.FeaturesDict(
        {
            # identity
            "token": feature.Text(),
            "scene_name": feature.Text(),
            "scene_description": feature.Text(),
            "location": feature.Text(),
            "log": feature.Text(),
            "frame_index": feature.Scalar(np.int32),  # position of the keyframe in its scene, from 0
            "timestamp_us": feature.Scalar(np.int64),
            # cameras
            "images": blobs(NUM_CAMERAS),  # encoded JPEG (PNG at another size than native: see
            # images.kept_view), b"" where absent
            "image_rendered": tensor(NUM_CAMERAS, dtype=np.bool_),  # drawn by the renderer, not photographed
            "image_size": tensor(NUM_CAMERAS, 2, dtype=np.int32),  # native (height, width)
            "exact_depth": blobs(NUM_CAMERAS),  # 16-bit PNG, see DEPTH_SCALE; b"" where unknown
            "camera_intrinsics": tensor(NUM_CAMERAS, 3, 3, dtype=np.float64),  # pixels at image_size
            "camera_to_ego": tensor(NUM_CAMERAS, 4, 4, dtype=np.float64),  # static calibration
            "camera_timestamp_us": tensor(NUM_CAMERAS, dtype=np.int64),
            "camera_ego_to_global": tensor(NUM_CAMERAS, 4, 4, dtype=np.float64),  # at each camera's time
            # ego state
            "ego_to_global": tensor(4, 4, dtype=np.float64),
            "past_to_ego": tensor(NUM_PAST, 4, 4, dtype=np.float64),  # newest first, zeros where masked
            "past_mask": tensor(NUM_PAST, dtype=np.bool_),
            "past_timestamp_us": tensor(NUM_PAST, dtype=np.int64),
            "can_bus": tensor(CAN_BUS_SIZE, dtype=np.float64),
            "can_bus_valid": feature.Scalar(np.bool_),  # false: the scene has no CAN data, can_bus is zeros
            "past_can_bus": tensor(NUM_PAST, CAN_BUS_SIZE, dtype=np.float64),
            "command_released": feature.Scalar(np.int32),  # 0..7, from the ground-truth endpoint
            "command_navigation": feature.Scalar(np.int32),  # 0..7, from the past only
            "past_command_released": tensor(NUM_PAST, dtype=np.int32),
            "past_command_navigation": tensor(NUM_PAST, dtype=np.int32),
            "command_route": feature.Scalar(np.int32),  # CARLA's RoadOption, from the route; -1 without one
            "past_command_route": tensor(NUM_PAST, dtype=np.int32),
            "target_points": tensor(NUM_TARGET_POINTS, 2, dtype=np.float64),  # the route's next two nodes
            "route_valid": feature.Scalar(np.bool_),  # false: no route is known, target_points are zeros
            # future of the ego vehicle
            "waypoints": tensor(NUM_WAYPOINTS, 2, dtype=np.float64),
            "waypoint_yaw": tensor(NUM_WAYPOINTS, dtype=np.float64),
            "waypoint_mask": tensor(NUM_WAYPOINTS, dtype=np.bool_),
            "waypoint_timestamp_us": tensor(NUM_WAYPOINTS, dtype=np.int64),
            "path": tensor(NUM_PATH_POINTS, 2, dtype=np.float64),  # 1, 2, ... m along the scene's whole
            "path_mask": tensor(NUM_PATH_POINTS, dtype=np.bool_),  # future, then the route; where known
            # agents
            "agent_token": feature.Sequence(feature.Text()),  # instance token
            "agent_category": feature.Sequence(feature.Text()),
            "agent_boxes": tensor(None, 7, dtype=np.float64),  # x y z length width height yaw
            "agent_velocity": tensor(None, 2, dtype=np.float64),  # nan where unknown
            "agent_future": tensor(None, NUM_WAYPOINTS, 2, dtype=np.float64),  # displacement from now
            "agent_future_yaw": tensor(None, NUM_WAYPOINTS, dtype=np.float64),  # heading
            "agent_future_mask": tensor(None, NUM_WAYPOINTS, dtype=np.bool_),
            "agent_lidar_points": tensor(None, dtype=np.int32),
            # map
            "drivable": tensor(DRIVABLE_CELLS, DRIVABLE_CELLS, dtype=np.uint8),  # row forward, column left
            "drivable_fine": tensor(dtype=np.object_),  # the same at 0.1 m as a 1-bit PNG, b"" without a map
            "drivable_polygons": blobs(None),  # WKB polygons, yaw-only ego frame; none from a mask-only map
            "drivable_source": feature.Text(),  # "expansion", "mask" or "none"
            # lidar
            "lidar": tensor(dtype=np.object_),  # the sweep file (float32 x y z intensity ring), or b""
            "lidar_to_ego": tensor(4, 4, dtype=np.float64),
        }
    )


Record = dict[str, Any]
"""One decoded record: feature name to numpy array, scalar, bytes, or list of bytes."""


TEXT_LIST_FEATURES = ("agent_token", "agent_category")
MAX_IMAGE_SIDE = 65_500
"""Pixels; libjpeg's limit."""
_MAY_BE_NAN = frozenset({"agent_velocity"})


class _Feature(NamedTuple):
    """What a feature's value is in a decoded record."""

    kind: str
    """`text`, `texts`, `bytes`, `blobs` or `numbers`."""
    shape: tuple[int | None, ...]
    """None for the number of agents."""
    dtype: Any


@functools.cache
def _schema() -> Mapping[str, _Feature]:
    found = {}
    for name, feature in record_features().items():
        shape, dtype = tuple(feature.shape), feature.np_dtype
        if type(feature).__name__ == "Sequence":
            kind = "texts" if name in TEXT_LIST_FEATURES else "blobs"
        elif type(feature).__name__ == "Text":
            kind = "text"
        else:
            kind = "bytes" if dtype == np.object_ else "numbers"
        found[name] = _Feature(kind, shape, dtype)
    return found


def blank_record() -> Record:
    """A record in which nothing is known: zeros, empty texts and lists."""
    empty = {"text": "", "bytes": b""}
    record: Record = {}
    for name, (kind, shape, dtype) in _schema().items():
        if kind in empty:
            record[name] = empty[kind]
        elif kind == "numbers":
            record[name] = np.zeros([side or 0 for side in shape], dtype)[()]
        else:
            record[name] = [b""] * (shape[0] or 0)
    return record


def impossible(record: Record) -> str:
    """Which feature has a value that no conversion writes; empty where none has.

    Args:
        record: whole, and of the schema's shapes.
    """
    for name, value in record.items():
        is_number = getattr(value, "dtype", None) == np.float64
        if is_number and name not in _MAY_BE_NAN and not np.isfinite(value).all():
            return f"{name} is not finite"
    sizes = record["image_size"]
    if not ((sizes > 0) & (sizes <= MAX_IMAGE_SIDE)).all():
        return f"image_size {sizes.tolist()} is not that of images"
    agents = len(record["agent_boxes"])
    for name in record:
        if name.startswith("agent_") and len(record[name]) != agents:
            return f"{name} is of {len(record[name])} agents, agent_boxes of {agents}"
    return ""


def own_record(values: Mapping[str, Any]) -> Record:
    """A record that somebody made, or read with tfds, as `open_records` gives records.

    Lists and jax's arrays become numpy arrays of the feature's type, texts in bytes `str`; what the schema
    does not know is left out.

    Args:
        values: feature name to value.

    Raises:
        DataError: a feature is lacking, of another shape or type, or no conversion writes its value.
    """
    missing = sorted(_schema().keys() - values.keys())
    if missing:
        raise DataError(
            f"the record lacks {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}: start from "
            "spacedrive_jax.data.schema.blank_record()"
        )
    record: Record = {}
    for name, feature in _schema().items():
        try:
            record[name] = _own_value(values[name], feature)
        except (TypeError, ValueError) as error:
            raise DataError(f"the record's {name} {error}; spacedrive_jax/data/schema.py has all") from error
    if wrong := impossible(record):
        raise DataError(f"the record {record['token']!r} cannot be: {wrong}")
    return record


def _own_value(value: Any, feature: _Feature) -> Any:
    kind, shape, dtype = feature
    if kind == "numbers":
        return _numbers(np.asarray(value), shape, dtype)
    if kind in ("text", "bytes"):
        return _text_or_bytes(value, kind)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        raise TypeError(f"is {type(value).__name__}, expected a list of {kind}")
    if shape[0] is not None and len(value) != shape[0]:
        raise TypeError(f"holds {len(value)} {kind}, expected {shape[0]}")
    return [_text_or_bytes(item, "text" if kind == "texts" else "bytes") for item in value]


def _text_or_bytes(value: Any, kind: str) -> str | bytes:
    if isinstance(value, bytes) and kind == "text":
        return value.decode()
    if not isinstance(value, str if kind == "text" else bytes):
        raise TypeError(f"holds {type(value).__name__}, expected {kind}")
    return value


def _numbers(value: np.ndarray, shape: tuple[int | None, ...], dtype: Any) -> Any:
    if not value.size and shape[:1] == (None,):
        return np.zeros([side or 0 for side in shape], dtype)
    expected = (
        f"expected {np.dtype(dtype)} of shape ({', '.join('A' if s is None else str(s) for s in shape)})"
    )
    fits = len(shape) == value.ndim and all(
        wanted in (None, found) for wanted, found in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise TypeError(f"is of shape {value.shape}, {expected}")
    is_whole = np.issubdtype(dtype, np.integer)
    if not (value.dtype.kind in "iu" if is_whole else np.can_cast(value.dtype, dtype, "same_kind")):
        raise TypeError(f"is of {value.dtype}, {expected}")
    converted = value.astype(dtype)
    if is_whole and not np.array_equal(converted, value):
        raise TypeError(f"holds numbers beyond what {np.dtype(dtype)} holds")
    return converted if shape else converted.item()

"""Small records for tests: one record with every feature, and a folder that `open_records` accepts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import dataset_info, file_adapters, naming

from spacedrive_jax.constants import (
    CAN_BUS_SIZE,
    NUM_CAMERAS,
    NUM_PAST,
    NUM_PATH_POINTS,
    NUM_WAYPOINTS,
)
from spacedrive_jax.data.records_folder import content_fingerprint, ends_sha256
from spacedrive_jax.data.schema import (
    DATASET_NAME,
    DATASET_VERSION,
    DRIVABLE_CELLS,
    DRIVABLE_FINE_CELLS,
    Record,
    record_features,
)
from spacedrive_jax.io import file_sha256

CAMERA_YAWS = np.deg2rad([0.0, -55.0, 55.0, 180.0, 110.0, -110.0])
"""Facing of the six cameras of `CAMERAS`, counter-clockwise from forward."""
KEYFRAME_STEP_US = 500_000


def encode_png(image: np.ndarray, bilevel: bool = False) -> bytes:
    done, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_BILEVEL, int(bilevel)])
    assert done
    return data.tobytes()


def encode_jpeg(image: np.ndarray) -> bytes:
    done, data = cv2.imencode(".jpg", image)
    assert done
    return data.tobytes()


def camera_to_ego(yaw: float, height: float = 1.5) -> np.ndarray:
    """A level camera (x right, y down, z forward) facing `yaw` in the ego frame."""
    forward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1], matrix[:3, 2] = right, [0.0, 0.0, -1.0], forward
    matrix[:3, 3] = [1.0, 0.0, height]
    return matrix


def straight_road(half_width: float = 6.0) -> np.ndarray:
    """A 0.1 m drivable raster, row forward, column left: a road along x as wide as asked."""
    left = (np.arange(DRIVABLE_FINE_CELLS) + 0.5) * 0.1 - 50.0
    return np.broadcast_to(np.abs(left) < half_width, (DRIVABLE_FINE_CELLS,) * 2).astype(np.uint8)


def make_record(rng: np.random.Generator, **overrides: Any) -> Record:
    """A whole record: the ego drives straight ahead at 2-10 m/s on a straight road among a few agents.

    Args:
        rng: source of every random value.
        overrides: features to replace; an unknown name is an error. Overriding `drivable_fine` with an
            array of 0 and 1 encodes it and derives `drivable`.
    """
    speed = rng.uniform(2.0, 10.0)
    agents = int(rng.integers(1, 5))
    times = np.arange(1, NUM_WAYPOINTS + 1) * 0.5
    height, width = 45, 80
    intrinsics = np.array([[60.0, 0.0, width / 2], [0.0, 60.0, height / 2], [0.0, 0.0, 1.0]])
    past = np.stack([np.eye(4)] * NUM_PAST)
    past[:, 0, 3] = -speed * 0.5 * np.arange(1, NUM_PAST + 1)
    boxes = np.zeros((agents, 7))
    boxes[:, 0] = rng.uniform(-30, 30, agents)
    boxes[:, 1] = rng.uniform(4, 10, agents)
    boxes[:, 2:6] = [0.8, 4.5, 1.9, 1.6]
    boxes[:, 6] = rng.uniform(-0.2, 0.2, agents)
    fine = overrides.pop("drivable_fine", straight_road())
    if isinstance(fine, np.ndarray):
        encoded, coarse = encode_png(fine * 255, bilevel=True), fine[2::5, 2::5]
    else:
        encoded, coarse = fine, np.zeros((DRIVABLE_CELLS, DRIVABLE_CELLS), np.uint8)
    timestamp = 1_600_000_000_000_000
    record: Record = {
        "token": rng.bytes(16).hex(),
        "scene_name": "scene-0000",
        "scene_description": "A straight road",
        "location": "testtown",
        "log": "log-0",
        "frame_index": 2,
        "timestamp_us": timestamp,
        "images": [
            encode_jpeg(rng.integers(90, 160, (height, width, 3), dtype=np.uint8)) for _ in range(NUM_CAMERAS)
        ],
        "image_rendered": np.zeros(NUM_CAMERAS, bool),
        "image_size": np.tile(np.array([height, width], np.int32), (NUM_CAMERAS, 1)),
        "exact_depth": [b""] * NUM_CAMERAS,
        "camera_intrinsics": np.tile(intrinsics, (NUM_CAMERAS, 1, 1)),
        "camera_to_ego": np.stack([camera_to_ego(yaw) for yaw in CAMERA_YAWS]),
        "camera_timestamp_us": np.full(NUM_CAMERAS, timestamp, np.int64),
        "camera_ego_to_global": np.stack([np.eye(4)] * NUM_CAMERAS),
        "ego_to_global": np.eye(4),
        "past_to_ego": past,
        "past_mask": np.ones(NUM_PAST, bool),
        "past_timestamp_us": timestamp - KEYFRAME_STEP_US * np.arange(1, NUM_PAST + 1, dtype=np.int64),
        "can_bus": np.zeros(CAN_BUS_SIZE),
        "can_bus_valid": True,
        "past_can_bus": np.zeros((NUM_PAST, CAN_BUS_SIZE)),
        "command_released": 0,
        "command_navigation": 0,
        "past_command_released": np.zeros(NUM_PAST, np.int32),
        "past_command_navigation": np.zeros(NUM_PAST, np.int32),
        "command_route": 4,
        "past_command_route": np.full(NUM_PAST, 4, np.int32),
        "target_points": np.array([[30.0, 0.0], [80.0, 0.0]]),
        "route_valid": True,
        "waypoints": np.stack([speed * times, np.zeros(NUM_WAYPOINTS)], axis=1),
        "waypoint_yaw": np.zeros(NUM_WAYPOINTS),
        "waypoint_mask": np.ones(NUM_WAYPOINTS, bool),
        "waypoint_timestamp_us": timestamp
        + KEYFRAME_STEP_US * np.arange(1, NUM_WAYPOINTS + 1, dtype=np.int64),
        "path": np.stack([np.arange(1.0, NUM_PATH_POINTS + 1), np.zeros(NUM_PATH_POINTS)], axis=1),
        "path_mask": np.ones(NUM_PATH_POINTS, bool),
        "agent_token": [rng.bytes(16).hex() for _ in range(agents)],
        "agent_category": ["vehicle.car"] * agents,
        "agent_boxes": boxes,
        "agent_velocity": np.zeros((agents, 2)),
        "agent_future": np.zeros((agents, NUM_WAYPOINTS, 2)),
        "agent_future_yaw": np.repeat(boxes[:, 6:], NUM_WAYPOINTS, axis=1),
        "agent_future_mask": np.ones((agents, NUM_WAYPOINTS), bool),
        "agent_lidar_points": np.full(agents, 20, np.int32),
        "drivable": np.ascontiguousarray(coarse),
        "drivable_fine": encoded,
        "drivable_polygons": [],
        "drivable_source": "mask",
        "lidar": b"",
        "lidar_to_ego": np.eye(4),
    }
    unknown = set(overrides) - set(record)
    if unknown:
        raise ValueError(f"no such record feature: {', '.join(sorted(unknown))}")
    return {**record, **overrides}


def write_records(
    directory: Path, records: Mapping[str, Sequence[Record]], version: str = "v1.0-mini"
) -> Path:
    """Writes a finished records folder, one shard a split, and returns it.

    Args:
        directory: the folder to write.
        records: split name (`train`, `val`) to its records; empty splits are left out.
        version: dataset version named in the provenance.
    """
    directory.mkdir(parents=True, exist_ok=True)
    features = record_features()
    splits = []
    shards: dict[str, dict[str, Any]] = {}
    for split, items in records.items():
        if not items:
            continue
        template = naming.ShardedFileTemplate(
            dataset_name=DATASET_NAME,
            data_dir=directory,
            split=split,
            filetype_suffix="array_record",
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        )
        shard = directory / f"{DATASET_NAME}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
        for record in items:
            data = features.serialize_example(record)
            writer.write(data)
        writer.close()
        shards[shard.name] = {
            "keyframes": len(items),
            "bytes": shard.stat().st_size,
            "sha256": file_sha256(shard),
            "ends_sha256": ends_sha256(shard),
        }
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(items)],
                num_bytes=shard.stat().st_size,
                filename_template=template,
            )
        )
    identity = dataset_info.DatasetIdentity(
        name=DATASET_NAME,
        version=tfds.core.Version(DATASET_VERSION),
        data_dir=str(directory),
        module_name="tests",
    )
    info = tfds.core.DatasetInfo(builder=identity, description="test records", features=features)
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(str(directory))
    counts = {split: len(items) for split, items in records.items()}
    (directory / "provenance.json").write_text(
        json.dumps(
            {
                "fingerprint": content_fingerprint((name, one["sha256"]) for name, one in shards.items()),
                "shards": shards,
                "records": sum(counts.values()),
                "splits": counts,
                "source": {"version": version},
                "licence": "made up",
            }
        )
    )
    return directory

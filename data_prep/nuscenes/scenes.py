"""The scenes of a nuScenes folder's tables, one after the other, as plain data."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping

from data_prep.nuscenes.tables import Row, Tables
from spacedrive_jax.cameras import CAMERAS
from spacedrive_jax.console import UserError
from spacedrive_jax.data.keyframe import Annotation, Keyframe, Scene, SensorFrame

LIDAR = "LIDAR_TOP"


def read_scenes(tables: Tables) -> Iterator[Scene]:
    """Yields the scenes in table order, each built when asked for.

    Raises:
        UserError: a keyframe chain is broken, a keyframe lacks one of its seven sensors, or an annotation
            chain leaves its scene.
    """
    sensor_rows = _keyframe_sensor_rows(tables)
    annotation_rows: defaultdict[str, list[Row]] = defaultdict(list)
    for row in tables["sample_annotation"].values():
        annotation_rows[row["sample_token"]].append(row)
    map_masks = {log: row["filename"] for row in tables["map"].values() for log in row["log_tokens"]}
    for scene_row in tables["scene"].values():
        samples = _sample_chain(tables, scene_row)
        rows = [row for sample in samples for row in annotation_rows[sample["token"]]]
        first = 0
        keyframes = []
        for sample in samples:
            count = len(annotation_rows[sample["token"]])
            keyframes.append(_keyframe(tables, sample, sensor_rows, range(first, first + count)))
            first += count
        log = tables["log"][scene_row["log_token"]]
        yield Scene(
            name=scene_row["name"],
            description=scene_row["description"],
            location=log["location"],
            log=log["logfile"],
            map_mask=map_masks.get(log["token"], ""),
            keyframes=tuple(keyframes),
            annotations=_annotations(tables, scene_row["name"], samples, rows),
        )


def _keyframe_sensor_rows(tables: Tables) -> dict[tuple[str, str], Row]:
    """(sample token, channel) to the keyframe's `sample_data` row."""
    rows: dict[tuple[str, str], Row] = {}
    for row in tables["sample_data"].values():
        calibration = tables["calibrated_sensor"][row["calibrated_sensor_token"]]
        channel = tables["sensor"][calibration["sensor_token"]]["channel"]
        key = row["sample_token"], channel
        if key in rows:
            raise UserError(
                f"sample_data.json: rows {rows[key]['token']!r} and {row['token']!r} are both the {channel} "
                f"data of keyframe {row['sample_token']!r}"
            )
        rows[key] = row
    return rows


def _sample_chain(tables: Tables, scene: Row) -> list[Row]:
    """The scene's samples from first to last along `next`."""
    chain = [tables["sample"][scene["first_sample_token"]]]
    while chain[-1]["next"] and len(chain) <= scene["nbr_samples"]:
        chain.append(tables["sample"][chain[-1]["next"]])
    if len(chain) != scene["nbr_samples"] or chain[-1]["token"] != scene["last_sample_token"]:
        raise UserError(
            f"scene.json: {scene['name']} declares {scene['nbr_samples']} keyframes ending at "
            f"{scene['last_sample_token']!r}, but the `next` chain in sample.json does not lead there "
            f"(stopped after {len(chain)} at {chain[-1]['token']!r})"
        )
    for earlier, later in itertools.pairwise(chain):
        if later["scene_token"] != scene["token"] or later["timestamp"] <= earlier["timestamp"]:
            raise UserError(
                f"sample.json: row {later['token']!r} follows {earlier['token']!r} in {scene['name']} but "
                f"belongs to another scene or is not later in time"
            )
    return chain


def _keyframe(
    tables: Tables, sample: Row, sensor_rows: Mapping[tuple[str, str], Row], annotations: range
) -> Keyframe:
    frames = {}
    for channel in (*CAMERAS, LIDAR):
        row = sensor_rows.get((sample["token"], channel))
        if row is None:
            raise UserError(f"sample_data.json: keyframe {sample['token']!r} has no {channel} row")
        frames[channel] = _sensor_frame(tables, channel, row)
    return Keyframe(
        token=sample["token"],
        timestamp_us=sample["timestamp"],
        cameras=tuple(frames[channel] for channel in CAMERAS),
        lidar=frames[LIDAR],
        annotations=tuple(annotations),
    )


def _sensor_frame(tables: Tables, channel: str, row: Row) -> SensorFrame:
    pose = tables["ego_pose"][row["ego_pose_token"]]
    calibration = tables["calibrated_sensor"][row["calibrated_sensor_token"]]
    intrinsics = tuple(tuple(line) for line in calibration["camera_intrinsic"])
    if channel in CAMERAS and [len(line) for line in intrinsics] != [3, 3, 3]:
        raise UserError(
            f"calibrated_sensor.json: row {calibration['token']!r} ({channel}), field 'camera_intrinsic' "
            f"is not a 3 x 3 matrix"
        )
    return SensorFrame(
        filename=row["filename"],
        timestamp_us=row["timestamp"],
        ego_translation=tuple(pose["translation"]),
        ego_rotation=tuple(pose["rotation"]),
        sensor_translation=tuple(calibration["translation"]),
        sensor_rotation=tuple(calibration["rotation"]),
        intrinsics=intrinsics,
        height=row["height"],
        width=row["width"],
    )


def _annotations(tables: Tables, scene: str, samples: list[Row], rows: list[Row]) -> tuple[Annotation, ...]:
    index = {row["token"]: position for position, row in enumerate(rows)}
    keyframe = {sample["token"]: position for position, sample in enumerate(samples)}

    def neighbour(row: Row, field: str) -> int:
        if not row[field]:
            return -1
        if row[field] not in index:
            raise UserError(
                f"sample_annotation.json: row {row['token']!r}, field {field!r} leaves its scene {scene}"
            )
        return index[row[field]]

    return tuple(
        Annotation(
            instance_token=row["instance_token"],
            category=tables["category"][tables["instance"][row["instance_token"]]["category_token"]]["name"],
            translation=tuple(row["translation"]),
            size=tuple(row["size"]),
            rotation=tuple(row["rotation"]),
            lidar_points=row["num_lidar_pts"],
            previous=neighbour(row, "prev"),
            next=neighbour(row, "next"),
            keyframe=keyframe[row["sample_token"]],
        )
        for row in rows
    )

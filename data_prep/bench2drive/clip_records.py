"""The unit of work: one clip in, one shard of records out.

Time is the frame number over ten, never a row of a list: some frames are missing. A keyframe is every fifth
frame; its past is 5 and 10 frames before, its waypoints 5 to 30 frames after.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from data_prep.bench2drive.annotations import Box, Calibration, Frame, read_calibration, read_frame
from data_prep.bench2drive.clips import Clip, read_clip, sweep_bytes
from data_prep.nuscenes.scene_records import SceneResult
from data_prep.nuscenes.scenes import MAX_SPEED, POSE_JITTER
from spacedrive_jax import exact
from spacedrive_jax.constants import CAMERAS, NUM_CAMERAS, NUM_PAST, NUM_PATH_POINTS, NUM_WAYPOINTS
from spacedrive_jax.data.ego_status import navigation_command
from spacedrive_jax.data.images import kept_view, picture_size
from spacedrive_jax.data.keyframe import command_released_towards, heading
from spacedrive_jax.data.keyframe_map import map_fields
from spacedrive_jax.data.records_folder import RecordSerializer, write_shard
from spacedrive_jax.data.route import future_path
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import DataError
from spacedrive_jax.io import say

STEP = 5
"""Frames between two keyframes: 0.5 s."""
FRAME_US = 100_000
LOCATION = "carla"
"""What the prompt names: at test time nobody tells the car which town it is in."""
MissingImages = Literal["stop", "skip", "empty"]


@dataclasses.dataclass(frozen=True)
class ClipUnit:
    """All that `convert_clip` needs."""

    clip: Clip
    offset: int
    """Frame number of the first keyframe."""
    missing_images: MissingImages
    shard: Path
    """The file to write."""
    lidar: bool = False
    """Keep the sweeps."""
    image_size: tuple[int, int] | None = None
    """Height and width that pictures are resized to and kept at, None for their own."""

    def resolved(self) -> ClipUnit:
        """The same with absolute paths."""
        clip = dataclasses.replace(self.clip, path=self.clip.path.resolve())
        return dataclasses.replace(self, clip=clip, shard=self.shard.resolve())


def convert_clip(unit: ClipUnit) -> SceneResult:
    """Writes the records of one clip as one shard.

    Raises:
        DataError: an annotation or picture is damaged or missing, or no keyframe is left; no shard is left
            behind.
    """
    counts: Counter[str] = Counter()
    tokens: list[str] = []
    serialize = RecordSerializer()
    records = clip_records(unit, counts)

    def serialized() -> Iterator[bytes]:
        for record in records:
            tokens.append(record["token"])
            yield serialize(record)
        if not tokens:
            raise DataError(
                f"{unit.clip.path} has no keyframe (every {STEP}th frame from {unit.offset} on) with all six "
                "pictures: remove the clip, or choose --missing-images empty"
            )

    try:
        shard = write_shard(unit.shard, serialized())
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot convert {unit.clip.path}: {say(error)}") from error
    return SceneResult(unit.clip.name, shard, tuple(tokens), dict(sorted(counts.items())))


def clip_records(unit: ClipUnit, counts: Counter[str]) -> Iterator[Record]:
    """Yields the clip's records in time order and counts what they hold."""
    clip = unit.clip
    files = read_clip(clip, unit.offset, STEP, lidar=unit.lidar)
    frames: dict[int, Frame] = {}
    calibrations: dict[int, Calibration] = {}
    for number, text in files.annotations.items():
        what = f"{clip.path}: anno/{number:05d}.json.gz"
        frames[number], anno = read_frame(text, number, what, counts)
        if number % STEP == unit.offset:
            calibrations[number] = read_calibration(anno, what)
    _check_drive(clip, list(frames.values()))
    counts["frames_missing"] += max(frames) + 1 - len(frames)
    keyframes = [number for number in frames if number % STEP == unit.offset]
    for index, number in enumerate(keyframes):
        pictures = _pictures(unit, files.pictures, number, calibrations[number])
        if pictures is None:
            counts["keyframes_skipped"] += 1
            continue
        counts["images_from_files"] += sum(map(bool, pictures))
        counts["images_empty"] += sum(not picture for picture in pictures)
        counts["drivable_none"] += 1
        sweep = b""
        if number in files.sweeps:
            sweep = sweep_bytes(files.sweeps[number], f"{clip.path}: lidar/{number:05d}.laz")
        counts["lidar_present" if sweep else "lidar_absent"] += 1
        counts["can_bus_present"] += 1
        yield {
            "token": f"{clip.name}-{number:05d}",
            "scene_name": clip.name,
            "scene_description": _description(clip),
            "location": LOCATION,
            "log": clip.parts.get("town", ""),
            "frame_index": index,
            **camera_fields(frames[number], calibrations[number], pictures),
            **ego_fields(frames, number),
            **agent_fields(frames, number, clip.name),
            **map_fields(None, frames[number].ego_to_global[:2, 3], frames[number].yaw),
            "lidar": sweep,
            "lidar_to_ego": np.eye(4),
        }


def _check_drive(clip: Clip, frames: list[Frame]) -> None:
    """Refuses poses that no vehicle can have within the time between them."""
    for earlier, later in itertools.pairwise(frames):
        seconds = (later.number - earlier.number) * FRAME_US * 1e-6
        distance = math.dist(earlier.ego_to_global[:3, 3], later.ego_to_global[:3, 3])
        if distance > MAX_SPEED * seconds + POSE_JITTER:
            raise DataError(
                f"{clip.path}: anno/{later.number:05d}.json.gz: bounding_boxes[0].world2ego puts the car "
                f"{distance:.0f} m from where it was {seconds:.1f} s before; no vehicle does that"
            )


def _description(clip: Clip) -> str:
    parts = clip.parts
    return f"{parts['scenario']}, weather {parts['weather']}" if parts else ""


def _pictures(
    unit: ClipUnit, found: Mapping[tuple[int, str], bytes], number: int, calibration: Calibration
) -> list[bytes] | None:
    """The pictures of a keyframe in the order of `CAMERAS`; None where it shall be skipped."""
    pictures = []
    for camera, size in zip(CAMERAS, calibration.sizes, strict=True):
        picture = found.get((number, camera), b"")
        problem = _problem(picture, size)
        if problem is not None:
            if unit.missing_images == "skip":
                return None
            if unit.missing_images == "stop":
                raise DataError(
                    f"{unit.clip.path}: the {camera} picture of frame {number:05d} {problem}; fetch the clip "
                    "again, or choose --missing-images skip or empty"
                )
            picture = b""
        if picture and unit.image_size is not None:
            what = f"{unit.clip.path}: the {camera} picture of frame {number:05d}"
            picture = kept_view(picture, unit.image_size, what)
        pictures.append(picture)
    return pictures


def _problem(picture: bytes, size: tuple[int, int]) -> str | None:
    """What is wrong with a JPEG, without decoding it."""
    if not picture:
        return "is missing"
    found = picture_size(picture)
    if found is None or not picture.rstrip(b"\0").endswith(b"\xff\xd9"):
        return "is no whole JPEG"
    if found != size:
        return f"has {found[1]}x{found[0]} pixels, its calibration says {size[1]}x{size[0]}"
    return None


def camera_fields(frame: Frame, calibration: Calibration, pictures: list[bytes]) -> Record:
    """All record fields about the six cameras, which fire at the frame's own time."""
    return {
        "images": pictures,
        "image_rendered": np.zeros(NUM_CAMERAS, bool),
        "image_size": np.array(calibration.sizes, np.int32),
        "exact_depth": [b""] * NUM_CAMERAS,  # 8 bits of whole metres, saturated: no truth
        "camera_intrinsics": calibration.intrinsics,
        "camera_to_ego": calibration.camera_to_ego,
        "camera_timestamp_us": np.full(NUM_CAMERAS, frame.number * FRAME_US, np.int64),
        "camera_ego_to_global": np.tile(frame.ego_to_global, (NUM_CAMERAS, 1, 1)),
    }


def ego_fields(frames: Mapping[int, Frame], number: int) -> Record:
    """All record fields about the ego vehicle and its route at a frame."""
    now = frames[number]
    past = [frames.get(number - STEP * step) for step in range(1, NUM_PAST + 1)]
    mask = np.array([one is not None for one in past])
    future = [frames.get(number + STEP * step) for step in range(1, NUM_WAYPOINTS + 1)]
    waypoints, yaw = np.zeros((NUM_WAYPOINTS, 2)), np.zeros(NUM_WAYPOINTS)
    for row, later in enumerate(future):
        if later is not None:
            pose = exact.matmul(now.global_to_ego, later.ego_to_global)
            waypoints[row], yaw[row] = pose[:2, 3], heading(pose)
    targets = np.zeros((2, 2))
    if now.targets is not None:
        # The route's nodes have no height: they are taken to be at the car's.
        heights = np.full((2, 1), now.ego_to_global[2, 3])
        targets = exact.transform(np.concatenate([now.targets, heights], axis=1), now.global_to_ego)[:, :2]
    return {
        "timestamp_us": number * FRAME_US,
        "ego_to_global": now.ego_to_global,
        "past_to_ego": past_poses(frames, number)[0],
        "past_mask": mask,
        "past_timestamp_us": np.array(
            [0 if one is None else one.number * FRAME_US for one in past], np.int64
        ),
        "can_bus": now.can_bus,
        "can_bus_valid": True,
        "past_can_bus": np.stack([np.zeros(13) if one is None else one.can_bus for one in past]),
        "command_released": _released(frames, number),
        "command_navigation": _navigation(frames, number),
        "past_command_released": _of_past(frames, number, _released),
        "past_command_navigation": _of_past(frames, number, _navigation),
        "command_route": now.command,
        "past_command_route": np.array([0 if one is None else one.command for one in past], np.int32),
        "target_points": targets,
        "route_valid": now.targets is not None,
        "waypoints": waypoints,
        "waypoint_yaw": yaw,
        "waypoint_mask": np.array([one is not None for one in future]),
        "waypoint_timestamp_us": np.array(
            [0 if one is None else one.number * FRAME_US for one in future], np.int64
        ),
        **path_fields(frames, number),
    }


def past_poses(frames: Mapping[int, Frame], number: int) -> tuple[Float[np.ndarray, "2 4 4"], np.ndarray]:
    """Poses 0.5 and 1 s ago in the ego frame, zeros where there is no such frame, and which there are."""
    poses = np.zeros((NUM_PAST, 4, 4))
    mask = np.zeros(NUM_PAST, bool)
    for row in range(NUM_PAST):
        earlier = frames.get(number - STEP * (row + 1))
        if earlier is not None:
            poses[row] = exact.matmul(frames[number].global_to_ego, earlier.ego_to_global)
            mask[row] = True
    return poses, mask


def path_fields(frames: Mapping[int, Frame], number: int) -> Record:
    """The path along all later poses of the clip, whatever the speed; masked where the clip ends."""
    now = frames[number]
    later = np.stack([one.ego_to_global for one in frames.values() if one.number >= number])[1:]
    poses = exact.matmul(now.global_to_ego, later) if len(later) else np.zeros((0, 4, 4))
    path = future_path(poses[:, :2, 3], heading(poses), NUM_PATH_POINTS)
    return {"path": path.points.astype(np.float64), "path_mask": path.mask}


def _navigation(frames: Mapping[int, Frame], number: int) -> int:
    poses, mask = past_poses(frames, number)
    # A frame behind a gap is no past of this one.
    connected = np.logical_and.accumulate(mask)
    return navigation_command(poses, connected, np.array([0.5, 1.0]))


def _released(frames: Mapping[int, Frame], number: int) -> int:
    end = frames.get(number + STEP * NUM_WAYPOINTS)
    if end is None:
        return command_released_towards(np.zeros((4, 4)))
    return command_released_towards(exact.matmul(frames[number].global_to_ego, end.ego_to_global))


def _of_past(
    frames: Mapping[int, Frame], number: int, rule: Callable[[Mapping[int, Frame], int], int]
) -> np.ndarray:
    earlier = [number - STEP * step for step in range(1, NUM_PAST + 1)]
    return np.array([rule(frames, one) if one in frames else 0 for one in earlier], np.int32)


def agent_fields(frames: Mapping[int, Frame], number: int, clip: str) -> Record:
    """All record fields about the agents at a frame."""
    now = frames[number]
    boxes = now.boxes
    later = [_by_key(frames.get(number + STEP * step)) for step in range(1, NUM_WAYPOINTS + 1)]
    before, after = _by_key(frames.get(number - 1)), _by_key(frames.get(number + 1))
    rotation = now.global_to_ego[:3, :3]
    centres = np.array([box.centre for box in boxes]).reshape(-1, 3)
    yaws = np.array([_turned(rotation, box.yaw) for box in boxes])
    future = np.zeros((len(boxes), NUM_WAYPOINTS, 2))
    future_yaw = np.zeros((len(boxes), NUM_WAYPOINTS))
    mask = np.zeros((len(boxes), NUM_WAYPOINTS), bool)
    velocity = np.full((len(boxes), 2), np.nan)
    for row, box in enumerate(boxes):
        velocity[row] = exact.rotate(_velocity(box, before, after), rotation)[:2]
        for step, there in enumerate(later):
            if box.key not in there:
                break  # known up to the first gap, as for nuScenes
            moved = np.array(there[box.key].centre) - centres[row]
            future[row, step] = exact.rotate(moved, rotation)[:2]
            future_yaw[row, step] = _turned(rotation, there[box.key].yaw)
            mask[row, step] = True
    sizes = np.array([box.size for box in boxes]).reshape(-1, 3)
    in_ego = exact.transform(centres, now.global_to_ego)
    return {
        "agent_token": [f"{clip}/{box.key}" for box in boxes],
        "agent_category": [box.category for box in boxes],
        "agent_boxes": np.concatenate([in_ego, sizes, yaws.reshape(-1, 1)], axis=1),
        "agent_velocity": velocity,
        "agent_future": future,
        "agent_future_yaw": future_yaw,
        "agent_future_mask": mask,
        "agent_lidar_points": np.array([box.lidar_points for box in boxes], np.int32),
    }


def _by_key(frame: Frame | None) -> dict[str, Box]:
    return {} if frame is None else {box.key: box for box in frame.boxes}


def _turned(rotation: Float[np.ndarray, "3 3"], yaw: float) -> float:
    """A global heading in the ego frame."""
    cos, sin = exact.cos_sin(yaw)
    x, y, _ = exact.rotate(np.array([cos, sin, 0.0]), rotation)
    return float(exact.arctan2(float(y), float(x)))


def _velocity(box: Box, before: Mapping[str, Box], after: Mapping[str, Box]) -> Float[np.ndarray, "3"]:
    """Global, m/s: CARLA's own speed for vehicles; for walkers, who have none, from their last step."""
    if box.speed is not None:
        cos, sin = exact.cos_sin(box.yaw)
        return np.array([box.speed * cos, box.speed * sin, 0.0])
    here = np.array(box.centre)
    if box.key in before:
        return (here - np.array(before[box.key].centre)) * 10
    if box.key in after:
        return (np.array(after[box.key].centre) - here) * 10
    return np.full(3, np.nan)

"""The unit of work: one scene in, one shard of records out.

`convert_scene` takes plain picklable data and returns plain values, so the same function serves a loop, a
process pool or a distributed map.
"""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.nuscenes.expansions import (
    MaskMap,
    expansion_file,
    mask_cache,
    open_expansion,
    read_pose_messages,
    read_route,
)
from data_prep.nuscenes.scenes import PackedScene
from data_prep.nuscenes.sensor_files import (
    MOST_BYTES,
    SceneFiles,
    backdrop_around,
    boxes_to_draw,
    depth_file,
    draw_missing_view,
    scene_seed,
    whole_points,
)
from spacedrive_jax.data.images import kept_view
from spacedrive_jax.data.keyframe import (
    AgentTracks,
    Keyframe,
    Scene,
    SensorFrame,
    View,
    agent_fields,
    agent_tracks,
    camera_fields,
    can_bus_at,
    devkit_yaw,
    ego_fields,
    ego_track,
    identity_fields,
    intrinsics_at,
    sensor_to_ego,
    transforms,
)
from spacedrive_jax.data.keyframe_map import DrivableMap, map_fields, route_fields
from spacedrive_jax.data.records_folder import RecordSerializer, ShardMetadata, write_shard
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import DataError
from spacedrive_jax.io import is_there, read_bytes


@dataclasses.dataclass(frozen=True)
class SceneUnit:
    """All that `convert_scene` needs."""

    dataroot: Path
    scene: PackedScene
    files: SceneFiles
    keyframes: tuple[int, ...]
    """Which keyframes get a record; the others still serve as their past and future."""
    shard: Path
    """The file to write."""
    mask_folder: Path
    """Unpacked basic map masks, see `prepare_masks`."""
    render_missing: bool
    """Draw unusable images; otherwise they stay empty."""
    render_size: tuple[int, int] | None
    """Height and width of drawn images, None for the camera's own."""
    image_size: tuple[int, int] | None
    """Height and width that all images are resized to and kept at, None for their own."""
    seed: int

    def resolved(self) -> SceneUnit:
        """The same with absolute paths."""
        return dataclasses.replace(
            self,
            dataroot=self.dataroot.resolve(),
            shard=self.shard.resolve(),
            mask_folder=self.mask_folder.resolve(),
        )


@dataclasses.dataclass(frozen=True)
class SceneResult:
    """What became of one scene."""

    scene: str
    shard: ShardMetadata
    tokens: tuple[str, ...]
    """Keyframe tokens in the order of the shard's records."""
    counts: Mapping[str, int]
    """How many images, sweeps and maps were found, drawn or absent, over the shard's records."""


def convert_scene(unit: SceneUnit) -> SceneResult:
    """Writes the records of one scene as one shard.

    Raises:
        DataError: a CAN bus file, map or depth image is damaged; no shard is left behind.
    """
    counts: Counter[str] = Counter()
    serialize, scene = RecordSerializer(), unit.scene.unpack()
    shard = write_shard(unit.shard, (serialize(record) for record in scene_records(unit, scene, counts)))
    tokens = tuple(scene.keyframes[index].token for index in unit.keyframes)
    return SceneResult(unit.scene.name, shard, tokens, dict(sorted(counts.items())))


def scene_records(unit: SceneUnit, scene: Scene, counts: Counter[str]) -> Iterator[Record]:
    """Yields the records of the unit's scene, unpacked, in time order and counts what they hold."""
    times = np.array([keyframe.timestamp_us for keyframe in scene.keyframes], np.int64)
    messages = read_pose_messages(unit.dataroot, scene.name, times.tolist())
    track = ego_track(scene, None if messages is None else can_bus_at(messages, times))
    agents = agent_tracks(scene)
    drivable_map = _open_map(unit)
    route = read_route(unit.dataroot, scene.name)
    for index in unit.keyframes:
        keyframe = scene.keyframes[index]
        ego = ego_fields(track, index)
        ego_to_global = ego["ego_to_global"]
        sweep, lidar_state = _read_sweep(unit, keyframe.lidar.filename)
        record = {
            **identity_fields(scene, index),
            **_camera_fields(unit, keyframe, agents, drivable_map, counts),
            **ego,
            **route_fields(track, index, route),
            **agent_fields(agents, keyframe.annotations, ego_to_global),
            **map_fields(drivable_map, ego_to_global[:2, 3], float(devkit_yaw(ego_to_global))),
            "lidar": sweep,
            "lidar_to_ego": sensor_to_ego(keyframe.lidar),
        }
        counts[f"lidar_{lidar_state}"] += 1
        counts["can_bus_present" if track.can_bus_valid else "can_bus_absent"] += 1
        counts["route_known" if record["route_valid"] else "route_unknown"] += 1
        counts[f"drivable_{record['drivable_source']}"] += 1
        yield record


def _read_sweep(unit: SceneUnit, filename: str) -> tuple[bytes, str]:
    """A sweep and whether it is `present`, `absent` or `damaged`; empty where it is not present."""
    if filename not in unit.files.sizes:
        return b"", "absent" if unit.files.unusable_lidar.get(filename) == "missing" else "damaged"
    sweep = read_bytes(unit.dataroot / filename, most=MOST_BYTES)
    # Changed since it was looked at, or full of numbers that are none.
    if len(sweep) != unit.files.sizes[filename] or not whole_points(sweep):
        return b"", "damaged"
    return sweep, "present"


def _open_map(unit: SceneUnit) -> DrivableMap | None:
    """The expansion of the scene's location, else its basic mask, else nothing."""
    expansion = expansion_file(unit.dataroot, unit.scene.location)
    if is_there(expansion):
        return open_expansion(expansion)
    cache = mask_cache(unit.mask_folder, unit.scene.map_mask)
    return MaskMap(cache) if unit.scene.map_mask and cache.is_file() else None


def _camera_fields(
    unit: SceneUnit,
    keyframe: Keyframe,
    agents: AgentTracks,
    drivable_map: DrivableMap | None,
    counts: Counter[str],
) -> Record:
    """All record fields about the six cameras."""
    cameras = keyframe.cameras
    ego_to_global = transforms(
        [camera.ego_translation for camera in cameras], [camera.ego_rotation for camera in cameras]
    )
    to_draw = [camera for camera in cameras if camera.filename not in unit.files.sizes]
    if unit.render_missing and to_draw:
        views = _draw_views(unit, keyframe, agents, drivable_map, to_draw, ego_to_global)
    else:
        views = {camera.filename: View(b"", b"", (camera.height, camera.width)) for camera in to_draw}
    ordered = [
        views[camera.filename] if camera.filename in views else _read_view(unit, camera) for camera in cameras
    ]
    for view in ordered:
        kind = "rendered" if view.rendered else "from_files" if view.image else "empty"
        counts[f"images_{kind}"] += 1
        counts["exact_depth_images"] += bool(view.depth)
    fields = camera_fields(cameras, ordered)
    if unit.image_size is not None:
        fields["images"] = [
            kept_view(view.image, unit.image_size, str(unit.dataroot / camera.filename))
            if view.image
            else b""
            for camera, view in zip(cameras, ordered, strict=True)
        ]
    return fields


def _read_view(unit: SceneUnit, camera: SensorFrame) -> View:
    """Reads a photographed image, and its exact depth where the folder has it."""
    path = unit.dataroot / camera.filename
    image = read_bytes(path, most=MOST_BYTES)
    if len(image) != unit.files.sizes[camera.filename]:
        raise DataError(f"{path} changed while it was converted; --resume goes on where it stopped")
    depth, depth_path = b"", depth_file(camera.filename)
    if depth_path in unit.files.sizes:
        depth = read_bytes(unit.dataroot / depth_path, most=MOST_BYTES)
        _check_depth(unit.dataroot / depth_path, depth, camera)
    return View(image=image, depth=depth, size=(camera.height, camera.width))


def _check_depth(path: Path, png: bytes, camera: SensorFrame) -> None:
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            mode, size = image.mode, image.size
            image.verify()
    except Exception as error:  # Pillow raises struct.error, ValueError and others on damaged files
        raise DataError(f"{path} is not a readable PNG ({error}); write it again or remove it") from error
    if not mode.startswith("I") or size != (camera.width, camera.height):
        raise DataError(
            f"{path} must be a 16-bit greyscale PNG of {camera.width}x{camera.height} pixels, like its "
            f"camera image; it is {size[0]}x{size[1]}, mode {mode}"
        )


def _draw_views(
    unit: SceneUnit,
    keyframe: Keyframe,
    agents: AgentTracks,
    drivable_map: DrivableMap | None,
    to_draw: list[SensorFrame],
    ego_to_global: np.ndarray,
) -> dict[str, View]:
    """Draws the given cameras of a keyframe, by file name."""
    boxes = boxes_to_draw(agents, keyframe.annotations)
    seed = scene_seed(unit.seed, unit.scene.name)
    backdrop = backdrop_around(drivable_map, np.array(keyframe.lidar.ego_translation[:2]), seed)
    views = {}
    for camera, pose in zip(keyframe.cameras, ego_to_global, strict=True):
        if camera in to_draw:
            size = unit.render_size or (camera.height, camera.width)
            drawn = draw_missing_view(
                boxes, backdrop, intrinsics_at(camera, size), sensor_to_ego(camera), pose, size, seed
            )
            views[camera.filename] = View(drawn.jpeg, drawn.depth_png, size, rendered=True)
    return views

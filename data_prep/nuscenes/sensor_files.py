"""Which of a scene's sensor files are there and whole, checked before anything is written.

Archives unpacked one folder off are there, but not where they are read. What a record may do without (CAN
bus, map expansion, LiDAR) would otherwise be left out with a mere count, and a model trained on zeros.

Camera images that a nuScenes folder does not have can be drawn.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from data_prep.nuscenes.expansions import expansion_file, pose_file
from data_prep.nuscenes.scenes import PackedScene
from spacedrive_jax import exact
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.keyframe import AgentTracks, Keyframe, Scene, SensorFrame, global_boxes
from spacedrive_jax.data.keyframe_map import DrivableMap
from spacedrive_jax.data.lidar import POINT_FLOATS
from spacedrive_jax.errors import DataError
from spacedrive_jax.io import MEBIBYTE, is_there, require_regular, say
from spacedrive_jax.world.sensors import DrawnBox, DrawnView, GroundRaster, draw_view, prepare_ground
from spacedrive_jax.world.stage import Backdrop

_PREFIXES = ("", "*/", "*/*/")


def check_layout(dataroot: Path, scenes: Sequence[PackedScene]) -> None:
    """Refuses a dataroot in which CAN bus, map expansion or LiDAR lie in another folder than their own.

    Data that are nowhere are no error: they are separate downloads.

    Raises:
        DataError: naming the file that was found and the place where it is read.
    """
    for wanted in _absent(dataroot, scenes):
        found = find_elsewhere(dataroot, wanted)
        if found is not None:
            raise DataError(
                f"{found} is one folder off: it is read as {wanted}. Move its folder there, or remove it to "
                "convert without"
            )


def find_elsewhere(dataroot: Path, wanted: Path) -> Path | None:
    """A file that is not where it should be, up to three folders below the dataroot.

    Args:
        dataroot: where to look.
        wanted: the file's place, below the dataroot.
    """
    parts = wanted.relative_to(dataroot).parts
    for first in range(len(parts)):
        tail = glob.escape("/".join(parts[first:]))
        for prefix in _PREFIXES:
            for found in sorted(dataroot.glob(prefix + tail)):
                if found != wanted and found.is_file():
                    return found
    return None


def _absent(dataroot: Path, scenes: Sequence[PackedScene]) -> Iterator[Path]:
    """One file of every kind of data of which there is none."""
    poses = [pose_file(dataroot, scene.name) for scene in scenes]
    if not any(path.exists() for path in poses):
        yield from poses[:3]  # a few scenes were recorded without
    for location in dict.fromkeys(scene.location for scene in scenes):
        if not expansion_file(dataroot, location).exists():
            yield expansion_file(dataroot, location)
    sweeps = [dataroot / scene.sweep for scene in scenes]
    if not any(path.exists() for path in sweeps):
        yield sweeps[0]


_START_OF_IMAGE = b"\xff\xd8"
_END_OF_IMAGE = b"\xff\xd9"
_TAIL = 64
"""Bytes searched for the end marker: some encoders pad the file with zeros."""
MOST_BYTES = 256 * MEBIBYTE
"""A photograph of nuScenes has 200 kB, a sweep 700 kB."""
LIDAR_POINT_BYTES = 4 * POINT_FLOATS


@dataclasses.dataclass(frozen=True)
class SceneFiles:
    """The state of one scene's sensor files; paths are relative to the dataroot."""

    unusable_images: Mapping[str, str]
    """Image path to what is wrong with it: `missing`, or how it is damaged."""
    unusable_lidar: Mapping[str, str]
    """The same for LIDAR_TOP sweeps."""
    sizes: Mapping[str, int]
    """Bytes of each usable image, sweep and depth file."""


def check_image(path: Path, width: int, height: int) -> str | None:
    """Says what is wrong with a JPEG, or None when it is whole.

    A whole JPEG starts with SOI, ends with EOI and declares the size the tables give. Its pixels are not
    decoded: that would take hours for nuScenes and finds little that a cut-off file does not show here.
    """
    problem = _problem(path)
    if problem is not None:
        return problem
    try:
        with path.open("rb") as stream:
            start = stream.read(2)
            length = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, length - _TAIL))
            tail = stream.read()
            if length == 0:
                return "empty file"
            if start != _START_OF_IMAGE:
                return "not a JPEG"
            if not tail.rstrip(b"\0").endswith(_END_OF_IMAGE):
                return "truncated (no end-of-image marker)"
            stream.seek(0)
            with Image.open(stream, formats=("JPEG",)) as image:
                size = image.size
    except Exception as error:  # Pillow raises struct.error, ValueError and others on damaged headers
        return f"unreadable ({error})"
    if size != (width, height):
        return f"{size[0]}x{size[1]} pixels where sample_data.json says {width}x{height}"
    return None


def check_lidar(path: Path) -> str | None:
    """Says what is wrong with a LiDAR sweep file, or None when it holds whole points."""
    problem = _problem(path)
    if problem is not None:
        return problem
    length = path.stat().st_size
    if length == 0 or length % LIDAR_POINT_BYTES:
        return f"truncated ({length} bytes are not whole points of {LIDAR_POINT_BYTES})"
    return None


def _problem(path: Path) -> str | None:
    """Why a file of any sensor cannot be read: not there, not a regular file, not permitted, too large."""
    if not path.exists():
        return "missing"
    try:
        require_regular(path, most=MOST_BYTES)
        path.open("rb").close()
    except DataError as error:
        return f"unreadable ({str(error).removeprefix(str(path)).strip(' :')})"
    except OSError as error:
        return f"unreadable ({say(error)})"
    return None


def whole_points(sweep: bytes) -> bool:
    """Whether every point of a sweep has finite coordinates."""
    points = np.frombuffer(sweep, "<f4").reshape(-1, POINT_FLOATS)
    return bool(np.isfinite(points[:, :3]).all())


def depth_file(image: str) -> str:
    """Where the exact depth of an image lies, relative to the dataroot like the image's own path."""
    return str(Path("samples_depth", *Path(image).parts[1:]).with_suffix(".png"))


def scan_scene(dataroot: Path, scene: Scene) -> SceneFiles:
    """Checks all camera images and LiDAR sweeps of a scene's keyframes and looks for exact depth."""
    has_depth = (dataroot / "samples_depth").is_dir()
    images: dict[str, str] = {}
    lidar: dict[str, str] = {}
    sizes: dict[str, int] = {}

    def note(frame: SensorFrame, problem: str | None, problems: dict[str, str]) -> None:
        if problem is None:
            sizes[frame.filename] = (dataroot / frame.filename).stat().st_size
        else:
            problems[frame.filename] = problem

    for keyframe in scene.keyframes:
        for camera in keyframe.cameras:
            note(camera, check_image(dataroot / camera.filename, camera.width, camera.height), images)
            if has_depth and is_there(dataroot / depth_file(camera.filename)):
                depth = depth_file(camera.filename)
                sizes[depth] = (dataroot / depth).stat().st_size
        note(keyframe.lidar, check_lidar(dataroot / keyframe.lidar.filename), lidar)
    return SceneFiles(images, lidar, sizes)


def has_all_images(keyframe: Keyframe, files: SceneFiles) -> bool:
    """Whether all six images of a keyframe are usable."""
    return not any(camera.filename in files.unusable_images for camera in keyframe.cameras)


def describe_unusable_images(scenes: Iterable[Scene], files: Iterable[SceneFiles], shown: int = 3) -> str:
    """Counts of unusable images per channel with the first few paths, one line per channel."""
    unusable: dict[str, str] = {}
    for one in files:
        unusable.update(one.unusable_images)
    by_channel: defaultdict[str, list[str]] = defaultdict(list)
    totals: Counter[str] = Counter()
    for scene in scenes:
        for keyframe in scene.keyframes:
            for channel, camera in zip(CAMERAS, keyframe.cameras, strict=True):
                totals[channel] += 1
                if camera.filename in unusable:
                    by_channel[channel].append(f"{camera.filename}: {unusable[camera.filename]}")
    lines = []
    for channel in CAMERAS:
        if by_channel[channel]:
            examples = by_channel[channel][:shown]
            lines.append(f"  {channel}: {len(by_channel[channel])} of {totals[channel]}")
            lines += [f"    {example}" for example in examples]
            if len(by_channel[channel]) > len(examples):
                lines.append(f"    ... and {len(by_channel[channel]) - len(examples)} more")
    return "\n".join(lines)


GROUND_EXTENT = 100.0
"""Half side, in metres, of the drivable raster handed to the renderer."""
GROUND_CELLS = 1000
GROUND_GRID = 10.0
"""Metres; rasters start on this grid, so that neighbouring keyframes see the same cells."""


def scene_seed(seed: int, scene_name: str) -> int:
    """The renderer's seed for a scene: one light for all its keyframes."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{scene_name}".encode()).digest()[:4])


def ground_around(drivable_map: DrivableMap | None, ego_xy: Float[np.ndarray, "2"]) -> GroundRaster:
    """The drivable ground around a global point; all undrivable where there is no map."""
    centre = np.round(ego_xy / GROUND_GRID) * GROUND_GRID
    if drivable_map is None:
        drivable = np.zeros((GROUND_CELLS, GROUND_CELLS), np.uint8)
    else:
        # Yaw 0 turns the patch's forward and left axes into global x and y; the renderer wants rows along y.
        drivable = np.ascontiguousarray(drivable_map.raster(centre, 0.0, GROUND_EXTENT, GROUND_CELLS).T)
    return GroundRaster(
        drivable=drivable,
        origin_xy=(float(centre[0] - GROUND_EXTENT), float(centre[1] - GROUND_EXTENT)),
        resolution=2 * GROUND_EXTENT / GROUND_CELLS,
    )


def backdrop_around(drivable_map: DrivableMap | None, ego_xy: Float[np.ndarray, "2"], seed: int) -> Backdrop:
    """Ground and scenery for the six views of a keyframe.

    Args:
        drivable_map: the scene's map, if there is one.
        ego_xy: ego position, metres, global frame.
        seed: see `scene_seed`.
    """
    return prepare_ground(ground_around(drivable_map, ego_xy), seed)


def boxes_to_draw(tracks: AgentTracks, rows: Sequence[int]) -> list[DrawnBox]:
    """A keyframe's annotations as the renderer takes them, global frame."""
    return [
        DrawnBox(
            centre=box[:3],
            size=(float(box[3]), float(box[4]), float(box[5])),
            yaw=float(box[6]),
            category=tracks.category[row],
            instance_token=tracks.instance_token[row],
        )
        for row, box in zip(rows, global_boxes(tracks, tuple(rows)), strict=True)
    ]


def draw_missing_view(
    boxes: Sequence[DrawnBox],
    backdrop: Backdrop,
    intrinsics: Float[np.ndarray, "3 3"],
    camera_to_ego: Float[np.ndarray, "4 4"],
    ego_to_global: Float[np.ndarray, "4 4"],
    image_size: tuple[int, int],
    seed: int,
) -> DrawnView:
    """Draws one camera image and its exact depth.

    Args:
        boxes: what to draw, global frame.
        backdrop: see `backdrop_around`.
        intrinsics: camera matrix in pixels of `image_size`.
        camera_to_ego: static calibration.
        ego_to_global: ego pose at the camera's time.
        image_size: height and width in pixels.
        seed: the one the backdrop was made with.
    """
    return draw_view(
        boxes, backdrop, intrinsics, exact.matmul(ego_to_global, camera_to_ego), image_size, seed
    )

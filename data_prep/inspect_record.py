"""Looking at one record: as text, as a picture, as a point cloud.

The picture has six cameras with projected boxes and waypoints, and a bird's-eye view; the point cloud is
the views lifted by their depth, coloured, as a PLY file that any viewer opens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data_prep.conversion import finished_scenes
from spacedrive_jax.console import progress
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.images import check_photo, decode_depth, decode_grey
from spacedrive_jax.data.prompts import COMMAND_WORDS
from spacedrive_jax.data.records import keyframe_index, open_records
from spacedrive_jax.data.schema import Record, record_features
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.io import write_bytes
from spacedrive_jax.reporting.birds_eye import agent_kind, draw_birds_eye
from spacedrive_jax.reporting.cameras import (
    BOX_EDGES,
    STRIP_ORDER,
    decode_image,
    project,
    project_segments,
    upright_corners,
)
from spacedrive_jax.reporting.figures import AGENTS, INK, MUTED, TRUTH, save_figure, styled
from spacedrive_jax.reporting.recordings import Shown, check_film, check_rerun, write_film, write_rerun


def write_ply(file: Path, points: Float[np.ndarray, "P 3"], colours: UInt8[np.ndarray, "P 3"]) -> None:
    """Writes a binary little-endian PLY; the file appears only when whole."""
    vertices = np.empty(
        len(points),
        [(name, "<f4") for name in ("x", "y", "z")] + [(name, "u1") for name in ("red", "green", "blue")],
    )
    for index, name in enumerate(("x", "y", "z")):
        vertices[name] = points[:, index]
    for index, name in enumerate(("red", "green", "blue")):
        vertices[name] = colours[:, index]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    header += [f"property float {name}" for name in ("x", "y", "z")]
    header += [f"property uchar {name}" for name in ("red", "green", "blue")]
    write_bytes(file, ("\n".join([*header, "end_header"]) + "\n").encode() + vertices.tobytes())


FARTHEST_BOX_M = 60.0
"""Boxes farther from a camera are not drawn into its image."""
VIEW_M = 45.0
"""The bird's-eye view shows this much to every side."""


def draw_record(record: Record, path: Path) -> None:
    """Draws a record into a picture.

    Args:
        record: one record as `open_records` gives it.
        path: the file to write; its ending names the format.

    Raises:
        ConfigError: it is none that pictures are written in.
    """
    save_figure(record_figure(record), path)


@styled
def record_figure(record: Record) -> Figure:
    """A record as a figure of 19.2 x 6.3 inches: the six cameras, and the keyframe from above."""
    figure = Figure(figsize=(19.2, 6.3), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 4, width_ratios=(1, 1, 1, 1.22), wspace=0.03, hspace=0.09)
    grid.update(left=0.008, right=0.966, top=0.875, bottom=0.07)
    for place, channel in enumerate(STRIP_ORDER):
        axes = figure.add_subplot(grid[place // 3, place % 3])
        _draw_camera(axes, record, CAMERAS.index(channel))
    axes = figure.add_subplot(grid[:, 3])
    draw_birds_eye(axes, record, ahead=(-VIEW_M, VIEW_M), aside=VIEW_M, lidar=True)
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    speed = f"{float(record['can_bus'][10]):.1f} m/s" if record["can_bus_valid"] else "no CAN bus"
    command = COMMAND_WORDS[int(record["command_navigation"])]
    axes.set_title(f"from above    {speed}, {command}", fontsize=9, color=MUTED, pad=4)
    title = f"{record['scene_name']}  ·  keyframe {int(record['frame_index'])}"
    subtitle = "   |   ".join(record[name] for name in ("scene_description", "location", "token"))
    figure.text(0.008, 0.953, title, fontsize=15, fontweight="bold", color=INK)
    figure.text(0.008, 0.918, subtitle, fontsize=9.5, color=MUTED)
    return figure


def film_scene(directory: Path, scene: str, path: Path) -> int:
    """Films a scene: the picture of `draw_record` for every keyframe, as fast as it was driven.

    Args:
        directory: the records folder.
        scene: the scene's name.
        path: .mp4 file to write (H.264); it appears under its name when whole.

    Returns:
        How many keyframes it shows.

    Raises:
        ConfigError: the extra `video` is not installed, or the file is no .mp4.
        DataError: there is no such scene.
        SpaceDriveError: the film cannot be written.
    """
    check_film(path, "--film")
    records = _records_of(directory, list_keyframes(directory, scene), f"film {scene}")
    return write_film(path, (record_figure(record) for record in records), "--film")


def record_scene(directory: Path, scene: str, keyframes: tuple[int, int] | None, path: Path) -> int:
    """Records keyframes of a scene in 3D (see `reporting.recordings.write_rerun`).

    Args:
        directory: the records folder.
        scene: the scene's name.
        keyframes: the first, and one past the last, counted from 0; None takes all of the scene.
        path: .rrd file to write.

    Returns:
        How many keyframes it shows.

    Raises:
        ConfigError: the extra `rerun` is not installed, the file is no .rrd, or there are no such keyframes.
        DataError: there is no such scene.
        SpaceDriveError: the recording cannot be written.
    """
    check_rerun(path, "--rerun")
    listed = list_keyframes(directory, scene)
    first, end = keyframes or (0, len(listed))
    if end > len(listed):
        raise ConfigError(f"--keyframes {first}:{end}: {scene} has {len(listed)}")
    records = _records_of(directory, listed[first:end], f"record {scene}")
    return write_rerun(path, (Shown(record) for record in records), "--rerun")


def _records_of(directory: Path, keyframes: Sequence[Listed], task: str) -> Iterator[Record]:
    splits = {split: open_records(directory, split) for split in {each.split for each in keyframes}}
    for each in progress(keyframes, desc=task, unit="keyframe"):
        yield splits[each.split][each.index]


def _draw_camera(axes: Axes, record: Record, camera: int) -> None:
    height, width = (int(size) for size in record["image_size"][camera])
    label = CAMERAS[camera].removeprefix("CAM_").replace("_", " ").lower()
    image = decode_image(record, camera)
    if image is not None:
        axes.imshow(image, interpolation="bilinear", aspect="equal")
        label += "  (rendered)" if record["image_rendered"][camera] else ""
    else:
        axes.add_patch(Rectangle((-0.5, -0.5), width, height, facecolor="#eef1f4", edgecolor="none"))
        axes.text(width / 2, height / 2, "no image", ha="center", va="center", color="#98a2ad", fontsize=11)
    for corners, category in zip(
        upright_corners(record["agent_boxes"]), record["agent_category"], strict=True
    ):
        _, depth = project(corners, record, camera)
        if depth.max() > 0 and depth.min() < FARTHEST_BOX_M:
            starts, ends = (corners[list(side)] for side in zip(*BOX_EDGES, strict=True))
            segments = project_segments(starts, ends, record, camera)
            color = AGENTS[agent_kind(category)]
            axes.add_collection(LineCollection(segments, colors=color, linewidths=1.0, alpha=0.95))
    _draw_waypoints(axes, record, camera)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    axes.set(aspect="equal", anchor="N")
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(label, fontsize=9, color=MUTED, pad=2.5)


def _draw_waypoints(axes: Axes, record: Record, camera: int) -> None:
    """The recorded way on the ground, which is taken as the plane z = 0 of the ego frame."""
    waypoints = record["waypoints"][record["waypoint_mask"]]
    if not len(waypoints):
        return
    way = np.pad(np.concatenate([np.zeros((1, 2)), waypoints]), ((0, 0), (0, 1)))
    axes.add_collection(
        LineCollection(project_segments(way[:-1], way[1:], record, camera), colors=TRUTH, linewidths=2.2)
    )
    pixels, _ = project(way[1:], record, camera)
    seen = pixels[np.isfinite(pixels).all(axis=1)]
    axes.scatter(seen[:, 0], seen[:, 1], s=26, color=TRUTH, edgecolor="white", linewidth=0.8, zorder=3)


_FEW_SCENES = 6
_SHOWN_DAMAGED = 20
_SHOWN_ITEMS = 3
_SHOWN_TEXT = 70


@dataclasses.dataclass(frozen=True)
class Listed:
    """A keyframe of a records folder."""

    split: str
    """`train` or `val`."""
    index: int
    """Its place in that split."""
    scene: str
    """Its scene's name."""
    token: str
    """Its nuScenes token."""


def list_keyframes(directory: Path, scene: str | None = None) -> list[Listed]:
    """The keyframes of a records folder, split by split in the order of the records.

    What the conversion noted is read; a folder without those notes is read record by record.

    Args:
        directory: the records folder.
        scene: a scene's name; None lists all.

    Raises:
        DataError: it is no finished records folder, or has no such scene.
    """
    records = open_records(directory)
    found: list[Listed] = []
    counts: Counter[str] = Counter()
    for split, name, tokens in finished_scenes(directory):
        found += [Listed(split, counts[split] + index, name, token) for index, token in enumerate(tokens)]
        counts[split] += len(tokens)
    if len(found) != len(records):
        found = []
        for split in sorted(records.splits):
            part = open_records(directory, split)
            for index in progress(range(len(part)), desc=f"list {split}", unit="record"):
                record = part[index]
                found.append(Listed(split, index, record["scene_name"], record["token"]))
    chosen = [one for one in found if scene in (None, one.scene)]
    if not chosen:
        scenes = list(dict.fromkeys(one.scene for one in found))
        few = ", ".join(scenes[:_FEW_SCENES]) + (", …" if len(scenes) > _FEW_SCENES else "")
        raise DataError(f"{directory} has no scene {scene!r}; it has {few}")
    return chosen


def find_record(directory: Path, token: str | None, scene: str | None = None) -> Record:
    """The record with the given token, or the middle keyframe of a scene (the first by default).

    Raises:
        DataError: no record has that token, or there is no such scene.
    """
    records = open_records(directory)
    if token is None and scene is not None:
        keyframes = list_keyframes(directory, scene)
        middle = keyframes[len(keyframes) // 2]
        return open_records(directory, middle.split)[middle.index]
    if token is None:
        first = records[0]["scene_name"]
        count = 1
        while count < len(records) and records[count]["scene_name"] == first:
            count += 1
        return records[count // 2]
    return records[keyframe_index(records, token)]


def check_pictures(directory: Path) -> int:
    """Decodes all pictures of a records folder, with what tells damage in a photograph (`check_photo`).

    Returns:
        How many there are, all of them whole.

    Raises:
        DataError: some are damaged; the message lists them.
    """
    records, count, damaged = open_records(directory), 0, []
    for index in progress(range(len(records)), desc="check pictures", unit="record"):
        record = records[index]
        checks: list[tuple[str, bytes, Any]] = [("the drivable area", record["drivable_fine"], decode_grey)]
        for camera, photo, depth in zip(CAMERAS, record["images"], record["exact_depth"], strict=True):
            checks += [
                (f"the {camera} image", photo, check_photo),
                (f"the {camera} depth", depth, decode_depth),
            ]
        for name, encoded, check in checks:
            if not encoded:
                continue
            count += 1
            try:
                check(encoded, f"keyframe {record['token']}: {name}")
            except DataError as error:
                damaged.append(str(error))
    if damaged:
        listed = "\n  ".join(damaged[:_SHOWN_DAMAGED])
        more = f"\n  and {len(damaged) - _SHOWN_DAMAGED} more" if len(damaged) > _SHOWN_DAMAGED else ""
        raise DataError(
            f"{directory}: {len(damaged)} of {count} pictures are damaged; fetch their files again and "
            f"convert again:\n  {listed}{more}"
        )
    return count


def describe_record(record: Record) -> str:
    """One line per field: name, type and shape, short value."""
    lines = []
    for name in record_features():
        kind, text = _describe(record[name])
        lines.append(f"  {name:<24} {kind:<22} {text}")
    return "\n".join(lines)


def _describe(value: Any) -> tuple[str, str]:
    if isinstance(value, str):
        return "text", _shortened(value)
    if isinstance(value, bytes):
        return "bytes", _bytes_summary(value)
    if isinstance(value, list):
        items = [_bytes_summary(item) if isinstance(item, bytes) else str(item) for item in value]
        shown = ", ".join(items[:_SHOWN_ITEMS]) + (", ..." if len(items) > _SHOWN_ITEMS else "")
        return f"list of {len(items)}", _shortened(shown)
    array = np.asarray(value)
    if array.ndim == 0:
        return str(array.dtype), str(array)
    shape = f"{array.dtype} {'x'.join(str(size) for size in array.shape)}"
    if array.size == 0:
        return shape, ""
    if array.dtype == np.uint8:
        return shape, f"{np.count_nonzero(array) / array.size:.1%} set"
    flat = array.ravel()
    shown = np.array2string(
        flat[:6], precision=3, suppress_small=True, max_line_width=10_000, separator=" "
    ).strip("[]")
    return shape, _shortened(" ".join(shown.split()) + (" ..." if flat.size > 6 else ""))


def _bytes_summary(value: bytes) -> str:
    if not value:
        return "empty"
    kind = "JPEG" if value[:2] == b"\xff\xd8" else "PNG" if value[:4] == b"\x89PNG" else "data"
    return f"{kind} {len(value):,} B"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_TEXT else text[: _SHOWN_TEXT - 3] + "..."

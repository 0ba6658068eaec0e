"""Keyframes one after the other, with a plan: as a film (MP4) and as a recording in 3D (Rerun).

Both need a package that the project does without otherwise; who lacks it is told which extra brings it.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spacedrive_jax import exact
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.images import media_type, picture_intrinsics, picture_size
from spacedrive_jax.data.keyframe import camera_to_ego
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.io import put_in_place, said_by
from spacedrive_jax.reporting.birds_eye import agent_kind, draw_birds_eye
from spacedrive_jax.reporting.cameras import front_overlay, has_points, keyframe_points
from spacedrive_jax.reporting.figures import AGENTS, INK, MUTED, PREDICTION, TRUTH, rgb, styled

FILM_RATE = 2.0
"""Pictures a second: keyframes come every half second."""
MOST_POINTS = 40_000
"""Depth points of a keyframe in a recording; more are thinned out evenly."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """One keyframe, and what was planned there."""

    record: Record
    """Its waypoints are the recorded drive's, or where the expert would have gone."""
    waypoints: Float[np.ndarray, "T 2"] | None = None
    """Planned, ego frame, metres."""
    path: Float[np.ndarray, "R 2"] | None = None
    """Planned along the way, where the planner gives one."""


def shown_drive(records: Sequence[Record], decisions: Sequence[dict[str, Any]]) -> list[Shown]:
    """A drive's keyframes with the plans made there, out of its records and its trace's decisions."""

    def points(values: Any) -> Float[np.ndarray, "K 2"] | None:
        return None if not values else np.array(values, np.float64)

    return [
        Shown(record, points(decision["waypoints"]), points(decision["path"]))
        for record, decision in zip(records, decisions, strict=True)
    ]


def check_film(path: Path, flag: str) -> Any:
    """The film writer's module.

    Args:
        path: file to write.
        flag: what asked for it.

    Raises:
        ConfigError: the extra `video` is not installed, or the file is no .mp4.
    """
    if path.suffix.lower() != ".mp4":
        raise ConfigError(f"{flag} {path}: films are written as .mp4")
    return _of_extra("imageio_ffmpeg", flag, "video", "imageio-ffmpeg")


def _of_extra(module: str, flag: str, extra: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"{flag} needs the extra `{extra}`: pip install {package} (or spacedrive_jax[{extra}])"
        ) from None


def write_film(path: Path, figures: Iterable[Figure], flag: str) -> int:
    """Films figures of one size, `FILM_RATE` a second (H.264); the file appears under its name when whole.

    Returns:
        How many there were.

    Raises:
        ConfigError: see `check_film`.
        SpaceDriveError: the film cannot be written.
    """
    imageio_ffmpeg = check_film(path, flag)
    # ffmpeg writes by name, so it gets one that nobody takes for the film.
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}.mp4")
    writer, count = None, 0
    try:
        for figure in figures:
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            picture = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
            if writer is None:
                size = picture.shape[1], picture.shape[0]
                writer = imageio_ffmpeg.write_frames(
                    str(partial),
                    size,
                    fps=FILM_RATE,
                    macro_block_size=2,
                    quality=7,
                    ffmpeg_log_level="error",
                )
                writer.send(None)
            writer.send(picture)
            count += 1
        if writer is not None:
            writer.close()
        put_in_place(partial, path)
    except OSError as error:  # of ffmpeg, too: its pipe breaks
        raise SpaceDriveError(f"cannot write {path}: {said_by(error, path)}") from error
    finally:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)
    return count


@styled
def drive_figure(shown: Shown, title: str) -> Figure:
    """The front view and the bird's-eye view of one decision, both with the plan; 12.8 x 5.2 inches."""
    record = shown.record
    figure = Figure(figsize=(12.8, 5.2), dpi=100, facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1.75, 1.0))
    figure.subplots_adjust(left=0.008, right=0.985, top=0.86, bottom=0.1, wspace=0.1)
    front = front_overlay(record, shown.waypoints)
    if front is None:
        left.text(0.5, 0.5, "no image", ha="center", va="center", color=MUTED, transform=left.transAxes)
    else:
        left.imshow(front, interpolation="bilinear")
    left.set_axis_off()
    draw_birds_eye(right, record, shown.waypoints, recorded="expert from here")
    if shown.path is not None:
        way = np.concatenate([np.zeros((1, 2)), shown.path])
        right.plot(way[:, 1], way[:, 0], color=PREDICTION, linewidth=1.0, linestyle="--", alpha=0.7)
    figure.text(0.008, 0.93, title, fontsize=13, fontweight="bold", color=INK)
    said = [f"{int(record['frame_index']) / 2:.1f} s"]
    if record["can_bus_valid"]:
        said.append(f"{float(record['can_bus'][10]):.1f} m/s")
    said.append("planned blue, the expert from here orange" if shown.waypoints is not None else "no plan")
    figure.text(0.008, 0.885, "   |   ".join(said), fontsize=9.5, color=MUTED)
    return figure


def check_rerun(path: Path, flag: str) -> Any:
    """Rerun's module.

    Args:
        path: file to write.
        flag: what asked for it.

    Raises:
        ConfigError: the extra `rerun` is not installed, or the file is no .rrd.
    """
    if path.suffix.lower() != ".rrd":
        raise ConfigError(f"{flag} {path}: recordings are written as .rrd")
    return _of_extra("rerun", flag, "rerun", "rerun-sdk")


def write_rerun(path: Path, keyframes: Iterable[Shown], flag: str) -> int:
    """Records keyframes in 3D: cameras with their images, depth points, boxes and plans, in time.

    Everything stands in the ego frame (`world/ego`), which moves through the frame of the first keyframe.
    The timelines are `time` (since the first keyframe) and `keyframe`. The file appears when whole.

    Args:
        path: .rrd file to write; `rerun FILE` shows it.
        keyframes: in time order.
        flag: what asked for it.

    Returns:
        How many there were.

    Raises:
        ConfigError: see `check_rerun`.
        SpaceDriveError: the recording cannot be written.
    """
    rerun = check_rerun(path, flag)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}.rrd")
    count, first = 0, None
    try:
        partial.touch()  # Rerun reports what it cannot write to the log alone
        recording = rerun.RecordingStream("spacedrive_jax", recording_id=path.stem)
        recording.save(str(partial))
        recording.log("world", rerun.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
        for shown in keyframes:
            first = first or shown.record
            recording.set_time("time", duration=_seconds(first, shown.record))
            recording.set_time("keyframe", sequence=int(shown.record["frame_index"]))
            _log_keyframe(rerun, recording, shown, first)
            count += 1
        recording.flush()
        recording.disconnect()
        put_in_place(partial, path)
    except (OSError, RuntimeError) as error:  # rerun's own
        raise SpaceDriveError(f"cannot write {path}: {said_by(error, path)}") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def _seconds(first: Record, record: Record) -> float:
    return (int(record["timestamp_us"]) - int(first["timestamp_us"])) * 1e-6


def _log_keyframe(rerun: Any, recording: Any, shown: Shown, first: Record) -> None:
    record = shown.record
    pose = exact.matmul(exact.rigid_inverse(first["ego_to_global"]), record["ego_to_global"])
    recording.log("world/ego", rerun.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3]))
    intrinsics = picture_intrinsics(record)
    for camera, name in enumerate(CAMERAS):
        size = picture_size(record["images"][camera])
        if size is None:
            continue
        place = camera_to_ego(record, camera)
        recording.log(
            f"world/ego/{name}",
            rerun.Transform3D(translation=place[:3, 3], mat3x3=place[:3, :3]),
            rerun.Pinhole(image_from_camera=intrinsics[camera], width=size[1], height=size[0]),
            rerun.EncodedImage(
                contents=record["images"][camera], media_type=media_type(record["images"][camera])
            ),
        )
    if has_points(record):
        points, colours = keyframe_points(record)
        step = -(-len(points) // MOST_POINTS)
        recording.log("world/ego/depth", rerun.Points3D(points[::step], colors=colours[::step], radii=0.04))
    boxes = np.asarray(record["agent_boxes"], np.float64).reshape(-1, 7)
    cos, sin = exact.cos_sin(boxes[:, 6] / 2)
    zero = np.zeros(len(boxes))
    categories = list(record["agent_category"])
    recording.log(
        "world/ego/boxes",
        rerun.Boxes3D(
            centers=boxes[:, :3],
            half_sizes=boxes[:, 3:6] / 2,
            quaternions=np.stack([zero, zero, sin, cos], axis=1),
            colors=[rgb(AGENTS[agent_kind(category)]) for category in categories],
            labels=categories,
            show_labels=False,
        ),
    )
    mask = np.asarray(record["waypoint_mask"], bool)
    ways = {"recorded": (record["waypoints"][mask], TRUTH), "plan": (shown.waypoints, PREDICTION)}
    for name, (waypoints, color) in (ways | {"plan_path": (shown.path, PREDICTION)}).items():
        known = waypoints is not None and len(waypoints)
        line = np.concatenate([np.zeros((1, 2)), waypoints]) if known else np.zeros((0, 2))
        strips = [np.pad(line, ((0, 0), (0, 1)))] if known else []
        recording.log(
            f"world/ego/{name}",
            rerun.LineStrips3D(
                strips, colors=[rgb(color)] * len(strips), radii=0.12 if name == "plan" else 0.07
            ),
        )

"""A picture of one record: six cameras with projected boxes and waypoints, and a bird's-eye view."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.prompts import COMMAND_WORDS
from spacedrive_jax.data.schema import Record
from spacedrive_jax.io import atomic_write
from spacedrive_jax.reporting.birds_eye import agent_kind, draw_birds_eye
from spacedrive_jax.reporting.cameras import STRIP_ORDER
from spacedrive_jax.reporting.projection import (
    BOX_EDGES,
    decode_image,
    project,
    project_segments,
    upright_corners,
)
from spacedrive_jax.reporting.style import AGENTS, INK, MUTED, TRUTH, styled

FARTHEST_BOX_M = 60.0
"""Boxes farther from a camera are not drawn into its image."""
VIEW_M = 45.0
"""The bird's-eye view shows this much to every side."""


@styled
def draw_record(record: Record, path: Path) -> None:
    """Draws a record into a PNG.

    Args:
        record: one record as `open_records` gives it.
        path: the file to write.
    """
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
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


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

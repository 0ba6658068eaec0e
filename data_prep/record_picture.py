"""A picture of one record: six cameras with projected boxes and waypoints, and a bird's-eye view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from spacedrive_jax import exact
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.encoded_images import decode_grey, decode_photo
from spacedrive_jax.data.lidar import sweep_points
from spacedrive_jax.data.schema import DRIVABLE_EXTENT, Record
from spacedrive_jax.io import atomic_write

_CAMERA_GRID = (
    ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"),
    ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"),
)
_GROUPS = {
    "vehicle": "#f28e2b",
    "cycle": "#e15759",
    "human": "#4e9bd6",
    "other": "#9c9c9c",
}
_WAYPOINT_COLOUR = "#2fbf71"
_PAST_COLOUR = "#7b5bd6"
_INK = "#20262e"
_DRIVABLE_RGB = (214, 218, 224)
_GROUND_RGB = (241, 242, 238)
_NEAR = 0.3
"""Metres; nothing nearer to a camera is drawn."""
_EDGES = [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)]
_EGO_BOX = np.array([[-1.0, -0.925], [3.084, -0.925], [3.084, 0.925], [-1.0, 0.925]])
"""Outline of a 4.084 m x 1.85 m vehicle; the ego origin is on its rear axle."""
_VIEW_EXTENT = 45.0
_COMMANDS = (
    "strictly forward",
    "forward",
    "slightly right",
    "right",
    "sharp right",
    "slightly left",
    "left",
    "sharp left",
)


def draw_record(record: Record, path: Path) -> None:
    """Draws a record into a PNG.

    Args:
        record: one record as `open_records` gives it.
        path: the file to write.
    """
    figure = Figure(figsize=(19.2, 6.3), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 4, width_ratios=(1, 1, 1, 1.22), wspace=0.03, hspace=0.09)
    grid.update(left=0.008, right=0.98, top=0.875, bottom=0.04)
    for row, channels in enumerate(_CAMERA_GRID):
        for column, channel in enumerate(channels):
            _draw_camera(figure.add_subplot(grid[row, column]), record, CAMERAS.index(channel))
    _draw_birds_eye(figure.add_subplot(grid[:, 3]), record)
    title = f"{record['scene_name']}  ·  keyframe {int(record['frame_index'])}"
    subtitle = "   |   ".join(record[name] for name in ("scene_description", "location", "token"))
    figure.text(0.008, 0.953, title, fontsize=15, fontweight="bold", color=_INK)
    figure.text(0.008, 0.918, subtitle, fontsize=9.5, color="#5a6470")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _group(category: str) -> str:
    if category.startswith(("vehicle.bicycle", "vehicle.motorcycle")):
        return "cycle"
    head = category.split(".")[0]
    return head if head in _GROUPS else "other"


def box_corners(boxes: Float[np.ndarray, "A 7"]) -> Float[np.ndarray, "A 8 3"]:
    """Corners of upright boxes: four at the bottom from front left clockwise, then four at the top."""
    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) / 2
    local = np.concatenate(
        [np.column_stack([signs, np.full(4, -0.5)]), np.column_stack([signs, np.full(4, 0.5)])]
    )
    scaled = local[None] * boxes[:, None, 3:6]
    cos, sin = exact.cos_sin(boxes[:, None, 6])
    x, y, z = np.moveaxis(scaled, -1, 0)
    turned = np.stack([cos * x - sin * y, sin * x + cos * y, z], axis=-1)
    return turned + boxes[:, None, :3]


def ego_to_camera(record: Record, camera: int) -> Float[np.ndarray, "4 4"]:
    """From the ego frame of the keyframe to a camera at its own time, the vehicle's motion included."""
    camera_to_global = exact.matmul(record["camera_ego_to_global"][camera], record["camera_to_ego"][camera])
    return exact.matmul(exact.affine_inverse(camera_to_global), record["ego_to_global"])


def _transformed(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return exact.transform(points, matrix)


def _projected_segments(intrinsics: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Image segments of 3-D ones given in the camera frame, cut off at the near plane."""
    segments = []
    for start, end in zip(starts, ends, strict=True):
        if start[2] < _NEAR and end[2] < _NEAR:
            continue
        if min(start[2], end[2]) < _NEAR:
            share = (_NEAR - start[2]) / (end[2] - start[2])
            cut = start + share * (end - start)
            start, end = (cut, end) if start[2] < _NEAR else (start, cut)
        pixels = exact.rotate(np.stack([start, end]), intrinsics)
        segments.append(pixels[:, :2] / pixels[:, 2:])
    return segments


def _draw_camera(axes: Any, record: Record, camera: int) -> None:
    height, width = (int(size) for size in record["image_size"][camera])
    encoded = record["images"][camera]
    label = CAMERAS[camera].removeprefix("CAM_").replace("_", " ").lower()
    if encoded:
        image = decode_photo(encoded, f"keyframe {record['token']}: the {CAMERAS[camera]} image")
        axes.imshow(image, interpolation="bilinear", aspect="equal")
        label += "  (rendered)" if record["image_rendered"][camera] else ""
    else:
        axes.add_patch(Rectangle((-0.5, -0.5), width, height, facecolor="#eef1f4", edgecolor="none"))
        axes.text(width / 2, height / 2, "no image", ha="center", va="center", color="#98a2ad", fontsize=11)
    intrinsics = record["camera_intrinsics"][camera]
    to_camera = ego_to_camera(record, camera)
    corners = _transformed(to_camera, box_corners(record["agent_boxes"]).reshape(-1, 3)).reshape(-1, 8, 3)
    for box, category in zip(corners, record["agent_category"], strict=True):
        if box[:, 2].max() < _NEAR or box[:, 2].min() > 60:
            continue
        segments = _projected_segments(intrinsics, *(box[list(side)] for side in zip(*_EDGES, strict=True)))
        axes.add_collection(
            LineCollection(segments, colors=_GROUPS[_group(category)], linewidths=0.9, alpha=0.95)
        )
    _draw_waypoints_in_camera(axes, record, intrinsics, to_camera)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    axes.set(aspect="equal", anchor="N")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(label, loc="left", fontsize=9, color="#5a6470", pad=2.5)


def _draw_waypoints_in_camera(
    axes: Any, record: Record, intrinsics: np.ndarray, to_camera: np.ndarray
) -> None:
    waypoints = record["waypoints"][record["waypoint_mask"]]
    if not len(waypoints):
        return
    ground = np.concatenate([np.zeros((1, 3)), np.column_stack([waypoints, np.zeros(len(waypoints))])])
    points = _transformed(to_camera, ground)
    axes.add_collection(
        LineCollection(
            _projected_segments(intrinsics, points[:-1], points[1:]), colors=_WAYPOINT_COLOUR, linewidths=2.2
        )
    )
    visible = exact.rotate(points[1:][points[1:, 2] > _NEAR], intrinsics)
    axes.scatter(
        *(visible[:, :2] / visible[:, 2:]).T,
        s=26,
        color=_WAYPOINT_COLOUR,
        edgecolor="white",
        linewidth=0.8,
        zorder=3,
    )


def _to_view(points: np.ndarray) -> np.ndarray:
    """Ego (x forward, y left) to plot coordinates (right, up)."""
    return np.stack([-points[..., 1], points[..., 0]], axis=-1)


def _draw_birds_eye(axes: Any, record: Record) -> None:
    axes.set_facecolor("#f1f2ee")
    if record["drivable_source"] != "none":
        what = f"keyframe {record['token']}: drivable_fine"
        fine = decode_grey(record["drivable_fine"], what) > 0
        colours = np.array([_GROUND_RGB, _DRIVABLE_RGB], np.uint8)[fine.astype(np.intp)]
        axes.imshow(
            colours[:, ::-1],  # columns grow left in the raster, right in the picture
            origin="lower",
            extent=(-DRIVABLE_EXTENT, DRIVABLE_EXTENT, -DRIVABLE_EXTENT, DRIVABLE_EXTENT),
            interpolation="nearest",
        )
    if record["lidar"]:
        sweep = sweep_points(record)
        points = _transformed(record["lidar_to_ego"], sweep.astype(np.float64))
        axes.scatter(
            *_to_view(points[:, :2]).T,
            s=0.35,
            c=np.clip(points[:, 2], -1, 4),
            cmap="viridis",
            linewidths=0,
            alpha=0.55,
            zorder=1,
        )
    _draw_agents_from_above(axes, record)
    _draw_ego_from_above(axes, record)
    axes.set(
        xlim=(-_VIEW_EXTENT, _VIEW_EXTENT), ylim=(-_VIEW_EXTENT, _VIEW_EXTENT), aspect="equal", anchor="N"
    )
    ticks = [-40, -20, 0, 20, 40]
    axes.set_xticks(ticks, [f"{-tick}" for tick in ticks])
    axes.set_yticks(ticks)
    axes.tick_params(labelsize=7.5, colors="#7a838d", length=2)
    axes.yaxis.tick_right()
    for spine in axes.spines.values():
        spine.set_color("#cfd5db")
    command = _COMMANDS[int(record["command_navigation"])]
    speed = f"{float(record['can_bus'][10]):.1f} m/s" if record["can_bus_valid"] else "no CAN bus"
    axes.set_title(
        f"bird's-eye view, metres (x up, y left)    {speed}, heading {command}",
        loc="left",
        fontsize=9,
        color="#5a6470",
        pad=4,
    )
    handles = [
        Line2D([], [], marker="s", linestyle="", color=colour, label=name)
        for name, colour in (*_GROUPS.items(), ("future", _WAYPOINT_COLOUR), ("past", _PAST_COLOUR))
    ]
    axes.legend(
        handles=handles,
        loc="lower left",
        fontsize=7.5,
        ncols=3,
        framealpha=0.9,
        edgecolor="none",
        handletextpad=0.2,
        columnspacing=0.9,
    )


def _draw_agents_from_above(axes: Any, record: Record) -> None:
    boxes = record["agent_boxes"]
    colours = [_GROUPS[_group(category)] for category in record["agent_category"]]
    outlines = _to_view(box_corners(boxes)[:, :4, :2])
    axes.add_collection(
        PolyCollection(list(outlines), facecolors=colours, edgecolors="white", linewidths=0.6, zorder=3)
    )
    paths, path_colours, arrows, arrow_colours = [], [], [], []
    for index, colour in enumerate(colours):
        mask = record["agent_future_mask"][index]
        if mask.any():
            steps = np.concatenate([np.zeros((1, 2)), record["agent_future"][index][mask]])
            if exact.norm(steps[-1]) > 0.5:
                paths.append(_to_view(boxes[index, :2] + steps))
                path_colours.append(colour)
        velocity = record["agent_velocity"][index]
        if np.isfinite(velocity).all() and exact.norm(velocity) > 0.3:
            arrows.append(_to_view(np.stack([boxes[index, :2], boxes[index, :2] + velocity])))
            arrow_colours.append(_INK)
    axes.add_collection(LineCollection(paths, colors=path_colours, linewidths=1.6, alpha=0.75, zorder=2))
    axes.add_collection(LineCollection(arrows, colors=arrow_colours, linewidths=0.9, zorder=4))


def _draw_ego_from_above(axes: Any, record: Record) -> None:
    axes.add_collection(PolyCollection([_to_view(_EGO_BOX)], facecolors=_INK, zorder=5))
    past = record["past_to_ego"][record["past_mask"]][:, :2, 3]
    future = record["waypoints"][record["waypoint_mask"]]
    for points, colour in ((past, _PAST_COLOUR), (future, _WAYPOINT_COLOUR)):
        view = _to_view(np.concatenate([np.zeros((1, 2)), points]))
        axes.plot(*view.T, color=colour, linewidth=2, zorder=6)
        axes.scatter(*view[1:].T, s=22, color=colour, edgecolor="white", linewidth=0.8, zorder=7)

"""Bird's-eye view of one keyframe: drivable area, other road users, recorded and predicted path."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D

from spacedrive_jax import exact
from spacedrive_jax.constants import EGO_CENTRE, EGO_LENGTH, EGO_WIDTH
from spacedrive_jax.data.images import decode_grey
from spacedrive_jax.data.schema import DRIVABLE_EXTENT, Record
from spacedrive_jax.evaluation.collision import box_corners
from spacedrive_jax.reporting.cameras import lidar_points
from spacedrive_jax.reporting.figures import (
    AGENTS,
    BEYOND,
    DRIVABLE,
    INK,
    MUTED,
    OFF_ROAD,
    PREDICTION,
    TRUTH,
    new_figure,
    styled,
    to_png,
)

VIEW_AHEAD_M = (-12.0, 42.0)
VIEW_ASIDE_M = 22.0
MOVES_M = 0.3
"""Agents that stay within this are drawn without a path."""
LEAST_SPEED = 0.3
"""m/s; slower agents get no arrow."""


@styled
def birds_eye_view(record: Record, waypoints: Float[np.ndarray, "T 2"] | None) -> str:
    """The keyframe from above, forward up, left to the left, as a figure of its own.

    Args:
        record: the keyframe.
        waypoints: the planned ones, metres, ego frame; None draws the recorded drive alone.

    Returns:
        PNG data address.
    """
    figure, axes = new_figure(4.6, 5.4)
    draw_birds_eye(axes, record, waypoints)
    return to_png(figure)


def draw_birds_eye(
    axes: Axes,
    record: Record,
    waypoints: Float[np.ndarray, "T 2"] | None = None,
    *,
    ahead: tuple[float, float] = VIEW_AHEAD_M,
    aside: float = VIEW_ASIDE_M,
    lidar: bool = False,
    recorded: str = "recorded",
) -> None:
    """Draws the keyframe from above into axes, forward up, left to the left.

    Args:
        axes: where.
        record: the keyframe.
        waypoints: the planned ones, metres, ego frame.
        ahead: metres shown behind and ahead of the ego origin, at least; grows to hold the paths.
        aside: metres shown to either side, likewise.
        lidar: draw the sweep, coloured by height.
        recorded: what the legend calls the record's own waypoints.
    """
    _draw_ground(axes, record)
    points = lidar_points(record) if lidar else None
    if points is not None:
        height = np.clip(points[:, 2], -1, 4)
        axes.scatter(
            points[:, 1],
            points[:, 0],
            s=0.35,
            c=height,
            cmap="viridis",
            linewidths=0,
            alpha=0.55,
            zorder=1,
            rasterized=True,
        )
    _draw_agents(axes, record)
    ego = box_corners(np.array([EGO_CENTRE, 0.0]), np.zeros(()), np.array([EGO_LENGTH, EGO_WIDTH]))
    axes.add_collection(
        PolyCollection([ego[:, ::-1]], facecolors=INK, edgecolors="white", linewidths=0.6, zorder=4)
    )
    past = record["past_to_ego"][np.asarray(record["past_mask"], bool), :2, 3]
    if len(past):
        trail = np.concatenate([np.zeros((1, 2)), past])
        axes.plot(trail[:, 1], trail[:, 0], color=MUTED, linewidth=1.4, linestyle=":", zorder=3, label="past")
    known = record["waypoints"][np.asarray(record["waypoint_mask"], bool)]
    paths = [(known, TRUTH, recorded, 5)] if len(known) else []
    paths += [(waypoints, PREDICTION, "predicted", 6)] if waypoints is not None else []
    for path, color, label, order in paths:
        _draw_path(axes, path, color, label, order)
    reach = np.concatenate([np.zeros((1, 2)), *(path for path, *_ in paths)])
    aside = max(aside, np.abs(reach[:, 1]).max() + 3)
    axes.set(
        xlim=(aside, -aside),
        ylim=(min(ahead[0], reach[:, 0].min() - 3), max(ahead[1], reach[:, 0].max() + 3)),
        aspect="equal",
        xlabel="left (m)",
        ylabel="forward (m)",
    )
    axes.grid(False)
    handles = axes.get_legend_handles_labels()[0]
    kinds = {agent_kind(category) for category in record["agent_category"]}
    handles += [
        Line2D([], [], marker="s", linestyle="", markersize=5, color=color, label=kind)
        for kind, color in AGENTS.items()
        if kind in kinds
    ]
    if handles:
        axes.legend(
            handles=handles,
            loc="upper left",
            fontsize=8,
            frameon=True,
            framealpha=0.85,
            edgecolor="none",
            handlelength=1.4,
        )


def agent_kind(category: str) -> str:
    """`vehicle`, `cycle`, `human` or `other` for a nuScenes category name."""
    if category.startswith(("vehicle.bicycle", "vehicle.motorcycle")):
        return "cycle"
    head = category.split(".")[0]
    return head if head in AGENTS else "other"


def _draw_ground(axes: Axes, record: Record) -> None:
    """The drivable area where there is a map; what lies beyond the raster is another colour."""
    if record["drivable_source"] == "none":
        axes.text(0.5, 0.02, "no map", transform=axes.transAxes, ha="center", color=MUTED)
        return
    drivable = record["drivable"]
    if record["drivable_fine"]:
        drivable = decode_grey(record["drivable_fine"], f"keyframe {record['token']}: drivable_fine") > 0
    axes.set_facecolor(BEYOND)
    axes.imshow(
        np.asarray(drivable, np.uint8),
        cmap=ListedColormap([OFF_ROAD, DRIVABLE]),
        vmin=0,
        vmax=1,
        origin="lower",
        extent=(-DRIVABLE_EXTENT, DRIVABLE_EXTENT, -DRIVABLE_EXTENT, DRIVABLE_EXTENT),
        interpolation="nearest",
    )


def _draw_agents(axes: Axes, record: Record) -> None:
    """Boxes, the way they take, and an arrow of one second along their velocity."""
    boxes = record["agent_boxes"]
    colors = [AGENTS[agent_kind(category)] for category in record["agent_category"]]
    outlines = box_corners(boxes[:, :2], boxes[:, 6], boxes[:, 3:5])[..., ::-1]
    axes.add_collection(
        PolyCollection(list(outlines), facecolors=colors, edgecolors="white", linewidths=0.6, zorder=3)
    )
    paths, path_colors, arrows = [], [], []
    for box, future, mask, velocity, color in zip(
        boxes,
        record["agent_future"],
        record["agent_future_mask"],
        record["agent_velocity"],
        colors,
        strict=True,
    ):
        path = box[:2] + np.concatenate([np.zeros((1, 2)), future[np.asarray(mask, bool)]])
        if np.ptp(path, axis=0).max() > MOVES_M:
            paths.append(path[:, ::-1])
            path_colors.append(color)
        if np.isfinite(velocity).all() and exact.norm(velocity) > LEAST_SPEED:
            arrows.append(np.stack([box[:2], box[:2] + velocity])[:, ::-1])
    axes.add_collection(LineCollection(paths, colors=path_colors, linewidths=1.3, alpha=0.75, zorder=2))
    axes.add_collection(LineCollection(arrows, colors=INK, linewidths=0.8, alpha=0.8, zorder=4))


def _draw_path(axes: Axes, waypoints: Float[np.ndarray, "n 2"], color: str, label: str, order: int) -> None:
    path = np.concatenate([np.zeros((1, 2)), waypoints])
    axes.plot(path[:, 1], path[:, 0], color=color, linewidth=1.8, zorder=order, label=label)
    axes.plot(
        waypoints[:, 1],
        waypoints[:, 0],
        color=color,
        linestyle="",
        marker="o",
        markersize=4.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=order,
    )

"""Bird's-eye view of one keyframe: drivable area, other road users, recorded and predicted path."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Polygon

from spacedrive_jax.data.schema import DRIVABLE_EXTENT, Record
from spacedrive_jax.evaluation.rasters import box_corners
from spacedrive_jax.reporting.style import (
    AGENT,
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

EGO_SIZE_M = (4.08, 1.85)
EGO_CENTRE_M = 1.4
"""The body's centre lies this far ahead of the ego origin, which is at the rear axle (approximate)."""
VIEW_AHEAD_M = (-12.0, 42.0)
VIEW_ASIDE_M = 22.0


@styled
def birds_eye_view(record: Record, prediction: Float[np.ndarray, "T 2"] | None) -> str:
    """Draws the keyframe from above, forward up, left to the left.

    Args:
        record: the keyframe.
        prediction: predicted waypoints, metres, ego frame; None draws the recorded drive alone.

    Returns:
        PNG data address.
    """
    figure, axes = new_figure(4.6, 5.4)
    extent = (-DRIVABLE_EXTENT, DRIVABLE_EXTENT, -DRIVABLE_EXTENT, DRIVABLE_EXTENT)
    if record["drivable_source"] == "none":
        axes.text(0.5, 0.02, "no map", transform=axes.transAxes, ha="center", color=MUTED)
    else:
        axes.set_facecolor(BEYOND)  # where the raster ends, nothing is known
        axes.imshow(
            record["drivable"],
            cmap=ListedColormap([OFF_ROAD, DRIVABLE]),
            vmin=0,
            vmax=1,
            origin="lower",
            extent=extent,
            interpolation="nearest",
        )
    for centre, size, yaw, moves in _agents(record):
        corners = box_corners(centre[None], np.array([yaw]), size[None])[0]
        axes.add_patch(Polygon(corners[:, ::-1], facecolor=AGENT, edgecolor="white", linewidth=0.6, zorder=3))
        if len(moves) and np.ptp(moves, axis=0).max() > 0.3:
            axes.plot(moves[:, 1], moves[:, 0], color=AGENT, linewidth=1, zorder=2)
    ego = box_corners(np.array([[EGO_CENTRE_M, 0.0]]), np.zeros(1), np.array([EGO_SIZE_M]))[0]
    axes.add_patch(Polygon(ego[:, ::-1], facecolor=INK, edgecolor="white", linewidth=0.6, zorder=4))
    past = record["past_to_ego"][np.asarray(record["past_mask"], bool), :2, 3]
    if len(past):
        trail = np.concatenate([np.zeros((1, 2)), past])
        axes.plot(trail[:, 1], trail[:, 0], color=MUTED, linewidth=1.2, linestyle=":", zorder=3, label="past")
    valid = np.asarray(record["waypoint_mask"], bool)
    if valid.any():
        _path(axes, record["waypoints"][valid], TRUTH, "recorded", zorder=5)
    if prediction is not None:
        _path(axes, prediction, PREDICTION, "predicted", zorder=6)
    reach = [record["waypoints"][valid], *([prediction] if prediction is not None else [])]
    points = np.concatenate([*reach, np.zeros((1, 2))])
    aside = max(VIEW_ASIDE_M, np.abs(points[:, 1]).max() + 3)
    axes.set_xlim(aside, -aside)
    axes.set_ylim(
        min(VIEW_AHEAD_M[0], points[:, 0].min() - 3),
        max(VIEW_AHEAD_M[1], points[:, 0].max() + 3),
    )
    axes.set_aspect("equal")
    axes.grid(False)
    axes.set_xlabel("left (m)")
    axes.set_ylabel("forward (m)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", fontsize=8, frameon=True, framealpha=0.85, edgecolor="none")
    return to_png(figure)


def _path(axes: Axes, waypoints: Float[np.ndarray, "n 2"], color: str, label: str, zorder: int) -> None:
    path = np.concatenate([np.zeros((1, 2)), waypoints])
    axes.plot(path[:, 1], path[:, 0], color=color, linewidth=1.8, zorder=zorder, label=label)
    axes.plot(
        waypoints[:, 1],
        waypoints[:, 0],
        color=color,
        linestyle="",
        marker="o",
        markersize=4.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=zorder,
    )


def _agents(record: Record) -> list[tuple[np.ndarray, np.ndarray, float, np.ndarray]]:
    """Centre, (length, width), yaw and future positions of each agent, metres, ego frame."""
    agents = []
    for box, future, mask in zip(
        record["agent_boxes"], record["agent_future"], record["agent_future_mask"], strict=True
    ):
        moves = box[:2] + future[np.asarray(mask, bool)]
        agents.append((box[:2], box[3:5], float(box[6]), np.concatenate([box[None, :2], moves])))
    return agents

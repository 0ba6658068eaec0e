"""Collision of planned ego boxes with other vehicles, per step, on the evaluation grid.

Follows the planning metric the published scripts inherited from ST-P3 (`evaluate_single_coll`), with the
heading rule of the OmniDrive variant.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Float, Int
from skimage.draw import polygon

from spacedrive_jax.evaluation.protocols import StepRule
from spacedrive_jax.evaluation.rasters import Grid, box_corners, draw_polygon, to_cells

COLLISION_LENGTH_M = 4.084
COLLISION_WIDTH_M = 1.85
MIN_TURNING_STEP_M = 1.0
"""Quirk Q3: a step shorter than this is tested with heading 0, not with the previous heading."""

VEHICLE_CATEGORIES = frozenset(
    {
        "vehicle.car",
        "vehicle.motorcycle",
        "vehicle.bicycle",
        "vehicle.bus.bendy",
        "vehicle.bus.rigid",
        "vehicle.truck",
        "vehicle.construction",
        "vehicle.emergency.ambulance",
        "vehicle.emergency.police",
        "vehicle.trailer",
    }
)
"""The nuScenes categories that count as obstacles (quirk Q4: people, cones and barriers never do)."""


@dataclasses.dataclass(frozen=True)
class Obstacles:
    """The future boxes of the agents that count as obstacles, ego frame of the keyframe, steps 1..6.

    Attributes:
        centre: x, y in metres.
        yaw: heading in radians.
        size: length and width in metres, the same at every step.
        mask: whether the agent is annotated at the step.
    """

    centre: Float[np.ndarray, "A T 2"]
    yaw: Float[np.ndarray, "A T"]
    size: Float[np.ndarray, "A 2"]
    mask: Bool[np.ndarray, "A T"]


@functools.lru_cache
def ego_cells(rule: StepRule) -> Int[np.ndarray, "K 2"]:
    """Cells (column x, row y) of the unrotated ego box at the origin of the ego frame.

    720 cells at 0.1 m without offset, 32 at 0.5 m with 0.5 m offset. The polygon is filled by scikit-image,
    not by OpenCV as everywhere else, and is half a cell off against it (quirk Q2).
    """
    grid = Grid(rule.resolution)
    x = rule.ego_offset + COLLISION_LENGTH_M / 2 * np.array([-1, 1, 1, -1])
    y = COLLISION_WIDTH_M / 2 * np.array([1, 1, -1, -1])
    columns, rows = polygon(
        (x - grid.first_centre) / grid.cell_size, (y - grid.first_centre) / grid.cell_size
    )
    return np.stack([columns, rows], axis=-1)


def step_headings(trajectories: Float[np.ndarray, "M T 2"]) -> Float[np.ndarray, "M T"]:
    """Heading of each step's collision box: the direction of the step, 0 when it is shorter than 1 m."""
    steps = np.diff(trajectories, axis=1, prepend=0.0)
    headings = np.arctan2(steps[..., 1], steps[..., 0])
    return np.where(np.linalg.norm(steps, axis=-1) >= MIN_TURNING_STEP_M, headings, 0.0)


def swept_cells(trajectories: Float[np.ndarray, "M T 2"], rule: StepRule) -> Int[np.ndarray, "M T K 2"]:
    """Cells (column x, row y) under the collision box at every step.

    Cells are rotated about the ego origin, rounded, moved by the waypoint and truncated toward zero;
    what leaves the grid is clipped to its border (so it is tested there, as published).

    Args:
        trajectories: M trajectories of waypoints, metres, ego frame.
        rule: grid and ego offset.
    """
    grid = Grid(rule.resolution)
    origin = np.float64(grid.first_centre / grid.cell_size)
    cells = ego_cells(rule) + origin
    headings = step_headings(trajectories)[..., None]
    # The published rotation matrix is float32, everything around it float64.
    cosine, sine = np.cos(headings).astype(np.float32), np.sin(headings).astype(np.float32)
    rotated = np.stack(
        [cosine * cells[:, 0] - sine * cells[:, 1], sine * cells[:, 0] + cosine * cells[:, 1]], axis=-1
    )
    # Wide finite predictions must not wrap around when they become integers.
    moved = np.round(rotated - origin) + (trajectories / grid.cell_size)[:, :, None]
    return np.clip(np.trunc(moved), 0, grid.cells - 1).astype(np.int32)


def collides(
    trajectories: Float[np.ndarray, "M T 2"], obstacles: Obstacles, rule: StepRule
) -> Bool[np.ndarray, "M T"]:
    """Whether the ego box of each step covers a cell that an obstacle covers at that step.

    Only obstacles whose cells can meet an ego box are drawn; the result is that of drawing them all.

    Args:
        trajectories: M trajectories over the same scene, metres, ego frame.
        obstacles: the scene's agents at steps 1..T.
        rule: grid and ego offset.
    """
    hits = np.zeros(trajectories.shape[:2], bool)
    if not obstacles.mask.any():
        return hits
    grid = Grid(rule.resolution)
    ego = swept_cells(trajectories, rule)
    corners = box_corners(obstacles.centre, obstacles.yaw, obstacles.size[:, None])
    polygons = to_cells(corners, grid)
    near = obstacles.mask & np.all(
        (polygons.max(axis=2) >= ego.min(axis=(0, 2))) & (polygons.min(axis=2) <= ego.max(axis=(0, 2))),
        axis=-1,
    )
    raster = grid.empty()
    for step in np.flatnonzero(near.any(axis=0)):
        drawn = polygons[near[:, step], step]
        for vertices in drawn:
            draw_polygon(raster, vertices)
        hits[:, step] = raster[ego[:, step, :, 1], ego[:, step, :, 0]].any(axis=-1)
        for (left, bottom), (right, top) in _windows(drawn, grid):
            raster[bottom:top, left:right] = 0
    return hits


def _windows(polygons: Int[np.ndarray, "K 4 2"], grid: Grid) -> Int[np.ndarray, "K 2 2"]:
    """First and last-plus-one (column, row) of the cells a polygon can set."""
    return np.clip(np.stack([polygons.min(axis=1), polygons.max(axis=1) + 1], axis=1), 0, grid.cells)

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

from spacedrive_jax import exact
from spacedrive_jax.constants import EGO_LENGTH, EGO_WIDTH
from spacedrive_jax.evaluation.protocols import StepRule
from spacedrive_jax.evaluation.rasters import GRID_EXTENT_M, Grid, box_corners, draw_polygon, to_cells

MIN_TURNING_STEP_M = 1.0
"""Quirk Q3: a step shorter than this is tested with heading 0, not with the previous heading."""
ROUNDING_CELLS = 6
"""More than rounding, truncation and inclusive borders move the cells of two boxes towards each other."""

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
    x = rule.ego_offset + EGO_LENGTH / 2 * np.array([-1, 1, 1, -1])
    y = EGO_WIDTH / 2 * np.array([1, 1, -1, -1])
    columns, rows = polygon(
        (x - grid.first_centre) / grid.cell_size, (y - grid.first_centre) / grid.cell_size
    )
    return np.stack([columns, rows], axis=-1)


def step_headings(trajectories: Float[np.ndarray, "M T 2"]) -> Float[np.ndarray, "M T"]:
    """Heading of each step's collision box: the direction of the step, 0 when it is shorter than 1 m."""
    steps = np.diff(trajectories, axis=1, prepend=0.0)
    headings = exact.arctan2(steps[..., 1], steps[..., 0])
    return np.where(exact.norm(steps) >= MIN_TURNING_STEP_M, headings, 0.0)


def box_cells(
    points: Float[np.ndarray, "P 2"], headings: Float[np.ndarray, "P"], rule: StepRule
) -> Int[np.ndarray, "P K 2"]:
    """Cells (column x, row y) under the collision box at each point.

    Cells are rotated about the ego origin, rounded, moved by the point and truncated toward zero; what leaves
    the grid is clipped to its border (so it is tested there, as published).

    Args:
        points: waypoints, metres, ego frame.
        headings: of the box there, radians.
        rule: grid and ego offset.
    """
    grid = Grid(rule.resolution)
    origin = np.float64(grid.first_centre / grid.cell_size)
    x, y = (ego_cells(rule) + origin).T
    # The published rotation matrix is float32, everything around it float64.
    cosine, sine = (part[:, None].astype(np.float32).astype(np.float64) for part in exact.cos_sin(headings))
    rotated = np.stack([cosine * x - sine * y, sine * x + cosine * y], axis=-1)
    # Wide finite predictions must not wrap around when they become integers.
    moved = np.round(rotated - origin) + (points / grid.cell_size)[:, None]
    return np.clip(np.trunc(moved), 0, grid.cells - 1).astype(np.int32)


def collides(
    trajectories: Float[np.ndarray, "M T 2"], obstacles: Obstacles, rule: StepRule
) -> Bool[np.ndarray, "M T"]:
    """Whether the ego box of each step covers a cell that an obstacle covers at that step.

    Only boxes that come near each other are laid on the grid; the result is that of drawing them all.

    Args:
        trajectories: M trajectories over the same scene, metres, ego frame.
        obstacles: the scene's agents at steps 1..T.
        rule: grid and ego offset.
    """
    hits = np.zeros(trajectories.shape[:2], bool)
    near = _near(trajectories, obstacles, rule)
    trajectory, step = np.nonzero(near.any(axis=1))
    if not len(trajectory):
        return hits
    grid = Grid(rule.resolution)
    ego = box_cells(trajectories[trajectory, step], step_headings(trajectories)[trajectory, step], rule)
    agent, agent_step = np.nonzero(near.any(axis=0))
    polygons = to_cells(
        box_corners(
            obstacles.centre[agent, agent_step], obstacles.yaw[agent, agent_step], obstacles.size[agent]
        ),
        grid,
    )
    windows = _windows(polygons, grid)
    raster = grid.empty()
    for now in np.unique(step):
        drawn = agent_step == now
        for vertices in polygons[drawn]:
            draw_polygon(raster, vertices)
        rows = step == now
        hits[trajectory[rows], now] = raster[ego[rows, :, 1], ego[rows, :, 0]].any(axis=-1)
        for (left, bottom), (right, top) in windows[drawn]:
            raster[bottom:top, left:right] = 0
    return hits


def _near(
    trajectories: Float[np.ndarray, "M T 2"], obstacles: Obstacles, rule: StepRule
) -> Bool[np.ndarray, "M A T"]:
    """Which agents' cells may meet the ego box's at a step: circles around both, with room for rounding."""
    ego_radius = exact.hypot(EGO_LENGTH / 2 + abs(rule.ego_offset), EGO_WIDTH / 2)
    reach = ego_radius + exact.norm(obstacles.size) / 2 + ROUNDING_CELLS * rule.resolution
    # A box beyond the grid is tested at its border, no farther from there than from its own centre.
    points = np.clip(trajectories, -GRID_EXTENT_M, GRID_EXTENT_M)
    squared = np.sum((points[:, None] - obstacles.centre) ** 2, axis=-1)
    return obstacles.mask & (squared <= reach[:, None] ** 2)


def _windows(polygons: Int[np.ndarray, "K 4 2"], grid: Grid) -> Int[np.ndarray, "K 2 2"]:
    """First and last-plus-one (column, row) of the cells a polygon can set."""
    return np.clip(np.stack([polygons.min(axis=1), polygons.max(axis=1) + 1], axis=1), 0, grid.cells)

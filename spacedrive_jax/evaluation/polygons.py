"""Collisions and road departures of the ego box as polygon overlaps, without a grid.

What the `corrected` protocol tests: one box of the vehicle's size, centred where the vehicle is, headed along
the path, against the other boxes and the drivable area as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
import shapely
from jaxtyping import Bool, Float, UInt8

from spacedrive_jax import exact
from spacedrive_jax.constants import EGO_LENGTH, EGO_WIDTH
from spacedrive_jax.data.schema import DRIVABLE_FINE_CELLS, Record
from spacedrive_jax.evaluation.collision import Obstacles
from spacedrive_jax.evaluation.protocols import PolygonRule
from spacedrive_jax.evaluation.rasters import GRID_EXTENT_M, MIN_STEP_M, box_corners, decode_fine, tangent_yaw

EGO_SIZE_M = np.array([EGO_LENGTH, EGO_WIDTH])
OFF_ROAD_AREA_M2 = 0.01
"""So much of the box (one cell of the 0.1 m grid) must leave the road: maps have hairline gaps."""

_MAP_SQUARE = shapely.box(-GRID_EXTENT_M, -GRID_EXTENT_M, GRID_EXTENT_M, GRID_EXTENT_M)


@runtime_checkable
class DrivableArea(Protocol):
    """What is drivable around a keyframe, ego frame; nothing is known beyond 50 m in x or y."""

    def outside(self, boxes: Float[np.ndarray, "K 4 2"]) -> Float[np.ndarray, "K"]:
        """Square metres of each box that lie within the known square but not on the road."""
        ...


@dataclasses.dataclass(frozen=True)
class PolygonArea:
    """The drivable area as one geometry (nuScenes map expansion)."""

    geometry: shapely.Geometry

    def outside(self, boxes: Float[np.ndarray, "K 4 2"]) -> Float[np.ndarray, "K"]:
        """See `DrivableArea.outside`; exact."""
        known = shapely.intersection(shapely.polygons(boxes), _MAP_SQUARE)
        return shapely.area(known) - shapely.area(shapely.intersection(known, self.geometry))


@dataclasses.dataclass(frozen=True)
class MaskArea:
    """The drivable area as 0.1 m cells (nuScenes basic map masks).

    Attributes:
        cells: 1 where drivable, row forward, column left, over the known square.
    """

    cells: UInt8[np.ndarray, "n n"]

    def outside(self, boxes: Float[np.ndarray, "K 4 2"]) -> Float[np.ndarray, "K"]:
        """See `DrivableArea.outside`; counts cells whose centre lies in the box."""
        count = len(self.cells)
        size = 2 * GRID_EXTENT_M / count
        limits = np.stack([boxes.min(axis=1), boxes.max(axis=1)], axis=1)
        # Far predictions stay finite as integers; what is beyond the square is empty either way.
        window = np.floor((limits + GRID_EXTENT_M) / size) + np.array([[0], [1]])
        window = np.clip(window, 0, count).astype(np.intp)
        areas = np.zeros(len(boxes))
        for index, ((first_x, first_y), (last_x, last_y)) in enumerate(window):
            off_road = np.argwhere(self.cells[first_x:last_x, first_y:last_y] == 0)
            if len(off_road):
                centres = (off_road + [first_x, first_y] + 0.5) * size - GRID_EXTENT_M
                areas[index] = np.count_nonzero(_contains(boxes[index], centres)) * (size * size)
        return areas


def _contains(box: Float[np.ndarray, "4 2"], points: Float[np.ndarray, "K 2"]) -> Bool[np.ndarray, "K"]:
    """Which points lie in a rectangle given by its corners in order around it."""
    sides = np.stack([box[1] - box[0], box[3] - box[0]])
    along = exact.rotate(points - box[0], sides)
    return np.all((along >= 0) & (along <= exact.dot(sides, sides)), axis=1)


def drivable_area(record: Record) -> DrivableArea | None:
    """The record's drivable area: its map polygons if it has any, else its fine raster; None without a map.

    Raises:
        DataError: the record claims a map but its fine raster is missing or unreadable.
    """
    if record["drivable_source"] == "none":
        return None
    polygons = shapely.from_wkb(list(record["drivable_polygons"]))
    if len(polygons):
        return PolygonArea(shapely.union_all(shapely.make_valid(polygons)))
    cells = decode_fine(record)
    assert len(cells) == DRIVABLE_FINE_CELLS
    return MaskArea(cells)


def ego_boxes(
    trajectories: Float[np.ndarray, "M T 2"], rule: PolygonRule
) -> tuple[Float[np.ndarray, "M T+1 2"], Float[np.ndarray, "M T+1 4 2"]]:
    """Centres and corners of the ego box now and at every waypoint, metres, ego frame.

    The heading is that of the step; a step shorter than 0.3 m keeps the one before (now: forward).
    """
    count = len(trajectories)
    points = np.concatenate([np.zeros((count, 1, 2)), trajectories], axis=1)
    yaw = np.concatenate([np.zeros((count, 1)), tangent_yaw(trajectories, MIN_STEP_M)], axis=1)
    centre = points + rule.ego_offset * np.stack(exact.cos_sin(yaw), axis=-1)
    return centre, box_corners(centre, yaw, EGO_SIZE_M)


def overlaps(
    trajectories: Float[np.ndarray, "M T 2"], obstacles: Obstacles, rule: PolygonRule
) -> Bool[np.ndarray, "M T"]:
    """Whether the ego box of each step touches an obstacle's box at that step.

    Args:
        trajectories: M trajectories over the same scene, metres, ego frame.
        obstacles: the scene's agents at steps 1..T.
        rule: where the ego box is.
    """
    hits = np.zeros(trajectories.shape[:2], bool)
    centre, boxes = (array[:, 1:] for array in ego_boxes(trajectories, rule))
    reach = (exact.norm(EGO_SIZE_M) + exact.norm(obstacles.size)) / 2
    distance = exact.norm(centre[:, None] - obstacles.centre[None])
    trajectory, agent, step = np.nonzero(obstacles.mask & (distance <= reach[:, None]))
    if len(trajectory):
        agents = box_corners(obstacles.centre[agent, step], obstacles.yaw[agent, step], obstacles.size[agent])
        touching = shapely.intersects(shapely.polygons(boxes[trajectory, step]), shapely.polygons(agents))
        hits[trajectory[touching], step[touching]] = True
    return hits


def leaves_road(
    trajectories: Float[np.ndarray, "M T 2"], area: DrivableArea, rule: PolygonRule
) -> Bool[np.ndarray, "M T+1"]:
    """Whether the ego box is off the road now (column 0) and at every waypoint.

    Args:
        trajectories: M trajectories of waypoints, metres, ego frame.
        area: what is drivable.
        rule: where the ego box is.
    """
    _, boxes = ego_boxes(trajectories, rule)
    outside = area.outside(boxes.reshape(-1, 4, 2)).reshape(boxes.shape[:2])
    return outside >= OFF_ROAD_AREA_M2

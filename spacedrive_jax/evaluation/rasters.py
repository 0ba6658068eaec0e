"""The drivable area on the evaluation grid, and how much of a planned ego box lies outside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np
import shapely
from jaxtyping import Float, Int, Int32, UInt8

from spacedrive_jax import exact
from spacedrive_jax.data.images import decode_grey
from spacedrive_jax.data.schema import DRIVABLE_FINE_CELLS, Record
from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.protocols import StepRule

# The evaluation grid and boxes drawn on it, cell for cell as the published scripts draw them.
#
# Rasters are indexed [row = y][column = x]; both grow with the coordinate and cell k spans [-50 + k *
# resolution, -50 + (k + 1) * resolution) m of the ego frame. The cell size and origin are float32 and
# rounding follows from that: a double-precision grid moves some borders by a cell.


GRID_EXTENT_M = 50.0


@dataclasses.dataclass(frozen=True)
class Grid:
    """A square grid over [-50, 50) m around the ego vehicle."""

    resolution: float
    """Metres a cell."""

    @property
    def cells(self) -> int:
        """Cells along one side."""
        return round(2 * GRID_EXTENT_M / self.resolution)

    @property
    def cell_size(self) -> np.float32:
        """Metres a cell."""
        return np.float32(self.resolution)

    @property
    def first_centre(self) -> np.float32:
        """Coordinate of the centre of cell 0, metres."""
        return np.float32(-GRID_EXTENT_M + self.resolution / 2)

    def empty(self) -> UInt8[np.ndarray, "n n"]:
        """A raster of zeros. Pages are touched only where something is drawn."""
        return np.zeros((self.cells, self.cells), np.uint8)


def box_corners(
    centre: Float[np.ndarray, "*#batch 2"],
    yaw: Float[np.ndarray, "*#batch"],
    size: Float[np.ndarray, "*#batch 2"],
) -> Float[np.ndarray, "*batch 4 2"]:
    """Corners of upright boxes seen from above.

    Args:
        centre: x, y in metres.
        yaw: heading in radians, counter-clockwise from x.
        size: length (along the heading) and width, metres; broadcast against `centre`.

    Returns:
        The corners in order around the box, metres.
    """
    forward = np.stack(exact.cos_sin(yaw), axis=-1)
    left = np.stack([-forward[..., 1], forward[..., 0]], axis=-1)
    half = np.asarray(size)[..., None, :] / 2 * np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]])
    return centre[..., None, :] + half[..., :1] * forward[..., None, :] + half[..., 1:] * left[..., None, :]


def to_cells(points: Float[np.ndarray, "*batch 2"], grid: Grid) -> Int32[np.ndarray, "*batch 2"]:
    """Integer polygon vertices for `cv2.fillPoly`: metres in the ego frame to (column x, row y)."""
    shifted = points - grid.first_centre + grid.cell_size / 2
    return np.round(shifted / grid.cell_size).astype(np.int32)


def draw_polygon(raster: UInt8[np.ndarray, "n n"], vertices: Int32[np.ndarray, "4 2"]) -> None:
    """Sets the polygon's cells, border included, to 1 in place.

    One call a polygon: `cv2.fillPoly` fills several by parity, so overlaps would come out empty. The whole
    raster is handed over because clipping at its edge changes which border cells are set.
    """
    cv2.fillPoly(raster, [vertices], 1)


FOOTPRINT_SIZE_M = (4.08, 1.85)
"""Length and width of the ego box tested against the drivable area (the collision box is 4.084 m long)."""
MIN_FIRST_STEP_M = 0.5
MIN_STEP_M = 0.3
"""Below these the tangent is unreliable: the first step then faces forward, later ones keep their heading."""


def tangent_yaw(
    waypoints: Float[np.ndarray, "M T 2"], min_first_step: float = MIN_FIRST_STEP_M
) -> Float[np.ndarray, "M T"]:
    """Heading along the path, held through steps shorter than 0.3 m (0 for a too short first step)."""
    steps = np.diff(waypoints, axis=1, prepend=0.0)
    length = exact.norm(steps)
    direction = exact.arctan2(steps[..., 1], steps[..., 0])
    yaw = np.zeros_like(direction)
    yaw[:, 0] = np.where(length[:, 0] < min_first_step, 0.0, direction[:, 0])
    for step in range(1, yaw.shape[1]):
        yaw[:, step] = np.where(length[:, step] < MIN_STEP_M, yaw[:, step - 1], direction[:, step])
    return yaw


def footprints(waypoints: Float[np.ndarray, "M T 2"], rule: StepRule) -> Int[np.ndarray, "M T+1 4 2"]:
    """Vertices (column x, row y) of the ego box now and at every waypoint, on the rule's grid."""
    count, steps = waypoints.shape[:2]
    centre = np.concatenate([np.zeros((count, 1, 2)), waypoints], axis=1)
    yaw = np.zeros((count, steps + 1))
    if rule.footprint_yaw == "tangent":
        yaw[:, 1:] = tangent_yaw(waypoints)
    corners = box_corners(centre, yaw, np.array(FOOTPRINT_SIZE_M))
    # A box far outside covers no cell; clipping it there keeps its vertices inside int32.
    return to_cells(np.clip(corners, -10 * GRID_EXTENT_M, 10 * GRID_EXTENT_M), Grid(rule.resolution))


def off_road_cells(
    waypoints: Float[np.ndarray, "M T 2"], drivable: UInt8[np.ndarray, "n n"], rule: StepRule
) -> Int[np.ndarray, "M T+1"]:
    """Non-drivable cells under the ego box now (column 0) and at every waypoint.

    Cells outside the grid count as neither.

    Args:
        waypoints: those of M plans, metres, ego frame.
        drivable: 1 where drivable, [row = y][column = x], on the rule's grid.
        rule: grid and footprint heading.
    """
    grid = Grid(rule.resolution)
    if drivable.shape != (grid.cells, grid.cells):
        raise ValueError(
            f"drivable raster is {drivable.shape}, the {rule.resolution} m grid needs {grid.cells}²"
        )
    count, steps = waypoints.shape[:2]
    polygons = footprints(waypoints, rule)
    low = np.clip(polygons.min(axis=2), 0, grid.cells)
    high = np.clip(polygons.max(axis=2) + 1, 0, grid.cells)
    cells = np.zeros((count, steps + 1), np.int64)
    raster = grid.empty()
    for plan, step in np.ndindex(cells.shape):
        if step == 0 and plan > 0:
            cells[plan, 0] = cells[0, 0]
            continue
        (left, bottom), (right, top) = low[plan, step], high[plan, step]
        if left >= right or bottom >= top:
            continue
        window = np.s_[bottom:top, left:right]
        if drivable[window].all():
            continue
        draw_polygon(raster, polygons[plan, step])
        cells[plan, step] = np.count_nonzero(raster[window] & (drivable[window] == 0))
        raster[window] = 0
    return cells


def drivable_rasters(record: Record, grids: Sequence[Grid]) -> dict[Grid, UInt8[np.ndarray, "n n"]] | None:
    """The record's drivable area on each grid, [row = y][column = x], or None when the record has no map.

    The 0.1 m grid is the record's own fine raster. Coarser grids are drawn from the map's polygons as the
    nuScenes devkit draws them where the record has polygons, otherwise taken from the fine raster at
    the centre of each cell.

    Raises:
        DataError: the record claims a map but its fine raster is missing or unreadable.
    """
    if record["drivable_source"] == "none":
        return None
    polygons = shapely.from_wkb(list(record["drivable_polygons"]))
    drawn = {grid for grid in grids if len(polygons) and grid.cells != DRIVABLE_FINE_CELLS}
    fine = None if drawn == set(grids) else decode_fine(record).T
    return {
        grid: _sample(fine, grid)
        if fine is not None and grid not in drawn
        else rasterize_polygons(polygons, grid)
        for grid in grids
    }


def _sample(fine: UInt8[np.ndarray, "1000 1000"], grid: Grid) -> UInt8[np.ndarray, "n n"]:
    """The fine raster at the centres of the grid's cells."""
    if grid.cells == len(fine):
        return fine
    index = ((np.arange(grid.cells) + 0.5) * len(fine) / grid.cells).astype(np.intp)
    return fine[np.ix_(index, index)]


def rasterize_polygons(polygons: np.ndarray, grid: Grid) -> UInt8[np.ndarray, "n n"]:
    """Draws polygons the way the nuScenes devkit does (`NuScenesMapExplorer.mask_for_polygons`).

    Args:
        polygons: shapely Polygons or MultiPolygons in the yaw-only ego frame, metres. Drawn one after
            the other: shell filled, then holes emptied, so a later polygon can refill an earlier hole.
        grid: the grid to draw on.
    """
    patch = shapely.box(-GRID_EXTENT_M, -GRID_EXTENT_M, GRID_EXTENT_M, GRID_EXTENT_M)
    scale = 1.0 / grid.resolution
    raster = grid.empty()
    for geometry in shapely.intersection(polygons, patch):
        parts = [
            part for part in shapely.get_parts(geometry) if part.geom_type == "Polygon" and not part.is_empty
        ]
        shells = [_ring_cells(part.exterior, scale) for part in parts]
        holes = [_ring_cells(ring, scale) for part in parts for ring in part.interiors]
        if shells:
            cv2.fillPoly(raster, shells, 1)
        if holes:
            cv2.fillPoly(raster, holes, 0)
    return raster


def _ring_cells(ring: shapely.LinearRing, scale: float) -> Int[np.ndarray, "V 2"]:
    return np.round((shapely.get_coordinates(ring) + GRID_EXTENT_M) * scale).astype(np.int32)


def decode_fine(record: Record) -> UInt8[np.ndarray, "1000 1000"]:
    """The record's 0.1 m raster, row forward, column left, 0 or 1.

    Raises:
        DataError: it is missing or no such picture.
    """
    what = f"keyframe {record['token']}: drivable_fine"
    if not record["drivable_fine"]:
        raise DataError(f"{what} is missing; convert the records again")
    size = (DRIVABLE_FINE_CELLS, DRIVABLE_FINE_CELLS)
    return (decode_grey(record["drivable_fine"], what, size) > 0).astype(np.uint8)

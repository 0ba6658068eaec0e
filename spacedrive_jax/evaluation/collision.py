"""Collisions of planned ego boxes and departures from the road, per step: on a grid, or exact.

On the evaluation grid it follows the planning metric the published scripts inherited from ST-P3
(`evaluate_single_coll`), with the heading rule of the OmniDrive variant, and the devkit's drawing of the
drivable area.

Without a grid, as polygon overlaps, what the `corrected` protocol tests: one box of the vehicle's size,
centred where the vehicle is, headed along the path, against the other boxes and the drivable area as they
are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
import shapely
from jaxtyping import Bool, Float, Int, Int32, UInt8
from skimage.draw import polygon

from spacedrive_jax import exact
from spacedrive_jax.constants import EGO_LENGTH, EGO_WIDTH
from spacedrive_jax.data.images import decode_grey
from spacedrive_jax.data.schema import DRIVABLE_FINE_CELLS, Record
from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.protocols import PolygonRule, StepRule

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
    """The future boxes of the agents that count as obstacles, ego frame of the keyframe, steps 1..6."""

    centre: Float[np.ndarray, "A T 2"]
    """x, y in metres."""
    yaw: Float[np.ndarray, "A T"]
    """Heading in radians."""
    size: Float[np.ndarray, "A 2"]
    """Length and width in metres, the same at every step."""
    mask: Bool[np.ndarray, "A T"]
    """Whether the agent is annotated at the step."""


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


def step_headings(waypoints: Float[np.ndarray, "M T 2"]) -> Float[np.ndarray, "M T"]:
    """Heading of each step's collision box: the direction of the step, 0 when it is shorter than 1 m."""
    steps = np.diff(waypoints, axis=1, prepend=0.0)
    headings = exact.arctan2(steps[..., 1], steps[..., 0])
    return np.where(exact.norm(steps) >= MIN_TURNING_STEP_M, headings, 0.0)


def box_cells(
    waypoints: Float[np.ndarray, "P 2"], headings: Float[np.ndarray, "P"], rule: StepRule
) -> Int[np.ndarray, "P K 2"]:
    """Cells (column x, row y) under the collision box at each waypoint.

    Cells are rotated about the ego origin, rounded, moved by the waypoint and truncated toward zero; what
    leaves the grid is clipped to its border (so it is tested there, as published).

    Args:
        waypoints: of any plans, metres, ego frame.
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
    moved = np.round(rotated - origin) + (waypoints / grid.cell_size)[:, None]
    return np.clip(np.trunc(moved), 0, grid.cells - 1).astype(np.int32)


def collides(
    waypoints: Float[np.ndarray, "M T 2"], obstacles: Obstacles, rule: StepRule
) -> Bool[np.ndarray, "M T"]:
    """Whether the ego box of each step covers a cell that an obstacle covers at that step.

    Only boxes that come near each other are laid on the grid; the result is that of drawing them all.

    Args:
        waypoints: those of M plans in the same scene, metres, ego frame.
        obstacles: the scene's agents at steps 1..T.
        rule: grid and ego offset.
    """
    hits = np.zeros(waypoints.shape[:2], bool)
    near = _near(waypoints, obstacles, rule)
    plan, step = np.nonzero(near.any(axis=1))
    if not len(plan):
        return hits
    grid = Grid(rule.resolution)
    ego = box_cells(waypoints[plan, step], step_headings(waypoints)[plan, step], rule)
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
        hits[plan[rows], now] = raster[ego[rows, :, 1], ego[rows, :, 0]].any(axis=-1)
        for (left, bottom), (right, top) in windows[drawn]:
            raster[bottom:top, left:right] = 0
    return hits


def _near(
    waypoints: Float[np.ndarray, "M T 2"], obstacles: Obstacles, rule: StepRule
) -> Bool[np.ndarray, "M A T"]:
    """Which agents' cells may meet the ego box's at a step: circles around both, with room for rounding."""
    ego_radius = exact.hypot(EGO_LENGTH / 2 + abs(rule.ego_offset), EGO_WIDTH / 2)
    reach = ego_radius + exact.norm(obstacles.size) / 2 + ROUNDING_CELLS * rule.resolution
    # A box beyond the grid is tested at its border, no farther from there than from its own centre.
    centres = np.clip(waypoints, -GRID_EXTENT_M, GRID_EXTENT_M)
    squared = np.sum((centres[:, None] - obstacles.centre) ** 2, axis=-1)
    return obstacles.mask & (squared <= reach[:, None] ** 2)


def _windows(polygons: Int[np.ndarray, "K 4 2"], grid: Grid) -> Int[np.ndarray, "K 2 2"]:
    """First and last-plus-one (column, row) of the cells a polygon can set."""
    return np.clip(np.stack([polygons.min(axis=1), polygons.max(axis=1) + 1], axis=1), 0, grid.cells)


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
    """The drivable area as 0.1 m cells (nuScenes basic map masks)."""

    cells: UInt8[np.ndarray, "n n"]
    """1 where drivable, row forward, column left, over the known square."""

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
    waypoints: Float[np.ndarray, "M T 2"], rule: PolygonRule
) -> tuple[Float[np.ndarray, "M T+1 2"], Float[np.ndarray, "M T+1 4 2"]]:
    """Centres and corners of the ego box now and at every waypoint, metres, ego frame.

    The heading is that of the step; a step shorter than 0.3 m keeps the one before (now: forward).
    """
    count = len(waypoints)
    origins = np.concatenate([np.zeros((count, 1, 2)), waypoints], axis=1)
    yaw = np.concatenate([np.zeros((count, 1)), tangent_yaw(waypoints, MIN_STEP_M)], axis=1)
    centre = origins + rule.ego_offset * np.stack(exact.cos_sin(yaw), axis=-1)
    return centre, box_corners(centre, yaw, EGO_SIZE_M)


def overlaps(
    waypoints: Float[np.ndarray, "M T 2"], obstacles: Obstacles, rule: PolygonRule
) -> Bool[np.ndarray, "M T"]:
    """Whether the ego box of each step touches an obstacle's box at that step.

    Args:
        waypoints: those of M plans in the same scene, metres, ego frame.
        obstacles: the scene's agents at steps 1..T.
        rule: where the ego box is.
    """
    hits = np.zeros(waypoints.shape[:2], bool)
    centre, boxes = (array[:, 1:] for array in ego_boxes(waypoints, rule))
    reach = (exact.norm(EGO_SIZE_M) + exact.norm(obstacles.size)) / 2
    distance = exact.norm(centre[:, None] - obstacles.centre[None])
    plan, agent, step = np.nonzero(obstacles.mask & (distance <= reach[:, None]))
    if len(plan):
        agents = box_corners(obstacles.centre[agent, step], obstacles.yaw[agent, step], obstacles.size[agent])
        touching = shapely.intersects(shapely.polygons(boxes[plan, step]), shapely.polygons(agents))
        hits[plan[touching], step[touching]] = True
    return hits


def leaves_road(
    waypoints: Float[np.ndarray, "M T 2"], area: DrivableArea, rule: PolygonRule
) -> Bool[np.ndarray, "M T+1"]:
    """Whether the ego box is off the road now (column 0) and at every waypoint.

    Args:
        waypoints: those of M plans, metres, ego frame.
        area: what is drivable.
        rule: where the ego box is.
    """
    _, boxes = ego_boxes(waypoints, rule)
    outside = area.outside(boxes.reshape(-1, 4, 2)).reshape(boxes.shape[:2])
    return outside >= OFF_ROAD_AREA_M2

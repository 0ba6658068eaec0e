"""The ground as rasters: what every patch of it is, its colour at several resolutions, and shadows.

Rasters are in global metres; row grows with y and column grows with x; cell (0, 0) covers the square
whose lower left corner is `origin`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

import cv2
import numpy as np
import shapely
from jaxtyping import Bool, Float, UInt8

from spacedrive_jax import exact
from spacedrive_jax.world import paths
from spacedrive_jax.world.town import LANE_WIDTH, SIDEWALK_WIDTH, STOP_SETBACK, Town


class Surface(enum.IntEnum):
    """Codes of the class raster."""

    GRASS = 0
    ASPHALT = 1
    SIDEWALK = 2
    KERB = 3
    WHITE = 4
    YELLOW = 5
    PAVING = 6


SURFACE_COLOURS = np.array(
    [
        (0.31, 0.40, 0.19),
        (0.38, 0.38, 0.39),
        (0.62, 0.60, 0.57),
        (0.70, 0.69, 0.66),
        (0.88, 0.88, 0.86),
        (0.85, 0.66, 0.16),
        (0.50, 0.47, 0.44),
    ],
    dtype=np.float32,
)


@dataclasses.dataclass(frozen=True)
class SurfaceMap:
    """Classes of ground cells around a scene."""

    classes: UInt8[np.ndarray, "R C"]
    origin: tuple[float, float]
    """Global x, y of the lower left corner of cell (0, 0), metres."""
    resolution: float
    """Metres per cell."""

    def to_cells(self, points: Float[np.ndarray, "... 2"]) -> Float[np.ndarray, "... 2"]:
        """Global metres to (column, row); a cell's centre has integer coordinates."""
        return (np.asarray(points) - np.array(self.origin)) / self.resolution - 0.5

    def drivable_distance(self) -> Float[np.ndarray, "R C"]:
        """Metres from each cell to the nearest drivable cell, 0 on the road."""
        drivable = np.isin(self.classes, (Surface.ASPHALT, Surface.WHITE, Surface.YELLOW))
        return _cells_to(drivable) * self.resolution


_FARTHEST_CELLS = 1000.0


def _cells_to(mask: Bool[np.ndarray, "R C"]) -> Float[np.ndarray, "R C"]:
    """Distance from each cell to the nearest true one, in cells, at most `_FARTHEST_CELLS`.

    OpenCV rounds its last bits as the processor's kernels do, but the square of a distance between cells is
    a whole number: up to a thousand cells, rounding it removes the difference.
    """
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.sqrt(np.rint(np.square(np.minimum(away, _FARTHEST_CELLS, dtype=np.float64))))


_SHIFT = 4


def fill(raster: UInt8[np.ndarray, "R C"], cells: Float[np.ndarray, "K 2"], value: int) -> None:
    """Fills a polygon given in (column, row), with sixteenths of a cell of precision, in place."""
    points = np.round(cells * (1 << _SHIFT)).astype(np.int32)
    cv2.fillPoly(raster, [points], int(value), lineType=cv2.LINE_8, shift=_SHIFT)


def polygons_of(geometry: shapely.Geometry) -> list[shapely.Polygon]:
    """The polygons of a polygon, multipolygon or collection."""
    if geometry.geom_type == "Polygon":
        return [geometry]
    parts = getattr(geometry, "geoms", [])
    return [polygon for part in parts for polygon in polygons_of(part)]


def rasterise(
    geometry: shapely.Geometry, surface_map: SurfaceMap, raster: UInt8[np.ndarray, "R C"], value: int
) -> None:
    """Draws a geometry with its holes into `raster` (same cells as `surface_map`), in place."""
    for polygon in polygons_of(geometry):
        mask = np.zeros_like(raster)
        fill(mask, surface_map.to_cells(np.array(polygon.exterior.coords)), 1)
        for hole in polygon.interiors:
            fill(mask, surface_map.to_cells(np.array(hole.coords)), 0)
        raster[mask > 0] = value


def surface_map_of_town(
    town: Town, low: Float[np.ndarray, "2"], high: Float[np.ndarray, "2"], resolution: float = 0.1
) -> SurfaceMap:
    """The classes inside a rectangle of a town: kerbs, sidewalks, lane markings, crossings, stop lines.

    Args:
        town: the road network.
        low: lower left corner, metres.
        high: upper right corner, metres.
        resolution: metres per cell.
    """
    columns, rows = np.ceil((high - low) / resolution).astype(int)
    area = shapely.box(*low, *high)
    result = SurfaceMap(np.zeros((rows, columns), dtype=np.uint8), (float(low[0]), float(low[1])), resolution)
    drivable = town.drivable.intersection(area.buffer(5.0))
    for geometry, value in (
        (drivable.buffer(SIDEWALK_WIDTH + 0.9).intersection(area.buffer(2.0)), Surface.PAVING),
        (drivable.buffer(SIDEWALK_WIDTH), Surface.SIDEWALK),
        (drivable.buffer(0.22), Surface.KERB),
        (drivable, Surface.ASPHALT),
    ):
        rasterise(geometry, result, result.classes, value)
    _draw_markings(town, result, area.buffer(30.0))
    return result


def _draw_markings(town: Town, surface_map: SurfaceMap, near: shapely.Geometry) -> None:
    raster = surface_map.classes

    def stroke(line: Float[np.ndarray, "K 2"], width: float, value: int) -> None:
        band = shapely.LineString(line).buffer(width / 2, cap_style="flat")
        for polygon in polygons_of(band):
            fill(raster, surface_map.to_cells(np.array(polygon.exterior.coords)), value)

    def dashes(line: Float[np.ndarray, "K 2"], width: float, on: float, off: float, value: int) -> None:
        lengths = paths.arc_lengths(line)
        for start in np.arange(0.0, lengths[-1] - on, on + off):
            s = np.linspace(start, start + on, 4)
            piece = np.stack([np.interp(s, lengths, line[:, axis]) for axis in range(2)], axis=1)
            stroke(piece, width, value)

    for road in town.roads:
        if not near.intersects(shapely.LineString(road.centre)):
            continue
        open_ends = [town.junctions[node].signalised for node, _ in (road.start, road.end)]
        first, last = (int(STOP_SETBACK + 0.5) if end else 0 for end in open_ends)
        body = road.centre[first : len(road.centre) - last]
        for side in (-0.12, 0.12):
            stroke(paths.offset(body, side), 0.11, Surface.YELLOW)
        for index in range(1, road.lanes):
            for side in (-1.0, 1.0):
                dashes(paths.offset(body, side * index * LANE_WIDTH), 0.13, 3.0, 4.5, Surface.WHITE)
        for side in (-1.0, 1.0):
            if road.parking:
                edge = side * road.lanes * LANE_WIDTH
                dashes(paths.offset(body, edge), 0.12, 5.0, 1.2, Surface.WHITE)
            else:
                stroke(paths.offset(body, side * (road.half_width - 0.3)), 0.12, Surface.WHITE)
    for lane in town.lanes.values():
        if lane.road is None or not town.junctions[lane.junction].signalised:
            continue
        if not near.intersects(shapely.Point(lane.centre[-1])):
            continue
        back = round(STOP_SETBACK) + 1
        across = paths.left_normals(lane.centre)[-back] * (LANE_WIDTH / 2 - 0.15)
        stroke(np.stack([lane.centre[-back] + across, lane.centre[-back] - across]), 0.4, Surface.WHITE)
    for crossing in town.crossings:
        if near.intersects(shapely.Polygon(crossing.polygon)):
            for stripe in _zebra_stripes(crossing.polygon):
                fill(raster, surface_map.to_cells(stripe), Surface.WHITE)


def _zebra_stripes(polygon: Float[np.ndarray, "4 2"]) -> Iterable[Float[np.ndarray, "4 2"]]:
    """Stripes 0.5 m wide, 0.5 m apart, parallel to the driving direction."""
    left, right = polygon[[0, 1]], polygon[[3, 2]]
    width = float(exact.norm(right[0] - left[0]))
    for start in np.arange(0.5, width - 0.8, 1.0):
        a, b = start / width, (start + 0.5) / width
        yield np.stack(
            [
                left[0] + a * (right[0] - left[0]),
                left[1] + a * (right[1] - left[1]),
                left[1] + b * (right[1] - left[1]),
                left[0] + b * (right[0] - left[0]),
            ]
        )


def surface_map_of_mask(
    drivable: UInt8[np.ndarray, "R C"], origin: tuple[float, float], resolution: float
) -> SurfaceMap:
    """Classes from a bare drivable mask: kerb and sidewalk are laid around it, markings are unknown."""
    away = _cells_to(drivable > 0) * resolution
    classes = np.full(drivable.shape, int(Surface.GRASS), dtype=np.uint8)
    classes[away < SIDEWALK_WIDTH + 0.9] = Surface.PAVING
    classes[away < SIDEWALK_WIDTH] = Surface.SIDEWALK
    classes[away < max(0.3, 1.5 * resolution)] = Surface.KERB
    classes[drivable > 0] = Surface.ASPHALT
    return SurfaceMap(classes, origin, resolution)


@dataclasses.dataclass(frozen=True)
class GroundColours:
    """Colours of the ground, averaged over ever larger cells so that the distance does not flicker."""

    levels: tuple[Float[np.ndarray, "_ _ 3"], ...]
    sizes: tuple[float, ...]
    """Metres per cell of each level."""
    origin: tuple[float, float]


def ground_colours(surface_map: SurfaceMap) -> GroundColours:
    """Builds the colour pyramid (each level three times coarser than the one before)."""
    level = SURFACE_COLOURS[surface_map.classes]
    levels, sizes = [level], [surface_map.resolution]
    while sizes[-1] < 2.0 and min(level.shape[:2]) > 6:
        rows, columns = (extent // 3 for extent in level.shape[:2])
        level = cv2.resize(level[: rows * 3, : columns * 3], (columns, rows), interpolation=cv2.INTER_AREA)
        levels.append(level)
        sizes.append(sizes[-1] * 3)
    return GroundColours(tuple(levels), tuple(sizes), surface_map.origin)


def shadow_outlines(
    footprints: Float[np.ndarray, "A K 2"], heights: Float[np.ndarray, "A"], sun: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "A 2*K 2"]:
    """Points whose convex hulls are the shadows of upright prisms.

    Args:
        footprints: convex outlines on the ground, global metres.
        heights: of the prisms, metres.
        sun: unit vector towards the sun.
    """
    shift = -sun[:2] / max(float(sun[2]), 0.15) * heights[:, None]
    return np.concatenate([footprints, footprints + shift[:, None]], axis=1)


def fill_hull(raster: UInt8[np.ndarray, "R C"], cells: Float[np.ndarray, "K 2"], value: int) -> None:
    """Fills the convex hull of points given in (column, row), in place."""
    fill(raster, cv2.convexHull(cells.astype(np.float32))[:, 0], value)

"""Map and route fields of a record: the drivable area around the vehicle, and the way that it is told of.

Patches are in the yaw-only ego frame (ego origin, x along the vehicle's yaw as the devkit has it, y left, no
roll or pitch). Rasters index [row, column]; the row grows with x (forward), the column with y (left); cell k
spans [-extent + k * pitch, -extent + (k + 1) * pitch).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
import shapely
from jaxtyping import Float, UInt8
from PIL import Image

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_PAST, NUM_PATH_POINTS, NUM_TARGET_POINTS
from spacedrive_jax.data.keyframe import EgoTrack, heading, inverse
from spacedrive_jax.data.route import RoadOption, Route, future_path
from spacedrive_jax.data.schema import DRIVABLE_CELLS, DRIVABLE_EXTENT, DRIVABLE_FINE_CELLS, Record

FAR_OFF = 30.0
"""Metres from the route beyond which it tells nothing (Bench2Drive's deviation limit)."""
PATH_JOINS = 5.0
"""Metres from the route within which the path may go on along it."""
JOIN_AHEAD = 2.0
"""Metres further on at which it does, so that it does not turn back for a lane centre beside it."""


def route_fields(track: EgoTrack, index: int, route: Route | None) -> Record:
    """All record fields about the route at keyframe `index` (see `record_features`).

    Args:
        track: the ego vehicle over the scene.
        index: of the keyframe.
        route: of the scene; None where none is known.
    """
    past = [command_route_at(track, index - 1 - step, route) for step in range(min(index, NUM_PAST))]
    ego_to_global = track.ego_to_global[index]
    place = None if route is None else _place(route, ego_to_global)
    targets = np.zeros((NUM_TARGET_POINTS, 2))
    if route is not None and place is not None:
        targets = to_ego(route.target_points(place), ego_to_global)
    return {
        "command_route": command_route_at(track, index, route),
        "past_command_route": np.array([*past, *[0] * (NUM_PAST - len(past))], np.int32),
        "target_points": targets,
        "route_valid": place is not None,
        **_path_fields(track, index, route),
    }


def command_route_at(track: EgoTrack, index: int, route: Route | None) -> int:
    """The route's command at keyframe `index`; `RoadOption.VOID` where the route is unknown or far."""
    place = None if route is None else _place(route, track.ego_to_global[index])
    return int(RoadOption.VOID if route is None or place is None else route.command(place))


def _place(route: Route, ego_to_global: Float[np.ndarray, "4 4"]) -> float | None:
    """Metres along the route, None far from it."""
    s, distance = route.project(ego_to_global[:2, 3], float(heading(ego_to_global)))
    return s if distance <= FAR_OFF else None


def _path_fields(track: EgoTrack, index: int, route: Route | None) -> Record:
    """The path: along the scene's whole future, not its next 3 s alone, then along the route."""
    ego_to_global = track.ego_to_global[index]
    future_to_ego = exact.matmul(inverse(ego_to_global), track.ego_to_global[index + 1 :])
    ahead = None
    if route is not None:
        end = track.ego_to_global[-1]
        s, distance = route.project(end[:2, 3], float(heading(end)))
        if distance <= PATH_JOINS:
            further = s + JOIN_AHEAD + np.arange(NUM_PATH_POINTS + 1)
            ahead = to_ego(route.at(further[further <= route.lengths[-1]]), ego_to_global)
    yaw = heading(future_to_ego)
    path = future_path(future_to_ego[:, :2, 3], yaw, NUM_PATH_POINTS, ahead)
    return {"path": path.points.astype(np.float64), "path_mask": path.mask}


def to_ego(
    points: Float[np.ndarray, "M 2"], ego_to_global: Float[np.ndarray, "4 4"]
) -> Float[np.ndarray, "M 2"]:
    """Global ground points at the vehicle's height, in its frame."""
    lifted = np.concatenate([points, np.full((len(points), 1), ego_to_global[2, 3])], axis=1)
    return exact.rotate(lifted - ego_to_global[:3, 3], ego_to_global[:3, :3].T)[:, :2]


@runtime_checkable
class DrivableMap(Protocol):
    """A map that knows where vehicles can drive."""

    source: str
    """`expansion` or `mask`, as in the record's `drivable_source`."""

    def raster(
        self, centre: Float[np.ndarray, "2"], yaw: float, extent: float, cells: int
    ) -> UInt8[np.ndarray, "cells cells"]:
        """1 where drivable, on a square of half side `extent` m around `centre` (global), turned by `yaw`."""

    def polygons(self, centre: Float[np.ndarray, "2"], yaw: float, extent: float) -> list[shapely.Polygon]:
        """The drivable polygons clipped to that square, in its frame; none where only a mask is known."""


class PolygonMap:
    """Drivable polygons in global metres: the map expansion's `drivable_area` layer, or a town's."""

    source = "expansion"

    def __init__(self, polygons: Sequence[shapely.Polygon]) -> None:
        """Args: valid polygons, with their holes."""
        self._polygons = list(polygons)
        self._tree = shapely.STRtree(self._polygons)
        self._last: tuple[tuple[float, ...], list[list[shapely.Polygon]]] | None = None

    def _clipped(
        self, centre: Float[np.ndarray, "2"], yaw: float, extent: float
    ) -> list[list[shapely.Polygon]]:
        """Per map polygon that meets the square, its pieces inside, in the square's frame.

        The last square's are kept: a record asks for the same one three times.
        """
        square = (float(centre[0]), float(centre[1]), float(yaw), float(extent))
        last = self._last
        if last is None or last[0] != square:
            last = self._last = (square, self._clip(centre, yaw, extent))
        return last[1]

    def _clip(self, centre: Float[np.ndarray, "2"], yaw: float, extent: float) -> list[list[shapely.Polygon]]:
        cos, sin = exact.cos_sin(yaw)
        rotation = np.array([[cos, -sin], [sin, cos]])
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * extent
        square = shapely.Polygon(exact.rotate(corners, rotation) + centre)
        axis_aligned = shapely.box(-extent, -extent, extent, extent)
        clipped = []
        for index in np.sort(self._tree.query(square, predicate="intersects")):
            piece = shapely.intersection(self._polygons[index], square)
            piece = shapely.transform(piece, lambda points: exact.rotate(points - centre, rotation.T))
            pieces = _polygon_parts(shapely.intersection(piece, axis_aligned))
            if pieces:
                clipped.append(pieces)
        return clipped

    def raster(
        self, centre: Float[np.ndarray, "2"], yaw: float, extent: float, cells: int
    ) -> UInt8[np.ndarray, "cells cells"]:
        """Draws the polygons as the devkit's `get_map_mask` does; see `DrivableMap.raster`.

        Vertices are rounded to cells, `cv2.fillPoly` draws boundary cells too, and each map polygon's holes
        are cut before the next polygon is drawn (fidelity Q40).
        """
        canvas = np.zeros((cells, cells), np.uint8)
        scale = cells / (2 * extent)

        def vertices(ring: Any) -> np.ndarray:
            return np.round((shapely.get_coordinates(ring) + extent) * scale).astype(np.int32)

        for pieces in self._clipped(centre, yaw, extent):
            cv2.fillPoly(canvas, [vertices(piece.exterior) for piece in pieces], 1)
            cv2.fillPoly(canvas, [vertices(hole) for piece in pieces for hole in piece.interiors], 0)
        # The devkit's canvas has row = y, column = x; fillPoly is not symmetric, so draw it so, then turn it.
        return cv2.transpose(canvas)

    def polygons(self, centre: Float[np.ndarray, "2"], yaw: float, extent: float) -> list[shapely.Polygon]:
        """All clipped polygons; see `DrivableMap.polygons`."""
        return [piece for pieces in self._clipped(centre, yaw, extent) for piece in pieces]


def _polygon_parts(geometry: Any) -> list[shapely.Polygon]:
    """The polygons of a geometry; lines and points left by a clip are dropped."""
    return [part for part in shapely.get_parts(geometry) if part.geom_type == "Polygon" and not part.is_empty]


def map_fields(drivable_map: DrivableMap | None, centre: Float[np.ndarray, "2"], yaw: float) -> Record:
    """All record fields about the map (see `record_features`).

    Args:
        drivable_map: None when the folder has no map of this location; rasters are then empty and the
            source is `none`.
        centre: ego position in the global frame, metres.
        yaw: `devkit_yaw` of the ego pose in the global frame, radians.
    """
    if drivable_map is None:
        return {
            "drivable": np.zeros((DRIVABLE_CELLS, DRIVABLE_CELLS), np.uint8),
            "drivable_fine": b"",
            "drivable_polygons": [],
            "drivable_source": "none",
        }
    polygons = drivable_map.polygons(centre, yaw, DRIVABLE_EXTENT)
    fine = drivable_map.raster(centre, yaw, DRIVABLE_EXTENT, DRIVABLE_FINE_CELLS)
    return {
        "drivable": drivable_map.raster(centre, yaw, DRIVABLE_EXTENT, DRIVABLE_CELLS),
        "drivable_fine": encode_bit_image(fine),
        "drivable_polygons": [shapely.to_wkb(polygon, byte_order=1) for polygon in polygons],
        "drivable_source": drivable_map.source,
    }


def encode_bit_image(mask: UInt8[np.ndarray, "rows columns"]) -> bytes:
    """A 1-bit PNG of a 0/1 mask."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(bool)).save(buffer, format="PNG")
    return buffer.getvalue()

"""Map fields of a record: the drivable area around the vehicle, as rasters and polygons.

Patches are in the yaw-only ego frame (ego origin, x along the vehicle's heading, y left, no roll or
pitch). Rasters index [row, column]; the row grows with x (forward), the column with y (left); cell k spans
[-extent + k * pitch, -extent + (k + 1) * pitch).
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
from spacedrive_jax.data.schema import DRIVABLE_CELLS, DRIVABLE_EXTENT, DRIVABLE_FINE_CELLS, Record


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

    def _clipped(
        self, centre: Float[np.ndarray, "2"], yaw: float, extent: float
    ) -> list[list[shapely.Polygon]]:
        """Per map polygon that meets the square, its pieces inside, in the square's frame."""
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
        return np.ascontiguousarray(canvas.T)

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
        yaw: ego heading in the global frame, radians.
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

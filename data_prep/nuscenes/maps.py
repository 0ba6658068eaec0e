"""Drivable area around a vehicle, from the map expansion's polygons or from the basic map mask.

Patches are in the yaw-only ego frame (ego origin, x along the vehicle's heading, y left, no roll or
pitch). Rasters index [row, column]; the row grows with x (forward), the column with y (left); cell k spans
[-extent + k * pitch, -extent + (k + 1) * pitch).
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import shapely
from jaxtyping import Float, UInt8
from PIL import Image

from data_prep.nuscenes.mask_png import cache_mask_bits
from spacedrive_jax.console import UserError
from spacedrive_jax.data.records import (
    DRIVABLE_CELLS,
    DRIVABLE_EXTENT,
    DRIVABLE_FINE_CELLS,
    Record,
)

MASK_RESOLUTION = 0.1
"""Metres per pixel of the basic map masks."""


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


class MaskMap:
    """The basic map mask, read through a memory-mapped bit array.

    Pixel (0, 0) is the top left; the global origin is the bottom left corner (devkit `MapMask`).
    """

    source = "mask"

    def __init__(self, cache: Path) -> None:
        self._bits = np.load(cache, mmap_mode="r")

    def raster(
        self, centre: Float[np.ndarray, "2"], yaw: float, extent: float, cells: int
    ) -> UInt8[np.ndarray, "cells cells"]:
        """Looks up the pixel under every cell centre; see `DrivableMap.raster`."""
        pitch = 2 * extent / cells
        offsets = -extent + pitch * (np.arange(cells) + 0.5)
        forward, left = offsets[:, None], offsets[None, :]
        x = (centre[0] + np.cos(yaw) * forward) - np.sin(yaw) * left
        y = (centre[1] + np.sin(yaw) * forward) + np.cos(yaw) * left
        rows, row_bytes = self._bits.shape
        column = np.round(x / MASK_RESOLUTION).astype(np.int64)
        row = np.round(rows - y / MASK_RESOLUTION).astype(np.int64)
        inside = (column >= 0) & (column < 8 * row_bytes) & (row >= 0) & (row < rows)
        packed = self._bits[np.where(inside, row, 0), np.where(inside, column >> 3, 0)]
        return np.where(inside, (packed >> (7 - (column & 7)).astype(np.uint8)) & 1, 0).astype(np.uint8)

    def polygons(self, centre: Float[np.ndarray, "2"], yaw: float, extent: float) -> list[shapely.Polygon]:
        """A mask has no polygons."""
        return []


class ExpansionMap:
    """The map expansion's `drivable_area` layer."""

    source = "expansion"

    def __init__(self, path: Path) -> None:
        self._polygons = _read_drivable_polygons(path)
        self._tree = shapely.STRtree(self._polygons)

    def _clipped(
        self, centre: Float[np.ndarray, "2"], yaw: float, extent: float
    ) -> list[list[shapely.Polygon]]:
        """Per map polygon that meets the square, its pieces inside, in the square's frame."""
        rotation = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * extent
        square = shapely.Polygon(corners @ rotation.T + centre)
        axis_aligned = shapely.box(-extent, -extent, extent, extent)
        clipped = []
        for index in np.sort(self._tree.query(square, predicate="intersects")):
            piece = shapely.intersection(self._polygons[index], square)
            piece = shapely.transform(piece, lambda points: (points - centre) @ rotation)
            pieces = _polygon_parts(shapely.intersection(piece, axis_aligned))
            if pieces:
                clipped.append(pieces)
        return clipped

    def raster(
        self, centre: Float[np.ndarray, "2"], yaw: float, extent: float, cells: int
    ) -> UInt8[np.ndarray, "cells cells"]:
        """Draws the polygons as the devkit's `get_map_mask` does; see `DrivableMap.raster`.

        Vertices are rounded to cells, `cv2.fillPoly` draws boundary cells too, and each map polygon's holes
        are cut before the next polygon is drawn (open_loop spec, 3.3 d).
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


def _read_drivable_polygons(path: Path) -> list[Any]:
    try:
        layers = json.loads(path.read_bytes())
        points = {node["token"]: (node["x"], node["y"]) for node in layers["node"]}
        rings: dict[str, Any] = {}
        for row in layers["polygon"]:
            exterior = [points[token] for token in row["exterior_node_tokens"]]
            holes = [[points[token] for token in hole["node_tokens"]] for hole in row["holes"]]
            rings[row["token"]] = (exterior, [hole for hole in holes if len(hole) > 2])
        tokens = [token for area in layers["drivable_area"] for token in area["polygon_tokens"]]
        polygons = [shapely.Polygon(*rings[token]) for token in tokens]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a map expansion with node, polygon and drivable_area layers "
            f"({type(error).__name__}: {error}); fetch it again"
        ) from None
    return [polygon if polygon.is_valid else shapely.make_valid(polygon) for polygon in polygons]


def expansion_file(dataroot: Path, location: str) -> Path:
    """Where the map expansion keeps a location's layers."""
    return Path(dataroot) / "maps" / "expansion" / f"{location}.json"


@functools.lru_cache(maxsize=4)
def open_expansion(path: Path) -> ExpansionMap:
    """Reads a map expansion once per process (four locations exist)."""
    return ExpansionMap(path)


def prepare_masks(
    dataroot: Path, masks: Sequence[str], cache_folder: Path, report: Callable[[], None]
) -> None:
    """Unpacks each basic map mask into `cache_folder`, one at a time, unless it is there already.

    Args:
        dataroot: the nuScenes folder.
        masks: mask files relative to it.
        cache_folder: where the bit arrays go.
        report: called after each mask.
    """
    cache_folder.mkdir(parents=True, exist_ok=True)
    for mask in masks:
        cache = mask_cache(cache_folder, mask)
        if not cache.is_file():
            cache_mask_bits(Path(dataroot) / mask, cache)
        report()


def mask_cache(cache_folder: Path, mask: str) -> Path:
    """The bit array of a mask file named relative to the dataroot."""
    return Path(cache_folder) / f"{Path(mask).stem}.npy"


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

"""Drivable area of a nuScenes location: the map expansion's polygons, or the basic map mask."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from jaxtyping import Float, UInt8

from data_prep.nuscenes.mask_png import cache_mask_bits
from spacedrive_jax import exact
from spacedrive_jax.console import UserError
from spacedrive_jax.data.keyframe_map import PolygonMap

MASK_RESOLUTION = 0.1
"""Metres per pixel of the basic map masks."""


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
        cos, sin = exact.cos_sin(yaw)
        x = (centre[0] + cos * forward) - sin * left
        y = (centre[1] + sin * forward) + cos * left
        rows, row_bytes = self._bits.shape
        column = np.round(x / MASK_RESOLUTION).astype(np.int64)
        row = np.round(rows - y / MASK_RESOLUTION).astype(np.int64)
        inside = (column >= 0) & (column < 8 * row_bytes) & (row >= 0) & (row < rows)
        packed = self._bits[np.where(inside, row, 0), np.where(inside, column >> 3, 0)]
        return np.where(inside, (packed >> (7 - (column & 7)).astype(np.uint8)) & 1, 0).astype(np.uint8)

    def polygons(self, centre: Float[np.ndarray, "2"], yaw: float, extent: float) -> list[shapely.Polygon]:
        """A mask has no polygons."""
        return []


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
def open_expansion(path: Path) -> PolygonMap:
    """Reads a map expansion's `drivable_area` layer once per process (four locations exist)."""
    return PolygonMap(_read_drivable_polygons(path))


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

"""The evaluation grid and boxes drawn on it, cell for cell as the published scripts draw them.

Rasters are indexed [row = y][column = x]; both grow with the coordinate and cell k spans
[-50 + k * resolution, -50 + (k + 1) * resolution) m of the ego frame. The cell size and origin are float32
and rounding follows from that: a double-precision grid moves some borders by a cell.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from jaxtyping import Float, Int32, UInt8

from spacedrive_jax import exact

GRID_EXTENT_M = 50.0


@dataclasses.dataclass(frozen=True)
class Grid:
    """A square grid over [-50, 50) m around the ego vehicle.

    Attributes:
        resolution: metres a cell.
    """

    resolution: float

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
    centre: Float[np.ndarray, "*batch 2"],
    yaw: Float[np.ndarray, "*batch"],
    size: Float[np.ndarray, "*batch 2"],
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

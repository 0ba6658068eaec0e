"""What stands on the land around the roads: buildings, trees and lamp posts.

They are a deterministic function of global position and the drivable surface: every cell of a global grid
draws its own content from a hash of its coordinates, so that the same place looks the same from every
keyframe, in every scene, and for the synthetic town and real maps alike.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.world.ground import SurfaceMap
from spacedrive_jax.world.shapes import (
    Blocks,
    Colour,
    Material,
    Quads,
    blob,
    blocks_of,
    box,
    concatenate,
    place,
)

_FACADES: tuple[Colour, ...] = (
    (0.62, 0.42, 0.33),
    (0.70, 0.66, 0.58),
    (0.50, 0.53, 0.57),
    (0.78, 0.76, 0.71),
    (0.55, 0.47, 0.38),
    (0.40, 0.44, 0.50),
    (0.72, 0.58, 0.44),
)
_BUILDING_GRID = 15.0
_TREE_GRID = 8.0
_POST_GRID = 24.0


@dataclasses.dataclass(frozen=True)
class Scenery:
    """What stands on the land, plus what throws long shadows: (outline, height) pairs."""

    blocks: Blocks
    casters: tuple[tuple[Float[np.ndarray, "_ 2"], float], ...]


def cell_generator(kind: int, column: int, row: int) -> np.random.Generator:
    """The random generator of one cell of a global grid."""
    return np.random.default_rng([kind, column + 1_000_000, row + 1_000_000])


def place_scenery(surface_map: SurfaceMap, seed: int = 0) -> Scenery:
    """Fills the land off the road.

    Args:
        surface_map: which cells are drivable; scenery keeps clear of them.
        seed: changes the whole look of the land.
    """
    distance = surface_map.drivable_distance()
    rows, columns = distance.shape
    low = np.array(surface_map.origin)
    high = low + np.array([columns, rows]) * surface_map.resolution

    def clearance(x: float, y: float) -> float:
        column, row = np.round(surface_map.to_cells(np.array([x, y]))).astype(int)
        inside = 0 <= column < columns and 0 <= row < rows
        return float(distance[row, column]) if inside else -1.0

    parts: list[Quads] = []
    casters: list[tuple[Float[np.ndarray, "K 2"], float]] = []

    def cells(size: float) -> list[tuple[int, int]]:
        first = np.floor(low / size).astype(int)
        last = np.ceil(high / size).astype(int)
        return [(c, r) for r in range(first[1], last[1]) for c in range(first[0], last[0])]

    for column, row in cells(_BUILDING_GRID):
        rng = cell_generator(3 * seed, column, row)
        x, y = (np.array([column, row]) + rng.uniform(0.35, 0.65, 2)) * _BUILDING_GRID
        free = clearance(x, y)
        kind, size, height = rng.random(), rng.uniform(9.0, 13.5, 2), rng.gamma(3.0, 4.0) + 6.0
        colour = _FACADES[int(rng.integers(len(_FACADES)))]
        turn = rng.uniform(-0.2, 0.2)
        if kind < 0.2 or free < 5.0:
            continue
        room = (free - 4.2) / exact.hypot(0.5, 0.5)
        if room < 5.5:
            continue
        size = np.minimum(size, room)
        parts.append(_building(x, y, turn, size, min(height, 55.0), colour))
        half = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * size / 2
        cos, sin = exact.cos_sin(turn)
        outline = exact.rotate(half, np.array([[cos, -sin], [sin, cos]])) + np.array([x, y])
        casters.append((outline, min(height, 25.0)))
    for column, row in cells(_TREE_GRID):
        rng = cell_generator(3 * seed + 1, column, row)
        x, y = (np.array([column, row]) + rng.uniform(0.1, 0.9, 2)) * _TREE_GRID
        free = clearance(x, y)
        present, height, radius = rng.random(), rng.uniform(4.5, 8.5), rng.uniform(1.3, 2.2)
        green = np.array([0.20, 0.34, 0.13]) * rng.uniform(0.75, 1.25)
        if not (2.2 < free < 4.0 and present < 0.75) and not (free > 12.0 and present < 0.25):
            continue
        parts.append(_tree(x, y, height, radius, (float(green[0]), float(green[1]), float(green[2]))))
        angles = np.linspace(0, 2 * np.pi, 9)[:-1]
        outline = np.array([x, y]) + radius * np.stack(exact.cos_sin(angles), axis=1)
        casters.append((outline * 1.0, height * 0.8))
    for column, row in cells(_POST_GRID):
        rng = cell_generator(3 * seed + 2, column, row)
        x, y = (np.array([column, row]) + rng.uniform(0.0, 1.0, 2)) * _POST_GRID
        spot = _nearest_kerb(distance, surface_map, x, y)
        if spot is not None:
            parts.append(_lamp_post(*spot))
    return Scenery(blocks_of(parts), tuple(casters))


def _nearest_kerb(
    distance: Float[np.ndarray, "R C"], surface_map: SurfaceMap, x: float, y: float
) -> tuple[float, float, float] | None:
    """Slides a point downhill to 0.7 m from the road; also the direction to the road."""
    rows, columns = distance.shape
    reach = max(1, round(0.8 / surface_map.resolution))
    for _ in range(4):
        column, row = np.round(surface_map.to_cells(np.array([x, y]))).astype(int)
        if not (reach <= column < columns - reach and reach <= row < rows - reach):
            return None
        here = float(distance[row, column])
        if not 0.3 < here < 9.0:
            return None
        gradient = np.array(
            [
                distance[row, column + reach] - distance[row, column - reach],
                distance[row + reach, column] - distance[row - reach, column],
            ]
        )
        norm = float(exact.norm(gradient))
        if norm < 0.2:
            return None
        direction = -gradient / norm
        if abs(here - 0.7) < 0.15:
            return x, y, exact.arctan2(direction[1], direction[0])
        x, y = np.array([x, y]) + direction * (here - 0.7)
    return None


def _building(
    x: float, y: float, turn: float, size: Float[np.ndarray, "2"], height: float, colour: Colour
) -> Quads:
    width, depth = float(size[0]), float(size[1])
    walls = box((0, 0, height / 2), (width, depth, height), colour, Material.WALL)
    walls = Quads(walls.vertices[:4], walls.colours[:4], walls.materials[:4], walls.groups[:4])
    roof = (colour[0] * 0.6, colour[1] * 0.6, colour[2] * 0.6)
    parts = [
        walls,
        box((0, 0, height + 0.3), (width + 0.5, depth + 0.5, 0.6), roof),
        box((width * 0.15, 0, height + 1.4), (width * 0.3, depth * 0.3, 1.8), (0.45, 0.45, 0.46)),
    ]
    return place(concatenate(parts), np.array([x, y, 0.0]), turn)


def _tree(x: float, y: float, height: float, radius: float, green: Colour) -> Quads:
    crown = height - radius * 1.2
    lighter = (green[0] * 1.2, green[1] * 1.2, green[2] * 1.15)
    parts = [box((0, 0, crown / 2), (0.26, 0.26, crown), (0.30, 0.22, 0.15), Material.BARK)]
    for centre, size, colour in (
        ((0.0, 0.0, 0.0), 1.0, green),
        ((0.45, 0.30, 0.50), 0.7, lighter),
        ((-0.40, -0.45, 0.35), 0.65, green),
    ):
        dx, dy, dz = (radius * part for part in centre)
        r = radius * size
        parts.append(blob((dx, dy, crown + dz), (r, r, r * 1.12), colour, Material.FOLIAGE))
    return place(concatenate(parts), np.array([x, y, 0.0]), x + y)


def _lamp_post(x: float, y: float, towards: float) -> Quads:
    grey = (0.35, 0.36, 0.38)
    parts = [
        box((0, 0, 3.3), (0.14, 0.14, 6.6), grey),
        box((0.7, 0, 6.6), (1.5, 0.09, 0.09), grey),
        box((1.35, 0, 6.52), (0.55, 0.22, 0.1), (1.0, 0.93, 0.75), Material.LAMP),
    ]
    return place(concatenate(parts), np.array([x, y, 0.0]), towards)

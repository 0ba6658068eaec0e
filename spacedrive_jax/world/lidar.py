"""A spinning LiDAR in the same world: rays against the ground plane and the very quads the cameras see."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

from spacedrive_jax import exact
from spacedrive_jax.world import paths, views
from spacedrive_jax.world.shapes import Quads

MIN_RANGE = 1.0
NOISE = 0.008
"""Standard deviation of the measured range, metres."""
_TOLERANCE = 1e-9
"""By which a beam may miss an edge; closes the seams between neighbours."""

_REFLECTIVITY = np.array([30.0, 25.0, 12.0, 90.0, 8.0, 110.0, 15.0])
_GROUND_REFLECTIVITY = 14.0
_HIGHEST_OBJECT = 0.19 * views.LIDAR_RANGE
"""Metres above the sensor that its highest beam stays below."""


def sweep(
    quads: Quads, lidar_to_global: Float[np.ndarray, "4 4"], rng: np.random.Generator
) -> Float[np.ndarray, "P 5"]:
    """One revolution, taken at a single instant.

    Args:
        quads: everything that stands on the ground, global frame.
        lidar_to_global: sensor pose; the sensor stands upright.
        rng: of the range and intensity noise.

    Returns:
        float32 rows x, y, z (sensor frame, metres), intensity (0 to 255), ring (0 is the lowest beam), in
        firing order (clockwise columns, rings upwards), beams without an echo left out.
    """
    east, north = exact.cos_sin(_azimuths()[:, None])
    flat, up = exact.cos_sin(np.radians(views.LIDAR_ELEVATIONS))
    # (columns, rings, 3), sensor frame
    rays = np.stack([flat * east, flat * north, np.broadcast_to(up, (len(east), len(up)))], axis=-1)
    ground = -rays[..., 2] / lidar_to_global[2, 3]
    nearness = np.maximum(ground, 1.0 / views.LIDAR_RANGE)  # 1 / range
    reflectivity = np.where(ground > 1.0 / views.LIDAR_RANGE, _GROUND_REFLECTIVITY, 0.0)
    quad, column, ring, inverse = _hits(quads, lidar_to_global)
    before = nearness[column, ring]
    np.maximum.at(nearness, (column, ring), inverse)
    nearest = np.flatnonzero((inverse > before) & (inverse == nearness[column, ring]))
    brightness = _REFLECTIVITY[quads.materials] * (0.5 + quads.colours.mean(axis=1))
    reflectivity[column[nearest], ring[nearest]] = brightness[quad[nearest]]
    echo = (reflectivity > 0) & (nearness > 1.0 / views.LIDAR_RANGE) & (nearness < 1.0 / MIN_RANGE)
    reach = 1.0 / nearness + rng.normal(0.0, NOISE, nearness.shape)
    intensity = np.clip(reflectivity * rng.uniform(0.6, 1.4, nearness.shape), 1, 255).round()
    rings = np.broadcast_to(np.arange(32), nearness.shape)
    cloud = np.concatenate([rays * reach[..., None], intensity[..., None], rings[..., None]], axis=-1)
    return cloud[echo].astype(np.float32)


def _azimuths() -> Float[np.ndarray, "K"]:
    """Direction of each column in the sensor frame, radians, clockwise from behind."""
    return np.pi - (np.arange(views.LIDAR_COLUMNS) + 0.5) * 2 * np.pi / views.LIDAR_COLUMNS


def _hits(
    quads: Quads, lidar_to_global: Float[np.ndarray, "4 4"]
) -> tuple[Int[np.ndarray, "K"], Int[np.ndarray, "K"], Int[np.ndarray, "K"], Float[np.ndarray, "K"]]:
    """Quad, column, ring and inverse range (1/m) of every meeting of a beam and a quad.

    The rays of a column are (cos a, sin a, t) for the azimuth a and the tangent t of the elevation: along
    a column the edges of a quad are affine in t (see `spans`).
    """
    points = quads.vertices - lidar_to_global[:3, 3]
    near = (exact.norm(points[..., :2]).min(axis=1) < views.LIDAR_RANGE) & (
        points[..., 2].min(axis=1) < _HIGHEST_OBJECT
    )
    chosen = np.flatnonzero(near)
    points = exact.rotate(points[chosen], lidar_to_global[:3, :3].T)
    normals = np.cross(points[:, 2] - points[:, 0], points[:, 3] - points[:, 1])
    distance = exact.dot(normals, points[:, 0])
    facing = np.flatnonzero(distance < -1e-9)
    chosen, points = chosen[facing], points[facing]
    planes = (normals[facing] / distance[facing, None]).T
    first, last = _columns(points)
    seen = np.flatnonzero(last > first)
    chosen, points, planes = chosen[seen], points[seen], planes[:, seen]

    edges = np.cross(points, np.roll(points, -1, axis=1))
    edges *= np.sign(exact.dot(edges, points.mean(axis=1)[:, None]))[..., None]
    facet, turned = paths.expand(first[seen], last[seen])
    column = turned % views.LIDAR_COLUMNS
    cos, sin = (part[column] for part in exact.cos_sin(_azimuths()))
    along = np.ascontiguousarray(edges.T)[..., facet]
    low, high = paths.intervals(along[0] * cos + along[1] * sin, along[2])
    elevations = np.radians(views.LIDAR_ELEVATIONS)
    (cosines, _), tangents = exact.cos_sin(elevations), exact.tan(elevations)
    lowest = np.searchsorted(tangents, low - _TOLERANCE)
    line, ring = paths.expand(lowest, np.searchsorted(tangents, high + _TOLERANCE, side="right"))
    plane = planes[:, facet]
    level = plane[0] * cos + plane[1] * sin
    inverse = (level[line] + plane[2, line] * tangents[ring]) * cosines[ring]
    valid = inverse < 1.0 / MIN_RANGE
    line, ring = line[valid], ring[valid]
    return chosen[facet[line]], column[line], ring, inverse[valid]


def _columns(points: Float[np.ndarray, "Q 4 3"]) -> tuple[Int[np.ndarray, "Q"], Int[np.ndarray, "Q"]]:
    """First column that may see each quad and one past the last; they may run over the seam at the back."""
    x, y = points[..., 0], points[..., 1]
    middle = exact.arctan2(y.mean(axis=1), x.mean(axis=1))
    spread = (exact.arctan2(y, x) - middle[:, None] + np.pi) % (2 * np.pi) - np.pi
    step = 2 * np.pi / views.LIDAR_COLUMNS
    first = np.ceil((np.pi - (middle + spread.max(axis=1))) / step - 0.5 - _TOLERANCE).astype(int)
    last = np.floor((np.pi - (middle + spread.min(axis=1))) / step - 0.5 + _TOLERANCE).astype(int) + 1
    overhead = exact.hypot(x, y).min(axis=1) < 1.0  # may surround the axis: look everywhere
    return np.where(overhead, 0, first), np.where(overhead, views.LIDAR_COLUMNS, last)


def count_inside(
    cloud: Float[np.ndarray, "P 5"],
    lidar_to_global: Float[np.ndarray, "4 4"],
    centres: Float[np.ndarray, "A 3"],
    sizes: Float[np.ndarray, "A 3"],
    yaws: Float[np.ndarray, "A"],
) -> list[int]:
    """Points of a sweep inside each box (length, width, height; global frame), as nuScenes counts them."""
    points = exact.transform(cloud[:, :3].astype(np.float64), lidar_to_global)
    reach = exact.norm(sizes[:, :2]) / 2
    candidates = cKDTree(points[:, :2]).query_ball_point(centres[:, :2], reach)
    counts = []
    for centre, size, yaw, nearby in zip(centres, sizes, yaws, candidates, strict=True):
        near = points[nearby] - centre
        cos, sin = exact.cos_sin(yaw)
        local = np.stack([cos * near[:, 0] + sin * near[:, 1], cos * near[:, 1] - sin * near[:, 0]], axis=1)
        inside = (np.abs(local) <= size[:2] / 2).all(axis=1) & (np.abs(near[:, 2]) <= size[2] / 2)
        counts.append(int(inside.sum()))
    return counts

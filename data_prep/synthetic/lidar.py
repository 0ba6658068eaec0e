"""A spinning LiDAR in the same world: rays against the ground plane and the very quads the cameras see."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.spatial import cKDTree

from data_prep.synthetic import rig
from data_prep.synthetic.shapes import Quads

MIN_RANGE = 1.0
NOISE = 0.008
"""Standard deviation of the measured range, metres."""

_REFLECTIVITY = np.array([30.0, 25.0, 12.0, 90.0, 8.0, 110.0, 15.0])


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
    columns = np.arange(rig.LIDAR_COLUMNS)
    azimuth = np.pi - (columns + 0.5) * 2 * np.pi / rig.LIDAR_COLUMNS
    elevation = np.radians(rig.LIDAR_ELEVATIONS)
    rays = np.stack(
        [
            np.cos(elevation)[None] * np.cos(azimuth)[:, None],
            np.cos(elevation)[None] * np.sin(azimuth)[:, None],
            np.tile(np.sin(elevation), (len(azimuth), 1)),
        ],
        axis=-1,
    )  # (columns, rings, 3), sensor frame
    height = lidar_to_global[2, 3]
    nearness = np.maximum(-rays[..., 2] / height, 1.0 / rig.LIDAR_RANGE)  # 1 / range
    reflectivity = np.where(-rays[..., 2] / height > 1.0 / rig.LIDAR_RANGE, 14.0, 0.0)
    points = (quads.vertices - lidar_to_global[:3, 3]) @ lidar_to_global[:3, :3]
    normals = np.cross(points[:, 2] - points[:, 0], points[:, 3] - points[:, 1])
    distance = np.einsum("qc,qc->q", normals, points[:, 0])
    flat = np.hypot(points[..., 0], points[..., 1])
    vertical = np.arctan2(points[..., 2], np.maximum(flat.min(axis=1, keepdims=True), 0.05))
    seen = (distance < -1e-9) & (flat.min(axis=1) < rig.LIDAR_RANGE)
    seen &= (vertical.max(axis=1) > elevation[0]) & (points[..., 2].min(axis=1) < 0.19 * rig.LIDAR_RANGE)
    chosen = np.flatnonzero(seen)
    edges = np.cross(points, np.roll(points, -1, axis=1))
    edges *= np.sign(np.einsum("qkc,qc->qk", edges, points.mean(axis=1)))[..., None]
    angles = np.arctan2(points[..., 1], points[..., 0])
    middle = np.arctan2(points[..., 1].mean(axis=1), points[..., 0].mean(axis=1))
    spread = (angles - middle[:, None] + np.pi) % (2 * np.pi) - np.pi
    step = 2 * np.pi / rig.LIDAR_COLUMNS
    first = np.floor((np.pi - (middle + spread.max(axis=1))) / step - 0.5).astype(int)
    last = np.ceil((np.pi - (middle + spread.min(axis=1))) / step - 0.5).astype(int) + 1
    overhead = flat.min(axis=1) < 1.0  # may surround the axis: look everywhere
    first, last = np.where(overhead, 0, first), np.where(overhead, rig.LIDAR_COLUMNS, last)
    for index in chosen:
        span = np.arange(first[index], last[index]) % rig.LIDAR_COLUMNS
        local = rays[span]
        inside = np.ones(local.shape[:2], dtype=bool)
        for edge in edges[index]:
            inside &= local @ edge >= 0
        if not inside.any():
            continue
        inverse = (local @ normals[index]) / distance[index]
        closer = inside & (inverse > nearness[span]) & (inverse < 1.0 / MIN_RANGE)
        where = np.nonzero(closer)
        nearness[span[where[0]], where[1]] = inverse[where]
        material = int(quads.materials[index])
        bright = 0.5 + float(quads.colours[index].mean())
        reflectivity[span[where[0]], where[1]] = _REFLECTIVITY[material] * bright
    echo = (reflectivity > 0) & (nearness > 1.0 / rig.LIDAR_RANGE) & (nearness < 1.0 / MIN_RANGE)
    reach = 1.0 / nearness + rng.normal(0.0, NOISE, nearness.shape)
    intensity = np.clip(reflectivity * rng.uniform(0.6, 1.4, nearness.shape), 1, 255).round()
    rings = np.broadcast_to(np.arange(32), nearness.shape)
    cloud = np.concatenate([rays * reach[..., None], intensity[..., None], rings[..., None]], axis=-1)
    return cloud[echo].astype(np.float32)


def count_inside(
    cloud: Float[np.ndarray, "P 5"],
    lidar_to_global: Float[np.ndarray, "4 4"],
    centres: Float[np.ndarray, "A 3"],
    sizes: Float[np.ndarray, "A 3"],
    yaws: Float[np.ndarray, "A"],
) -> list[int]:
    """Points of a sweep inside each box (length, width, height; global frame), as nuScenes counts them."""
    points = cloud[:, :3].astype(np.float64) @ lidar_to_global[:3, :3].T + lidar_to_global[:3, 3]
    reach = np.hypot(sizes[:, 0], sizes[:, 1]) / 2
    candidates = cKDTree(points[:, :2]).query_ball_point(centres[:, :2], reach)
    counts = []
    for centre, size, yaw, nearby in zip(centres, sizes, yaws, candidates, strict=True):
        near = points[nearby] - centre
        cos, sin = np.cos(yaw), np.sin(yaw)
        local = np.stack([cos * near[:, 0] + sin * near[:, 1], cos * near[:, 1] - sin * near[:, 0]], axis=1)
        inside = (np.abs(local) <= size[:2] / 2).all(axis=1) & (np.abs(near[:, 2]) <= size[2] / 2)
        counts.append(int(inside.sum()))
    return counts

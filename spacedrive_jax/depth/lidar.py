"""Patch depth from the keyframe's LiDAR sweep."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from spacedrive_jax import exact
from spacedrive_jax.data.records import NUM_CAMERAS, Record
from spacedrive_jax.errors import DataError

MIN_DEPTH = 1.0
"""Nearer returns belong to the ego vehicle, metres."""
POINT_FLOATS = 5
"""A sweep file is float32 x, y, z, intensity, ring index per point."""


def sweep_points(record: Record) -> Float[np.ndarray, "P 3"]:
    """The sweep's points in the sensor's frame, metres.

    Raises:
        DataError: the bytes are not whole points, or a coordinate is not finite.
    """
    sweep = record["lidar"]
    if len(sweep) % (4 * POINT_FLOATS):
        raise DataError(f"keyframe {record['token']}: {len(sweep)} bytes of LiDAR are not whole points")
    points = np.frombuffer(sweep, "<f4").reshape(-1, POINT_FLOATS)[:, :3].astype(np.float64)
    if not np.isfinite(points).all():
        raise DataError(f"keyframe {record['token']}: the LiDAR sweep has points that are not finite")
    return points


def points_in_cameras(record: Record) -> list[Float[np.ndarray, "P 3"]]:
    """The sweep in each camera's frame, metres, moved to that camera's own time by the ego poses.

    sensor -> ego at LiDAR time -> global -> ego at camera time -> camera (nuScenes devkit convention).
    """
    points = sweep_points(record)
    lidar_to_global = exact.matmul(record["ego_to_global"], record["lidar_to_ego"])
    moved = []
    for camera in range(NUM_CAMERAS):
        camera_to_global = exact.matmul(
            record["camera_ego_to_global"][camera], record["camera_to_ego"][camera]
        )
        lidar_to_camera = exact.matmul(exact.affine_inverse(camera_to_global), lidar_to_global)
        moved.append(exact.transform(points, lidar_to_camera))
    return moved


def sparse_patch_depth(
    points: Float[np.ndarray, "P 3"],
    intrinsics: Float[np.ndarray, "3 3"],
    image_size: tuple[int, int],
    grid: tuple[int, int],
) -> Float[np.ndarray, "h w"]:
    """Nearest return of every patch; inf where there is none.

    Args:
        points: camera frame, metres.
        intrinsics: pixels of an image of `image_size`.
        image_size: (height, width), pixels.
        grid: (h, w) patches.
    """
    points = points[points[:, 2] > MIN_DEPTH]
    projected = exact.rotate(points, intrinsics)
    pixels = projected[:, :2] / projected[:, 2:]
    column = np.floor(pixels[:, 0] * grid[1] / image_size[1]).astype(int)
    row = np.floor(pixels[:, 1] * grid[0] / image_size[0]).astype(int)
    inside = (column >= 0) & (column < grid[1]) & (row >= 0) & (row < grid[0])
    depth = np.full(grid, np.inf)
    np.minimum.at(depth, (row[inside], column[inside]), points[inside, 2])
    return depth


def densify(sparse: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"] | None:
    """Gives every empty patch the depth of the nearest patch that has one; None if none has."""
    known = np.isfinite(sparse)
    if not known.any():
        return None
    rows, columns = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    return sparse[rows, columns]

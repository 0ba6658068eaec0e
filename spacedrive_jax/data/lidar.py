"""The LiDAR sweep as depth: pooled for the visual tokens, and as what a network's depth is aligned to.

The alignment is a robust scale and shift for each camera. A depth network's error is for the most part a
factor (and a little offset) per image; a few hundred LiDAR returns tell both. An affine map with positive
scale commutes with min, median and mean pooling, so that two numbers per camera, kept beside pooled network
depth, are all that fusion needs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from spacedrive_jax import exact
from spacedrive_jax.bounds import COUNT, POSITIVE, Bound, Bounds, check_bounds
from spacedrive_jax.constants import NUM_CAMERAS
from spacedrive_jax.data.keyframe import camera_to_global
from spacedrive_jax.data.schema import Record
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


def points_in_cameras(record: Record) -> list[Float[np.ndarray, "_ 3"]]:
    """The sweep in each camera's frame, metres, moved to that camera's own time by the ego poses; points
    that are farther than `MIN_DEPTH` in front of it.

    sensor -> ego at LiDAR time -> global -> ego at camera time -> camera (nuScenes devkit convention).
    """
    points = sweep_points(record)
    lidar_to_global = exact.matmul(record["ego_to_global"], record["lidar_to_ego"])
    moved = []
    for camera in range(NUM_CAMERAS):
        global_to_camera = exact.affine_inverse(camera_to_global(record, camera))
        lidar_to_camera = exact.matmul(global_to_camera, lidar_to_global)
        depth = exact.dot(points, lidar_to_camera[2, :3]) + lidar_to_camera[2, 3]
        moved.append(exact.transform(points[depth > MIN_DEPTH], lidar_to_camera))
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


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """When LiDAR is trusted to correct a camera's depth."""

    min_points: int = 60
    """Fewer returns in the image leave the camera unaligned."""
    max_depth: float = 80.0
    """Farther returns are left out, metres."""
    scale_bounds: tuple[float, float] = (0.1, 10.0)
    """A scale outside says that network and LiDAR do not see the same; the camera stays unaligned."""
    min_spread: float = 1.5
    """90th over 10th percentile of the network's depth below which only the scale is fitted."""
    iterations: int = 20

    BOUNDS: ClassVar[Bounds] = {
        "min_points": Bound(2),
        "max_depth": POSITIVE,
        "scale_bounds": POSITIVE,
        "min_spread": Bound(1),
        "iterations": COUNT,
    }

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS)


class Alignment(NamedTuple):
    """fused = scale * network + shift."""

    scale: float
    shift: float
    """Metres."""
    points: int
    """LiDAR returns it rests on; 0 with scale 1 and shift 0 where the camera is not aligned."""


UNALIGNED = Alignment(1.0, 0.0, 0)
HUBER = 1.345
"""In standard deviations: 95 % efficiency for Gaussian residuals (Huber 1981)."""
MAD_TO_DEVIATION = 1.4826
SMALLEST_DEVIATION = 1e-3


def depth_pairs(
    depth: Float[np.ndarray, "H W"],
    points: Float[np.ndarray, "P 3"],
    intrinsics: Float[np.ndarray, "3 3"],
) -> tuple[Float[np.ndarray, "K"], Float[np.ndarray, "K"]]:
    """The network's depth at the pixels that LiDAR returns fall on, and the returns' depth.

    Args:
        depth: the network's, metres.
        points: LiDAR, camera frame, metres.
        intrinsics: pixels of `depth`.
    """
    points = points[points[:, 2] > MIN_DEPTH]
    projected = exact.rotate(points, intrinsics)
    column, row = np.floor(projected[:, :2] / projected[:, 2:]).astype(int).T
    inside = (column >= 0) & (column < depth.shape[1]) & (row >= 0) & (row < depth.shape[0])
    return depth[row[inside], column[inside]].astype(np.float64), points[inside, 2]


def align(
    network: Float[np.ndarray, "K"], lidar: Float[np.ndarray, "K"], config: FusionConfig | None = None
) -> Alignment:
    """Fits scale and shift by iteratively reweighted least squares on relative residuals.

    Huber's weights bound the pull of returns that the camera does not see (the sensors stand apart) and of
    object borders.

    Args:
        network: depth of the network, metres.
        lidar: depth of the LiDAR returns at the same pixels, metres.
        config: thresholds.

    Returns:
        The alignment; `UNALIGNED` where there are too few returns or the fit is not credible.
    """
    config = config or FusionConfig()
    usable = (lidar < config.max_depth) & (network > 0) & np.isfinite(network)
    network, lidar = network[usable], lidar[usable]
    if len(lidar) < config.min_points:
        return UNALIGNED
    scale, shift = float(np.median(lidar / network)), 0.0
    low, high = np.percentile(network, [10, 90])
    with_shift = high > config.min_spread * low
    # Residuals relative to the return's depth: an error of 1 m matters at 5 m, hardly at 60 m.
    slope, level = network / lidar, 1.0 / lidar
    for _ in range(config.iterations):
        residual = np.abs((scale * network + shift) / lidar - 1.0)
        deviation = max(MAD_TO_DEVIATION * float(np.median(residual)), SMALLEST_DEVIATION)
        weight = np.minimum(1.0, HUBER * deviation / np.maximum(residual, 1e-12))
        # The normal equations of weight * (scale * slope + shift * level - 1)^2, not LAPACK's fit: the bits
        # of scale and shift are kept beside the depth.
        if not with_shift:
            scale = float(np.sum(weight * slope) / np.sum(weight * slope * slope))
            continue
        a, b, c = (np.sum(weight * x * y) for x, y in ((slope, slope), (slope, level), (level, level)))
        d, e = np.sum(weight * slope), np.sum(weight * level)
        determinant = a * c - b * b
        scale, shift = float((c * d - b * e) / determinant), float((a * e - b * d) / determinant)
    if not config.scale_bounds[0] <= scale <= config.scale_bounds[1]:
        return UNALIGNED
    return Alignment(scale, shift, len(lidar))


def apply(depth: Float[np.ndarray, "*B"], alignment: Alignment) -> Float[np.ndarray, "*B"]:
    """Aligned depth, metres, never nearer than LiDAR's own nearest return may be."""
    aligned = alignment.scale * depth + alignment.shift
    return np.maximum(aligned, np.minimum(depth, MIN_DEPTH)).astype(depth.dtype)

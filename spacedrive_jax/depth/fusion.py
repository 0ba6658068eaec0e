"""Aligns a network's depth to the LiDAR returns of the same camera by a robust scale and shift.

A depth network's error is for the most part a factor (and a little offset) per image; a few hundred LiDAR
returns tell both. An affine map with positive scale commutes with min, median and mean pooling, so that two
numbers per camera, kept beside pooled network depth, are all that fusion needs.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.depth.lidar import MIN_DEPTH


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

"""Sizes, cameras and rays of UniDepthV2's inference (Piccinelli et al. 2025)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spacedrive_jax.console import UserError

SMALLEST_X = 1e-3
"""Floor of |x| in a ray's azimuth, as in the published code."""


@dataclasses.dataclass(frozen=True)
class InferenceSize:
    """How images of one size are padded and scaled for the network; static."""

    image: tuple[int, int]
    """Height and width of the images, pixels."""
    padded: tuple[int, int]
    """The same after padding to a legal aspect ratio."""
    top: int
    left: int
    """Rows and columns of padding before the image."""
    factor: float
    """Scale of pixel coordinates (the network's sides are rounded up to whole patches on top of it)."""
    network: tuple[int, int]
    """Height and width of the network's input, pixels."""


def inference_size(
    image: tuple[int, int],
    *,
    ratio_bounds: tuple[float, float],
    pixel_bounds: tuple[float, float],
    multiple: int,
    resolution_level: int | None = None,
) -> InferenceSize:
    """Pads to a legal aspect ratio, then scales to a legal pixel count, as the published code does.

    One departure: the published code crops a column off some images of legal aspect (about one size in
    twenty, where a floating-point product falls below a whole number) and then returns a depth one column
    wide; here such images are not padded.

    Args:
        image: (height, width), pixels.
        ratio_bounds: smallest and largest width/height.
        pixel_bounds: smallest and largest pixel count of the network's input.
        multiple: patch size.
        resolution_level: 0..9 narrows the pixel bounds to that tenth; None keeps them.

    Raises:
        UserError: the level is out of range or the image is empty.
    """
    height, width = image
    if height < 1 or width < 1:
        raise UserError(f"an image of {height}x{width} pixels has no depth")
    low, high = pixel_bounds
    if resolution_level is not None:
        if not 0 <= resolution_level < 10:
            raise UserError(f"resolution_level {resolution_level} must be 0..9")
        step = (high - low) / 10
        low, high = low + resolution_level * step, low + (resolution_level + 1) * step
    ratio = width / height
    legal = min(max(ratio, ratio_bounds[0]), ratio_bounds[1])
    padded = (int(width / legal), width) if ratio > legal else (height, max(width, int(height * legal)))
    pixels = padded[0] * padded[1]
    factor = math.sqrt(min(max(pixels, low), high) / pixels)
    rows, columns = (math.ceil(int(side * factor) / multiple) * multiple for side in padded)
    return InferenceSize(
        image,
        padded,
        (padded[0] - height) // 2,
        (padded[1] - width) // 2,
        factor,
        (rows, columns),
    )


def to_network(intrinsics: Float[Array, "B 3 3"], size: InferenceSize) -> Float[Array, "B 4"]:
    """Intrinsics of the image to (fx, fy, cx, cy) in pixels of the network's input."""
    focal_x, focal_y = intrinsics[:, 0, 0], intrinsics[:, 1, 1]
    centre_x, centre_y = intrinsics[:, 0, 2] + size.left, intrinsics[:, 1, 2] + size.top
    return jnp.stack([focal_x, focal_y, centre_x, centre_y], axis=-1).astype(jnp.float32) * size.factor


def to_image(parameters: Float[Array, "B 4"], size: InferenceSize) -> Float[Array, "B 3 3"]:
    """Inverse of `to_network`."""
    return intrinsic_matrix(parameters / size.factor - jnp.array([0, 0, size.left, size.top], jnp.float32))


def intrinsic_matrix(parameters: Float[Array, "B 4"]) -> Float[Array, "B 3 3"]:
    """(fx, fy, cx, cy) to 3x3 matrices."""
    focal_x, focal_y, centre_x, centre_y = jnp.moveaxis(parameters, -1, 0)
    zero, one = jnp.zeros_like(focal_x), jnp.ones_like(focal_x)
    rows = [[focal_x, zero, centre_x], [zero, focal_y, centre_y], [zero, zero, one]]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def pixel_rays(parameters: Float[Array, "B 4"], size: tuple[int, int]) -> Float[Array, "B H W 3"]:
    """Unit rays through the pixel centres (index + 0.5) of images of `size`, camera frame."""
    v = jnp.arange(size[0], dtype=jnp.float32)[:, None] + 0.5
    u = jnp.arange(size[1], dtype=jnp.float32)[None, :] + 0.5
    focal_x, focal_y, centre_x, centre_y = (each[:, None, None] for each in jnp.moveaxis(parameters, -1, 0))
    shape = (parameters.shape[0], *size)
    x = jnp.broadcast_to((u - centre_x) / focal_x, shape)
    y = jnp.broadcast_to((v - centre_y) / focal_y, shape)
    rays = jnp.stack([x, y, jnp.ones_like(x)], axis=-1)
    return rays / jnp.linalg.norm(rays, axis=-1, keepdims=True)


def normalised(vectors: Float[Array, "*B C"], floor: float) -> Float[Array, "*B C"]:
    """Vectors over their norm, which counts as `floor` at least."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), floor)


def ray_angles(rays: Float[Array, "B H W 3"], grid: tuple[int, int]) -> Float[Array, "B P 2"]:
    """Polar angle and azimuth of the rays averaged over each cell of a grid, radians, row-major."""
    # Smoothed with the triangle filter of an antialiased bilinear resize.
    shape = (rays.shape[0], *grid, 3)
    x, y, z = jnp.moveaxis(normalised(jax.image.resize(rays, shape, "linear", antialias=True), 1e-4), -1, 0)
    polar = jnp.arccos(jnp.clip(z, -1.0, 1.0))
    away_from_zero = jnp.where(x >= 0, 1.0, -1.0) * jnp.maximum(jnp.abs(x), SMALLEST_X)
    azimuth = jnp.arctan2(y, away_from_zero)
    return jnp.stack([polar, azimuth], axis=-1).reshape(rays.shape[0], -1, 2)


def ray_embedding(angles: Float[Array, "B P 2"], grid: tuple[int, int], width: int) -> Float[Array, "B P D"]:
    """Sines of both angles at D/2 octave-spaced frequencies: all of the polar angle, then of the azimuth."""
    top = math.log2(max(grid) // 2)
    frequencies = jnp.exp2(jnp.linspace(0.0, top, width // 2, dtype=jnp.float32))
    waves = jnp.sin(jnp.pi * angles[..., None] * frequencies)
    return waves.reshape(*angles.shape[:2], -1)

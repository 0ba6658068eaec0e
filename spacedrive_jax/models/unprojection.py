"""From depth maps to 3D points of patches in the ego frame: pooling, unprojection (paper section 3.1)."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Pools a depth map onto a patch grid with the published window rule.


Pooling = Literal["min", "median", "mean"]


@functools.lru_cache(maxsize=64)
def windows(size: int, cells: int) -> tuple[Int[np.ndarray, "cells K"], Bool[np.ndarray, "cells K"]]:
    """Indices of every window along one axis, padded to the widest window.

    Window i covers [round(i*size/cells), round((i+1)*size/cells)), with Python's round (half to even), as
    in the published code. A window can be empty where cells > size.

    Returns:
        indices: in [0, size), padding repeats a valid index; valid: which of them belong to the window.
    """
    edges = np.array([round(i * size / cells) for i in range(cells + 1)])
    start, stop = edges[:-1], edges[1:]
    steps = np.arange(max(1, int((stop - start).max())))
    indices = start[:, None] + steps[None, :]
    valid = indices < stop[:, None]
    return np.minimum(indices, size - 1), valid


def pool_depth(
    depth: Float[Any, "*B H W"], grid: tuple[int, int], pooling: Pooling = "min"
) -> Float[Any, "*B h w"]:
    """Pools depth over the windows of a patch grid; jitted by its callers, or plain numpy on the host.

    Args:
        depth: metres; a jax or a numpy array decides where the work is done.
        grid: (h, w) cells.
        pooling: `min` (the paper's), `median` (the lower of two middle values, as torch.median) or `mean`.

    Returns:
        One depth per cell, metres; 0 for an empty window, as in the published code.
    """
    xp: ModuleType = jnp if isinstance(depth, jax.Array) else np
    rows, row_valid = windows(depth.shape[-2], grid[0])
    columns, column_valid = windows(depth.shape[-1], grid[1])
    if pooling == "min" and xp is np:  # of many pixels: rows first, without a copy of all windows
        nearest = _least(_least(depth, rows, row_valid), columns, column_valid, axis=-1)
        filled = np.any(row_valid, axis=1, keepdims=True) & np.any(column_valid, axis=1)
        return np.where(filled, nearest, 0).astype(depth.dtype)
    # Rows first, then columns: (..., h, Kr, w, Kc) -> (..., h, w, Kr*Kc)
    gathered = depth[..., rows[:, :, None, None], columns[None, None, :, :]]
    gathered = xp.swapaxes(gathered, -3, -2)
    gathered = gathered.reshape(*gathered.shape[:-2], -1)
    valid = (row_valid[:, None, :, None] & column_valid[None, :, None, :]).reshape(*grid, -1)
    count = valid.sum(-1)
    if pooling == "mean":
        return xp.where(valid, gathered, 0).sum(-1) / np.maximum(count, 1)
    far = xp.where(valid, gathered, xp.inf)
    if pooling == "min":
        pooled = far.min(-1)
    else:
        middle = np.maximum(count - 1, 0)[..., None] // 2
        index = xp.broadcast_to(middle, (*gathered.shape[:-1], 1))
        pooled = xp.take_along_axis(xp.sort(far, axis=-1), index, axis=-1)[..., 0]
    return xp.where(count > 0, pooled, 0).astype(depth.dtype)


def _least(
    depth: Float[np.ndarray, "*B"], indices: np.ndarray, valid: np.ndarray, axis: int = -2
) -> Float[np.ndarray, "*C"]:
    """The least over windows of one axis; inf for an empty one."""
    parts = [
        np.min(depth.take(window[inside], axis), axis, initial=np.inf)
        for window, inside in zip(indices, valid, strict=True)
    ]
    return np.stack(parts, axis)


MIN_DEPTH = 1e-5
"""Floor of the depth that multiplies pixel coordinates; the third entry keeps the raw depth."""


def patch_centres(grid: tuple[int, int], patch_pixels: int) -> Float[np.ndarray, "h w 2"]:
    """Pixel centres (u, v) of the visual tokens in the image the processor made, row-major.

    Args:
        grid: (h, w) merged patches.
        patch_pixels: side of a merged patch in pixels (28 for Qwen2.5-VL, 14 for LLaVA-1.5).
    """
    h, w = grid
    v, u = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    return ((np.stack([u, v], axis=-1) + 0.5) * patch_pixels).astype(np.float32)


def ego_to_image(
    intrinsics: Float[Array, "*B 3 3"], camera_to_ego: Float[Array, "*B 4 4"]
) -> Float[Array, "*B 4 4"]:
    """K @ inverse(camera_to_ego): ego-frame points to (u*d, v*d, d, 1); the reference's `lidar2img`."""
    homogeneous = jnp.zeros((*intrinsics.shape[:-2], 4, 4), jnp.float32)
    homogeneous = homogeneous.at[..., :3, :3].set(intrinsics).at[..., 3, 3].set(1.0)
    ego_to_camera = jnp.linalg.inv(camera_to_ego.astype(jnp.float32))
    return jnp.matmul(homogeneous, ego_to_camera, precision=jax.lax.Precision.HIGHEST)


def unproject(
    patch_depth: Float[Array, "*B h w"],
    centres: Float[Array, "h w 2"],
    ego_to_image: Float[Array, "*B 4 4"],
) -> Float[Array, "*B h w 3"]:
    """Lifts patch centres to the ego frame.

    Args:
        patch_depth: z-depth in the camera frame, metres.
        centres: pixels, in the image that `ego_to_image` projects to.
        ego_to_image: 4x4 projection per camera.

    Returns:
        Points in the ego frame, metres, float32: inverse(ego_to_image) @ (u*d, v*d, d, 1).
    """
    depth = patch_depth.astype(jnp.float32)[..., None]
    rays = jax.lax.broadcast_to_rank(centres, depth.ndim) * jnp.maximum(depth, MIN_DEPTH)
    homogeneous = jnp.concatenate([rays, depth, jnp.ones_like(depth)], axis=-1)
    image_to_ego = jnp.linalg.inv(ego_to_image.astype(jnp.float32))
    return jnp.einsum("...ij,...hwj->...hwi", image_to_ego, homogeneous, precision=jax.lax.Precision.HIGHEST)[
        ..., :3
    ]

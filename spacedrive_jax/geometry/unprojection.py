"""From patches with depth to 3D points in the ego frame (paper section 3.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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
    rays = centres * jnp.maximum(depth, MIN_DEPTH)
    homogeneous = jnp.concatenate([rays, depth, jnp.ones_like(depth)], axis=-1)
    image_to_ego = jnp.linalg.inv(ego_to_image.astype(jnp.float32))
    return jnp.einsum("...ij,...hwj->...hwi", image_to_ego, homogeneous, precision=jax.lax.Precision.HIGHEST)[
        ..., :3
    ]

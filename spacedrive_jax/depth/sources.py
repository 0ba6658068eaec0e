"""Patch depth of a record, from the first source that has it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float

from spacedrive_jax.cameras import CAMERAS
from spacedrive_jax.console import UserError
from spacedrive_jax.data.records import DEPTH_SCALE, NUM_CAMERAS, Record
from spacedrive_jax.depth import lidar
from spacedrive_jax.geometry.patch_depth import Pooling, pool_depth

DepthSource = Literal["exact", "lidar"]
"""`exact`: the renderer's own depth (drawn images only). `lidar`: the sweep, densified on the patch grid."""


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    """Where the depth of the visual tokens comes from."""

    sources: tuple[DepthSource, ...] = ("exact", "lidar")
    """In order of preference, chosen for each camera of each keyframe; an error where none has it."""
    pooling: Pooling = "min"
    """The paper min-pools, so that a patch takes its nearest surface (section 3.1)."""
    far: float = 200.0
    """Depth of sky and of surfaces beyond it, metres."""


def record_patch_depth(
    record: Record, grid: tuple[int, int], config: DepthConfig
) -> tuple[Float[np.ndarray, "N h w"], list[DepthSource]]:
    """Pooled depth of every camera on the grid of visual tokens.

    Returns:
        Depth, metres, float32, and which source each camera's came from.

    Raises:
        UserError: a camera has no depth from any of the configured sources.
    """
    depth = np.empty((NUM_CAMERAS, *grid), np.float32)
    used: list[DepthSource] = []
    in_cameras = lidar.points_in_cameras(record) if record["lidar"] and "lidar" in config.sources else None
    for camera in range(NUM_CAMERAS):
        for source in config.sources:
            if source == "exact":
                found = _exact(record, camera, grid, config)
            else:
                found = _lidar(record, camera, grid, in_cameras)
            if found is not None:
                depth[camera] = np.minimum(found, config.far)
                used.append(source)
                break
        else:
            raise UserError(
                f"keyframe {record['token']} has no depth for {CAMERAS[camera]} from "
                f"{' or '.join(config.sources)}: set data.depth.sources to a source the records have, or "
                "convert with --missing-images render"
            )
    return depth, used


def decode_exact_depth(png: bytes) -> Float[np.ndarray, "H W"]:
    """Decodes a record's `exact_depth` image: metres, 0 where nothing was hit (sky)."""
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    return image.astype(np.float32) / DEPTH_SCALE


def _exact(
    record: Record, camera: int, grid: tuple[int, int], config: DepthConfig
) -> Float[np.ndarray, "h w"] | None:
    if not record["exact_depth"][camera]:
        return None
    depth = decode_exact_depth(record["exact_depth"][camera])
    return pool_depth(np.where(depth > 0, depth, np.float32(config.far)), grid, config.pooling)


def _lidar(
    record: Record, camera: int, grid: tuple[int, int], in_cameras: list[np.ndarray] | None
) -> Float[np.ndarray, "h w"] | None:
    if in_cameras is None:
        return None
    height, width = (int(side) for side in record["image_size"][camera])
    sparse = lidar.sparse_patch_depth(
        in_cameras[camera], record["camera_intrinsics"][camera], (height, width), grid
    )
    return lidar.densify(sparse)

"""A keyframe's views lifted to one coloured point cloud, as a PLY file that any viewer opens."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from spacedrive_jax import exact
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data import lidar
from spacedrive_jax.data.encoded_images import decode_depth, decode_photo
from spacedrive_jax.data.poses import camera_to_ego
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import DataError
from spacedrive_jax.io import write_bytes

FARTHEST = 80.0
"""Points farther away are left out, metres."""
LIDAR_COLOUR = (255, 64, 64)


def keyframe_points(
    record: Record, full_depth: tuple[bytes, ...] | None = None
) -> tuple[Float[np.ndarray, "P 3"], UInt8[np.ndarray, "P 3"]]:
    """Every pixel with depth as a point, and the LiDAR sweep in red.

    Args:
        record: the keyframe.
        full_depth: a network's depth of every view (`CachedDepth.full`); None takes the exact depth of drawn
            views.

    Returns:
        Points in the ego frame at the keyframe, metres, and their colours, RGB.

    Raises:
        DataError: the keyframe has neither depth of every pixel nor a sweep.
    """
    points, colours = [], []
    encoded = record["exact_depth"] if full_depth is None else full_depth
    for camera, png in enumerate(encoded):
        if not png or not record["images"][camera]:
            continue
        what = f"keyframe {record['token']}: the {CAMERAS[camera]}"
        depth = decode_depth(png, f"{what} depth")
        image = decode_photo(record["images"][camera], f"{what} image")
        image = cv2.resize(image, depth.shape[::-1], interpolation=cv2.INTER_AREA)
        native = record["image_size"][camera]
        scale = np.array([depth.shape[1] / native[1], depth.shape[0] / native[0], 1.0])
        intrinsics = record["camera_intrinsics"][camera] * scale[:, None]
        row, column = np.nonzero((depth > 0) & (depth < FARTHEST))
        pixels = np.stack([column + 0.5, row + 0.5, np.ones(len(row))], axis=1)
        in_camera = exact.rotate(pixels, exact.inverse_3x3(intrinsics)) * depth[row, column, None]
        points.append(exact.transform(in_camera, camera_to_ego(record, camera)))
        colours.append(image[row, column])
    if record["lidar"]:
        sweep = lidar.sweep_points(record)
        to_ego = record["lidar_to_ego"]
        points.append(exact.transform(sweep, to_ego))
        colours.append(np.tile(np.array(LIDAR_COLOUR, np.uint8), (len(sweep), 1)))
    if not points:
        raise DataError(
            f"keyframe {record['token']} has no depth of every pixel and no LiDAR: `add-depth --full` adds it"
        )
    return np.concatenate(points), np.concatenate(colours)


def write_ply(file: Path, points: Float[np.ndarray, "P 3"], colours: UInt8[np.ndarray, "P 3"]) -> None:
    """Writes a binary little-endian PLY; the file appears only when whole."""
    vertices = np.empty(
        len(points),
        [(name, "<f4") for name in ("x", "y", "z")] + [(name, "u1") for name in ("red", "green", "blue")],
    )
    for index, name in enumerate(("x", "y", "z")):
        vertices[name] = points[:, index]
    for index, name in enumerate(("red", "green", "blue")):
        vertices[name] = colours[:, index]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    header += [f"property float {name}" for name in ("x", "y", "z")]
    header += [f"property uchar {name}" for name in ("red", "green", "blue")]
    write_bytes(file, ("\n".join([*header, "end_header"]) + "\n").encode() + vertices.tobytes())

"""What a record shows in its cameras: points, segments and boxes of the ego frame, its images and depth."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from spacedrive_jax import exact
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data import images
from spacedrive_jax.data.images import decode_photo
from spacedrive_jax.data.keyframe import ego_to_camera
from spacedrive_jax.data.lidar import sweep_points
from spacedrive_jax.data.schema import Record
from spacedrive_jax.evaluation.rasters import box_corners

MIN_DEPTH_M = 0.5
"""Nothing nearer to a camera is drawn."""
BOX_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))
"""Pairs of `upright_corners`."""


def project(
    points: Float[np.ndarray, "n 3"], record: Record, camera: int
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n"]]:
    """Pixel coordinates (x, y at the native image size) and depth in metres of points in the ego frame.

    Pixels of points nearer than 0.5 m, or behind, are nan.
    """
    in_camera = exact.transform(points, ego_to_camera(record, camera))
    depth = in_camera[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = _to_pixels(in_camera, record, camera)
    return np.where(depth[:, None] > MIN_DEPTH_M, pixels, np.nan), depth


def project_segments(
    starts: Float[np.ndarray, "n 3"], ends: Float[np.ndarray, "n 3"], record: Record, camera: int
) -> list[Float[np.ndarray, "2 2"]]:
    """Segments of the ego frame in a camera's image, cut off 0.5 m before it; those behind are left out.

    Args:
        starts: metres, ego frame of the keyframe.
        ends: likewise.
        record: the keyframe.
        camera: index of the camera.

    Returns:
        Two pixel positions (x, y at the native image size) for each segment that is seen.
    """
    to_camera = ego_to_camera(record, camera)
    segments = []
    for start, end in zip(exact.transform(starts, to_camera), exact.transform(ends, to_camera), strict=True):
        if max(start[2], end[2]) < MIN_DEPTH_M:
            continue
        if min(start[2], end[2]) < MIN_DEPTH_M:
            share = (MIN_DEPTH_M - start[2]) / (end[2] - start[2])
            cut = start + share * (end - start)
            start, end = (cut, end) if start[2] < MIN_DEPTH_M else (start, cut)
        segments.append(_to_pixels(np.stack([start, end]), record, camera))
    return segments


def _to_pixels(in_camera: Float[np.ndarray, "n 3"], record: Record, camera: int) -> Float[np.ndarray, "n 2"]:
    image = exact.rotate(in_camera, np.asarray(record["camera_intrinsics"][camera]))
    return image[:, :2] / image[:, 2:]


def upright_corners(boxes: Float[np.ndarray, "A 7"]) -> Float[np.ndarray, "A 8 3"]:
    """Corners of upright boxes: four at the bottom from front left clockwise, then four at the top.

    Args:
        boxes: x y z length width height yaw, centre, as `agent_boxes` of a record.
    """
    ground = box_corners(boxes[:, :2], boxes[:, 6], boxes[:, 3:5])
    heights = boxes[:, 2, None] + boxes[:, 5, None] / 2 * np.array([-1, 1])
    levels = [
        np.concatenate([ground, np.repeat(height[:, None, None], 4, axis=1)], axis=2) for height in heights.T
    ]
    return np.concatenate(levels, axis=1)


def decode_image(record: Record, camera: int) -> UInt8[np.ndarray, "H W 3"] | None:
    """The camera's RGB image, or None when the record has no pixels for it.

    Raises:
        DataError: it is damaged.
    """
    data = record["images"][camera]
    return decode_photo(data, f"keyframe {record['token']}: the {CAMERAS[camera]} image") if data else None


def decode_depth(record: Record, camera: int) -> Float[np.ndarray, "H W"] | None:
    """The exact depth image in metres, 0 where unknown, or None when the record has none."""
    data = record["exact_depth"][camera]
    what = f"keyframe {record['token']}: the {CAMERAS[camera]} depth"
    return images.decode_depth(data, what) if data else None


def lidar_points(record: Record) -> Float[np.ndarray, "n 3"] | None:
    """The sweep's points in the ego frame of the keyframe, metres, or None without a sweep."""
    if not record["lidar"]:
        return None
    points = sweep_points(record)
    return exact.transform(points, record["lidar_to_ego"])


def ground_ribbon(
    waypoints: Float[np.ndarray, "T 2"], width: float, spacing: float = 0.25
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"]]:
    """Left and right border, on the ground, of the strip a vehicle sweeps along the waypoints.

    Args:
        waypoints: metres, ego frame; the path starts at the origin.
        width: width of the strip in metres.
        spacing: distance between neighbouring border points in metres.
    """
    path = np.concatenate([np.zeros((1, 2)), waypoints])
    length = np.concatenate([[0.0], exact.norm(np.diff(path, axis=0)).cumsum()])
    at = np.linspace(0.0, length[-1], max(int(length[-1] / spacing), 1) + 1)
    # np.interp wants distinct positions: a vehicle at rest repeats its waypoint.
    keep = np.concatenate([[True], np.diff(length) > 1e-6])
    centre = np.stack([np.interp(at, length[keep], path[keep, axis]) for axis in range(2)], axis=1)
    tangent = np.gradient(centre, axis=0) if len(centre) > 1 else np.zeros_like(centre)
    norm = exact.norm(tangent)[:, None]
    tangent = np.divide(tangent, norm, out=np.tile([1.0, 0.0], (len(centre), 1)), where=norm > 1e-9)
    offset = width / 2 * np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)
    left, right = (np.pad(centre + side * offset, ((0, 0), (0, 1))) for side in (1, -1))
    return left, right

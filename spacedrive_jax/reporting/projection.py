"""What a record shows in its cameras: points, segments and boxes of the ego frame, its images and depth."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from spacedrive_jax import exact
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data import images
from spacedrive_jax.data.images import decode_photo
from spacedrive_jax.data.keyframe import camera_to_ego, ego_to_camera
from spacedrive_jax.data.lidar import sweep_points
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.collision import box_corners

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
    """The camera's RGB image at its native size, or None when the record has no pixels for it.

    Raises:
        DataError: it is damaged.
    """
    if not record["images"][camera]:
        return None
    image = decode_photo(record["images"][camera], f"keyframe {record['token']}: the {CAMERAS[camera]} image")
    height, width = (int(side) for side in record["image_size"][camera])
    if image.shape[:2] != (height, width):  # kept at the size of training
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


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
        depth = images.decode_depth(png, f"{what} depth")
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
        sweep = sweep_points(record)
        to_ego = record["lidar_to_ego"]
        points.append(exact.transform(sweep, to_ego))
        colours.append(np.tile(np.array(LIDAR_COLOUR, np.uint8), (len(sweep), 1)))
    if not points:
        raise DataError(
            f"keyframe {record['token']} has no depth of every pixel and no LiDAR: `add-depth --full` adds it"
        )
    return np.concatenate(points), np.concatenate(colours)


def has_points(record: Record) -> bool:
    """Whether a keyframe has depth of every pixel, or a sweep."""
    return bool(record["lidar"]) or any(map(bool, record["exact_depth"]))

"""Points of the ego frame in camera images, and depth images from records."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from spacedrive_jax import exact
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data import encoded_images
from spacedrive_jax.data.encoded_images import decode_photo
from spacedrive_jax.data.lidar import sweep_points
from spacedrive_jax.data.schema import Record

MIN_DEPTH_M = 0.5


def ego_to_camera(record: Record, camera: int) -> Float[np.ndarray, "4 4"]:
    """Takes points in the ego frame of the keyframe to the camera frame at the camera's own time."""
    camera_to_global = exact.matmul(record["camera_ego_to_global"][camera], record["camera_to_ego"][camera])
    return exact.matmul(exact.affine_inverse(camera_to_global), record["ego_to_global"])


def project(
    points: Float[np.ndarray, "n 3"], record: Record, camera: int
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n"]]:
    """Pixel coordinates (x, y at the native image size) and depth in metres of points in the ego frame.

    Pixels of points nearer than 0.5 m, or behind, are nan.
    """
    in_camera = exact.transform(points, ego_to_camera(record, camera))
    depth = in_camera[:, 2]
    image = exact.rotate(in_camera, np.asarray(record["camera_intrinsics"][camera]))
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = image[:, :2] / image[:, 2:]
    return np.where(depth[:, None] > MIN_DEPTH_M, pixels, np.nan), depth


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
    return encoded_images.decode_depth(data, what).astype(np.float64) if data else None


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

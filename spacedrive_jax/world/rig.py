"""The sensor rig: six cameras and a LiDAR with round values typical of nuScenes cars."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.errors import ConfigError

NATIVE_SIZE = (900, 1600)
"""Height and width in pixels the nominal intrinsics refer to."""


def parse_image_size(text: str) -> tuple[int, int]:
    """Reads `--image-size` WxH; returns height and width.

    Raises:
        ConfigError: the text is no size, or one no camera has.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--image-size {text!r} is not WIDTHxHEIGHT, for example 704x396")
    width, height = (int(part) for part in parts)
    if not (32 <= width <= 4096 and 18 <= height <= 4096):
        raise ConfigError(f"--image-size {text} must lie between 32x18 and 4096x4096")
    return height, width


@dataclasses.dataclass(frozen=True)
class CameraMount:
    """One camera: where it sits and looks in the ego frame, and when it fires."""

    channel: str
    position: tuple[float, float, float]
    yaw: float
    """Viewing direction, degrees to the left of straight ahead."""
    focal: float
    principal: tuple[float, float]
    lead_ms: float
    """How long before the LiDAR time stamp the camera fires, milliseconds (means of the real data)."""

    def to_ego(self) -> Float[np.ndarray, "4 4"]:
        """camera_to_ego; camera x right, y down, z forward, pitched down by half a degree."""
        cos, sin = exact.cos_sin(np.radians(self.yaw))
        flat, dip = exact.cos_sin(np.radians(0.5))
        forward = np.array([cos * flat, sin * flat, -dip])
        right = np.array([sin, -cos, 0.0])
        down = np.cross(forward, right)
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([right, down, forward], axis=1)
        matrix[:3, 3] = self.position
        return matrix

    def intrinsics(self, image_size: tuple[int, int]) -> Float[np.ndarray, "3 3"]:
        """Pixels at an image size (height, width)."""
        rows, columns = image_size[0] / NATIVE_SIZE[0], image_size[1] / NATIVE_SIZE[1]
        return np.array(
            [
                [self.focal * columns, 0.0, self.principal[0] * columns],
                [0.0, self.focal * rows, self.principal[1] * rows],
                [0.0, 0.0, 1.0],
            ]
        )


CAMERA_MOUNTS = (
    CameraMount("CAM_FRONT", (1.70, 0.01, 1.51), 0.0, 1266.0, (816.0, 491.0), 36.0),
    CameraMount("CAM_FRONT_RIGHT", (1.55, -0.49, 1.50), -56.0, 1260.0, (808.0, 495.0), 28.0),
    CameraMount("CAM_FRONT_LEFT", (1.52, 0.49, 1.51), 55.5, 1272.0, (826.0, 480.0), 43.0),
    CameraMount("CAM_BACK", (0.03, 0.00, 1.57), 180.0, 809.0, (829.0, 482.0), 11.0),
    CameraMount("CAM_BACK_LEFT", (1.04, 0.48, 1.59), 108.5, 1257.0, (792.0, 493.0), 1.0),
    CameraMount("CAM_BACK_RIGHT", (1.01, -0.48, 1.56), -110.5, 1259.0, (807.0, 501.0), 20.0),
)

LIDAR_POSITION = (0.94, 0.0, 1.84)
LIDAR_YAW = -90.0
"""The sensor's x axis points to the right of the car, degrees in the ego frame."""
LIDAR_ELEVATIONS = np.linspace(-30.67, 10.67, 32)
"""Degrees, by ring index."""
LIDAR_COLUMNS = 1084
LIDAR_RANGE = 100.0


def lidar_to_ego() -> Float[np.ndarray, "4 4"]:
    """The LiDAR's pose in the ego frame."""
    x, y, z = LIDAR_POSITION
    return pose_matrix(x, y, float(np.radians(LIDAR_YAW)), z)


def pose_matrix(x: float, y: float, yaw: float, z: float = 0.0) -> Float[np.ndarray, "4 4"]:
    """A planar pose as a 4x4 matrix to the global frame."""
    matrix = np.eye(4)
    cos, sin = exact.cos_sin(yaw)
    matrix[:2, :2] = [[cos, -sin], [sin, cos]]
    matrix[:3, 3] = x, y, z
    return matrix


def quaternion(matrix: Float[np.ndarray, "4 4"]) -> list[float]:
    """w, x, y, z of a pose's rotation, w not negative."""
    return exact.quaternion(matrix[:3, :3]).tolist()

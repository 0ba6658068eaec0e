"""The sensor rig that Bench2Drive's data was recorded with, in CARLA's axes and in this project's.

Runs in Python 3.7 with numpy alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

IMAGE_SIZE = (1600, 900)
JPEG_QUALITY = 20
"""The data was saved so."""
RIG = {
    # x forward, y right (CARLA's), z up in metres; yaw to the right and field of view in degrees
    "CAM_FRONT": (0.80, 0.0, 1.60, 0.0, 70.0),
    "CAM_FRONT_LEFT": (0.27, -0.55, 1.60, -55.0, 70.0),
    "CAM_FRONT_RIGHT": (0.27, 0.55, 1.60, 55.0, 70.0),
    "CAM_BACK": (-2.0, 0.0, 1.60, 180.0, 110.0),
    "CAM_BACK_LEFT": (-0.32, -0.55, 1.60, -110.0, 70.0),
    "CAM_BACK_RIGHT": (-0.32, 0.55, 1.60, 110.0, 70.0),
}

LIDAR = (-0.39, 0.0, 1.84)
"""Where the data's LiDAR was mounted, metres as in `RIG`, looking ahead."""
LIDAR_RATE = 2
"""Ticks that the LiDAR takes for one turn: each brings half a sweep."""


def camera_intrinsics(name: str, size: tuple[int, int] = IMAGE_SIZE) -> Any:
    """(3, 3), pixels of a camera's image of a size (width, height)."""
    width, height = size
    focal = width / (2 * math.tan(math.radians(RIG[name][4]) / 2))
    focal = round(focal, 9)  # the tangent's last bit is the machine's
    return np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])


def mount_matrix(name: str) -> Any:
    """(4, 4) from a camera's frame to the vehicle's, both in CARLA's axes (x forward, y right, z up)."""
    x, y, z, yaw, _ = RIG[name]
    c, s = round(math.cos(math.radians(yaw)), 12), round(math.sin(math.radians(yaw)), 12)
    return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, z], [0, 0, 0, 1.0]])


def camera_to_ego(name: str) -> Any:
    """(4, 4) from a camera's frame (x right, y down, z forward) to the ego frame (x forward, y left)."""
    optical = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
    return np.diag([1.0, -1.0, 1.0, 1.0]).dot(mount_matrix(name)).dot(optical)


def sweep_in_ego(points: Any) -> Any:
    """A LiDAR measurement (P, 4: x forward, y right, z up and intensity, the sensor's frame) as the records
    have sweeps: (P, 5) x, y, z in the ego frame (y left), intensity, ring, float32.
    """
    points = np.asarray(points, np.float32).reshape(-1, 4)
    x, y, z, intensity = points.T
    return np.stack([x + LIDAR[0], -(y + LIDAR[1]), z + LIDAR[2], intensity, np.zeros_like(x)], axis=1)


def ego_numbers(yaw: float, imu: Any, speed: float) -> Any:
    """(13,) the ego status as the records have it: quaternion w x y z of the yaw alone, acceleration, rate,
    velocity; CARLA's axes mirrored (a rate is an axial vector).

    Args:
        yaw: radians.
        imu: accelerometer (m/s²) and gyroscope (rad/s), three each.
        speed: m/s.
    """
    values = [float(value) if math.isfinite(value) else 0.0 for value in list(imu)[:6]]
    ax, ay, az, wx, wy, wz = values
    sign = 1.0 if math.cos(yaw / 2) >= 0 else -1.0
    turn = [sign * math.cos(yaw / 2), 0.0, 0.0, sign * math.sin(yaw / 2)]
    return np.array([*turn, ax, -ay, az, -wx, wy, -wz, speed, 0.0, 0.0])

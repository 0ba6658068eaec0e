"""LiDAR sweeps made by hand."""

import numpy as np

from spacedrive_jax.data import lidar


def sweep(points: np.ndarray) -> bytes:
    """The bytes of a sweep file from points (P, 3), metres, sensor frame."""
    rows = np.zeros((len(points), lidar.POINT_FLOATS), np.float32)
    rows[:, :3] = points
    return rows.tobytes()


def walls_around(distance: float) -> bytes:
    """Returns on a ring of walls: every camera sees plenty."""
    angle, up = (each.ravel() for each in np.meshgrid(np.linspace(0, 2 * np.pi, 400), np.linspace(-2, 4, 20)))
    radius = distance * (1 + 0.5 * np.sin(3 * angle))
    return sweep(np.stack([radius * np.cos(angle), radius * np.sin(angle), up], axis=1))

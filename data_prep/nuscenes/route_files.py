"""The route files of the CAN bus expansion: the lane centre that a scene drives along, and 50 m around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spacedrive_jax.data.route import Route
from spacedrive_jax.errors import DataError
from spacedrive_jax.io import MEBIBYTE, read_json

MOST_ROUTE_BYTES = 16 * MEBIBYTE
"""A kilometre of 0.2 m steps has a fifth of a megabyte."""


def route_file(dataroot: Path, scene_name: str) -> Path:
    """Where the CAN bus expansion keeps a scene's route."""
    return Path(dataroot) / "can_bus" / f"{scene_name}_route.json"


def read_route(dataroot: Path, scene_name: str) -> Route | None:
    """Reads a scene's route, or None when the scene has none (the expansion is a separate download).

    Raises:
        DataError: the file exists but is not a list of at least two different points.
    """
    path = route_file(dataroot, scene_name)
    if not path.exists():
        return None
    values = read_json(path, most=MOST_ROUTE_BYTES)
    try:
        points = np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        points = np.zeros(0)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise DataError(f"{path} is not a list of [x, y] points in metres; fetch it again or remove it")
    if len(points) < 2 or not (points != points[0]).any():
        raise DataError(f"{path} has no two different points; fetch it again or remove it")
    return Route(points)

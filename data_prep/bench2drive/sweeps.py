"""Bench2Drive's LiDAR sweeps: LAZ files to the bytes that a record holds.

Their points are in the ego frame already, the sensor's place added, with y to the right as all of CARLA.
"""

from __future__ import annotations

import io
from types import ModuleType

import numpy as np

from spacedrive_jax.errors import ConfigError, DataError

MOST_POINTS = 5_000_000
"""A sweep has some 60,000."""


def laz_reader() -> ModuleType:
    """The package that reads LAZ.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import laspy
    except ImportError:
        raise ConfigError(
            "--lidar reads LAZ files: pip install -r requirements-bench2drive.txt, or leave it out"
        ) from None
    return laspy


def sweep_bytes(laz: bytes, what: str) -> bytes:
    """A sweep as nuScenes' files have it: float32 x y z intensity ring, here in the ego frame, ring 0.

    Args:
        laz: the file's bytes.
        what: what to call it in an error.

    Raises:
        DataError: it is damaged, or holds more points than a sweep may.
    """
    laspy = laz_reader()
    try:
        with laspy.open(io.BytesIO(laz)) as file:
            count = int(file.header.point_count)
            if count > MOST_POINTS:
                raise DataError(f"{what} has {count:,} points, more than the {MOST_POINTS:,} it may have")
            points = file.read()
        intensity = points.intensity if "intensity" in points.point_format.dimension_names else 0
        rows = np.zeros((count, 5), np.float32)
        rows[:, 0], rows[:, 1], rows[:, 2] = points.x, -np.asarray(points.y), points.z
        rows[:, 3] = intensity
    except DataError:
        raise
    except Exception as error:  # of many kinds on damaged files, the decompressor's own among them
        raise DataError(f"{what} is no whole LAZ file ({error}): fetch it again") from error
    return rows.tobytes()

"""Axes in which other projects write waypoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np

from spacedrive_jax import exact
from spacedrive_jax.evaluation.predictions import Predictions

AxesName = Literal["forward-left", "forward-right", "right-forward"]

TO_EGO: Mapping[AxesName, np.ndarray] = MappingProxyType(
    {
        "forward-left": np.eye(2),
        "forward-right": np.array([[1.0, 0.0], [0.0, -1.0]]),
        "right-forward": np.array([[0.0, 1.0], [-1.0, 0.0]]),
    }
)
"""What the two numbers of a waypoint mean, to the matrix that takes them to x forward, y left.
`right-forward` is the nuScenes lidar frame, which UniAD and VAD plan in."""


def to_ego_axes(predictions: Predictions, axes: AxesName) -> Predictions:
    """The predictions with waypoints in the ego frame's axes (their origin stays where it is)."""
    matrix = TO_EGO[axes]
    waypoints = {token: exact.rotate(points, matrix) for token, points in predictions.waypoints.items()}
    return dataclasses.replace(predictions, waypoints=waypoints)

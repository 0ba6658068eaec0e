"""Rigid transforms from nuScenes translations and quaternions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact


def rotation_matrices(quaternions: Sequence[Sequence[float]]) -> Float[np.ndarray, "K 3 3"]:
    """Rotation matrices of unit quaternions w x y z; none gives shape (0, 3, 3)."""
    return exact.rotation_matrix(np.asarray(quaternions, np.float64).reshape(-1, 4))


def transforms(
    translations: Sequence[Sequence[float]], quaternions: Sequence[Sequence[float]]
) -> Float[np.ndarray, "K 4 4"]:
    """4 x 4 transforms: points in the posed frame to the frame the pose is given in."""
    matrices = np.tile(np.eye(4), (len(translations), 1, 1))
    matrices[:, :3, :3] = rotation_matrices(quaternions)
    matrices[:, :3, 3] = np.asarray(translations, np.float64).reshape(-1, 3)
    return matrices


def inverse(transform: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """Inverse of a rigid transform, exact in its rotation part."""
    return exact.rigid_inverse(transform)


def heading(matrices: Float[np.ndarray, "*K R R"]) -> Float[np.ndarray, " *K"]:
    """Angle of the posed frame's x axis in the ground plane, radians in (-pi, pi].

    For a vehicle with roll and pitch this is the direction it drives in. The devkit's
    `yaw_pitch_roll[0]` differs from it in second order, by less than 2e-4 rad at nuScenes' inclinations.
    """
    return np.asarray(exact.arctan2(matrices[..., 1, 0], matrices[..., 0, 0]))

"""Rigid transforms: from nuScenes translations and quaternions, and between the frames of a record."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.data.schema import Record


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


def camera_to_global(record: Record, camera: int) -> Float[np.ndarray, "4 4"]:
    """From a camera at its own time to the global frame."""
    return exact.matmul(record["camera_ego_to_global"][camera], record["camera_to_ego"][camera])


def ego_to_camera(record: Record, camera: int) -> Float[np.ndarray, "4 4"]:
    """From the ego frame of the keyframe to a camera at its own time, the vehicle's motion included."""
    return exact.matmul(exact.affine_inverse(camera_to_global(record, camera)), record["ego_to_global"])


def camera_to_ego(record: Record, camera: int) -> Float[np.ndarray, "4 4"]:
    """From a camera at its own time to the ego frame of the keyframe."""
    return exact.matmul(exact.affine_inverse(record["ego_to_global"]), camera_to_global(record, camera))

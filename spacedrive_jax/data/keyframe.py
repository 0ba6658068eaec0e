"""A keyframe and its scene as plain data, and the record fields that follow from them.

The converter fills these from a nuScenes folder, the closed loop from its world, so that a drive
cannot be told from a data set. A `Scene` is small (a few hundred kilobytes), picklable and self-contained:
the work on it can run in any process, or on another machine, without the tables.

Rigid transforms, from nuScenes translations and quaternions and between the frames of a record, are here
too.
"""

from __future__ import annotations

import dataclasses
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


Vector = tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SensorFrame:
    """One sensor's data of one keyframe: its file, its time, and where sensor and vehicle were."""

    filename: str
    """Relative to the dataroot."""
    timestamp_us: int
    ego_translation: Vector
    """Ego origin at `timestamp_us` in the global frame, metres."""
    ego_rotation: Vector
    """Ego axes at `timestamp_us` in the global frame, quaternion w x y z."""
    sensor_translation: Vector
    """Sensor origin in the ego frame, metres."""
    sensor_rotation: Vector
    """Sensor axes in the ego frame, quaternion w x y z."""
    intrinsics: tuple[Vector, ...]
    """3 x 3 camera matrix in pixels; empty for a LiDAR."""
    height: int
    width: int


@dataclasses.dataclass(frozen=True, slots=True)
class Annotation:
    """One annotated box, global frame."""

    instance_token: str
    category: str
    translation: Vector
    """Box centre, metres."""
    size: Vector
    """Width, length, height in metres (nuScenes order)."""
    rotation: Vector
    """Quaternion w x y z."""
    lidar_points: int
    previous: int
    """Index of the instance's previous annotation in `Scene.annotations`, -1 for none."""
    next: int
    """Index of the instance's next annotation in `Scene.annotations`, -1 for none."""
    keyframe: int
    """Index of its keyframe in `Scene.keyframes`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Keyframe:
    """One sample."""

    token: str
    timestamp_us: int
    cameras: tuple[SensorFrame, ...]
    """In the order of `CAMERAS`."""
    lidar: SensorFrame
    annotations: tuple[int, ...]
    """Indices into `Scene.annotations`, in the order of the devkit's `sample['anns']`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """One scene: its keyframes in time order and all their annotations."""

    name: str
    description: str
    location: str
    log: str
    map_mask: str
    """Basic map mask relative to the dataroot, empty when the map table names none for this log."""
    keyframes: tuple[Keyframe, ...]
    annotations: tuple[Annotation, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """The pixels of one camera."""

    image: bytes
    """Encoded JPEG, empty where absent."""
    depth: bytes
    """16-bit PNG of round(metres * 256), empty where unknown."""
    size: tuple[int, int]
    """Height and width."""
    rendered: bool = False
    """Drawn in place of a photograph that the folder lacks."""


def camera_fields(cameras: Sequence[SensorFrame], views: Sequence[View]) -> Record:
    """All record fields about the six cameras (see `record_features`)."""
    return {
        "images": [view.image for view in views],
        "image_rendered": np.array([view.rendered for view in views]),
        "image_size": np.array([view.size for view in views], np.int32),
        "exact_depth": [view.depth for view in views],
        "camera_intrinsics": np.stack(
            [intrinsics_at(camera, view.size) for camera, view in zip(cameras, views, strict=True)]
        ),
        "camera_to_ego": transforms(
            [camera.sensor_translation for camera in cameras], [camera.sensor_rotation for camera in cameras]
        ),
        "camera_timestamp_us": np.array([camera.timestamp_us for camera in cameras], np.int64),
        "camera_ego_to_global": transforms(
            [camera.ego_translation for camera in cameras], [camera.ego_rotation for camera in cameras]
        ),
    }


def intrinsics_at(camera: SensorFrame, size: tuple[int, int]) -> Float[np.ndarray, "3 3"]:
    """The camera matrix in pixels of an image of `size` (height, width)."""
    scale = np.array([size[1] / camera.width, size[0] / camera.height, 1.0])
    return np.array(camera.intrinsics, np.float64) * scale[:, None]


def sensor_to_ego(frame: SensorFrame) -> Float[np.ndarray, "4 4"]:
    """Where a sensor is mounted."""
    return transforms([frame.sensor_translation], [frame.sensor_rotation])[0]


def identity_fields(scene: Scene, index: int) -> Record:
    """The record fields that say which keyframe it is (see `record_features`)."""
    keyframe = scene.keyframes[index]
    return {
        "token": keyframe.token,
        "scene_name": scene.name,
        "scene_description": scene.description,
        "location": scene.location,
        "log": scene.log,
        "frame_index": index,
        "timestamp_us": keyframe.timestamp_us,
    }

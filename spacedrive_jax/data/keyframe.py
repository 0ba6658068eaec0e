"""A keyframe and its scene as plain data, and the record fields that follow from them.

The converter fills these from a nuScenes folder, the closed loop from its world, so that a drive cannot be
told from a data set. A `Scene` is small (a few hundred kilobytes), picklable and self-contained: the work on
it can run in any process, or on another machine, without the tables.

What moves is the ego vehicle and the agents around it, in the current ego frame. The ego vehicle's past
poses, waypoints and commands are derived from the scene's ego poses at LIDAR_TOP time. Waypoints are
positions of the ego origin in the current ego frame with its full 3-D rotation (fidelity Q39).

Rigid transforms, from nuScenes translations and quaternions and between the frames of a record, are here too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from spacedrive_jax import exact
from spacedrive_jax.constants import CAN_BUS_SIZE, NUM_PAST, NUM_WAYPOINTS
from spacedrive_jax.data.ego_status import navigation_command, released_command
from spacedrive_jax.data.schema import Record

_PSEUDO_BOX_BOTTOM = np.array([0.0, 0.0, -0.78])
"""The published planning labels follow the bottom centre of a 1.56 m high box around the ego origin."""
CAN_MOTION_FIELDS = ("accel", "rotation_rate", "vel")
"""Of a pose message, behind its orientation."""
MAX_TIME_DIFFERENCE = 1.5
"""Seconds; a velocity over a longer gap counts as unknown (twice that between two neighbours)."""


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

    For a vehicle with roll and pitch this is the direction it drives in.
    """
    return np.asarray(exact.arctan2(matrices[..., 1, 0], matrices[..., 0, 0]))


def devkit_yaw(matrices: Float[np.ndarray, "*K R R"]) -> Float[np.ndarray, " *K"]:
    """The yaw by which the nuScenes devkit turns its map patches, radians in (-pi, pi].

    `yaw_pitch_roll[0]` of pyquaternion, which turns about z first; it differs from `heading` in second order,
    by less than 2e-4 rad at nuScenes' inclinations (fidelity Q40).
    """
    # Taken from 0: minus zero would turn a heading of pi into -pi.
    return np.asarray(exact.arctan2(0.0 - matrices[..., 0, 1], matrices[..., 0, 0]))


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


@dataclasses.dataclass(frozen=True)
class EgoTrack:
    """The ego vehicle over one scene, one row per keyframe."""

    timestamp_us: Int[np.ndarray, " K"]
    ego_to_global: Float[np.ndarray, "K 4 4"]
    can_bus: Float[np.ndarray, "K 13"]
    can_bus_valid: bool


def ego_track(scene: Scene, can_bus: Float[np.ndarray, "K 13"] | None) -> EgoTrack:
    """Collects the scene's ego poses at LIDAR_TOP time; `can_bus` None means the scene has no CAN data."""
    lidars = [keyframe.lidar for keyframe in scene.keyframes]
    return EgoTrack(
        timestamp_us=np.array([keyframe.timestamp_us for keyframe in scene.keyframes], np.int64),
        ego_to_global=transforms(
            [lidar.ego_translation for lidar in lidars], [lidar.ego_rotation for lidar in lidars]
        ),
        can_bus=np.zeros((len(lidars), CAN_BUS_SIZE)) if can_bus is None else can_bus,
        can_bus_valid=can_bus is not None,
    )


def past_poses(
    track: EgoTrack, index: int
) -> tuple[Float[np.ndarray, "2 4 4"], Bool[np.ndarray, "2"], Int[np.ndarray, "2"]]:
    """Ego poses of the previous two keyframes in the ego frame of keyframe `index`.

    Returns:
        past-to-ego transforms, newest first, zeros where the scene has no such keyframe; which of them
        exist; their times in microseconds, zero where masked.
    """
    count = min(index, NUM_PAST)
    earlier = index - 1 - np.arange(count)
    past_to_ego = np.zeros((NUM_PAST, 4, 4))
    past_to_ego[:count] = exact.matmul(inverse(track.ego_to_global[index]), track.ego_to_global[earlier])
    times = np.zeros(NUM_PAST, np.int64)
    times[:count] = track.timestamp_us[earlier]
    return past_to_ego, np.arange(NUM_PAST) < count, times


def future_poses(
    track: EgoTrack, index: int
) -> tuple[Float[np.ndarray, "6 4 4"], Bool[np.ndarray, "6"], Int[np.ndarray, "6"]]:
    """Ego poses of the next six keyframes in the ego frame of keyframe `index`; zeros where masked."""
    later = np.arange(index + 1, min(index + 1 + NUM_WAYPOINTS, len(track.timestamp_us)))
    future_to_ego = np.zeros((NUM_WAYPOINTS, 4, 4))
    future_to_ego[: len(later)] = exact.matmul(
        inverse(track.ego_to_global[index]), track.ego_to_global[later]
    )
    times = np.zeros(NUM_WAYPOINTS, np.int64)
    times[: len(later)] = track.timestamp_us[later]
    return future_to_ego, np.arange(NUM_WAYPOINTS) < len(later), times


def command_released_at(track: EgoTrack, index: int) -> int:
    """The published command of keyframe `index`, from its last waypoint."""
    future_to_ego, _, _ = future_poses(track, index)
    return command_released_towards(future_to_ego[-1])


def command_released_towards(last_to_ego: Float[np.ndarray, "4 4"]) -> int:
    """The published command that leads to the ego pose three seconds ahead, zeros where there is none."""
    x, y, _ = exact.transform(_PSEUDO_BOX_BOTTOM, last_to_ego)
    return released_command(np.array([x, y, heading(last_to_ego)]))


def command_navigation_at(track: EgoTrack, index: int) -> int:
    """The command of keyframe `index` that only the past decides."""
    past_to_ego, mask, times = past_poses(track, index)
    return navigation_command(past_to_ego, mask, (track.timestamp_us[index] - times) * 1e-6)


def ego_fields(track: EgoTrack, index: int) -> Record:
    """All record fields about the ego vehicle at keyframe `index` (see `record_features`)."""
    past_to_ego, past_mask, past_times = past_poses(track, index)
    future_to_ego, waypoint_mask, waypoint_times = future_poses(track, index)
    earlier = [index - 1 - step for step in range(int(past_mask.sum()))]  # newest first
    released = [command_released_at(track, past) for past in earlier]
    navigation = [command_navigation_at(track, past) for past in earlier]

    def of_past(values: np.ndarray) -> np.ndarray:
        padded = np.zeros((NUM_PAST, *values.shape[1:]), values.dtype)
        padded[: len(earlier)] = values
        return padded

    return {
        "ego_to_global": track.ego_to_global[index],
        "past_to_ego": past_to_ego,
        "past_mask": past_mask,
        "past_timestamp_us": past_times,
        "can_bus": track.can_bus[index],
        "can_bus_valid": track.can_bus_valid,
        "past_can_bus": of_past(track.can_bus[earlier]),
        "command_released": command_released_at(track, index),
        "command_navigation": command_navigation_at(track, index),
        "past_command_released": of_past(np.array(released, np.int32)),
        "past_command_navigation": of_past(np.array(navigation, np.int32)),
        "waypoints": future_to_ego[:, :2, 3],
        "waypoint_yaw": heading(future_to_ego),
        "waypoint_mask": waypoint_mask,
        "waypoint_timestamp_us": waypoint_times,
    }


def can_bus_at(
    messages: Sequence[Mapping[str, Any]], timestamps_us: Int[np.ndarray, " K"]
) -> Float[np.ndarray, "K 13"]:
    """The CAN-bus vector at each keyframe.

    orientation quaternion w x y z | acceleration xyz (m/s^2) | rotation rate xyz (rad/s) | velocity xyz
    (m/s). As published (fidelity Q38), the orientation is of the last message at or
    before the keyframe, but the other nine numbers are of the first message after it (the last one when
    none follows; the first message serves for both when all are later).

    Args:
        messages: pose messages in time order, at least one.
        timestamps_us: keyframe times.
    """
    times = np.array([message["utime"] for message in messages], np.int64)
    after = np.searchsorted(times, timestamps_us, side="right")
    before = np.maximum(after - 1, 0)
    after = np.minimum(after, len(messages) - 1)
    orientation = np.array([message["orientation"] for message in messages], np.float64)
    motion = [np.array([message[field] for message in messages], np.float64) for field in CAN_MOTION_FIELDS]
    return np.concatenate([orientation[before], *(values[after] for values in motion)], axis=1)


@dataclasses.dataclass(frozen=True)
class AgentTracks:
    """All annotations of one scene as arrays, one row each, global frame."""

    instance_token: tuple[str, ...]
    category: tuple[str, ...]
    centre: Float[np.ndarray, "M 3"]
    size: Float[np.ndarray, "M 3"]
    """Length, width, height in metres."""
    rotation: Float[np.ndarray, "M 3 3"]
    velocity: Float[np.ndarray, "M 3"]
    """Metres per second, nan where unknown."""
    lidar_points: Int[np.ndarray, " M"]
    future: Int[np.ndarray, "M 6"]
    """Row of the same instance one to six keyframes later; -1 from the first gap on."""


def agent_tracks(scene: Scene) -> AgentTracks:
    """Collects the annotations of a scene, their velocities and their futures."""
    rows = scene.annotations
    centre = np.array([row.translation for row in rows], np.float64).reshape(-1, 3)
    width_length_height = np.array([row.size for row in rows], np.float64).reshape(-1, 3)
    keyframe = np.array([row.keyframe for row in rows], np.int64)
    following = np.array([row.next for row in rows], np.int64)
    keyframe_seconds = np.array([frame.timestamp_us for frame in scene.keyframes], np.int64) * 1e-6
    return AgentTracks(
        instance_token=tuple(row.instance_token for row in rows),
        category=tuple(row.category for row in rows),
        centre=centre,
        size=width_length_height[:, [1, 0, 2]],
        rotation=rotation_matrices([row.rotation for row in rows]),
        velocity=box_velocity(
            centre,
            keyframe_seconds[keyframe],
            np.array([row.previous for row in rows], np.int64),
            following,
        ),
        lidar_points=np.array([row.lidar_points for row in rows], np.int32),
        future=future_rows(keyframe, following),
    )


def box_velocity(
    centre: Float[np.ndarray, "M 3"],
    seconds: Float[np.ndarray, " M"],
    previous: Int[np.ndarray, " M"],
    following: Int[np.ndarray, " M"],
) -> Float[np.ndarray, "M 3"]:
    """Finite-difference velocities as of the devkit's `box_velocity`.

    The centred difference where an annotation has both neighbours, else the one-sided one; nan without a
    neighbour or where the time between exceeds `MAX_TIME_DIFFERENCE` (twice that for a centred one).

    Args:
        centre: box centres, metres, global frame.
        seconds: time of each row's keyframe.
        previous: row of the same instance's previous annotation, -1 for none.
        following: row of the same instance's next annotation, -1 for none.
    """
    here = np.arange(len(centre))
    first = np.where(previous >= 0, previous, here)
    last = np.where(following >= 0, following, here)
    elapsed = seconds[last] - seconds[first]
    limit = np.where((previous >= 0) & (following >= 0), 2 * MAX_TIME_DIFFERENCE, MAX_TIME_DIFFERENCE)
    known = (first != last) & (elapsed <= limit)
    velocity = np.full(centre.shape, np.nan)
    velocity[known] = (centre[last] - centre[first])[known] / elapsed[known, None]
    return velocity


def future_rows(keyframe: Int[np.ndarray, " M"], following: Int[np.ndarray, " M"]) -> Int[np.ndarray, "M 6"]:
    """Row of the same instance at each of the next six keyframes, -1 from the first gap on.

    Args:
        keyframe: index of each row's keyframe in the scene.
        following: row of the instance's next annotation, -1 for none.
    """
    steps = np.full((len(keyframe), NUM_WAYPOINTS), -1, np.int64)
    current = np.arange(len(keyframe))
    for step in range(NUM_WAYPOINTS):
        candidate = np.where(current >= 0, following[current], -1)
        adjacent = (candidate >= 0) & (keyframe[candidate] == keyframe + step + 1)
        current = np.where(adjacent, candidate, -1)
        steps[:, step] = current
    return steps


def agent_fields(
    tracks: AgentTracks, rows: tuple[int, ...], ego_to_global: Float[np.ndarray, "4 4"]
) -> Record:
    """All record fields about the agents of one keyframe (see `record_features`).

    Args:
        tracks: the scene's annotations.
        rows: the keyframe's annotations, in the order the record shall have.
        ego_to_global: ego pose of the keyframe.
    """
    index = np.array(rows, np.int64)
    to_ego = ego_to_global[:3, :3].T
    centre = exact.rotate(tracks.centre[index] - ego_to_global[:3, 3], to_ego)
    yaw = heading(exact.matmul(to_ego, tracks.rotation[index]))
    later = tracks.future[index]  # (A, 6)
    mask = later >= 0
    displacement = exact.rotate(tracks.centre[later] - tracks.centre[index][:, None], to_ego)
    future_yaw = heading(exact.matmul(to_ego, tracks.rotation[later]))
    return {
        "agent_token": [tracks.instance_token[row] for row in rows],
        "agent_category": [tracks.category[row] for row in rows],
        "agent_boxes": np.concatenate([centre, tracks.size[index], yaw[:, None]], axis=1),
        "agent_velocity": exact.rotate(tracks.velocity[index], to_ego)[:, :2],
        "agent_future": np.where(mask[..., None], displacement[..., :2], 0.0),
        "agent_future_yaw": np.where(mask, future_yaw, 0.0),
        "agent_future_mask": mask,
        "agent_lidar_points": tracks.lidar_points[index],
    }


def global_boxes(tracks: AgentTracks, rows: tuple[int, ...]) -> Float[np.ndarray, "A 7"]:
    """Boxes of some rows in the global frame: x y z length width height yaw."""
    index = np.array(rows, np.int64)
    yaw = heading(tracks.rotation[index])
    return np.concatenate([tracks.centre[index], tracks.size[index], yaw[:, None]], axis=1)

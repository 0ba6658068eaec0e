"""Agent fields of a record: boxes, velocities and futures in the current ego frame."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_WAYPOINTS
from spacedrive_jax.data.keyframe import Scene, heading, rotation_matrices
from spacedrive_jax.data.schema import Record

MAX_TIME_DIFFERENCE = 1.5
"""Seconds; a velocity over a longer gap counts as unknown (twice that between two neighbours)."""


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

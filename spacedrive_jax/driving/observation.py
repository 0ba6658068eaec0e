"""What the world's sensors tell a planner: a record, built by the functions that the converter uses.

A drive cannot be told from a data set: on an undisturbed drive the record at a decision holds, byte for byte,
what the converter makes of the recorded scene, except for what looks ahead (waypoints, the agents' futures).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import shapely

from spacedrive_jax.data.keyframe import (
    Annotation,
    Keyframe,
    Scene,
    SensorFrame,
    Vector,
    View,
    agent_fields,
    agent_tracks,
    camera_fields,
    can_bus_at,
    devkit_yaw,
    ego_fields,
    ego_track,
    identity_fields,
    sensor_to_ego,
)
from spacedrive_jax.data.keyframe_map import PolygonMap, map_fields, route_fields
from spacedrive_jax.data.route import Route
from spacedrive_jax.data.schema import Record
from spacedrive_jax.world import can_bus, sensors
from spacedrive_jax.world.filming import Film, Shot, Sighting, annotated_span
from spacedrive_jax.world.ground import polygons_of
from spacedrive_jax.world.scenario import Scenario
from spacedrive_jax.world.town import Town


@dataclasses.dataclass(frozen=True)
class _Frame:
    """What one keyframe's sensors gave."""

    keyframe: Keyframe
    """Without its annotations: which there are is known only when later keyframes have been seen."""
    views: tuple[View, ...]
    cloud: bytes


class Observer:
    """Looks through the sensors at every keyframe of a drive, and remembers."""

    def __init__(self, film: Film, scenario: Scenario, *, images: bool = True, lidar: bool = False) -> None:
        """Prepares the map and the route.

        Args:
            film: the sensors.
            scenario: the script.
            images: draw the cameras; without them the record's images are empty (planners that do not look).
            lidar: take sweeps; without them an object counts as noticed by its pixels alone.
        """
        self.film, self.images, self.lidar = film, images, lidar
        self.description = f"{scenario.description}, {film.light.weather.name}"
        self.map = PolygonMap(drivable_polygons(scenario.town))
        self.route = Route(can_bus.route_points(scenario.ego.route))
        take = film.take
        self.can = can_bus.PoseMessages(
            can_bus.FIRST_MESSAGE, take.end, film.epoch_us, can_bus.noise_seed(take.seed, take.index)
        )
        self.frames: list[_Frame] = []
        self.sightings: dict[int, list[Sighting]] = {}

    def look(self, scenario: Scenario) -> Record:
        """Takes the next keyframe and returns its record, as far as the present knows it.

        Args:
            scenario: with the motions up to now (`World.recording`).
        """
        film, number = self.film, len(self.frames)
        shots = self._photograph(scenario, number)
        cloud = film.scan(scenario, number) if self.lidar else None
        seen = film.sightings(scenario, number, shots, cloud) if self.images or self.lidar else {}
        for group, sighting in seen.items():
            self.sightings.setdefault(group, []).append(sighting)
        time = float(film.times[number])
        self.can.until(scenario, time)
        keyframe = Keyframe(
            token=film.take.token("sample", number),
            timestamp_us=film.stamp(time),
            cameras=tuple(
                self._frame(scenario, mount.channel, float(film.camera_times[number, index]), number)
                for index, mount in enumerate(sensors.CAMERA_MOUNTS)
            ),
            lidar=self._frame(scenario, "LIDAR_TOP", time, number),
            annotations=(),
        )
        taken = tuple(
            View(shot.picture.jpeg, shot.picture.depth_png, film.take.image_size) for shot in shots
        ) or tuple(View(b"", b"", film.take.image_size) for _ in sensors.CAMERA_MOUNTS)
        self.frames.append(_Frame(keyframe, taken, b"" if cloud is None else cloud.tobytes()))
        return self.record(number)

    def _photograph(self, scenario: Scenario, number: int) -> list[Shot]:
        if not self.images:
            return []
        return [
            self.film.photograph(scenario, number, camera) for camera in range(len(sensors.CAMERA_MOUNTS))
        ]

    def record(self, index: int) -> Record:
        """The record of a keyframe that was taken, with as much of its future as is known by now."""
        scene = self.scene()
        keyframe, frame = scene.keyframes[index], self.frames[index]
        times = np.array([each.timestamp_us for each in scene.keyframes], np.int64)
        track = ego_track(scene, can_bus_at(self.can.messages, times))
        ego = ego_fields(track, index)
        ego_to_global = ego["ego_to_global"]
        return {
            **identity_fields(scene, index),
            **camera_fields(keyframe.cameras, frame.views),
            **ego,
            **route_fields(track, index, self.route),
            **agent_fields(agent_tracks(scene), keyframe.annotations, ego_to_global),
            **map_fields(self.map, ego_to_global[:2, 3], float(devkit_yaw(ego_to_global))),
            "lidar": frame.cloud,
            "lidar_to_ego": sensor_to_ego(keyframe.lidar),
        }

    def scene(self) -> Scene:
        """The drive so far as the converter's plain data."""
        rows: list[list[tuple[Sighting, str]]] = [[] for _ in self.frames]
        for group, seen in self.sightings.items():
            for sighting in annotated_span(seen):
                rows[sighting.keyframe].append((sighting, self.film.tokens[group]))
        annotations = _annotations(rows)
        keyframes, first = [], 0
        for frame, found in zip(self.frames, rows, strict=True):
            own = tuple(range(first, first + len(found)))
            keyframes.append(dataclasses.replace(frame.keyframe, annotations=own))
            first += len(found)
        take = self.film.take
        return Scene(
            name=take.name,
            description=self.description,
            location=take.location,
            log=take.logfile,
            map_mask="",
            keyframes=tuple(keyframes),
            annotations=annotations,
        )

    def _frame(self, scenario: Scenario, channel: str, time: float, number: int) -> SensorFrame:
        pose = self.film.ego_pose(scenario, time)
        mount = next((mount for mount in sensors.CAMERA_MOUNTS if mount.channel == channel), None)
        to_ego = sensors.lidar_to_ego() if mount is None else mount.to_ego()
        size = self.film.take.image_size
        return SensorFrame(
            filename=f"samples/{channel}/{number}",
            timestamp_us=self.film.stamp(time),
            ego_translation=(float(pose[0, 3]), float(pose[1, 3]), 0.0),
            ego_rotation=tuple(sensors.quaternion(pose)),
            sensor_translation=_vector(to_ego[:3, 3]),
            sensor_rotation=tuple(sensors.quaternion(to_ego)),
            intrinsics=() if mount is None else tuple(_vector(row) for row in mount.intrinsics(size)),
            height=0 if mount is None else size[0],
            width=0 if mount is None else size[1],
        )


def _annotations(rows: Sequence[Sequence[tuple[Sighting, str]]]) -> tuple[Annotation, ...]:
    """All annotations of a scene; an instance's neighbours are those of the keyframes before and after."""
    index: dict[tuple[str, int], int] = {}
    flat = [row for found in rows for row in found]
    for position, (sighting, token) in enumerate(flat):
        index[token, sighting.keyframe] = position
    return tuple(
        Annotation(
            instance_token=token,
            category=sighting.item.category,
            translation=(sighting.item.pose[0], sighting.item.pose[1], sighting.item.size[2] / 2),
            size=(sighting.item.size[1], sighting.item.size[0], sighting.item.size[2]),
            rotation=tuple(sensors.quaternion(sensors.pose_matrix(0.0, 0.0, sighting.item.pose[2]))),
            lidar_points=sighting.points,
            previous=index.get((token, sighting.keyframe - 1), -1),
            next=index.get((token, sighting.keyframe + 1), -1),
            keyframe=sighting.keyframe,
        )
        for sighting, token in flat
    )


def _vector(values: np.ndarray) -> Vector:
    return tuple(float(value) for value in values)


def drivable_polygons(town: Town) -> list[shapely.Polygon]:
    """A town's drivable surface as its map expansion holds it (vertices to a tenth of a millimetre)."""

    def ring(coordinates: Sequence[tuple[float, ...]]) -> list[tuple[float, float]]:
        return [(round(float(x), 4), round(float(y), 4)) for x, y in coordinates[:-1]]

    polygons = []
    for polygon in polygons_of(town.drivable):
        holes = [ring(list(hole.coords)) for hole in polygon.interiors]
        rounded = shapely.Polygon(
            ring(list(polygon.exterior.coords)), [hole for hole in holes if len(hole) > 2]
        )
        polygons.append(rounded if rounded.is_valid else shapely.make_valid(rounded))
    return polygons

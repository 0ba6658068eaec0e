"""Records one scene: drives the sensors through a scenario and returns the scene's table rows.

`record_scene` is a plain function of plain data, so scenes can be recorded in any process, in any order.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np

from data_prep.synthesize.tables import Row, link, visibility_token
from spacedrive_jax.driving.recovery import shifted_recording
from spacedrive_jax.io import write_part
from spacedrive_jax.world import can_bus, sensors
from spacedrive_jax.world.filming import Film, Shot, Sighting, Take, annotated_span
from spacedrive_jax.world.scenario import MANOEUVRES, Scenario, UnplayableError, build_scenario, make_token
from spacedrive_jax.world.town import LOCATIONS, Town, build_town


@dataclasses.dataclass(frozen=True)
class SceneJob:
    """Everything a worker needs to record one scene."""

    index: int
    seed: int
    keyframes: int
    image_size: tuple[int, int]
    """Height, width."""
    with_depth: bool
    root: Path
    perturb: bool = False
    """The ego vehicle begins beside its lane, and the expert drives it back."""

    @property
    def location(self) -> str:
        """Scenes alternate between the towns."""
        return LOCATIONS[self.index % len(LOCATIONS)]

    @property
    def manoeuvre(self) -> str:
        """What happens in it."""
        return MANOEUVRES[(self.index * 3 + self.seed) % len(MANOEUVRES)]

    @property
    def take(self) -> Take:
        """How the scene is filmed."""
        return Take(self.index, self.seed, self.keyframes, self.image_size, self.with_depth, self.location)


def town_of(seed: int, location: str) -> Town:
    """The town of a location, the same for all scenes of a seed."""
    return build_town(location, np.random.default_rng([seed, LOCATIONS.index(location), 1]))


@dataclasses.dataclass(frozen=True)
class NotRecorded:
    """A scene that cannot begin beside its lane."""

    name: str
    reason: str


def record_scene(job: SceneJob) -> dict[str, list[Row]] | NotRecorded:
    """Simulates and records one scene; writes its sensor and CAN files under `job.root`.

    Returns:
        Rows of scene, log, sample, sample_data, ego_pose, instance and sample_annotation; or why there are
        none, where there is no room for a perturbed scene (then nothing is written).
    """
    cv2.setNumThreads(1)
    try:
        recorder = _Recorder(job)
    except UnplayableError as error:
        if not job.perturb:
            raise
        return NotRecorded(job.take.name, str(error))
    return recorder.record()


class _Recorder:
    def __init__(self, job: SceneJob) -> None:
        self.job, self.take = job, job.take
        rng = np.random.default_rng([job.seed, job.index, 2])
        self.scenario: Scenario = build_scenario(
            town_of(job.seed, job.location), job.manoeuvre, self.take.duration + 0.5, rng
        )
        if job.perturb:
            self.scenario = shifted_recording(
                self.scenario,
                can_bus.FIRST_MESSAGE,
                self.take.end,
                np.random.default_rng([job.seed, job.index, 12]),
            )
        self.film = Film(self.take, self.scenario)

    def record(self) -> dict[str, list[Row]]:
        job = self.job
        channels: dict[str, list[Row]] = {mount.channel: [] for mount in sensors.CAMERA_MOUNTS}
        channels["LIDAR_TOP"] = []
        poses: list[Row] = []
        samples: list[Row] = []
        sightings: dict[int, list[Sighting]] = {}
        for keyframe, time in enumerate(self.film.times):
            sample: Row = {
                "token": self.take.token("sample", keyframe),
                "timestamp": self.film.stamp(time),
                "prev": "",
                "next": "",
                "scene_token": self.take.token("scene"),
            }
            samples.append(sample)
            shots = [
                self.film.photograph(self.scenario, keyframe, number)
                for number in range(len(sensors.CAMERA_MOUNTS))
            ]
            for mount, shot in zip(sensors.CAMERA_MOUNTS, shots, strict=True):
                row, pose = self._data_row(keyframe, mount.channel, sample["token"], shot.time, "jpg")
                self._write_picture(mount.channel, row["filename"], shot)
                channels[mount.channel].append(row)
                poses.append(pose)
            cloud = self.film.scan(self.scenario, keyframe)
            row, pose = self._data_row(keyframe, "LIDAR_TOP", sample["token"], float(time), "pcd.bin")
            write_part(job.root / row["filename"], cloud.tobytes())
            channels["LIDAR_TOP"].append(row)
            poses.append(pose)
            for group, sighting in self.film.sightings(self.scenario, keyframe, shots, cloud).items():
                sightings.setdefault(group, []).append(sighting)
        link(samples)
        for rows in channels.values():
            link(rows)
        instances, annotations = self._annotations(sightings, samples)
        can_bus.write_can_bus(
            self.scenario,
            self.take.name,
            job.root / "can_bus",
            can_bus.FIRST_MESSAGE,
            self.take.end,
            self.film.epoch_us,
            can_bus.noise_seed(job.seed, job.index),
        )
        sample_data = [rows[k] for k in range(job.keyframes) for rows in channels.values()]
        return {
            "scene": [self._scene_row(samples)],
            "log": [self._log_row()],
            "sample": samples,
            "sample_data": sample_data,
            "ego_pose": poses,
            "instance": instances,
            "sample_annotation": annotations,
        }

    def _scene_row(self, samples: list[Row]) -> Row:
        weather = self.film.light.weather.name
        return {
            "token": self.take.token("scene"),
            "log_token": self.take.token("log"),
            "nbr_samples": len(samples),
            "first_sample_token": samples[0]["token"],
            "last_sample_token": samples[-1]["token"],
            "name": self.take.name,
            "description": f"{self.scenario.description}, {weather}",
        }

    def _log_row(self) -> Row:
        return {
            "token": self.take.token("log"),
            "logfile": self.take.logfile,
            "vehicle": f"synthetic{self.job.seed}",
            "date_captured": f"{self.take.start:%Y-%m-%d}",
            "location": self.job.location,
        }

    def _data_row(
        self, keyframe: int, channel: str, sample: str, time: float, extension: str
    ) -> tuple[Row, Row]:
        """A sample_data row and its ego_pose row, which share their token as in nuScenes."""
        camera = channel != "LIDAR_TOP"
        height, width = self.job.image_size if camera else (0, 0)
        token = self.take.token("sample_data", channel, keyframe)
        stamp = self.film.stamp(time)
        pose = self.film.ego_pose(self.scenario, time)
        row = {
            "token": token,
            "sample_token": sample,
            "ego_pose_token": token,
            "calibrated_sensor_token": make_token(self.job.seed, "calibrated_sensor", channel),
            "timestamp": stamp,
            "fileformat": "jpg" if camera else "pcd",
            "is_key_frame": True,
            "height": height,
            "width": width,
            "filename": f"samples/{channel}/{self.take.logfile}__{channel}__{stamp}.{extension}",
            "prev": "",
            "next": "",
        }
        ego_pose = {
            "token": token,
            "timestamp": stamp,
            "rotation": sensors.quaternion(pose),
            "translation": [float(pose[0, 3]), float(pose[1, 3]), 0.0],
        }
        return row, ego_pose

    def _write_picture(self, channel: str, filename: str, shot: Shot) -> None:
        path = self.job.root / filename
        write_part(path, shot.picture.jpeg)
        if self.job.with_depth:
            write_part(self.job.root / "samples_depth" / channel / f"{path.stem}.png", shot.picture.depth_png)

    def _annotations(
        self, sightings: dict[int, list[Sighting]], samples: list[Row]
    ) -> tuple[list[Row], list[Row]]:
        instances: list[Row] = []
        by_sample: list[list[Row]] = [[] for _ in samples]
        for group, seen in sightings.items():
            span = annotated_span(seen)
            if not span:
                continue
            rows = [self._annotation(group, sighting, samples) for sighting in span]
            link(rows)
            for sighting, row in zip(span, rows, strict=True):
                by_sample[sighting.keyframe].append(row)
            instances.append(
                {
                    "token": self.film.tokens[group],
                    "category_token": make_token(self.job.seed, "category", seen[0].item.category),
                    "nbr_annotations": len(rows),
                    "first_annotation_token": rows[0]["token"],
                    "last_annotation_token": rows[-1]["token"],
                }
            )
        return instances, [row for rows in by_sample for row in rows]

    def _annotation(self, group: int, sighting: Sighting, samples: list[Row]) -> Row:
        item = sighting.item
        x, y, yaw = item.pose
        attributes = [make_token(self.job.seed, "attribute", item.attribute)] if item.attribute else []
        return {
            "token": self.take.token("annotation", item.key, sighting.keyframe),
            "sample_token": samples[sighting.keyframe]["token"],
            "instance_token": self.film.tokens[group],
            "visibility_token": visibility_token(sighting.visible, sighting.covered),
            "attribute_tokens": attributes,
            "translation": [x, y, item.size[2] / 2],
            "size": [item.size[1], item.size[0], item.size[2]],
            "rotation": sensors.quaternion(sensors.pose_matrix(0.0, 0.0, yaw)),
            "prev": "",
            "next": "",
            "num_lidar_pts": sighting.points,
            "num_radar_pts": 0,
        }

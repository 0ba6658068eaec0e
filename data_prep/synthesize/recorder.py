"""Records one scene: drives the sensors through a scenario and returns the scene's table rows.

`record_scene` is a plain function of plain data, so scenes can be recorded in any process, in any order.
"""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float

from data_prep.synthesize.tables import Row, link, visibility_token
from data_prep.synthesize.tokens import make_token
from spacedrive_jax import exact
from spacedrive_jax.world import can_bus, ground, lidar, rig, scenery, stage
from spacedrive_jax.world.scenario import MANOEUVRES, WARM_UP, Scenario, build_scenario
from spacedrive_jax.world.shapes import Quads
from spacedrive_jax.world.stage import Participant
from spacedrive_jax.world.town import LOCATIONS, Town, build_town
from spacedrive_jax.world.weather import WEATHERS, Light

KEYFRAME_PERIOD = 0.5
ANNOTATION_RANGE = 75.0
_FIRST_DAY = datetime.datetime(2024, 5, 1, 9, 0, tzinfo=datetime.UTC)
_NO_CAN_BUS = frozenset([*range(161, 169), *range(170, 177), *range(309, 315)])
"""Scene numbers for which the devkit refuses CAN data; the synthetic world does not use them."""


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

    @property
    def location(self) -> str:
        """Scenes alternate between the towns."""
        return LOCATIONS[self.index % len(LOCATIONS)]

    @property
    def name(self) -> str:
        """scene-0001, scene-0002 and so on."""
        free = (number for number in range(1, 10_000) if number not in _NO_CAN_BUS)
        return f"scene-{next(number for i, number in enumerate(free) if i == self.index):04d}"

    @property
    def start(self) -> datetime.datetime:
        """Local time at which the recording begins."""
        return _FIRST_DAY + datetime.timedelta(hours=7 * self.index, minutes=11 * (self.index % 5))


def town_of(seed: int, location: str) -> Town:
    """The town of a location, the same for all scenes of a seed."""
    return build_town(location, np.random.default_rng([seed, LOCATIONS.index(location), 1]))


def record_scene(job: SceneJob) -> dict[str, list[Row]]:
    """Simulates and records one scene; writes its sensor and CAN files under `job.root`.

    Returns:
        Rows of scene, log, sample, sample_data, ego_pose, instance and sample_annotation.
    """
    cv2.setNumThreads(1)
    return _Recorder(job).record()


@dataclasses.dataclass
class _Sighting:
    """One annotated object at one keyframe."""

    keyframe: int
    item: Participant
    points: int
    visible: int
    covered: int


class _Recorder:
    def __init__(self, job: SceneJob) -> None:
        self.job = job
        duration = (job.keyframes - 1) * KEYFRAME_PERIOD
        manoeuvre = MANOEUVRES[(job.index * 3 + job.seed) % len(MANOEUVRES)]
        rng, jitter = (np.random.default_rng([job.seed, job.index, part]) for part in (2, 3))
        self.scenario: Scenario = build_scenario(
            town_of(job.seed, job.location), manoeuvre, duration + 0.5, rng
        )
        self.end = WARM_UP + duration + 0.4
        weather = WEATHERS[int(jitter.integers(len(WEATHERS)))] if job.index else WEATHERS[0]
        self.light = Light(weather, float(jitter.uniform(0, 2 * np.pi)))
        low, high = stage.scene_area(self.scenario, self.end)
        surface_map = ground.surface_map_of_town(self.scenario.town, low, high)
        backdrop = stage.build_backdrop(surface_map, self.light, scenery.LAND_SEED)
        self.standing = stage.standing_participants(self.scenario)
        shadows = stage.frame_shadows(backdrop, self.standing, self.light)
        self.backdrop = dataclasses.replace(backdrop, shadows=shadows)
        self.epoch_us = int(job.start.timestamp() * 1e6) + int(jitter.integers(1_000_000))
        self.logfile = f"synthetic{job.seed}-{job.start:%Y-%m-%d-%H-%M-%S}+0000"
        nominal = WARM_UP + KEYFRAME_PERIOD * np.arange(job.keyframes)
        self.times = nominal + jitter.uniform(-0.003, 0.003, job.keyframes)
        leads = np.array([mount.lead_ms for mount in rig.CAMERA_MOUNTS]) * 1e-3
        jitters = jitter.uniform(-0.002, 0.002, (job.keyframes, len(leads)))
        self.camera_times = self.times[:, None] - leads + jitters
        self.lidar_rng = np.random.default_rng([job.seed, job.index, 4])
        people = [*stage.moving_participants(self.scenario, 0.0), *self.standing]
        self.tokens = [self._token("instance", item.key) for item in people]

    def _token(self, *parts: object) -> str:
        return make_token(self.job.seed, self.job.name, *parts)

    def _stamp(self, time: float) -> int:
        return self.epoch_us + round(time * 1e6)

    def _ego_pose(self, time: float) -> Float[np.ndarray, "4 4"]:
        state = can_bus.ego_state(self.scenario, time)
        return rig.pose_matrix(state["x"], state["y"], state["yaw"])

    def _quads(self, time: float, people: list[Participant]) -> Quads:
        signals = stage.signal_quads(self.scenario, time)
        return stage.frame_quads(self.backdrop, people, self.tokens, signals)

    def record(self) -> dict[str, list[Row]]:
        job = self.job
        channels: dict[str, list[Row]] = {mount.channel: [] for mount in rig.CAMERA_MOUNTS}
        channels["LIDAR_TOP"] = []
        poses: list[Row] = []
        samples: list[Row] = []
        sightings: dict[int, list[_Sighting]] = {}
        for keyframe, time in enumerate(self.times):
            sample: Row = {
                "token": self._token("sample", keyframe),
                "timestamp": self._stamp(time),
                "prev": "",
                "next": "",
                "scene_token": self._token("scene"),
            }
            samples.append(sample)
            visible: dict[int, int] = {}
            covered: dict[int, int] = {}
            for number in range(len(rig.CAMERA_MOUNTS)):
                row, pose = self._photograph(keyframe, number, sample["token"], visible, covered)
                channels[rig.CAMERA_MOUNTS[number].channel].append(row)
                poses.append(pose)
            row, pose, seen = self._scan(keyframe, sample["token"], visible, covered)
            channels["LIDAR_TOP"].append(row)
            poses.append(pose)
            for group, sighting in seen.items():
                sightings.setdefault(group, []).append(sighting)
        link(samples)
        for rows in channels.values():
            link(rows)
        instances, annotations = self._annotations(sightings, samples)
        can_bus.write_can_bus(
            self.scenario,
            job.name,
            job.root / "can_bus",
            WARM_UP - 0.3,
            self.end,
            self.epoch_us,
            job.seed * 100_003 + job.index,
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
        weather = self.light.weather.name
        return {
            "token": self._token("scene"),
            "log_token": self._token("log"),
            "nbr_samples": len(samples),
            "first_sample_token": samples[0]["token"],
            "last_sample_token": samples[-1]["token"],
            "name": self.job.name,
            "description": f"{self.scenario.description}, {weather}",
        }

    def _log_row(self) -> Row:
        return {
            "token": self._token("log"),
            "logfile": self.logfile,
            "vehicle": f"synthetic{self.job.seed}",
            "date_captured": f"{self.job.start:%Y-%m-%d}",
            "location": self.job.location,
        }

    def _data_row(
        self, keyframe: int, channel: str, sample: str, time: float, extension: str
    ) -> tuple[Row, Row]:
        """A sample_data row and its ego_pose row, which share their token as in nuScenes."""
        camera = channel != "LIDAR_TOP"
        height, width = self.job.image_size if camera else (0, 0)
        token = self._token("sample_data", channel, keyframe)
        stamp = self._stamp(time)
        pose = self._ego_pose(time)
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
            "filename": f"samples/{channel}/{self.logfile}__{channel}__{stamp}.{extension}",
            "prev": "",
            "next": "",
        }
        ego_pose = {
            "token": token,
            "timestamp": stamp,
            "rotation": rig.quaternion(pose),
            "translation": [float(pose[0, 3]), float(pose[1, 3]), 0.0],
        }
        return row, ego_pose

    def _photograph(
        self, keyframe: int, number: int, sample: str, visible: dict[int, int], covered: dict[int, int]
    ) -> tuple[Row, Row]:
        job, mount = self.job, rig.CAMERA_MOUNTS[number]
        time = float(self.camera_times[keyframe, number])
        moving = stage.moving_participants(self.scenario, time)
        quads = self._quads(time, [*moving, *self.standing])
        camera = stage.camera_of(
            mount.intrinsics(job.image_size),
            exact.matmul(self._ego_pose(time), mount.to_ego()),
            job.image_size,
        )
        picture = stage.take_picture(
            self.backdrop,
            quads,
            stage.frame_shadows(self.backdrop, moving, self.light),
            camera,
            self.light,
            job.index * 1000 + keyframe * 6 + number,
            with_depth=job.with_depth,
        )
        row, pose = self._data_row(keyframe, mount.channel, sample, time, "jpg")
        path = job.root / row["filename"]
        _write(path, picture.jpeg)
        if job.with_depth:
            _write(job.root / "samples_depth" / mount.channel / f"{path.stem}.png", picture.depth_png)
        groups = np.append(quads.groups, [-1, -1])[picture.buffer.surface]  # GROUND and SKY have no group
        names, counts = np.unique(groups[groups >= 0], return_counts=True)
        for group, count in zip(names.tolist(), counts.tolist(), strict=True):
            visible[group] = visible.get(group, 0) + count
        for group, count in picture.buffer.covered.items():
            covered[group] = covered.get(group, 0) + count
        return row, pose

    def _scan(
        self, keyframe: int, sample: str, visible: dict[int, int], covered: dict[int, int]
    ) -> tuple[Row, Row, dict[int, _Sighting]]:
        time = float(self.times[keyframe])
        people = [*stage.moving_participants(self.scenario, time), *self.standing]
        quads = self._quads(time, people)
        ego = self._ego_pose(time)
        sensor = exact.matmul(ego, rig.lidar_to_ego())
        cloud = lidar.sweep(quads, sensor, self.lidar_rng)
        row, pose = self._data_row(keyframe, "LIDAR_TOP", sample, time, "pcd.bin")
        _write(self.job.root / row["filename"], cloud.tobytes())
        if not people:
            return row, pose, {}
        centres = np.array([[item.pose[0], item.pose[1], item.size[2] / 2] for item in people])
        sizes = np.array([item.size for item in people])
        yaws = np.array([item.pose[2] for item in people])
        counts = lidar.count_inside(cloud, sensor, centres, sizes, yaws)
        near = exact.norm(centres[:, :2] - ego[:2, 3]) < ANNOTATION_RANGE
        seen = {
            group: _Sighting(keyframe, item, counts[group], visible.get(group, 0), covered.get(group, 0))
            for group, item in enumerate(people)
            if near[group]
        }
        return row, pose, seen

    def _annotations(
        self, sightings: dict[int, list[_Sighting]], samples: list[Row]
    ) -> tuple[list[Row], list[Row]]:
        """An object is annotated from the first to the last keyframe at which a sensor notices it."""
        instances: list[Row] = []
        by_sample: list[list[Row]] = [[] for _ in samples]
        for group, seen in sightings.items():
            noticed = [i for i, s in enumerate(seen) if s.points > 0 or s.visible >= 30]
            if not noticed:
                continue
            span = _contiguous(seen[noticed[0] : noticed[-1] + 1])
            rows = [self._annotation(group, sighting, samples) for sighting in span]
            link(rows)
            for sighting, row in zip(span, rows, strict=True):
                by_sample[sighting.keyframe].append(row)
            instances.append(
                {
                    "token": self.tokens[group],
                    "category_token": make_token(self.job.seed, "category", seen[0].item.category),
                    "nbr_annotations": len(rows),
                    "first_annotation_token": rows[0]["token"],
                    "last_annotation_token": rows[-1]["token"],
                }
            )
        return instances, [row for rows in by_sample for row in rows]

    def _annotation(self, group: int, sighting: _Sighting, samples: list[Row]) -> Row:
        item = sighting.item
        x, y, yaw = item.pose
        attributes = [make_token(self.job.seed, "attribute", item.attribute)] if item.attribute else []
        return {
            "token": self._token("annotation", item.key, sighting.keyframe),
            "sample_token": samples[sighting.keyframe]["token"],
            "instance_token": self.tokens[group],
            "visibility_token": visibility_token(sighting.visible, sighting.covered),
            "attribute_tokens": attributes,
            "translation": [x, y, item.size[2] / 2],
            "size": [item.size[1], item.size[0], item.size[2]],
            "rotation": rig.quaternion(rig.pose_matrix(0.0, 0.0, yaw)),
            "prev": "",
            "next": "",
            "num_lidar_pts": sighting.points,
            "num_radar_pts": 0,
        }


def _contiguous(span: list[_Sighting]) -> list[_Sighting]:
    """The first run without a gap (an object that leaves the range and returns is not tracked again)."""
    for i in range(1, len(span)):
        if span[i].keyframe != span[i - 1].keyframe + 1:
            return span[:i]
    return span


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)

"""The sensors of one scene: when they fire, what they see, what of it counts as noticed.

A film does not care who drives: it looks at a scenario whose motions are those of the script (a recording) or
of what happened so far (a drive), through the same functions.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.world import can_bus, ground, sensors, stage
from spacedrive_jax.world.render import Camera
from spacedrive_jax.world.scenario import WARM_UP, Scenario, make_token
from spacedrive_jax.world.shading import WEATHERS, Light
from spacedrive_jax.world.shapes import Blocks, Quads
from spacedrive_jax.world.stage import Participant, Picture

KEYFRAME_PERIOD = 0.5
ANNOTATION_RANGE = 75.0
NOTICED_PIXELS = 30
"""An object without a LiDAR return is noticed when it shows at least so many pixels in the six images."""
_FIRST_DAY = datetime.datetime(2024, 5, 1, 9, 0, tzinfo=datetime.UTC)
_NO_CAN_BUS = frozenset([*range(161, 169), *range(170, 177), *range(309, 315)])
"""Scene numbers for which the devkit refuses CAN data; the synthetic world does not use them."""


@dataclasses.dataclass(frozen=True)
class Take:
    """All that decides how a scene is filmed, besides what happens in it."""

    index: int
    """Of the scene among those of its seed."""
    seed: int
    keyframes: int
    """Two a second."""
    image_size: tuple[int, int]
    """Height, width."""
    with_depth: bool
    location: str
    weather: str | None = None
    """Name of a weather; None draws one."""

    @property
    def name(self) -> str:
        """scene-0001, scene-0002 and so on."""
        free = (number for number in range(1, 10_000) if number not in _NO_CAN_BUS)
        return f"scene-{next(number for i, number in enumerate(free) if i == self.index):04d}"

    @property
    def start(self) -> datetime.datetime:
        """Local time at which the recording begins."""
        return _FIRST_DAY + datetime.timedelta(hours=7 * self.index, minutes=11 * (self.index % 5))

    @property
    def logfile(self) -> str:
        """The log's name."""
        return f"synthetic{self.seed}-{self.start:%Y-%m-%d-%H-%M-%S}+0000"

    @property
    def duration(self) -> float:
        """From the first keyframe to the last, seconds."""
        return (self.keyframes - 1) * KEYFRAME_PERIOD

    @property
    def end(self) -> float:
        """The last time that any sensor reports, seconds since the start of the simulation."""
        return WARM_UP + self.duration + 0.4

    def token(self, *parts: object) -> str:
        """The token of something of this scene."""
        return make_token(self.seed, self.name, *parts)


@dataclasses.dataclass(frozen=True)
class Sighting:
    """One object near the ego vehicle at one keyframe."""

    keyframe: int
    item: Participant
    points: int
    """LiDAR returns."""
    visible: int
    """Pixels it shows in the six images."""
    covered: int
    """Pixels it would show if nothing stood before it."""

    @property
    def noticed(self) -> bool:
        """Whether a sensor sees it."""
        return self.points > 0 or self.visible >= NOTICED_PIXELS


@dataclasses.dataclass(frozen=True)
class Shot:
    """One image."""

    picture: Picture
    time: float
    """When it was taken, seconds since the start of the simulation."""
    ego_to_global: Float[np.ndarray, "4 4"]
    visible: Mapping[int, int]
    """Pixels of each participant."""


class Film:
    """The sensors of one scene and the place they see."""

    def __init__(self, take: Take, scenario: Scenario, reach: float | None = None) -> None:
        """Draws the light, the sensors' times and the backdrop.

        Args:
            take: how it is filmed.
            scenario: the script; its motions say which ground may be seen.
            reach: seconds along the script after which nothing is seen any more; the take's end by default.
        """
        self.take = take
        jitter = np.random.default_rng([take.seed, take.index, 3])
        drawn = WEATHERS[int(jitter.integers(len(WEATHERS)))] if take.index else WEATHERS[0]
        named = [weather for weather in WEATHERS if weather.name == take.weather]
        self.light = Light(named[0] if named else drawn, float(jitter.uniform(0, 2 * np.pi)))
        low, high = stage.scene_area(scenario, take.end if reach is None else reach)
        surface_map = ground.surface_map_of_town(scenario.town, low, high)
        backdrop = stage.build_backdrop(surface_map, self.light, stage.LAND_SEED)
        self.standing = stage.standing_participants(scenario)
        shadows = stage.frame_shadows(backdrop, self.standing, self.light)
        self.backdrop = dataclasses.replace(backdrop, shadows=shadows)
        self.shadows = stage.MovingShadows(self.backdrop, self.light)
        self._signals: tuple[tuple[str, ...], Blocks] | None = None
        self.epoch_us = int(take.start.timestamp() * 1e6) + int(jitter.integers(1_000_000))
        nominal = WARM_UP + KEYFRAME_PERIOD * np.arange(take.keyframes)
        self.times = nominal + jitter.uniform(-0.003, 0.003, take.keyframes)
        leads = np.array([mount.lead_ms for mount in sensors.CAMERA_MOUNTS]) * 1e-3
        jitters = jitter.uniform(-0.002, 0.002, (take.keyframes, len(leads)))
        self.camera_times = self.times[:, None] - leads + jitters
        self.lidar_rng = np.random.default_rng([take.seed, take.index, 4])
        people = [*stage.moving_participants(scenario, 0.0), *self.standing]
        self.tokens = [take.token("instance", item.key) for item in people]

    def stamp(self, time: float) -> int:
        """A time of the simulation in microseconds."""
        return self.epoch_us + round(time * 1e6)

    def ego_pose(self, scenario: Scenario, time: float) -> Float[np.ndarray, "4 4"]:
        """ego_to_global at a time."""
        state = can_bus.ego_state(scenario, time)
        return sensors.pose_matrix(state["x"], state["y"], state["yaw"])

    def people(self, scenario: Scenario, time: float) -> list[Participant]:
        """Everybody annotated at a time, in the order of `tokens`."""
        return [*stage.moving_participants(scenario, time), *self.standing]

    def quads(
        self, scenario: Scenario, time: float, people: list[Participant], camera: Camera | None = None
    ) -> Quads:
        """Everything that stands on the ground at a time; with a camera, what it may see (`frame_quads`)."""
        states = stage.signal_states(scenario, time)
        if self._signals is None or self._signals[0] != states:  # they change every few seconds
            self._signals = states, stage.signal_blocks(scenario.town, states)
        return stage.frame_quads(self.backdrop, people, self.tokens, self._signals[1], camera)

    def photograph(self, scenario: Scenario, keyframe: int, number: int) -> Shot:
        """Takes the image of one camera (in the order of `CAMERA_MOUNTS`) of a keyframe."""
        take, mount = self.take, sensors.CAMERA_MOUNTS[number]
        time = float(self.camera_times[keyframe, number])
        moving = stage.moving_participants(scenario, time)
        pose = self.ego_pose(scenario, time)
        camera = stage.camera_of(
            mount.intrinsics(take.image_size), exact.matmul(pose, mount.to_ego()), take.image_size
        )
        quads = self.quads(scenario, time, [*moving, *self.standing], camera)
        picture = stage.take_picture(
            self.backdrop,
            quads,
            self.shadows.draw(moving, camera),
            camera,
            self.light,
            take.index * 1000 + keyframe * 6 + number,
            with_depth=take.with_depth,
        )
        shown = picture.buffer.surface.ravel()
        groups = quads.groups.take(shown.compress(shown >= 0))
        counts = np.bincount(groups.compress(groups >= 0))
        names = np.flatnonzero(counts)
        return Shot(picture, time, pose, dict(zip(names.tolist(), counts[names].tolist(), strict=True)))

    def scan(self, scenario: Scenario, keyframe: int) -> Float[np.ndarray, "P 5"]:
        """The LiDAR sweep of a keyframe; sweeps must be taken in order, their noise is one stream."""
        time = float(self.times[keyframe])
        quads = self.quads(scenario, time, self.people(scenario, time))
        sensor = exact.matmul(self.ego_pose(scenario, time), sensors.lidar_to_ego())
        return sensors.lidar_sweep(quads, sensor, self.lidar_rng)

    def sightings(
        self, scenario: Scenario, keyframe: int, shots: Sequence[Shot], cloud: Float[np.ndarray, "P 5"] | None
    ) -> dict[int, Sighting]:
        """Who is near at a keyframe and how much of each is seen, by position in `people`."""
        time = float(self.times[keyframe])
        people = self.people(scenario, time)
        if not people:
            return {}
        ego = self.ego_pose(scenario, time)
        centres = np.array([[item.pose[0], item.pose[1], item.size[2] / 2] for item in people])
        sizes = np.array([item.size for item in people])
        yaws = np.array([item.pose[2] for item in people])
        counts = [0] * len(people)
        if cloud is not None:
            sensor = exact.matmul(ego, sensors.lidar_to_ego())
            counts = sensors.count_inside(cloud, sensor, centres, sizes, yaws)
        near = exact.norm(centres[:, :2] - ego[:2, 3]) < ANNOTATION_RANGE
        return {
            group: Sighting(
                keyframe,
                item,
                counts[group],
                sum(shot.visible.get(group, 0) for shot in shots),
                sum(shot.picture.buffer.covered.get(group, 0) for shot in shots),
            )
            for group, item in enumerate(people)
            if near[group]
        }


def annotated_span(seen: Sequence[Sighting]) -> list[Sighting]:
    """The sightings of one object that are annotated: from the first to the last that a sensor notices.

    An object that leaves the range and returns is not tracked again: the first run without a gap counts.
    """
    noticed = [index for index, sighting in enumerate(seen) if sighting.noticed]
    if not noticed:
        return []
    span = list(seen[noticed[0] : noticed[-1] + 1])
    for index in range(1, len(span)):
        if span[index].keyframe != span[index - 1].keyframe + 1:
            return span[:index]
    return span

"""What happened on a drive, as arrays: the one thing that scores, reports and films read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import shapely
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree

from spacedrive_jax import exact
from spacedrive_jax.world import paths
from spacedrive_jax.world.paths import corners
from spacedrive_jax.world.scenario import Scenario
from spacedrive_jax.world.town import LANE_WIDTH, STOP_SETBACK, Town
from spacedrive_jax.world.traffic import TIME_STEP, Mover, Obstacle, Tracks
from spacedrive_jax.world.vehicle import WHEEL_BASE
from spacedrive_jax.world.world import World, WorldState

CAR_HALF = np.array([4.084 / 2, 1.73 / 2])
"""Half length and width of the Renault Zoe that recorded nuScenes, metres."""
CAR_CENTRE = 1.39
"""Metres from the rear axle ahead to the middle of that footprint."""


@dataclasses.dataclass(frozen=True)
class DriveLog:
    """T time steps of `TIME_STEP` seconds; R boxes: movers (the ego vehicle first), then what stands."""

    scenario: Scenario
    time: Float[np.ndarray, " T"]
    ego: Float[np.ndarray, "T 6"]
    """x, y, yaw of the rear axle, speed, acceleration, steering angle."""
    s: Float[np.ndarray, " T"]
    """Metres along the route of the nearest place on it."""
    aside: Float[np.ndarray, " T"]
    """Metres from the route, positive to its left."""
    poses: Float[np.ndarray, "T R 3"]
    """x, y, heading of every box centre."""
    speeds: Float[np.ndarray, "T R"]
    goal: float
    """Metres along the route at which it ends."""

    @property
    def start(self) -> float:
        """Metres along the route at which the drive began."""
        return float(self.s[0])

    @property
    def _everybody(self) -> list[Mover | Obstacle]:
        return [*self.scenario.cast.movers, *self.scenario.cast.obstacles]

    @functools.cached_property
    def half(self) -> Float[np.ndarray, "R 2"]:
        """Half length and half width of every box."""
        return np.array([item.size[:2] for item in self._everybody]).reshape(-1, 2) / 2

    @functools.cached_property
    def categories(self) -> tuple[str, ...]:
        """NuScenes category of everybody."""
        return tuple(item.category for item in self._everybody)

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        """Names of everybody."""
        return tuple(item.key for item in self._everybody)

    @functools.cached_property
    def progress(self) -> Float[np.ndarray, " T"]:
        """The furthest place reached so far, metres along the route."""
        return np.maximum.accumulate(self.s)

    @functools.cached_property
    def travelled(self) -> Float[np.ndarray, " T"]:
        """Metres driven by each step."""
        steps = exact.norm(np.diff(self.ego[:, :2], axis=0))
        return np.concatenate([[0.0], np.cumsum(steps)])

    @functools.cached_property
    def corners(self) -> Float[np.ndarray, "T 4 2"]:
        """Of the car's footprint: front left, rear left, rear right, front right.

        The box that others see spans the metrics' footprint and the car; on the road only the car must be.
        """
        cos, sin = exact.cos_sin(self.ego[:, 2])
        centre = self.ego[:, :3].copy()
        centre[:, 0] += CAR_CENTRE * cos
        centre[:, 1] += CAR_CENTRE * sin
        return corners(centre, np.broadcast_to(CAR_HALF, (len(self.time), 2)))

    @functools.cached_property
    def yaw_rate(self) -> Float[np.ndarray, " T"]:
        """Radians per second, as driven."""
        if len(self.time) < 2:
            return np.zeros(len(self.time))
        return np.gradient(self.ego[:, 2], TIME_STEP)

    @functools.cached_property
    def acceleration(self) -> Float[np.ndarray, " T"]:
        """Along the vehicle, m/s^2, as driven."""
        if len(self.time) < 2:
            return np.zeros(len(self.time))
        return np.gradient(self.ego[:, 3], TIME_STEP)


def drive_log(world: World, states: Sequence[WorldState], goal: float) -> DriveLog:
    """The log of some states of a world in which the ego vehicle was steered."""
    route = world.scenario.ego.route
    rows, aside = [], []
    for state in states:
        vehicle = state.vehicle
        assert vehicle is not None, "a drive begins where the vehicle is handed over"
        rows.append((vehicle.x, vehicle.y, vehicle.yaw, vehicle.speed, vehicle.acceleration, vehicle.steer))
        aside.append(route.project(np.array(rows[-1][:2]), float(state.traffic.s[0]))[1])
    poses = np.stack([world.poses(state) for state in states])
    speeds = np.zeros(poses.shape[:2])
    speeds[:, : len(world.scenario.cast.movers)] = np.stack([state.traffic.speed for state in states])
    return DriveLog(
        scenario=world.scenario,
        time=np.array([state.time for state in states]),
        ego=np.array(rows),
        s=np.array([float(state.traffic.s[0]) for state in states]),
        aside=np.array(aside),
        poses=poses,
        speeds=speeds,
        goal=goal,
    )


def script_log(scenario: Scenario, start: float, goal: float) -> DriveLog:
    """The log of what the script's own driver does, from a time on until it is at the goal.

    Args:
        scenario: with its script's motions.
        start: seconds since the start of the simulation.
        goal: metres along the route.
    """
    cast, route, ego = scenario.cast, scenario.ego.route, scenario.motions[0]
    first = round(start / TIME_STEP)
    steps = slice(first, first + int(np.searchsorted(ego.s[first:], goal)) + 1)
    s, speeds = (
        np.stack([getattr(motion, name)[steps] for motion in scenario.motions], axis=1)
        for name in ("s", "speed")
    )
    tracks = Tracks(cast.movers)
    still = np.array([item.pose for item in cast.obstacles]).reshape(-1, 3)
    poses = np.stack([np.concatenate([tracks.poses(row), still]) for row in s])
    steer = exact.arctan(WHEEL_BASE * route.curvature(s[:, 0]))
    along = np.stack([speeds[:, 0], ego.acceleration[steps], steer], axis=1)
    return DriveLog(
        scenario=scenario,
        time=TIME_STEP * (first + np.arange(len(s))),
        ego=np.concatenate([route.pose(s[:, 0]), along], axis=1),
        s=s[:, 0],
        aside=np.zeros(len(s)),
        poses=poses,
        speeds=np.pad(speeds, ((0, 0), (0, len(still)))),
        goal=goal,
    )


@dataclasses.dataclass(frozen=True)
class StopLine:
    """Where vehicles of one lane wait for their light."""

    junction: int
    arm: int
    ends: Float[np.ndarray, "2 2"]


class LaneMap:
    """A town's lanes for questions about a place."""

    def __init__(self, town: Town) -> None:
        self.town = town
        roads = [lane for lane in town.lanes.values() if lane.road is not None]
        turns = [lane for lane in town.lanes.values() if lane.road is None]
        self._roads = _Lines([lane.centre for lane in roads])
        self._turns = _Lines([lane.centre for lane in turns])
        self._signalised = np.array([junction.centre for junction in town.junctions])
        self._radii = np.array([junction.radius for junction in town.junctions])
        self.drivable = town.drivable.buffer(DRIVABLE_TOLERANCE)
        shapely.prepare(self.drivable)
        self.stop_lines = [
            StopLine(lane.junction, lane.arm, _stop_line(lane.centre))
            for lane in roads
            if town.junctions[lane.junction].signalised
        ]

    def in_junction(self, places: Float[np.ndarray, "T 2"]) -> Bool[np.ndarray, " T"]:
        """Whether places lie inside a junction (bends of two arms count: lanes cross over there too)."""
        distances = exact.norm(places[:, None] - self._signalised)
        return np.any(distances < self._radii, axis=1)

    def off_centre(self, places: Float[np.ndarray, "T 2"]) -> Float[np.ndarray, " T"]:
        """Metres to the nearest centre line of a lane or a way through a junction."""
        return np.minimum(self._roads.nearest(places)[0], self._turns.nearest(places)[0])

    def against(
        self, places: Float[np.ndarray, "T 2"], yaw: Float[np.ndarray, " T"]
    ) -> Bool[np.ndarray, " T"]:
        """Whether a vehicle drives against the direction of the nearest lane, outside junctions."""
        _, heading = self._roads.nearest(places)
        cos, _ = exact.cos_sin(yaw - heading)
        return (cos < -0.5) & ~self.in_junction(places)

    def on_road(self, points: Float[np.ndarray, "T 4 2"]) -> Bool[np.ndarray, " T"]:
        """Whether all four corners lie on the drivable surface, to within `DRIVABLE_TOLERANCE`."""
        inside = shapely.contains_xy(self.drivable, points[..., 0], points[..., 1])
        return np.all(inside, axis=1)


DRIVABLE_TOLERANCE = 0.3
"""Metres (nuPlan's)."""


class _Lines:
    """Polylines as points a quarter of a metre apart, with the direction at each."""

    def __init__(self, lines: Sequence[Float[np.ndarray, "_ 2"]]) -> None:
        dense = [paths.resample(line, 0.25) for line in lines]
        self._points = np.concatenate(dense)
        self._headings = np.concatenate([paths.headings(line) for line in dense])
        self._tree = cKDTree(self._points)

    def nearest(
        self, places: Float[np.ndarray, "T 2"]
    ) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
        """Distance to, and direction at, the nearest point."""
        _, index = self._tree.query(places)
        return exact.norm(self._points[index] - places), self._headings[index]


def _stop_line(centre: Float[np.ndarray, "K 2"]) -> Float[np.ndarray, "2 2"]:
    lengths = paths.arc_lengths(centre)
    at = max(float(lengths[-1]) - STOP_SETBACK, 0.0)
    nearest = int(np.argmin(np.abs(lengths - at)))
    middle = np.array([np.interp(at, lengths, centre[:, axis]) for axis in range(2)])
    across = paths.left_normals(centre)[nearest] * LANE_WIDTH / 2
    return np.stack([middle + across, middle - across])

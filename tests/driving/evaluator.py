"""A stand-in for Bench2Drive's leaderboard: its life cycle around the shipped agent file, without CARLA.

What it keeps of the evaluator (leaderboard_evaluator, scenario_manager, agent_wrapper): the agent's file is
imported by its bare name from its folder; TEAM_CONFIG grows by `+name` for every route; an error in `setup`
ends everything, one in `run_step` its route; ten ticks are dropped; 20 Hz; a result JSON. The car is the
kinematic bicycle that SimLingo fitted to CARLA's MKZ; value classes are carla's own where the wheel is there.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import math
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import spacedrive_jax.driving
from data_prep.synthesize.bench2drive import route_nodes
from spacedrive_jax.driving.bench2drive_rig import LIDAR
from spacedrive_jax.driving.bench2drive_route import GNSS_X, REAR_AXLE
from spacedrive_jax.world.traffic import Route

try:
    import carla
except ImportError:  # no wheel for this machine
    carla = None

ORIGIN = (42.0, 2.0)
"""Latitude and longitude of the map's origin."""
RADIUS = 6378137.0
GPS_SIGMA = 5e-6
TICK = 0.05
DROPPED_TICKS = 10
MOST_TICKS = 4000
STEER_GAIN, AXLES, BRAKING, THROTTLE = 0.36848336, 1.3270585, 4.952399, 4.5
"""SimLingo's bicycle (its own throttle gain of 0.56 m/s² is that of a step of several ticks)."""
AGENT_FILES = Path(spacedrive_jax.driving.__path__[0])


class RoadOption(enum.IntEnum):
    """`agents.navigation.local_planner`, which is not in the wheel."""

    VOID = -1
    LEFT = 1
    RIGHT = 2
    STRAIGHT = 3
    LANEFOLLOW = 4


@dataclasses.dataclass
class VehicleControl:
    throttle: float = 0.0
    steer: float = 0.0
    brake: float = 0.0


def transform(x: float, y: float, yaw: float = 0.0) -> Any:
    if carla is not None:
        return carla.Transform(carla.Location(x=x, y=y, z=0.0), carla.Rotation(yaw=yaw))
    location = types.SimpleNamespace(x=x, y=y, z=0.0)
    return types.SimpleNamespace(location=location, rotation=types.SimpleNamespace(yaw=yaw))


def gps_of(x: float, y: float) -> dict[str, float]:
    """The leaderboard's `_location_to_gps`."""
    scale = math.cos(math.radians(ORIGIN[0]))
    mx = scale * ORIGIN[1] * math.pi * RADIUS / 180.0 + x
    my = scale * RADIUS * math.log(math.tan((90.0 + ORIGIN[0]) * math.pi / 360.0)) - y
    longitude = mx * 180.0 / (math.pi * RADIUS * scale)
    latitude = 360.0 * math.atan(math.exp(my / (RADIUS * scale))) / math.pi - 90.0
    return {"lat": latitude, "lon": longitude, "z": 0.0}


class Track(enum.Enum):
    SENSORS = "SENSORS"


class AutonomousAgent:
    """The base class, as far as an agent relies on it."""

    car: Car
    """The hero, which the real one finds in the simulator."""

    def __init__(self, carla_host: str, carla_port: int, debug: bool = False) -> None:
        self.track = Track.SENSORS
        self._global_plan: Any = None
        self._global_plan_world_coord: Any = None

    def set_global_plan(self, gps: Sequence[Any], world: Sequence[Any]) -> None:
        self._global_plan, self._global_plan_world_coord = list(gps), list(world)

    def get_metric_info(self) -> dict[str, Any]:
        c, s = math.cos(self.car.yaw), math.sin(self.car.yaw)
        return {
            "acceleration": [self.car.acceleration * c, -self.car.acceleration * s, 0.0],
            "angular_velocity": [0.0, 0.0, -math.degrees(self.car.rate)],
            "forward_vector": [c, -s, 0.0],
            "right_vector": [s, c, 0.0],
            "location": [self.car.origin[0], -self.car.origin[1], 0.0],
            "rotation": [0.0, 0.0, -math.degrees(self.car.yaw)],
        }


def install_modules() -> None:
    """The modules that the agent's file imports."""
    leaderboard = types.ModuleType("leaderboard")
    autoagents = types.ModuleType("leaderboard.autoagents")
    agent = types.ModuleType("leaderboard.autoagents.autonomous_agent")
    agent.AutonomousAgent, agent.Track = AutonomousAgent, Track  # type: ignore[attr-defined]
    autoagents.autonomous_agent = agent  # type: ignore[attr-defined]
    sys.modules |= {
        "leaderboard": leaderboard,
        "leaderboard.autoagents": autoagents,
        "leaderboard.autoagents.autonomous_agent": agent,
    }
    if carla is None:
        stand_in = types.ModuleType("carla")
        stand_in.VehicleControl = VehicleControl  # type: ignore[attr-defined]
        sys.modules["carla"] = stand_in


def load_agent() -> Any:
    """The agent's module, imported as the evaluator does."""
    install_modules()
    sys.path.insert(0, str(AGENT_FILES))
    try:
        return importlib.import_module("bench2drive_agent")
    finally:
        sys.path.remove(str(AGENT_FILES))


@dataclasses.dataclass
class Car:
    """Rear axle, this project's axes."""

    x: float
    y: float
    yaw: float
    speed: float = 0.0
    acceleration: float = 0.0
    rate: float = 0.0

    @property
    def origin(self) -> np.ndarray:
        return np.array([self.x, self.y]) + REAR_AXLE * np.array([math.cos(self.yaw), math.sin(self.yaw)])

    def drive(self, control: Any) -> None:
        """One tick."""
        pushed = THROTTLE * control.throttle - 0.05 * self.speed - BRAKING * control.brake
        later = max(self.speed + pushed * TICK, 0.0)
        self.acceleration = (later - self.speed) / TICK
        way = (self.speed + later) / 2 * TICK
        turn = -math.tan(STEER_GAIN * control.steer) / AXLES * way  # positive steer is to the right
        self.rate = turn / TICK
        self.x += way * math.cos(self.yaw + turn / 2)
        self.y += way * math.sin(self.yaw + turn / 2)
        self.yaw += turn
        self.speed = later


@dataclasses.dataclass
class Drive:
    """One route of the set."""

    number: int
    scenario: str
    route: Route
    start: float
    end: float
    stop: float | None = None
    """Where to come to a stand and stay, metres along the route."""
    start_speed: float = 0.0
    picture: Callable[[str, Car, int], np.ndarray] | None = None
    """BGRA of a camera."""
    sweep: Callable[[Car, int], np.ndarray] | None = None
    """Points around (P, 4): x, y, z, intensity in the frame of a LiDAR at `LIDAR`, CARLA's axes."""

    @property
    def save_name(self) -> str:
        return f"RouteScenario_{self.number}_rep0_Town91_{self.scenario}_0_11_27_12_00_00"


class Evaluator:
    """Drives routes with the agent and writes what the benchmark would."""

    def __init__(
        self, config: str, seed: int = 0, disturb: Callable[[int, dict], None] | None = None
    ) -> None:
        """Args: TEAM_CONFIG, seed of the sensors' noise, what to do to each tick's sensor data."""
        self.config, self.disturb = config, disturb
        self.rng = np.random.default_rng(seed)
        self.module = load_agent()
        self.records: list[dict[str, Any]] = []
        self.car: Car | None = None
        self.route: Drive | None = None
        self.farthest = 0.0
        """Largest distance of the last drive from its route, metres."""

    def run(self, drive: Drive) -> dict[str, Any]:
        """One route; returns its record."""
        started = time.monotonic()
        agent = getattr(self.module, self.module.get_entry_point())("localhost", 2000, False)
        x, y, yaw = (float(value) for value in drive.route.pose(drive.start))
        back = REAR_AXLE * np.array([math.cos(yaw), math.sin(yaw)])
        self.car = agent.car = Car(x - back[0], y - back[1], yaw, drive.start_speed)
        self.route = drive
        self.config = f"{self.config}+{drive.save_name}"
        points, commands = route_nodes(drive.route, drive.start)
        world = [
            (transform(px, -py), RoadOption(word))
            for (px, py), word in zip(points.tolist(), commands, strict=True)
        ]
        gps = [(gps_of(place.location.x, place.location.y), word) for place, word in world]
        agent.set_global_plan(gps, world)
        agent.setup(self.config)  # an error here ends the evaluation
        sensors = {sensor["id"]: sensor for sensor in agent.sensors()}
        status, tick = "Completed", 0
        self.farthest, reached = 0.0, drive.start
        still = 0
        while True:
            tick += 1
            if tick > MOST_TICKS:
                status = "Failed - TickRuntime"
                break
            if tick <= DROPPED_TICKS:
                continue
            data = self._sense(sensors, tick)
            if self.disturb is not None:
                self.disturb(tick, data)
            try:
                control = agent.run_step(data, tick * TICK)
            except Exception as error:
                status = f"Failed - Agent crashed: {error!r}"
                break
            self.car.drive(control)
            s, aside = drive.route.project(self.car.origin, reached)
            reached = max(reached, s)
            self.farthest = max(self.farthest, abs(aside))
            still = still + 1 if self.car.speed < 0.1 else 0
            if drive.stop is None and s >= drive.end:
                break
            if drive.stop is not None and still >= 40 and s > drive.stop - 4:
                break
            if self.farthest > 30:
                status = "Failed - Agent deviated from the route"
                break
            if still > 1200:
                status = "Failed - Agent got blocked"
                break
        agent.destroy()
        goal = drive.end if drive.stop is None else drive.stop - 4
        share = min(max((reached - drive.start) / (goal - drive.start), 0.0), 1.0)
        self.records.append(self._record(drive, status, 100 * share, tick, time.monotonic() - started))
        return self.records[-1]

    def _sense(self, sensors: dict[str, Any], tick: int) -> dict[str, tuple[int, Any]]:
        car = self.car
        assert car is not None
        forward = np.array([math.cos(car.yaw), math.sin(car.yaw)])
        antenna = car.origin + GNSS_X * forward
        gps = gps_of(antenna[0], -antenna[1])
        compass = math.pi / 2 - car.yaw if tick > DROPPED_TICKS + 2 else math.nan
        lateral = car.speed * car.rate
        imu = [car.acceleration, -lateral, 9.81, 0.0, 0.0, -car.rate, compass % (2 * math.pi)]
        values: dict[str, Any] = {
            "GPS": np.array([gps["lat"], gps["lon"], 0.0]) + self.rng.normal(0, GPS_SIGMA, 3),
            "IMU": np.array(imu) + np.append(self.rng.normal(0, 0.001, 6), 0.0),
            "SPEED": {"speed": car.speed},
        }
        for name, sensor in sensors.items():
            if sensor["type"] == "sensor.camera.rgb":
                size = (sensor["height"], sensor["width"])
                values[name] = self._picture(name, size, tick)
            elif sensor["type"] == "sensor.lidar.ray_cast":
                assert self.route is not None
                assert self.route.sweep is not None
                assert (sensor["x"], sensor["y"], sensor["z"], sensor["yaw"]) == (*LIDAR, 0)
                points = self.route.sweep(car, tick)
                # 10 turns a second: a tick brings the half that it passes over.
                values[name] = points[points[:, 1] > 0 if tick % 2 else points[:, 1] <= 0]
        return {name: (tick, value) for name, value in values.items()}

    def _picture(self, name: str, size: tuple[int, int], tick: int) -> np.ndarray:
        assert self.route is not None
        assert self.car is not None
        if self.route.picture is None:
            return _GREY.setdefault(size, np.full((*size, 4), 128, np.uint8))
        return self.route.picture(name, self.car, tick)

    def _record(
        self, drive: Drive, status: str, completion: float, ticks: int, took: float
    ) -> dict[str, Any]:
        kinds = (
            *("collisions_layout", "collisions_pedestrian", "collisions_vehicle", "red_light"),
            *("stop_infraction", "outside_route_lanes", "min_speed_infractions", "scenario_timeouts"),
            *("yield_emergency_vehicle_infractions", "route_dev", "vehicle_blocked", "route_timeout"),
        )
        completion = round(completion, 6)
        return {
            "index": len(self.records),
            "route_id": f"RouteScenario_{drive.number}_rep0",
            "scenario_name": drive.scenario,
            "weather_id": "0",
            "save_name": drive.save_name,
            "town_name": "Town91",
            "status": "Perfect" if status == "Completed" and completion == 100 else status,
            "num_infractions": 0,
            "infractions": {kind: [] for kind in kinds},
            "scores": {"score_route": completion, "score_penalty": 1.0, "score_composed": completion},
            "meta": {
                "route_length": drive.end - drive.start,
                "duration_game": ticks * TICK,
                "duration_system": took,
            },
        }

    def write(self, path: Path) -> None:
        """The result JSON."""
        count = len(self.records)
        path.write_text(
            json.dumps(
                {
                    "_checkpoint": {"global_record": {}, "progress": [count, count], "records": self.records},
                    "entry_status": "Finished",
                    "eligible": True,
                    "sensors": [],
                    "values": [],
                    "labels": [],
                }
            )
        )


_GREY: dict[tuple[int, int], np.ndarray] = {}


class Expert:
    """The policy that knows the route and where the car truly is: it follows the one at a sensible speed."""

    def __init__(self, evaluator: Callable[[], Evaluator], points: int = 20) -> None:
        from spacedrive_jax.driving.client import PROTOCOL

        self.metadata = {"protocol": PROTOCOL, "model": "expert"}
        self.most, self.points = 8, points
        self.seen: list[dict[str, Any]] = []
        self._evaluator = evaluator
        self._near = 0.0

    def warm_up(self) -> None:
        """Nothing to compile."""

    def prepare(self, message: Any) -> Any:
        from spacedrive_jax.driving.protocol import partial_record

        self.seen.append(dict(message) | {"images": None})
        return partial_record(message)

    def run(self, prepared: Sequence[Any]) -> list[dict[str, Any]]:
        return [self._plan() for _ in prepared]

    def _plan(self) -> dict[str, Any]:
        evaluator = self._evaluator()
        car, drive = evaluator.car, evaluator.route
        assert car is not None
        assert drive is not None
        s, _ = drive.route.project(car.origin, max(drive.start, self._near))
        self._near = s
        places, speed, at = [], car.speed, s
        for _ in range(60):  # 3 s
            ahead = at + np.arange(0.0, 12.0, 0.5)
            bend = float(np.abs(drive.route.curvature(ahead)).max())
            wanted = min(5.0, math.sqrt(1.0 / max(bend, 1e-3)))
            if drive.stop is not None:
                wanted = min(wanted, math.sqrt(2 * 1.5 * max(drive.stop - 1.5 - at, 0.0)))
            speed += min(max(wanted - speed, -3.0 * TICK), 1.6 * TICK)
            at += max(speed, 0.0) * TICK
            places.append(at)
        waypoints = drive.route.pose(np.array(places[9::10]))[:, :2]
        path = drive.route.pose(s + np.arange(1.0, self.points + 1))[:, :2]
        return {
            "waypoints": _into(car, waypoints),
            "path": _into(car, path) if self.points else np.zeros((0, 2)),
            "text": "",
            "status": "ok",
        }


def _into(car: Car, points: np.ndarray) -> np.ndarray:
    c, s = math.cos(car.yaw), math.sin(car.yaw)
    x, y = (points - car.origin).T
    return np.stack([c * x + s * y, c * y - s * x], axis=1)

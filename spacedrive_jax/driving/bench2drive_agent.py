"""The agent for Bench2Drive's leaderboard: sensors to a policy server, its plan to the car's controls.

Give this file as TEAM_AGENT and the server as TEAM_CONFIG, `ws://HOST:PORT` with options behind a question
mark: `ws://127.0.0.1:8000?controller=zoo&every=10` (see `Options`). Runs in CARLA's Python 3.7 with the files
beside it, numpy, OpenCV, msgpack and websockets; the model runs in the server.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import urllib.parse
from typing import Any, NamedTuple

import carla
import cv2
import numpy as np
from leaderboard.autoagents import autonomous_agent

if __package__:
    from spacedrive_jax.driving.bench2drive_control import STOP, Controller, Controls, along, path_of
    from spacedrive_jax.driving.bench2drive_rig import (
        IMAGE_SIZE,
        JPEG_QUALITY,
        LIDAR,
        LIDAR_RATE,
        RIG,
        camera_intrinsics,
        camera_to_ego,
        ego_numbers,
        sweep_in_ego,
    )
    from spacedrive_jax.driving.bench2drive_route import (
        GNSS_X,
        IMU_X,
        Localiser,
        Pose,
        RoutePlanner,
        find_projection,
        first_heading,
        into,
        out_of,
        relative,
    )
    from spacedrive_jax.driving.client import PolicyClient
else:  # the evaluator imports this file by its bare name, from its folder
    from bench2drive_control import STOP, Controller, Controls, along, path_of  # type: ignore
    from bench2drive_rig import (  # type: ignore
        IMAGE_SIZE,
        JPEG_QUALITY,
        LIDAR,
        LIDAR_RATE,
        RIG,
        camera_intrinsics,
        camera_to_ego,
        ego_numbers,
        sweep_in_ego,
    )
    from bench2drive_route import (  # type: ignore
        GNSS_X,
        IMU_X,
        Localiser,
        Pose,
        RoutePlanner,
        find_projection,
        first_heading,
        into,
        out_of,
        relative,
    )
    from client import PolicyClient  # type: ignore

TICK = 0.05
"""Seconds between two calls."""
HISTORY_TICKS = (10, 20, 30, 40)
"""The model's past: 0.5 and 1 s ago, and as far behind those for the commands it had then."""
ROUTE_RULES = ("near_far", "nodes")

log = logging.getLogger(__name__)


def get_entry_point() -> str:
    """The name of the agent's class, which the evaluator asks for."""
    return "SpaceDriveAgent"


class Options(NamedTuple):
    """What TEAM_CONFIG sets behind the question mark."""

    controller: str = "simlingo"
    """Preset of `bench2drive_control`: zoo, simlingo, hip_ad, minddrive."""
    throttle: str = "pid"
    """`pid`, or `pdm_lite`."""
    every: int = 10
    """Ask for a plan every so many ticks; it is followed in between. Published
    agents ask at every tick."""
    route: str = "near_far"
    """`near_far`: the command and the two target points by the two planners that Bench2Drive's data was
    recorded with; `nodes`: the command of the node passed last and the next two nodes (HiP-AD)."""
    creep: str = ""
    """`simlingo` or `lead`: press the throttle after standing for long."""
    target_point: int = 1
    """0: never aim at the route's target point in the plan's stead, which the `zoo` preset does."""
    lidar: int = 1
    """Carry a LiDAR where the server's model reads depth from one; 0: never."""
    speed_cap: float = 0.0
    """No throttle above this speed, m/s; 0 for none."""
    token: str = ""
    """What the server asks for (`%2B` for a plus); by default what the environment variable SPACEDRIVE_TOKEN
    says, if anything."""
    patience: float = 500.0
    """Seconds to wait for a server that is away."""
    video: int = 0
    """Save front and top view and the plan every so many ticks, into SAVE_PATH."""


def read_config(text: str) -> tuple[str, Options, str]:
    """Server, options and this route's save name, from the text that `setup` gets.

    The evaluator appends `+NAME` for each route to what it passed for the one before.

    Raises:
        ValueError: an option is unknown, given twice, or has no such value.
    """
    parts = text.split("+")
    url = urllib.parse.urlsplit(parts[0])
    if url.scheme not in ("ws", "wss") or not url.hostname:
        raise ValueError(f"TEAM_CONFIG {parts[0]!r} names no policy server: give ws://HOST:PORT")
    pairs = urllib.parse.parse_qsl(url.query, keep_blank_values=True)
    given = dict(pairs)
    if len(given) < len(pairs):
        raise ValueError(f"TEAM_CONFIG {parts[0]!r} gives an option twice")
    unknown = sorted(set(given) - set(Options._fields))
    if unknown:
        raise ValueError("TEAM_CONFIG has unknown options: {}".format(", ".join(unknown)))
    values = {}
    for name, value in given.items():
        kind = type(getattr(Options(), name))
        try:
            values[name] = kind(value)
        except ValueError:
            raise ValueError(f"TEAM_CONFIG: {name}={value!r} is no {kind.__name__}") from None
    options = Options(**values)
    if options.every < 1 or options.route not in ROUTE_RULES:
        raise ValueError(f"TEAM_CONFIG: every must be 1 or more, route one of {ROUTE_RULES}")
    # Neither below 0 nor nan, which every comparison lets pass.
    wrong = [name for name in ("speed_cap", "patience", "video") if not getattr(options, name) >= 0]
    if wrong:
        raise ValueError("TEAM_CONFIG: {} must be 0 or more".format(", ".join(wrong)))
    server = urllib.parse.urlunsplit((url.scheme, url.netloc, url.path, "", ""))
    return server, options, parts[-1] if len(parts) > 1 else ""


def moved_plan(waypoints: Any, path: Any, made: Pose, now: Pose) -> tuple[Any, Any]:
    """A plan in the frame of the present pose, its time shifted, its path from the car on.

    Args:
        waypoints: (6, 2) at 0.5 s steps behind `made`, in its frame.
        path: (R, 2) 1 m apart, in the same frame; empty takes the waypoints' line.
        made: where and when the plan was made.
        now: where and when it is followed.
    """
    line = into(now, out_of(made, np.concatenate([np.zeros((1, 2)), waypoints])))
    at = 0.5 * np.arange(len(line))
    wanted = at[1:] + (now.time - made.time)
    shifted = np.stack([np.interp(wanted, at, line[:, axis]) for axis in range(2)], axis=1)
    shifted += (np.maximum(wanted - at[-1], 0.0) / 0.5)[:, None] * (line[-1] - line[-2])
    if len(path) == 0:
        path = path_of(np.asarray(waypoints, np.float64))
    road = into(now, out_of(made, np.concatenate([np.zeros((1, 2)), path])))
    ahead = _from_nearest(road)
    return shifted, along(ahead, np.arange(1.0, len(path) + 1.0))


def _from_nearest(road: Any) -> Any:
    """The part of a polyline behind its point nearest the origin."""
    steps = np.diff(road, axis=0)
    squares = np.maximum(np.sum(steps * steps, axis=1), 1e-12)
    shares = np.clip(-np.sum(road[:-1] * steps, axis=1) / squares, 0.0, 1.0)
    nearest = road[:-1] + shares[:, None] * steps
    index = int(np.argmin(np.hypot(nearest[:, 0], nearest[:, 1])))
    return np.concatenate([nearest[index : index + 1], road[index + 1 :]])


class SpaceDriveAgent(autonomous_agent.AutonomousAgent):
    """One route; the evaluator makes an agent for each."""

    def setup(self, path_to_conf_file: str) -> None:
        """Reads TEAM_CONFIG and waits for the server (an error here would end the whole evaluation)."""
        self.track = autonomous_agent.Track.SENSORS
        server, self.options, self.save_name = read_config(path_to_conf_file)
        self.controller = Controller(
            self.options.controller,
            self.options.throttle,
            creep=self.options.creep or None,
            speed_cap=self.options.speed_cap or None,
            target_point=bool(self.options.target_point),
        )
        self.step = -1
        self.localiser = None  # type: Localiser | None
        self.plan = None  # type: tuple[Any, Any, Pose] | None
        self.history = collections.deque(maxlen=max(HISTORY_TICKS) + 1)  # type: collections.deque
        self.commands = collections.deque(maxlen=max(HISTORY_TICKS) + 1)  # type: collections.deque
        self.images = {}  # type: dict
        self.metric_info = {}  # type: dict
        self.unparsed = 0
        token = self.options.token or os.environ.get("SPACEDRIVE_TOKEN") or None
        self.client = PolicyClient(server, token=token, patience_seconds=self.options.patience)
        self.client.connect()
        self._keep_to_one_policy()
        self.client.reset(self.save_name)
        reads = {"lidar", "fused"} & set(self.client.metadata.get("depth") or ())
        carries = bool(reads and self.options.lidar)
        self.sweeps = collections.deque(maxlen=LIDAR_RATE) if carries else None  # type: Any

    def sensors(self) -> list:
        """The rig that Bench2Drive's data was recorded with."""
        width, height = IMAGE_SIZE
        zero = {"roll": 0.0, "pitch": 0.0, "yaw": 0.0}
        rig = [
            dict(zero, type="sensor.camera.rgb", id=name, x=x, y=y, z=z, yaw=yaw, fov=fov, width=width,
                 height=height)
            for name, (x, y, z, yaw, fov) in RIG.items()
        ]  # fmt: skip
        rig += [
            dict(zero, type="sensor.other.imu", id="IMU", x=IMU_X, y=0.0, z=0.0, sensor_tick=TICK),
            dict(zero, type="sensor.other.gnss", id="GPS", x=GNSS_X, y=0.0, z=0.0, sensor_tick=0.01),
            {"type": "sensor.speedometer", "id": "SPEED", "reading_frequency": 20},
        ]
        if self.sweeps is not None:
            x, y, z = LIDAR
            rig.append(dict(zero, type="sensor.lidar.ray_cast", id="LIDAR", x=x, y=y, z=z))
        # 50 m above the car: only with SAVE_PATH does the evaluator let a sensor be farther than 3 m.
        if self.options.video and os.environ.get("SAVE_PATH"):
            rig.append(
                dict(zero, type="sensor.camera.rgb", id="bev", x=0.0, y=0.0, z=50.0, pitch=-90.0, fov=50.0,
                     width=512, height=512)
            )  # fmt: skip
        return rig

    def run_step(self, input_data: dict, timestamp: float) -> Any:
        """The controls of one tick."""
        self.step += 1
        if self.localiser is None:
            self._begin()
        assert self.localiser is not None
        imu, gps = input_data["IMU"][1], input_data["GPS"][1]
        speed = float(input_data["SPEED"][1]["speed"])
        pose = self.localiser.update(timestamp, speed, float(imu[-1]), gps)
        self.history.append((pose, ego_numbers(pose.yaw, imu, speed)))
        if self.sweeps is not None and "LIDAR" in input_data:
            self.sweeps.append((pose, sweep_in_ego(input_data["LIDAR"][1])))
        command, targets = self._route(pose)
        self.commands.append(command)
        if self.step % self.options.every == 0 or self.plan is None:
            self._ask(input_data, timestamp, command, targets)
        controls = self._follow(pose, speed, targets[0])
        self._keep(input_data, controls)
        return carla.VehicleControl(
            throttle=float(controls.throttle), steer=float(controls.steer), brake=float(controls.brake)
        )

    def destroy(self) -> None:
        """Ends the route: closes the session and writes the motion that the comfort score reads."""
        client = getattr(self, "client", None)
        if client is not None:
            client.close()
        folder = self._folder()
        if folder and self.metric_info:
            partial = os.path.join(folder, ".metric_info.json.partial")
            with open(partial, "w") as file:
                json.dump(self.metric_info, file)
            os.replace(partial, os.path.join(folder, "metric_info.json"))
        if getattr(self, "unparsed", 0):
            log.warning("%d answers could not be read", self.unparsed)

    def _keep_to_one_policy(self) -> None:
        """Notes in SAVE_PATH who drives there, so that an evaluation that is gone on with is one policy's.

        Raises:
            ValueError: the routes so far were driven with another model or other options.
        """
        root = os.environ.get("SAVE_PATH")
        if not root:
            return
        same = ("controller", "throttle", "every", "route", "creep", "target_point", "lidar", "speed_cap")
        policy = {name: getattr(self.options, name) for name in same}
        policy.update((name, self.client.metadata.get(name)) for name in ("model", "config_hash", "weights"))
        policy = json.loads(json.dumps(policy, default=str))
        place = os.path.join(root, "policy.json")
        if os.path.exists(place):
            with open(place) as file:
                before = json.load(file)
            unlike = [name for name in policy if before.get(name) != policy[name]]
            if unlike:
                raise ValueError(
                    "SAVE_PATH {}: its routes were driven with {}, not {}: go on with that, or give another "
                    "SAVE_PATH and another result file".format(
                        root,
                        ", ".join(f"{name} {before.get(name)}" for name in unlike),
                        ", ".join(f"{name} {policy[name]}" for name in unlike),
                    )
                )
            return
        os.makedirs(root, exist_ok=True)
        partial = f"{place}.{os.getpid()}.partial"
        with open(partial, "w") as file:
            json.dump(policy, file)
        os.replace(partial, place)

    def _begin(self) -> None:
        """Finds the map's origin and lays out the route, at the first tick."""
        world = [transform.location for transform, _ in self._global_plan_world_coord]
        points = np.array([[place.x, -place.y] for place in world])
        commands = [int(getattr(option, "value", option)) for _, option in self._global_plan_world_coord]
        fix = self._global_plan[0][0]
        projection = find_projection(fix["lat"], fix["lon"], world[0].x, world[0].y)
        self.localiser = Localiser(projection, first_heading(points))
        self.near = RoutePlanner(points, commands, 4.0, 50.0)
        self.far = RoutePlanner(points, commands, 7.5, 25.0)

    def _route(self, pose: Pose) -> tuple[int, Any]:
        """The command, and the two target points (2, 2) in the ego frame."""
        assert self.localiser is not None
        position = self.localiser.position()
        self.near.advance(position)
        self.far.advance(position)
        if self.options.route == "nodes":
            command = self.near.node(0)[1]
            targets = [self.near.node(1)[0], self.near.node(2)[0]]
        else:
            command = self.near.node(1)[1]
            targets = [self.near.node(1)[0], self.far.node(1)[0]]
        return command, into(pose, self.localiser.from_map(targets))

    def _ask(self, input_data: dict, timestamp: float, command: int, targets: Any) -> None:
        """Gets a plan, unless a camera has not delivered anything yet."""
        for name in RIG:
            if name in input_data:  # else the picture before: a camera may be a tick late
                self.images[name] = input_data[name][1]
        missing = [name for name in RIG if name not in self.images]
        if missing:
            log.warning("no image of %s yet", ", ".join(missing))
            return
        if self.sweeps is not None and len(self.sweeps) < LIDAR_RATE:
            return  # half a sweep leaves cameras without depth
        cameras = self.client.metadata.get("cameras") or list(RIG)
        past = [self._past(ticks) for ticks in HISTORY_TICKS]
        pose, numbers = self.history[-1]
        message = (
            {} if self.sweeps is None else {"lidar": _joined(pose, self.sweeps), "lidar_to_ego": np.eye(4)}
        )
        answer = self.client.act(
            {
                **message,
                "step": self.step,
                "time_s": float(timestamp),
                "images": [_encoded(self.images[name]) for name in cameras],
                "camera_intrinsics": np.stack([camera_intrinsics(name) for name in cameras]),
                "camera_to_ego": np.stack([camera_to_ego(name) for name in cameras]),
                "can_bus": numbers,
                "past_can_bus": np.stack([np.zeros(13) if one is None else one[1] for one in past[:2]]),
                "past_to_ego": np.stack(
                    [np.zeros((4, 4)) if one is None else relative(pose, one[0]) for one in past]
                ),
                "past_mask": np.array([one is not None for one in past]),
                "command": command,
                "past_command": np.array([0 if one is None else one[2] for one in past[:2]]),
                "target_points": np.asarray(targets, np.float64),
            }
        )
        if answer["status"] == "ok":
            self.plan = (np.asarray(answer["waypoints"]), np.asarray(answer["path"]), pose)
        else:
            self.unparsed += 1  # the plan before goes on

    def _past(self, ticks: int) -> tuple[Pose, Any, int] | None:
        """Pose, ego status and command so many ticks ago."""
        if len(self.history) <= ticks:
            return None
        return self.history[-1 - ticks] + (self.commands[-1 - ticks],)

    def _follow(self, pose: Pose, speed: float, target: Any) -> Controls:
        if self.plan is None:
            return STOP
        waypoints, path = moved_plan(self.plan[0], self.plan[1], self.plan[2], pose)
        return self.controller.step(speed, waypoints, path, target)

    def _folder(self) -> str | None:
        """SAVE_PATH/<save name>, where the metric tools look; None when nothing is to be kept."""
        root, name = os.environ.get("SAVE_PATH"), getattr(self, "save_name", "")
        if not root or not name:
            return None
        folder = os.path.join(root, name)
        os.makedirs(folder, exist_ok=True)
        return folder

    def _keep(self, input_data: dict, controls: Controls) -> None:
        """Notes the car's motion, and saves pictures when asked to."""
        measure = getattr(self, "get_metric_info", None)
        if measure is not None:
            self.metric_info[str(self.step)] = measure()
        every, folder = self.options.video, self._folder() if self.options.video else None
        if not folder or self.step % every:
            return
        for name in ("CAM_FRONT", "bev"):
            if name in input_data:
                place = os.path.join(folder, name)
                os.makedirs(place, exist_ok=True)
                cv2.imwrite(os.path.join(place, f"{self.step:05d}.jpg"), input_data[name][1][..., :3])
        plan = None if self.plan is None else [np.asarray(part).tolist() for part in self.plan[:2]]
        os.makedirs(os.path.join(folder, "plan"), exist_ok=True)
        with open(os.path.join(folder, "plan", f"{self.step:05d}.json"), "w") as file:
            json.dump({"plan": plan, "controls": controls._asdict()}, file)


def _joined(pose: Pose, sweeps: Any) -> bytes:
    """The last parts of a sweep as one, each moved to where the car is now."""
    parts = []
    for then, points in sweeps:
        points = points.copy()
        points[:, :2] = into(pose, out_of(then, points[:, :2]))
        parts.append(points)
    return np.concatenate(parts).astype("<f4").tobytes()


def _encoded(image: Any) -> bytes:
    """A camera's BGRA picture as the JPEG that the data would hold."""
    picture = np.ascontiguousarray(image[..., :3])
    done, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        raise RuntimeError("OpenCV could not encode a camera image")
    return data.tobytes()

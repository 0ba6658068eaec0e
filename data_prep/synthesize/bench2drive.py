"""The synthetic world in Bench2Drive's layout and axes: clips of `anno/*.json.gz` and six pictures a frame.

Left-handed, half sizes, degrees, ten frames a second, the ego's origin in its box centre, with what the real
data has of trouble: missing frames, a compass that is NaN at first, a speedometer that says null once.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from data_prep.synthesize.recorder import town_of
from spacedrive_jax import exact
from spacedrive_jax.data.images import decode_photo
from spacedrive_jax.data.route import RoadOption
from spacedrive_jax.driving.bench2drive_rig import (
    JPEG_QUALITY,
    RIG,
    camera_intrinsics,
    camera_to_ego,
    mount_matrix,
)
from spacedrive_jax.driving.bench2drive_route import GNSS_X, RoutePlanner
from spacedrive_jax.io import write_bytes
from spacedrive_jax.world import can_bus, sensors, stage
from spacedrive_jax.world.filming import ANNOTATION_RANGE, Film, Take
from spacedrive_jax.world.scenario import EGO_AHEAD, EGO_SIZE, MANOEUVRES, WARM_UP, Scenario, build_scenario
from spacedrive_jax.world.shading import WEATHERS
from spacedrive_jax.world.stage import Participant
from spacedrive_jax.world.town import LOCATIONS
from spacedrive_jax.world.traffic import Route

FRAME_SECONDS = 0.1
FRAMES_PER_KEYFRAME = 5
GPS_NOISE = 0.557
"""Metres on each axis, as CARLA's."""
NODE_SPACING = 50.0
FOLLOW = int(RoadOption.LANE_FOLLOW)
TURNS = {
    "left": int(RoadOption.LEFT),
    "right": int(RoadOption.RIGHT),
    "straight": int(RoadOption.STRAIGHT),
}
"""RoadOption of a junction's turn."""
_MIRROR = np.array([1.0, -1.0, 1.0, 1.0])
_KINDS: Mapping[str, tuple[str, str, str]] = {
    # class, type_id, base_type
    "vehicle.car": ("vehicle", "vehicle.audi.a2", "car"),
    "vehicle.truck": ("vehicle", "vehicle.carlamotors.carlacola", "truck"),
    "vehicle.construction": ("vehicle", "vehicle.carlamotors.european_hgv", "truck"),
    "vehicle.bus.rigid": ("vehicle", "vehicle.mitsubishi.fusorosa", "bus"),
    "vehicle.bicycle": ("vehicle", "vehicle.bh.crossbike", "bicycle"),
    "vehicle.motorcycle": ("vehicle", "vehicle.yamaha.yzf", "motorcycle"),
    "human.pedestrian.adult": ("walker", "walker.pedestrian.0001", ""),
    "human.pedestrian.child": ("walker", "walker.pedestrian.0009", ""),
    "movable_object.trafficcone": ("traffic_sign", "static.prop.trafficcone01", ""),
    "movable_object.barrier": ("traffic_sign", "static.prop.streetbarrier", ""),
}


@dataclasses.dataclass(frozen=True)
class ClipJob:
    """Everything a worker needs to record one clip."""

    index: int
    seed: int
    keyframes: int
    image_size: tuple[int, int]
    """Height, width."""
    root: Path

    @property
    def location(self) -> str:
        """Clips alternate between the towns."""
        return LOCATIONS[self.index % len(LOCATIONS)]

    @property
    def manoeuvre(self) -> str:
        """What happens in it."""
        return MANOEUVRES[(self.index * 3 + self.seed) % len(MANOEUVRES)]

    @property
    def take(self) -> Take:
        """How it is filmed."""
        return Take(self.index, self.seed, self.keyframes, self.image_size, False, self.location)

    @property
    def frames(self) -> list[int]:
        """The frame numbers that are there; some are missing, one of them a keyframe's."""
        last = (self.keyframes - 1) * FRAMES_PER_KEYFRAME
        rng = np.random.default_rng([self.seed, self.index, 11])
        between = [n for n in range(1, last) if n % FRAMES_PER_KEYFRAME]
        missing = set(rng.choice(between, min(3, len(between)), replace=False).tolist())
        if self.index % 2 == 1 and last > 2 * FRAMES_PER_KEYFRAME:
            missing.add(2 * FRAMES_PER_KEYFRAME)
        return [number for number in range(last + 1) if number not in missing]


def script(job: ClipJob) -> Scenario:
    """What happens in a clip."""
    rng = np.random.default_rng([job.seed, job.index, 2])
    return build_scenario(town_of(job.seed, job.location), job.manoeuvre, job.take.duration + 0.5, rng)


def clip_name(job: ClipJob, weather: str) -> str:
    """`<Scenario>_<Town>_Route<n>_Weather<n>`."""
    scenario = "".join(word.capitalize() for word in job.manoeuvre.split("_"))
    town = "".join(word.capitalize() for word in job.location.split("-"))
    number = [one.name for one in WEATHERS].index(weather)
    return f"{scenario}_Town{town}_Route{job.index + 1}_Weather{number}"


def record_clip(job: ClipJob) -> int:
    """Writes one clip and returns its frames."""
    cv2.setNumThreads(1)
    scenario = script(job)
    film = Film(job.take, scenario)
    folder = job.root / clip_name(job, film.light.weather.name)
    plan = planners(scenario)
    rng = np.random.default_rng([job.seed, job.index, 12])
    frames = job.frames
    for number in range(frames[-1] + 1):
        # Route and noise go on where the frame is missing.
        anno = describe_frame(scenario, film, number, job, plan, rng)
        if number not in frames:
            continue
        data = gzip.compress(json.dumps(anno).encode(), 6, mtime=0)
        write_bytes(folder / "anno" / f"{number:05d}.json.gz", data)
        for name in RIG:
            picture = photograph(scenario, film, number, name, job)
            place = f"rgb_{name.removeprefix('CAM_').lower()}"
            write_bytes(folder / "camera" / place / f"{number:05d}.jpg", picture)
    return len(frames)


def frame_time(number: int) -> float:
    """Seconds since the start of the simulation."""
    return WARM_UP + number * FRAME_SECONDS


def ego_pose(scenario: Scenario, number: int) -> Float[np.ndarray, "4 4"]:
    """ego_to_global of a frame; the origin is the box centre, as CARLA's."""
    state = can_bus.ego_state(scenario, frame_time(number))
    cos, sin = exact.cos_sin(state["yaw"])
    return sensors.pose_matrix(state["x"] + EGO_AHEAD * cos, state["y"] + EGO_AHEAD * sin, state["yaw"])


def route_nodes(route: Route, start: float) -> tuple[Float[np.ndarray, "K 2"], list[int]]:
    """The thinned plan from a place on: junction entries and exits, the end, nothing farther than 50 m apart.

    Args:
        route: of the ego vehicle.
        start: metres along it.

    Returns:
        Global positions, and the RoadOption of each.
    """
    end = float(route.lengths[-1])
    marks = {start: FOLLOW, end: FOLLOW}
    for gate in route.gates:
        if gate.leave > start:
            marks[max(gate.enter, start)] = marks[gate.leave] = TURNS[gate.turn]
    places = sorted(marks)
    nodes = [places[0]]
    for place in places[1:]:
        while place - nodes[-1] > NODE_SPACING:
            nodes.append(nodes[-1] + NODE_SPACING)
        nodes.append(place)
    return route.pose(np.array(nodes))[:, :2], [marks.get(node, FOLLOW) for node in nodes]


def planners(scenario: Scenario) -> tuple[RoutePlanner, RoutePlanner]:
    """The near and the far planner that the data is recorded with."""
    points, commands = route_nodes(scenario.ego.route, float(scenario.ego.start))
    return RoutePlanner(points, commands, 4.0, 50.0), RoutePlanner(points, commands, 7.5, 25.0)


def describe_frame(
    scenario: Scenario,
    film: Film,
    number: int,
    job: ClipJob,
    plan: tuple[RoutePlanner, RoutePlanner],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """What one frame's JSON says."""
    state = can_bus.ego_state(scenario, frame_time(number))
    pose = ego_pose(scenario, number)
    left_handed = _MIRROR[:, None] * pose * _MIRROR + 0.0
    gps = pose[:2, 3] + GNSS_X * pose[:2, 0] + rng.normal(0.0, GPS_NOISE, 2)
    nodes = []
    for planner in plan:
        planner.advance(pose[:2, 3])
        nodes.append(planner.node(1))
    (near, near_command), (far, far_command) = nodes
    compass = float(np.mod(np.pi / 2 - state["yaw"], 2 * np.pi))
    people = film.people(scenario, frame_time(number))
    return {
        "x": float(gps[0]),
        "y": float(-gps[1]),
        "throttle": max(state["acceleration"], 0.0) / 2.5,
        "steer": 0.0,
        "brake": float(state["acceleration"] < -0.5),
        "reverse": False,
        "theta": float("nan") if number == 0 else compass,
        "speed": None if number == FRAMES_PER_KEYFRAME and job.index % 2 == 0 else state["speed"],
        "x_command_near": float(near[0]),
        "y_command_near": float(-near[1]),
        "command_near": near_command,
        "x_command_far": float(far[0]),
        "y_command_far": float(-far[1]),
        "command_far": far_command,
        "acceleration": [state["acceleration"], -state["speed"] * state["yaw_rate"], can_bus.GRAVITY],
        "angular_velocity": [0.0, 0.0, -state["yaw_rate"]],
        "weather": film.light.weather.name,
        "sensors": {name: _camera(name, left_handed, job.image_size) for name in RIG},
        "bounding_boxes": [
            _ego_box(left_handed, state["speed"]),
            *(
                _box(item, group)
                for group, item in enumerate(people)
                if exact.norm(np.array(item.pose[:2]) - pose[:2, 3]) < ANNOTATION_RANGE
            ),
            *_lights(scenario),
        ],
    }


def photograph(scenario: Scenario, film: Film, number: int, name: str, job: ClipJob) -> bytes:
    """The JPEG of one camera at a frame, of the quality that the real data has."""
    noise = job.index * 100_000 + number * 6 + list(RIG).index(name)
    pose, time = ego_pose(scenario, number), frame_time(number)
    pixels = view(scenario, film, pose, time, name, job.image_size, noise)[..., ::-1]
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return data.tobytes()


def view(
    scenario: Scenario,
    film: Film,
    pose: Float[np.ndarray, "4 4"],
    time: float,
    name: str,
    image_size: tuple[int, int],
    noise: int,
) -> UInt8[np.ndarray, "H W 3"]:
    """What a camera of the rig sees, RGB, from wherever the ego vehicle is.

    Args:
        scenario: who takes part.
        film: its light and backdrop.
        pose: ego_to_global, the origin in the box centre.
        time: seconds since the start of the simulation.
        name: of the camera.
        image_size: height and width.
        noise: seed of the sensor's noise.
    """
    moving = stage.moving_participants(scenario, time)
    height, width = image_size
    camera = stage.camera_of(
        camera_intrinsics(name, (width, height)), exact.matmul(pose, camera_to_ego(name)), image_size
    )
    picture = stage.take_picture(
        film.backdrop,
        film.quads(scenario, time, [*moving, *film.standing], camera),
        film.shadows.draw(moving, camera),
        camera,
        film.light,
        noise,
        with_depth=False,
    )
    return decode_photo(picture.jpeg, name)


def _camera(name: str, ego: Float[np.ndarray, "4 4"], size: tuple[int, int]) -> dict[str, Any]:
    height, width = size
    mount = mount_matrix(name)
    to_world = exact.matmul(ego, mount)
    return {
        "location": to_world[:3, 3].tolist(),
        "rotation": [0.0, 0.0, RIG[name][3]],
        "intrinsic": camera_intrinsics(name, (width, height)).tolist(),
        "world2cam": exact.affine_inverse(to_world).tolist(),
        "cam2ego": mount.tolist(),
        "fov": RIG[name][4],
        "image_size_x": width,
        "image_size_y": height,
    }


def _ego_box(ego: Float[np.ndarray, "4 4"], speed: float) -> dict[str, Any]:
    return {
        "class": "ego_vehicle",
        "id": "0",
        "type_id": "vehicle.lincoln.mkz_2020",
        "base_type": "car",
        "location": ego[:3, 3].tolist(),
        "center": (ego[:3, 3] + [0.0, 0.0, EGO_SIZE[2] / 2]).tolist(),
        "extent": [side / 2 for side in EGO_SIZE],
        "rotation": [0.0, 0.0, float(np.degrees(exact.arctan2(float(ego[1, 0]), float(ego[0, 0]))))],
        "speed": speed,
        "world2ego": exact.affine_inverse(ego).tolist(),
    }


def _box(item: Participant, group: int) -> dict[str, Any]:
    x, y, yaw = item.pose
    kind, type_id, base = _KINDS.get(item.category, ("traffic_sign", "static.prop.box01", ""))
    box: dict[str, Any] = {
        "class": kind,
        "id": str(group + 1),
        "type_id": type_id,
        "base_type": base,
        "location": [x, -y, 0.0],
        "center": [x, -y, item.size[2] / 2],
        "extent": [side / 2 for side in item.size],
        "rotation": [0.0, 0.0, -float(np.degrees(yaw))],
        # CARLA tells no walker's speed.
        "speed": 0.0 if kind != "vehicle" else item.speed,
        "num_points": 12,
    }
    if kind == "vehicle":
        box["state"] = "static" if item.attribute == "vehicle.parked" else "dynamic"
    if kind == "walker":
        box["age"] = "child" if item.category.endswith("child") else "adult"
    return box


def _lights(scenario: Scenario) -> list[dict[str, Any]]:
    """The nearest junctions' lights, which are no road users."""
    return [
        {
            "class": "traffic_light",
            "id": f"light{junction.index}",
            "type_id": "traffic.traffic_light",
            "location": [float(junction.centre[0]), -float(junction.centre[1]), 5.0],
            "center": [float(junction.centre[0]), -float(junction.centre[1]), 5.0],
            "extent": [0.2, 0.2, 0.5],
            "rotation": [0.0, 0.0, 0.0],
        }
        for junction in scenario.town.junctions[:2]
        if junction.signalised
    ]

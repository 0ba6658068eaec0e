"""One frame's annotations, read strictly and brought into this project's axes.

CARLA's axes are left-handed (y to the right); with S = diag(1, -1, 1, 1) a matrix M of it is S M S here.
Boxes have half sizes, angles are degrees to the right, and numbers may be null or NaN where a sensor had
none.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.frame import check_pose, check_principal_point
from spacedrive_jax.data.keyframe import heading
from spacedrive_jax.data.route import RoadOption
from spacedrive_jax.errors import DataError
from spacedrive_jax.json_files import parse_json

_MIRROR = np.array([1.0, -1.0, 1.0, 1.0])
# Camera axes (x right, y down, z forward) in UE's (x forward, y right, z up).
_OPTICAL = np.array([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])


@dataclasses.dataclass(frozen=True)
class Box:
    """A road user or obstacle, global frame."""

    key: str
    category: str
    """nuScenes' name."""
    centre: tuple[float, float, float]
    size: tuple[float, float, float]
    """Length, width, height, metres."""
    yaw: float
    """Radians."""
    speed: float | None
    """Along the heading, m/s; None where CARLA does not tell."""
    lidar_points: int


@dataclasses.dataclass(frozen=True)
class Frame:
    """What one frame says."""

    number: int
    """Ten a second."""
    ego_to_global: Float[np.ndarray, "4 4"]
    global_to_ego: Float[np.ndarray, "4 4"]
    yaw: float
    """Heading by the pose, radians."""
    can_bus: Float[np.ndarray, "13"]
    command: int
    """RoadOption."""
    targets: Float[np.ndarray, "2 2"] | None
    """The near and the far node of the route, global frame, metres; None where they are not known."""
    boxes: tuple[Box, ...]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The six cameras, in the order of `CAMERAS`."""

    intrinsics: Float[np.ndarray, "N 3 3"]
    camera_to_ego: Float[np.ndarray, "N 4 4"]
    sizes: tuple[tuple[int, int], ...]
    """Height and width."""


def read_frame(text: bytes, number: int, what: str, unknown: Counter[str]) -> tuple[Frame, Mapping[str, Any]]:
    """One frame.

    Args:
        text: its JSON.
        number: its place in the clip, ten a second.
        what: what to call it in an error.
        unknown: counts the numbers that were null or NaN, by name.

    Returns:
        The frame, and the JSON itself for `read_calibration`.

    Raises:
        DataError: it is not laid out as Bench2Drive's are; the message names the field.
    """
    anno = parse_json(text, what, nan=True)
    if not isinstance(anno, dict):
        raise DataError(f"{what} is no object")
    boxes = anno.get("bounding_boxes")
    if not isinstance(boxes, list) or not boxes or not isinstance(boxes[0], dict):
        raise DataError(f"{what}: bounding_boxes lacks the ego vehicle")
    global_to_ego = _mirrored(_pose(boxes[0], "world2ego", f"{what}: bounding_boxes[0]"))
    ego_to_global = exact.affine_inverse(global_to_ego)
    yaw = float(heading(ego_to_global))
    frame = Frame(
        number=number,
        ego_to_global=ego_to_global,
        global_to_ego=global_to_ego,
        yaw=yaw,
        can_bus=_can_bus(anno, yaw, what, unknown),
        command=_command(anno, what),
        targets=_targets(anno, unknown),
        boxes=tuple(_boxes(boxes, what)),
    )
    return frame, anno


def read_calibration(anno: Mapping[str, Any], what: str) -> Calibration:
    """The cameras of a frame.

    Raises:
        DataError: a camera or one of its fields is missing.
    """
    sensors = anno.get("sensors")
    intrinsics, mounts, sizes = [], [], []
    for name in CAMERAS:
        camera = sensors.get(name) if isinstance(sensors, dict) else None
        if not isinstance(camera, dict):
            raise DataError(f"{what}: sensors lacks {name}")
        place = f"{what}: sensors.{name}"
        matrix = _array(camera, "intrinsic", (3, 3), place)
        if not (min(matrix[0, 0], matrix[1, 1]) > 0 and matrix[2].tolist() == [0, 0, 1]):
            raise DataError(f"{place}: intrinsic {matrix.tolist()} is no camera matrix")
        intrinsics.append(matrix)
        mount = _pose(camera, "cam2ego", place)
        mounts.append(exact.matmul(_MIRROR[:, None] * mount, _OPTICAL))
        size = [camera.get("image_size_y"), camera.get("image_size_x")]
        try:
            sizes.append((int(size[0]), int(size[1])))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise DataError(f"{place}: image_size_x and image_size_y are no numbers") from None
        if min(sizes[-1]) < 1:
            raise DataError(f"{place}: image_size_x and image_size_y {size[::-1]} are no picture's")
        check_principal_point(matrix, sizes[-1], f"{place}: intrinsic")
    return Calibration(np.stack(intrinsics), np.stack(mounts), tuple(sizes))


def _mirrored(matrix: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """S M S: the same transform between right-handed axes. (The + 0 makes -0 a plain 0.)"""
    return _MIRROR[:, None] * matrix * _MIRROR + 0.0


def _can_bus(anno: Mapping[str, Any], yaw: float, what: str, unknown: Counter[str]) -> np.ndarray:
    """Quaternion of the yaw alone, acceleration, rate, velocity; what is unknown is 0."""
    compass = _number(anno.get("theta"), "theta", unknown, None)
    turn = yaw if compass is None else math.pi / 2 - compass
    cos, sin = exact.cos_sin(turn / 2)
    sign = 1.0 if cos >= 0 else -1.0
    ax, ay, az = _vector(anno, "acceleration", what, unknown)
    wx, wy, wz = _vector(anno, "angular_velocity", what, unknown)
    speed = _number(anno.get("speed"), "speed", unknown, 0.0)
    # A rate is an axial vector: mirrored in y it keeps y and turns x and z around.
    values = [sign * cos, 0.0, 0.0, sign * sin, ax, -ay, az, -wx, wy, -wz, speed, 0.0, 0.0]
    return np.array(values, np.float64) + 0.0


def _command(anno: Mapping[str, Any], what: str) -> int:
    value = anno.get("command_near")
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= 6:
        raise DataError(f"{what}: command_near {value!r} is no RoadOption (-1, 1 to 6)")
    return int(RoadOption.LANE_FOLLOW) if value < 1 else value


def _targets(anno: Mapping[str, Any], unknown: Counter[str]) -> np.ndarray | None:
    names = ("x_command_near", "y_command_near", "x_command_far", "y_command_far")
    values = [_number(anno.get(name), name, unknown, None) for name in names]
    if any(value is None for value in values):
        return None
    return np.array(values, np.float64).reshape(2, 2) * [1.0, -1.0] + 0.0


def _boxes(boxes: list[Any], what: str) -> list[Box]:
    found = []
    for place, box in enumerate(boxes):
        where = f"{what}: bounding_boxes[{place}]"
        if not isinstance(box, dict):
            raise DataError(f"{where} is no object")
        category = category_of(box)
        if category is None:
            continue
        x, y, z = _array(box, "center", (3,), where).tolist()
        half = _array(box, "extent", (3,), where)
        if half.min() < 0:
            raise DataError(f"{where}: extent {half.tolist()} is below 0")
        rotation = _array(box, "rotation", (3,), where)
        speed = box.get("speed")
        moves = box.get("class") == "vehicle" and box.get("state") != "static"
        known = isinstance(speed, int | float) and math.isfinite(speed)
        points = box.get("num_points")
        length, width, height = (2 * half).tolist()
        found.append(
            Box(
                key=str(box.get("id")),
                category=category,
                centre=(x, -y + 0.0, z),
                size=(length, width, height),
                yaw=-math.radians(float(rotation[2])) + 0.0,
                speed=0.0 if box.get("state") == "static" else float(speed or 0) if moves and known else None,
                lidar_points=points if isinstance(points, int) and points > 0 else 0,
            )
        )
    return found


_PARTS_OF_NAMES = (
    # Of CARLA's blueprints and meshes, in order; the first that fits counts.
    ("cone", "movable_object.trafficcone"),
    ("police", "vehicle.emergency.police"),
    ("ambulance", "vehicle.emergency.ambulance"),
    ("crossbike", "vehicle.bicycle"),
    ("century", "vehicle.bicycle"),
    ("omafiets", "vehicle.bicycle"),
    ("harley", "vehicle.motorcycle"),
    ("kawasaki", "vehicle.motorcycle"),
    ("vespa", "vehicle.motorcycle"),
    ("yamaha", "vehicle.motorcycle"),
    ("fusorosa", "vehicle.bus.rigid"),
    ("firetruck", "vehicle.truck"),
    ("carlacola", "vehicle.truck"),
    ("european_hgv", "vehicle.truck"),
)
_BASE_TYPES = {
    "bicycle": "vehicle.bicycle",
    "motorcycle": "vehicle.motorcycle",
    "bus": "vehicle.bus.rigid",
    "truck": "vehicle.truck",
}


def category_of(box: Mapping[str, Any]) -> str | None:
    """NuScenes' category of a box; None for the ego vehicle, traffic lights and signs."""
    kind, name = str(box.get("class")), str(box.get("type_id")).lower()
    if kind in ("ego_vehicle", "traffic_light") or name.startswith("traffic."):
        return None
    if kind in ("walker", "pedestrian") or name.startswith("walker."):
        return f"human.pedestrian.{'child' if box.get('age') == 'child' else 'adult'}"
    by_name = next((category for part, category in _PARTS_OF_NAMES if part in name), None)
    if kind != "vehicle":
        # Obstacles come among the signs: cones, warning triangles, barriers.
        return by_name or ("movable_object.barrier" if name.startswith("static.prop") else None)
    return by_name or _BASE_TYPES.get(str(box.get("base_type")).lower(), "vehicle.car")


LARGEST = 1e7
"""Of any number in a clip: pixels, and metres of a town's coordinates, which are below 1e5."""


def _number(value: Any, name: str, unknown: Counter[str], default: float | None) -> float | None:
    # What is not finite, or no metre, radian or second of any town, is as good as not there.
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    unknown[f"unknown_{name}"] += 1
    return default


def _vector(anno: Mapping[str, Any], name: str, what: str, unknown: Counter[str]) -> list[float]:
    value = anno.get(name)
    if value is None:
        value = [None] * 3
    if not isinstance(value, list) or len(value) != 3:
        raise DataError(f"{what}: {name} is not three numbers")
    return [_number(part, name, unknown, 0.0) or 0.0 for part in value]


def _pose(values: Mapping[str, Any], name: str, what: str) -> np.ndarray:
    matrix = _array(values, name, (4, 4), what)
    check_pose(matrix, f"{what}: {name}", LARGEST)
    return matrix


def _array(values: Mapping[str, Any], name: str, shape: tuple[int, ...], what: str) -> np.ndarray:
    try:
        array = np.array(values.get(name), np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.shape != shape or not (np.abs(array) <= LARGEST).all():
        raise DataError(
            f"{what}: {name} must be {'x'.join(map(str, shape))} finite numbers up to {LARGEST:g}"
        )
    return array

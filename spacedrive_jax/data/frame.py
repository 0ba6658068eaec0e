"""A keyframe of one's own: six images, their calibration and a speed, as the record that a planner takes.

What nobody measured is filled in as a car that holds its speed and its yaw rate would have it, and what lies
ahead (waypoints, agents, map) stays empty. Frames and units are the record's: the ego frame has x forward,
y left, z up, in metres; a camera frame x right, y down, z forward; `camera_to_ego` takes points from the
latter to the former.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.constants import (
    CAMERAS,
    CAN_BUS_SIZE,
    NUM_CAMERAS,
    NUM_PAST,
    NUM_TARGET_POINTS,
    WAYPOINT_STEP,
)
from spacedrive_jax.data.ego_status import mirrored_command, navigation_command
from spacedrive_jax.data.images import picture_size
from spacedrive_jax.data.route import NODE_SPACING, RoadOption
from spacedrive_jax.data.schema import Record, blank_record
from spacedrive_jax.errors import DataError
from spacedrive_jax.io import MEBIBYTE, inside, read_bytes
from spacedrive_jax.json_files import read_typed

GRAVITY = 9.81
"""m/s^2; what an accelerometer at rest reads upwards, as the CAN bus of nuScenes has it."""
NOW_US = 10_000_000
"""Time of the keyframe; only differences count."""
MOST_SPEED = 100.0
"""m/s, forwards or back."""
MOST_OFFSET = 50.0
"""Metres that a camera, and a past position each second, may be from the ego origin."""
TOLERANCE = 1e-3
"""How far a rotation may be from one."""
MOST_IMAGE_BYTES = 64 * MEBIBYTE
AHEAD = np.array([[NODE_SPACING, 0.0], [2 * NODE_SPACING, 0.0]])
"""Nodes of a straight route, as far apart as nodes are."""
SUFFIXES = (".jpg", ".jpeg", ".png")

Command = Literal["left", "right", "straight", "lane_follow", "change_left", "change_right"]
"""Where the route goes within the next 50 m."""
_ROAD_OPTIONS: Mapping[str, RoadOption] = {
    "left": RoadOption.LEFT,
    "right": RoadOption.RIGHT,
    "straight": RoadOption.STRAIGHT,
    "lane_follow": RoadOption.LANE_FOLLOW,
    "change_left": RoadOption.CHANGE_LANE_LEFT,
    "change_right": RoadOption.CHANGE_LANE_RIGHT,
}

_Row3 = tuple[float, float, float]
_Row4 = tuple[float, float, float, float]
_Matrix3 = tuple[_Row3, _Row3, _Row3]
_Matrix4 = tuple[_Row4, _Row4, _Row4, _Row4]
_Point = tuple[float, float]
_Name = Annotated[str, msgspec.Meta(max_length=32, pattern=r"^[\w -]*$")]


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """One keyframe of one's own; rows are in the order of `CAMERAS`."""

    images: tuple[bytes, ...]
    """Six encoded pictures, JPEG or PNG."""
    intrinsics: Float[np.ndarray, "N 3 3"]
    """Pixels at the pictures' own size."""
    camera_to_ego: Float[np.ndarray, "N 4 4"]
    speed: float
    """m/s, forward."""
    acceleration: float = 0.0
    """m/s^2, forward."""
    yaw_rate: float = 0.0
    """rad/s, to the left."""
    past_to_ego: Float[np.ndarray, "2 4 4"] | None = None
    """Ego poses of half a second and of a second ago in the current ego frame; None for those of a car that
    held its speed and yaw rate."""
    command: Command | None = None
    """For models that are told where the route turns; None where it is not known."""
    target_points: Float[np.ndarray, "2 2"] | None = None
    """The next two nodes of the route, every `NODE_SPACING` metres along it and more than `PASSED` ahead, ego
    frame; None for points straight ahead where there is a command, and for none, as in records without a
    route, where there is not."""
    depth: tuple[bytes, ...] = (b"",) * NUM_CAMERAS
    """16-bit PNGs of metres times 256, 0 where unknown; empty where there is none."""
    location: str = ""
    """Where the car drives, as the question names it."""
    name: str = "frame"
    """What errors and pictures call it."""

    def record(self) -> Record:
        """The keyframe as a record whose future, agents and map are empty.

        Raises:
            DataError: a picture is none, an array is of another shape, or a number is not finite or not what
                it stands for.
        """
        images, depth = (self._six(name) for name in ("images", "depth"))
        intrinsics = self._array("intrinsics", NUM_CAMERAS, 3, 3)
        camera_to_ego = self._array("camera_to_ego", NUM_CAMERAS, 4, 4)
        check_calibration(intrinsics, camera_to_ego, self.name)
        can_bus = self._can_bus()
        past = (
            _past(self.speed, self.yaw_rate)
            if self.past_to_ego is None
            else self._array("past_to_ego", NUM_PAST, 4, 4)
        )
        _check_past(past, self.name)
        if self.command is not None and self.command not in _ROAD_OPTIONS:
            raise DataError(f"{self.name}: command {self.command!r} is not one of {', '.join(_ROAD_OPTIONS)}")
        seconds = WAYPOINT_STEP * np.arange(1, NUM_PAST + 1)
        word = navigation_command(past, np.ones(NUM_PAST, bool), seconds)
        option = RoadOption.VOID if self.command is None else _ROAD_OPTIONS[self.command]
        if self.target_points is not None:
            targets = self._array("target_points", NUM_TARGET_POINTS, 2)
        else:
            targets = AHEAD if self.command is not None else np.zeros((NUM_TARGET_POINTS, 2))
        return blank_record() | {
            "token": self.name,
            "scene_name": self.name,
            "location": self.location,
            "timestamp_us": np.int64(NOW_US),
            "images": images,
            "image_size": np.stack(
                [
                    _size(image, f"{self.name}: {camera}")
                    for camera, image in zip(CAMERAS, images, strict=True)
                ]
            ),
            "exact_depth": depth,
            "camera_intrinsics": intrinsics,
            "camera_to_ego": camera_to_ego,
            "camera_timestamp_us": np.full(NUM_CAMERAS, NOW_US, np.int64),
            "camera_ego_to_global": np.tile(np.eye(4), (NUM_CAMERAS, 1, 1)),
            "ego_to_global": np.eye(4),
            "past_to_ego": past,
            "past_mask": np.ones(NUM_PAST, bool),
            "past_timestamp_us": NOW_US - np.round(seconds * 1e6).astype(np.int64),
            "can_bus": can_bus,
            "can_bus_valid": np.bool_(True),
            "past_can_bus": np.tile(can_bus, (NUM_PAST, 1)),
            "command_navigation": np.int32(word),
            "past_command_navigation": np.full(NUM_PAST, word, np.int32),
            # Nothing knows where the car will be in 3 s; the published words are those of navigation.
            "command_released": np.int32(mirrored_command(word)),
            "past_command_released": np.full(NUM_PAST, mirrored_command(word), np.int32),
            "command_route": np.int32(option),
            "past_command_route": np.full(NUM_PAST, option, np.int32),
            "target_points": targets,
            "route_valid": np.bool_(self.command is not None),
            "drivable_source": "none",
            "lidar_to_ego": np.eye(4),
        }

    def _six(self, field: str) -> list[bytes]:
        """Encoded pictures, one a camera."""
        pictures = getattr(self, field)
        if not isinstance(pictures, Sequence) or isinstance(pictures, str | bytes):
            raise DataError(f"{self.name}: {field} is {type(pictures).__name__}, expected a list of bytes")
        for picture in pictures:
            if not isinstance(picture, bytes):
                raise DataError(
                    f"{self.name}: {field} holds {type(picture).__name__}, expected the bytes of encoded "
                    "pictures, as pathlib.Path(FILE).read_bytes() gives them"
                )
        if len(pictures) != NUM_CAMERAS:
            raise DataError(
                f"{self.name}: {field} holds {len(pictures)}, expected those of {', '.join(CAMERAS)}"
            )
        return list(pictures)

    def _array(self, field: str, *shape: int) -> np.ndarray:
        value = getattr(self, field)
        try:
            array = np.asarray(value, np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.name}: {field} holds what are no numbers ({error})") from error
        if array.shape != shape:
            raise DataError(f"{self.name}: {field} is of shape {array.shape}, expected {shape}")
        return array

    def _can_bus(self) -> Float[np.ndarray, "13"]:
        for name, value in (
            ("speed", self.speed),
            ("acceleration", self.acceleration),
            ("yaw_rate", self.yaw_rate),
        ):
            number = getattr(value, "ndim", 0) == 0 and not isinstance(value, str | None)
            if not (number and abs(value) <= MOST_SPEED):  # nan too
                raise DataError(f"{self.name}: {name} is {value}, expected a number up to {MOST_SPEED:g}")
        values = np.zeros(CAN_BUS_SIZE)
        values[0] = 1.0  # heading: the global frame is the ego frame
        values[4:7] = self.acceleration, self.speed * self.yaw_rate, GRAVITY
        values[9], values[10] = self.yaw_rate, self.speed
        return values


def _past(speed: float, yaw_rate: float) -> Float[np.ndarray, "2 4 4"]:
    """Poses of a car that held its speed and yaw rate, newest first."""
    poses = np.tile(np.eye(4), (NUM_PAST, 1, 1))
    for index in range(NUM_PAST):
        seconds = WAYPOINT_STEP * (index + 1)
        turn = -yaw_rate * seconds
        cos, sin = exact.cos_sin(turn)
        half_cos, half_sin = exact.cos_sin(turn / 2)
        # Chord of the arc that was driven, in the direction of its middle.
        chord = -speed * seconds * (half_sin / (turn / 2) if turn else 1.0)
        poses[index, :2, :2] = [[cos, -sin], [sin, cos]]
        poses[index, :2, 3] = chord * half_cos, chord * half_sin
    return poses


class _Camera(msgspec.Struct, forbid_unknown_fields=True):
    """One camera of a calibration file."""

    intrinsics: _Matrix3
    camera_to_ego: _Matrix4
    image: str | None = None
    """File in the folder of images; by default CAMERA.jpg, .jpeg or .png."""
    depth: str | None = None
    """16-bit PNG in the same folder."""


class _Calibration(msgspec.Struct, forbid_unknown_fields=True):
    """A calibration file: the cameras, and what else is known."""

    cameras: dict[str, _Camera]
    speed: float | None = None
    acceleration: float = 0.0
    yaw_rate: float = 0.0
    past_to_ego: tuple[_Matrix4, _Matrix4] | None = None
    command: Command | None = None
    target_points: tuple[_Point, _Point] | None = None
    location: _Name = ""


def read_frame(images: Path, calibration: Path, speed: float | None = None) -> Frame:
    """Reads a keyframe of one's own.

    Args:
        images: folder of the six pictures.
        calibration: JSON; docs/how-to/own_data.md shows one.
        speed: m/s; None takes the file's.

    Raises:
        DataError: something is missing, of another shape, or cannot be; the message names file and field.
    """
    found = read_typed(calibration, _Calibration, most=MEBIBYTE, advice="docs/how-to/own_data.md shows one")
    missing = [name for name in CAMERAS if name not in found.cameras]
    unknown = [name for name in found.cameras if name not in CAMERAS]
    if missing or unknown:
        said = [f"lacks {', '.join(missing)}"] if missing else []
        said += [f"has unknown {', '.join(unknown)}"] if unknown else []
        raise DataError(f"{calibration}: cameras {' and '.join(said)}: it must hold {', '.join(CAMERAS)}")
    if speed is None and found.speed is None:
        raise DataError(f"{calibration} says no speed: give --speed, m/s, or add the field `speed`")
    fast = float(found.speed if speed is None else speed)  # type: ignore[arg-type]
    if not abs(fast) <= MOST_SPEED:
        raise DataError(f"{calibration}: a speed of {fast} is beyond {MOST_SPEED} m/s: is it in m/s?")
    cameras = [found.cameras[name] for name in CAMERAS]
    pictures, depths = [], []
    for name, camera in zip(CAMERAS, cameras, strict=True):
        what = f"{calibration}: cameras.{name}"
        file = (
            _image_file(images, name)
            if camera.image is None
            else inside(images, camera.image, f"{what}.image")
        )
        pictures.append(read_bytes(file, most=MOST_IMAGE_BYTES))
        size = _size(pictures[-1], str(file)).tolist()
        check_principal_point(camera.intrinsics, size, f"{what}.intrinsics")
        depths.append(_depth(inside(images, camera.depth, f"{what}.depth")) if camera.depth else b"")
    intrinsics = np.array([camera.intrinsics for camera in cameras], np.float64)
    to_ego = np.array([camera.camera_to_ego for camera in cameras], np.float64)
    check_calibration(intrinsics, to_ego, str(calibration))
    past = None if found.past_to_ego is None else np.array(found.past_to_ego, np.float64)
    if past is not None:
        _check_past(past, str(calibration))
    targets = None if found.target_points is None else np.array(found.target_points, np.float64)
    return Frame(
        images=tuple(pictures),
        intrinsics=intrinsics,
        camera_to_ego=to_ego,
        speed=fast,
        acceleration=found.acceleration,
        yaw_rate=found.yaw_rate,
        past_to_ego=past,
        command=found.command,
        target_points=targets,
        depth=tuple(depths),
        location=found.location,
        name=images.resolve().name,
    )


def _image_file(folder: Path, camera: str) -> Path:
    files = [folder / f"{camera}{suffix}" for suffix in SUFFIXES]
    there = [file for file in files if file.is_file()]
    if not there:
        raise DataError(
            f"{folder} holds no {files[0].name} (or .jpeg, .png): name the file in the calibration's "
            f"cameras.{camera}.image"
        )
    return there[0]


def _size(picture: bytes, what: str) -> np.ndarray:
    size = picture_size(picture)
    if size is None or min(size) < 1:
        raise DataError(f"{what} is neither a JPEG nor a PNG picture")
    return np.array(size, np.int32)


def check_principal_point(intrinsics: Any, size: Sequence[int], what: str) -> None:
    """Refuses intrinsics of a picture of another size, as they are before it was made smaller.

    Args:
        intrinsics: 3 x 3, pixels.
        size: height and width of the picture.
        what: what to call them in an error.

    Raises:
        DataError: the principal point is at the picture's border, or outside.
    """
    (height, width), x, y = size, intrinsics[0][2], intrinsics[1][2]
    if not (width <= 10 * x <= 9 * width and height <= 10 * y <= 9 * height):
        raise DataError(
            f"{what} has the principal point at ({x:g}, {y:g}), at the border or outside of its "
            f"picture of {width}x{height}: are they of another size? fx, fy, cx and cy go with the picture's"
        )


def _depth(file: Path) -> bytes:
    data = read_bytes(file, most=MOST_IMAGE_BYTES)
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or data[24:26] != b"\x10\x00":
        raise DataError(f"{file} is no 16-bit grey PNG, which depth is: metres times 256, 0 where unknown")
    return data


def check_calibration(
    intrinsics: Float[np.ndarray, "N 3 3"], camera_to_ego: Float[np.ndarray, "N 4 4"], what: str
) -> None:
    """Refuses cameras that cannot be.

    Args:
        intrinsics: pixels.
        camera_to_ego: metres.
        what: what to call them in an error.

    Raises:
        DataError: naming camera and field.
    """
    for name, matrix, pose in zip(CAMERAS, intrinsics, camera_to_ego, strict=True):
        focal = matrix[[0, 1], [0, 1]]
        if not (np.isfinite(matrix).all() and (focal > 0).all() and np.array_equal(matrix[2], [0, 0, 1])):
            raise DataError(
                f"{what}: {name}.intrinsics is {matrix.tolist()}, expected [[fx, 0, cx], [0, fy, cy], "
                "[0, 0, 1]] in pixels"
            )
        check_pose(pose, f"{what}: {name}.camera_to_ego", MOST_OFFSET)
    front = camera_to_ego[0, :3, 2]
    if front[0] <= abs(front[2]):
        raise DataError(
            f"{what}: by its camera_to_ego {CAMERAS[0]} looks along {np.round(front, 2).tolist()} in the ego "
            "frame (x forward, y left, z up), not forward: is it ego_to_camera, or of a camera frame other "
            "than x right, y down, z forward?"
        )


def _check_past(poses: Any, what: str) -> None:
    for index, pose in enumerate(poses):
        check_pose(pose, f"{what}: past_to_ego[{index}]", MOST_SPEED * WAYPOINT_STEP * (index + 1))


def check_pose(pose: Float[np.ndarray, "4 4"], what: str, most: float) -> None:
    """Refuses a matrix that is no rigid transform.

    Args:
        pose: rotation and place, metres.
        what: what to call it in an error.
        most: how far the place may be from the origin.

    Raises:
        DataError: a number is not finite, the last row is not 0, 0, 0, 1, the rotation is scaled, sheared or
            mirrored, or the place is farther.
    """
    if not np.isfinite(pose).all():
        raise DataError(f"{what} holds numbers that are not finite")
    if not np.array_equal(pose[3], [0, 0, 0, 1]):
        raise DataError(
            f"{what} is no pose: its last row is {np.asarray(pose[3]).tolist()}, not [0, 0, 0, 1]"
        )
    rotation = pose[:3, :3]
    away = np.abs(exact.matmul(rotation, rotation.T) - np.eye(3)).max()
    turned = exact.dot(np.cross(rotation[:, 0], rotation[:, 1]), rotation[:, 2])
    if away > TOLERANCE or turned < 0:
        why = f"no rotation (off by {away:.3g})" if away > TOLERANCE else "a mirror image, no rotation"
        raise DataError(f"{what} is no pose: its upper left 3 x 3 is {why}")
    if exact.norm(pose[:3, 3]) > most:
        raise DataError(
            f"{what} is {exact.norm(pose[:3, 3]):.4g} m away, more than {most:g} m: is it in metres?"
        )

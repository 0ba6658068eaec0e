"""Draws a camera view of any annotated place, for images a nuScenes folder lacks.

Only plain data go in: boxes, a drivable raster and a calibrated camera. What the annotations and the map
do not tell (colours, buildings, trees, light) is a deterministic function of the instance tokens, of global
position and of the seed, so that an object and a place keep their look from frame to frame.

The rig of the synthetic world stands here too: six cameras and a LiDAR with round values typical of
nuScenes cars.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

from spacedrive_jax import exact
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.world import ground, scenery, shapes, stage
from spacedrive_jax.world.shading import WEATHERS, Light
from spacedrive_jax.world.stage import Backdrop, Participant

NATIVE_SIZE = (900, 1600)
"""Height and width in pixels the nominal intrinsics refer to."""


def parse_image_size(text: str) -> tuple[int, int]:
    """Reads `--image-size` WxH; returns height and width.

    Raises:
        ConfigError: the text is no size, or one no camera has.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--image-size {text!r} is not WIDTHxHEIGHT, for example 704x396")
    width, height = (int(part) for part in parts)
    if not (32 <= width <= 4096 and 18 <= height <= 4096):
        raise ConfigError(f"--image-size {text} must lie between 32x18 and 4096x4096")
    return height, width


@dataclasses.dataclass(frozen=True)
class CameraMount:
    """One camera: where it sits and looks in the ego frame, and when it fires."""

    channel: str
    position: tuple[float, float, float]
    yaw: float
    """Viewing direction, degrees to the left of straight ahead."""
    focal: float
    principal: tuple[float, float]
    lead_ms: float
    """How long before the LiDAR time stamp the camera fires, milliseconds (means of the real data)."""

    def to_ego(self) -> Float[np.ndarray, "4 4"]:
        """camera_to_ego; camera x right, y down, z forward, pitched down by half a degree."""
        cos, sin = exact.cos_sin(np.radians(self.yaw))
        flat, dip = exact.cos_sin(np.radians(0.5))
        forward = np.array([cos * flat, sin * flat, -dip])
        right = np.array([sin, -cos, 0.0])
        down = np.cross(forward, right)
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([right, down, forward], axis=1)
        matrix[:3, 3] = self.position
        return matrix

    def intrinsics(self, image_size: tuple[int, int]) -> Float[np.ndarray, "3 3"]:
        """Pixels at an image size (height, width)."""
        rows, columns = image_size[0] / NATIVE_SIZE[0], image_size[1] / NATIVE_SIZE[1]
        return np.array(
            [
                [self.focal * columns, 0.0, self.principal[0] * columns],
                [0.0, self.focal * rows, self.principal[1] * rows],
                [0.0, 0.0, 1.0],
            ]
        )


CAMERA_MOUNTS = (
    CameraMount("CAM_FRONT", (1.70, 0.01, 1.51), 0.0, 1266.0, (816.0, 491.0), 36.0),
    CameraMount("CAM_FRONT_RIGHT", (1.55, -0.49, 1.50), -56.0, 1260.0, (808.0, 495.0), 28.0),
    CameraMount("CAM_FRONT_LEFT", (1.52, 0.49, 1.51), 55.5, 1272.0, (826.0, 480.0), 43.0),
    CameraMount("CAM_BACK", (0.03, 0.00, 1.57), 180.0, 809.0, (829.0, 482.0), 11.0),
    CameraMount("CAM_BACK_LEFT", (1.04, 0.48, 1.59), 108.5, 1257.0, (792.0, 493.0), 1.0),
    CameraMount("CAM_BACK_RIGHT", (1.01, -0.48, 1.56), -110.5, 1259.0, (807.0, 501.0), 20.0),
)

LIDAR_POSITION = (0.94, 0.0, 1.84)
LIDAR_YAW = -90.0
"""The sensor's x axis points to the right of the car, degrees in the ego frame."""
LIDAR_ELEVATIONS = np.linspace(-30.67, 10.67, 32)
"""Degrees, by ring index."""
LIDAR_COLUMNS = 1084
LIDAR_RANGE = 100.0


def lidar_to_ego() -> Float[np.ndarray, "4 4"]:
    """The LiDAR's pose in the ego frame."""
    x, y, z = LIDAR_POSITION
    return pose_matrix(x, y, float(np.radians(LIDAR_YAW)), z)


def pose_matrix(x: float, y: float, yaw: float, z: float = 0.0) -> Float[np.ndarray, "4 4"]:
    """A planar pose as a 4x4 matrix to the global frame."""
    matrix = np.eye(4)
    cos, sin = exact.cos_sin(yaw)
    matrix[:2, :2] = [[cos, -sin], [sin, cos]]
    matrix[:3, 3] = x, y, z
    return matrix


def quaternion(matrix: Float[np.ndarray, "4 4"]) -> list[float]:
    """w, x, y, z of a pose's rotation, w not negative."""
    return exact.quaternion(matrix[:3, :3]).tolist()


@dataclasses.dataclass(frozen=True)
class DrawnBox:
    """An annotated object."""

    centre: Float[np.ndarray, "3"]
    """Global frame, metres."""
    size: tuple[float, float, float]
    """Length, width, height, metres (nuScenes tables store width, length, height)."""
    yaw: float
    """Heading about the vertical, radians, global frame."""
    category: str
    """nuScenes category name."""
    instance_token: str


@dataclasses.dataclass(frozen=True)
class GroundRaster:
    """Drivable cells around the camera. Row grows with global y, column grows with global x."""

    drivable: UInt8[np.ndarray, "R C"] | Bool[np.ndarray, "R C"]
    """Non-zero where drivable."""
    origin_xy: tuple[float, float]
    """Global x, y of the lower left corner of cell (0, 0), metres."""
    resolution: float
    """Metres per cell; 0.1 to 0.5 looks best."""


@dataclasses.dataclass(frozen=True)
class DrawnView:
    """An encoded image and its exact depth."""

    jpeg: bytes
    depth_png: bytes
    """16-bit PNG of round(z * 256) in the camera frame, metres; 0 for the sky and beyond 256 m."""


def prepare_ground(ground_raster: GroundRaster, seed: int) -> Backdrop:
    """Scenery, colours and shadows of a place; worth keeping for the six views of a keyframe.

    Args:
        ground_raster: drivable cells, at least some 50 m around the camera.
        seed: chooses the light; use one per scene.

    Raises:
        ConfigError: the raster is empty or its resolution is not positive.
    """
    drivable = np.asarray(ground_raster.drivable)
    if drivable.ndim != 2 or min(drivable.shape) < 2 or not ground_raster.resolution > 0:
        raise ConfigError(
            f"ground raster has shape {drivable.shape} at {ground_raster.resolution} m per cell: "
            "give at least 2 x 2 cells and a positive resolution"
        )
    origin = (float(ground_raster.origin_xy[0]), float(ground_raster.origin_xy[1]))
    surface_map = ground.surface_map_of_mask(
        (drivable > 0).astype(np.uint8), origin, ground_raster.resolution
    )
    return stage.build_backdrop(surface_map, light_of(seed), scenery.LAND_SEED)


def light_of(seed: int) -> Light:
    """Daylight weather and sun direction of a seed."""
    rng = np.random.default_rng([seed, 5])
    return Light(WEATHERS[int(rng.integers(3))], float(rng.uniform(0.0, 2 * np.pi)))


def draw_view(
    boxes: Sequence[DrawnBox],
    ground_raster: GroundRaster | Backdrop,
    intrinsics: Float[np.ndarray, "3 3"],
    camera_to_global: Float[np.ndarray, "4 4"],
    image_size: tuple[int, int],
    seed: int = 0,
) -> DrawnView:
    """Draws one camera image.

    Args:
        boxes: annotated objects, global frame.
        ground_raster: drivable cells around the camera, or what `prepare_ground` made of them.
        intrinsics: pinhole camera in pixels at `image_size`.
        camera_to_global: pose of the camera (x right, y down, z forward); the ground is global z = 0.
        image_size: height, width in pixels.
        seed: chooses the light and sensor noise; use one per scene.

    Raises:
        ConfigError: the calibration has wrong shapes, or the camera is not above the ground.
    """
    intrinsics, camera_to_global = (np.asarray(a, dtype=np.float64) for a in (intrinsics, camera_to_global))
    if intrinsics.shape != (3, 3) or camera_to_global.shape != (4, 4):
        raise ConfigError(
            f"intrinsics {intrinsics.shape} and camera_to_global {camera_to_global.shape} "
            "must be (3, 3) and (4, 4)"
        )
    if not camera_to_global[2, 3] > 0.1:
        raise ConfigError(f"the camera is at z = {camera_to_global[2, 3]:.2f} m, not above the ground z = 0")
    backdrop = ground_raster if isinstance(ground_raster, Backdrop) else prepare_ground(ground_raster, seed)
    light = light_of(seed)
    parts = [backdrop.land.quads]
    for box in boxes:
        quads = shapes.object_quads(box.category, _plain_size(box.size), box.instance_token)
        parts.append(shapes.place(quads, np.asarray(box.centre, dtype=np.float64), box.yaw))
    camera = stage.camera_of(intrinsics, camera_to_global, image_size)
    people = [_participant(box) for box in boxes]
    picture = stage.take_picture(
        backdrop,
        shapes.concatenate(parts),
        stage.frame_shadows(backdrop, people, light),
        camera,
        light,
        noise_seed=seed,
    )
    return DrawnView(picture.jpeg, picture.depth_png)


def _plain_size(size: Sequence[float]) -> tuple[float, float, float]:
    length, width, height = (float(extent) for extent in size)
    return length, width, height


def _participant(box: DrawnBox) -> Participant:
    pose = (float(box.centre[0]), float(box.centre[1]), float(box.yaw))
    return Participant(box.instance_token, box.category, _plain_size(box.size), pose, 0.0, False, "")

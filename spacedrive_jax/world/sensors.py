"""The sensors of the synthetic world: six cameras and a LiDAR, with round values typical of nuScenes cars.

`draw_view` draws a camera view of any annotated place, for images a nuScenes folder lacks. Only plain data go
in: boxes, a drivable raster and a calibrated camera. What the annotations and the map do not tell (colours,
buildings, trees, light) is a deterministic function of the instance tokens, of global position and of the
seed, so that an object and a place keep their look from frame to frame.

`lidar_sweep` spins in the same world: rays against the ground plane and the very quads the cameras see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy.spatial import cKDTree

from spacedrive_jax import exact
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.world import ground, paths, shapes, stage
from spacedrive_jax.world.shading import WEATHERS, Light
from spacedrive_jax.world.shapes import Quads
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
LIDAR_MIN_RANGE = 1.0
LIDAR_NOISE = 0.008
"""Standard deviation of the measured range, metres."""
_TOLERANCE = 1e-9
"""By which a beam may miss an edge; closes the seams between neighbours."""

_REFLECTIVITY = np.array([30.0, 25.0, 12.0, 90.0, 8.0, 110.0, 15.0])
_GROUND_REFLECTIVITY = 14.0
_HIGHEST_OBJECT = 0.19 * LIDAR_RANGE
"""Metres above the sensor that its highest beam stays below."""


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
    return stage.build_backdrop(surface_map, light_of(seed), stage.LAND_SEED)


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


def lidar_sweep(
    quads: Quads, lidar_to_global: Float[np.ndarray, "4 4"], rng: np.random.Generator
) -> Float[np.ndarray, "P 5"]:
    """One revolution, taken at a single instant.

    Args:
        quads: everything that stands on the ground, global frame.
        lidar_to_global: sensor pose; the sensor stands upright.
        rng: of the range and intensity noise.

    Returns:
        float32 rows x, y, z (sensor frame, metres), intensity (0 to 255), ring (0 is the lowest beam), in
        firing order (clockwise columns, rings upwards), beams without an echo left out.
    """
    east, north = exact.cos_sin(_azimuths()[:, None])
    flat, up = exact.cos_sin(np.radians(LIDAR_ELEVATIONS))
    # (columns, rings, 3), sensor frame
    rays = np.stack([flat * east, flat * north, np.broadcast_to(up, (len(east), len(up)))], axis=-1)
    of_ground = -rays[..., 2] / lidar_to_global[2, 3]
    nearness = np.maximum(of_ground, 1.0 / LIDAR_RANGE)  # 1 / range
    reflectivity = np.where(of_ground > 1.0 / LIDAR_RANGE, _GROUND_REFLECTIVITY, 0.0)
    quad, column, ring, inverse = _hits(quads, lidar_to_global)
    before = nearness[column, ring]
    np.maximum.at(nearness, (column, ring), inverse)
    nearest = np.flatnonzero((inverse > before) & (inverse == nearness[column, ring]))
    brightness = _REFLECTIVITY[quads.materials] * (0.5 + quads.colours.mean(axis=1))
    reflectivity[column[nearest], ring[nearest]] = brightness[quad[nearest]]
    echo = (reflectivity > 0) & (nearness > 1.0 / LIDAR_RANGE) & (nearness < 1.0 / LIDAR_MIN_RANGE)
    reach = 1.0 / nearness + rng.normal(0.0, LIDAR_NOISE, nearness.shape)
    intensity = np.clip(reflectivity * rng.uniform(0.6, 1.4, nearness.shape), 1, 255).round()
    rings = np.broadcast_to(np.arange(32), nearness.shape)
    cloud = np.concatenate([rays * reach[..., None], intensity[..., None], rings[..., None]], axis=-1)
    return cloud[echo].astype(np.float32)


def _azimuths() -> Float[np.ndarray, "K"]:
    """Direction of each column in the sensor frame, radians, clockwise from behind."""
    return np.pi - (np.arange(LIDAR_COLUMNS) + 0.5) * 2 * np.pi / LIDAR_COLUMNS


def _hits(
    quads: Quads, lidar_to_global: Float[np.ndarray, "4 4"]
) -> tuple[Int[np.ndarray, "K"], Int[np.ndarray, "K"], Int[np.ndarray, "K"], Float[np.ndarray, "K"]]:
    """Quad, column, ring and inverse range (1/m) of every meeting of a beam and a quad.

    The rays of a column are (cos a, sin a, t) for the azimuth a and the tangent t of the elevation: along
    a column the edges of a quad are affine in t (see `paths.intervals`).
    """
    points = quads.vertices - lidar_to_global[:3, 3]
    near = (exact.norm(points[..., :2]).min(axis=1) < LIDAR_RANGE) & (
        points[..., 2].min(axis=1) < _HIGHEST_OBJECT
    )
    chosen = np.flatnonzero(near)
    points = exact.rotate(points[chosen], lidar_to_global[:3, :3].T)
    normals = np.cross(points[:, 2] - points[:, 0], points[:, 3] - points[:, 1])
    distance = exact.dot(normals, points[:, 0])
    facing = np.flatnonzero(distance < -1e-9)
    chosen, points = chosen[facing], points[facing]
    planes = (normals[facing] / distance[facing, None]).T
    first, last = _columns(points)
    seen = np.flatnonzero(last > first)
    chosen, points, planes = chosen[seen], points[seen], planes[:, seen]

    edges = np.cross(points, np.roll(points, -1, axis=1))
    edges *= np.sign(exact.dot(edges, points.mean(axis=1)[:, None]))[..., None]
    facet, turned = paths.expand(first[seen], last[seen])
    column = turned % LIDAR_COLUMNS
    cos, sin = (part[column] for part in exact.cos_sin(_azimuths()))
    along = np.ascontiguousarray(edges.T)[..., facet]
    low, high = paths.intervals(along[0] * cos + along[1] * sin, along[2])
    elevations = np.radians(LIDAR_ELEVATIONS)
    (cosines, _), tangents = exact.cos_sin(elevations), exact.tan(elevations)
    lowest = np.searchsorted(tangents, low - _TOLERANCE)
    line, ring = paths.expand(lowest, np.searchsorted(tangents, high + _TOLERANCE, side="right"))
    plane = planes[:, facet]
    level = plane[0] * cos + plane[1] * sin
    inverse = (level[line] + plane[2, line] * tangents[ring]) * cosines[ring]
    valid = inverse < 1.0 / LIDAR_MIN_RANGE
    line, ring = line[valid], ring[valid]
    return chosen[facet[line]], column[line], ring, inverse[valid]


def _columns(points: Float[np.ndarray, "Q 4 3"]) -> tuple[Int[np.ndarray, "Q"], Int[np.ndarray, "Q"]]:
    """First column that may see each quad and one past the last; they may run over the seam at the back."""
    x, y = points[..., 0], points[..., 1]
    middle = exact.arctan2(y.mean(axis=1), x.mean(axis=1))
    spread = (exact.arctan2(y, x) - middle[:, None] + np.pi) % (2 * np.pi) - np.pi
    step = 2 * np.pi / LIDAR_COLUMNS
    first = np.ceil((np.pi - (middle + spread.max(axis=1))) / step - 0.5 - _TOLERANCE).astype(int)
    last = np.floor((np.pi - (middle + spread.min(axis=1))) / step - 0.5 + _TOLERANCE).astype(int) + 1
    overhead = exact.hypot(x, y).min(axis=1) < 1.0  # may surround the axis: look everywhere
    return np.where(overhead, 0, first), np.where(overhead, LIDAR_COLUMNS, last)


def count_inside(
    cloud: Float[np.ndarray, "P 5"],
    lidar_to_global: Float[np.ndarray, "4 4"],
    centres: Float[np.ndarray, "A 3"],
    sizes: Float[np.ndarray, "A 3"],
    yaws: Float[np.ndarray, "A"],
) -> list[int]:
    """Points of a sweep inside each box (length, width, height; global frame), as nuScenes counts them."""
    points = exact.transform(cloud[:, :3].astype(np.float64), lidar_to_global)
    reach = exact.norm(sizes[:, :2]) / 2
    candidates = cKDTree(points[:, :2]).query_ball_point(centres[:, :2], reach)
    counts = []
    for centre, size, yaw, nearby in zip(centres, sizes, yaws, candidates, strict=True):
        near = points[nearby] - centre
        cos, sin = exact.cos_sin(yaw)
        local = np.stack([cos * near[:, 0] + sin * near[:, 1], cos * near[:, 1] - sin * near[:, 0]], axis=1)
        inside = (np.abs(local) <= size[:2] / 2).all(axis=1) & (np.abs(near[:, 2]) <= size[2] / 2)
        counts.append(int(inside.sum()))
    return counts

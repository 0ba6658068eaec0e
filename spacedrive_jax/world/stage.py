"""A scene made visible: the scenario's road users, the scenery around them, lights and shadows."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from spacedrive_jax import exact
from spacedrive_jax.world import ground, scenery, shapes
from spacedrive_jax.world.ground import GroundColours, SurfaceMap
from spacedrive_jax.world.render import Camera, FrameBuffer, cast, depth_image
from spacedrive_jax.world.scenario import Scenario
from spacedrive_jax.world.shading import shade
from spacedrive_jax.world.shapes import Quads
from spacedrive_jax.world.simulate import corners
from spacedrive_jax.world.town import LANE_WIDTH
from spacedrive_jax.world.traffic import Mover
from spacedrive_jax.world.weather import Light

VIEW_MARGIN = 110.0
"""Metres of scenery around the ego vehicle's way."""
JPEG_QUALITY = 90


@dataclasses.dataclass(frozen=True)
class Participant:
    """An annotated object at one instant."""

    key: str
    category: str
    size: tuple[float, float, float]
    pose: tuple[float, float, float]
    """x, y, heading of the box centre, global frame."""
    speed: float
    braking: bool
    attribute: str


@dataclasses.dataclass(frozen=True)
class Backdrop:
    """All that does not change during a scene."""

    surface_map: SurfaceMap
    colours: GroundColours
    quads: Quads
    shadows: UInt8[np.ndarray, "R C"]


def build_backdrop(surface_map: SurfaceMap, light: Light, seed: int) -> Backdrop:
    """Ground, scenery and its shadows around a scene."""
    land = scenery.place_scenery(surface_map, seed)
    shadows = np.zeros_like(surface_map.classes)
    for outline, height in land.casters:
        ground.draw_shadow(shadows, surface_map, outline, height, light.sun, 200)
    return Backdrop(surface_map, ground.ground_colours(surface_map), land.quads, shadows)


def scene_area(scenario: Scenario, duration: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower left and upper right corner of the ground that may be seen, rounded to whole 10 m."""
    motion = scenario.motions[0]
    s = np.array([motion.at(time)[0] for time in np.linspace(0.0, duration, 20)])
    way = scenario.ego.route.pose(s)[:, :2]
    low = np.floor((way.min(axis=0) - VIEW_MARGIN) / 10) * 10
    return low, np.ceil((way.max(axis=0) + VIEW_MARGIN) / 10) * 10


def moving_participants(scenario: Scenario, time: float) -> list[Participant]:
    """Every mover but the ego vehicle at a time in seconds, in the cast's order."""
    states = [motion.at(time) for motion in scenario.motions]
    poses = scenario.tracks.poses(np.array([s for s, _, _ in states])).tolist()
    return [
        Participant(
            mover.key,
            mover.category,
            mover.size,
            (x, y, yaw),
            speed,
            acceleration < -0.6 or speed < 0.1,
            _attribute(mover, speed),
        )
        for mover, (_, speed, acceleration), (x, y, yaw) in list(
            zip(scenario.cast.movers, states, poses, strict=True)
        )[1:]
    ]


def standing_participants(scenario: Scenario) -> list[Participant]:
    """Everything annotated that stands still, in the cast's order."""
    return [
        Participant(item.key, item.category, item.size, item.pose, 0.0, False, item.attribute)
        for item in scenario.cast.obstacles
    ]


def _attribute(mover: Mover, speed: float) -> str:
    if mover.pedestrian:
        return "pedestrian.moving" if speed > 0.2 else "pedestrian.standing"
    if mover.category in ("vehicle.bicycle", "vehicle.motorcycle"):
        return "cycle.with_rider"
    return "vehicle.moving" if speed > 0.2 else "vehicle.stopped"


def signal_quads(scenario: Scenario, time: float) -> Quads:
    """All traffic lights with their state at a time."""
    town = scenario.town
    roads = {node: road for road in town.roads for node in (road.start, road.end)}
    parts = []
    for junction in town.junctions:
        if not junction.signalised:
            continue
        green = scenario.cast.signals.green_arm(junction.index, time)
        soon_red = scenario.cast.signals.green_arm(junction.index, time + 1.0) != green
        for arm in junction.arms:
            arriving = junction.arm_heading(arm) + np.pi
            forward = np.array(exact.cos_sin(arriving))
            left = np.array([-forward[1], forward[0]])
            road = roads[junction.index, arm]
            kerb = road.half_width + 0.8
            pole = junction.centre + forward * (junction.radius + 0.6) + left * town.side * kerb
            overhead = -left * town.side * (kerb - LANE_WIDTH * (road.lanes - 0.5))
            state = "red" if arm != green else ("amber" if soon_red else "green")
            where, arm_reach = tuple(pole.tolist()), tuple(overhead.tolist())
            parts.append(scenery.traffic_light(where, arriving + np.pi, arm_reach, state))
    return shapes.concatenate(parts)


def frame_quads(backdrop: Backdrop, people: list[Participant], tokens: list[str], signals: Quads) -> Quads:
    """Scenery, signals and participants (group = position in `people`) as one collection."""
    objects = [
        shapes.object_quads(item.category, item.size, token, braking=item.braking)
        for item, token in zip(people, tokens, strict=True)
    ]
    poses = np.array([item.pose for item in people]).reshape(-1, 3)
    centres = np.array([[item.pose[0], item.pose[1], item.size[2] / 2] for item in people]).reshape(-1, 3)
    return shapes.concatenate([backdrop.quads, signals, shapes.place_all(objects, centres, poses[:, 2])])


def frame_shadows(backdrop: Backdrop, people: list[Participant], light: Light) -> UInt8[np.ndarray, "R C"]:
    """The shadow raster with everybody's shadow and the dark patch beneath them."""
    shadows = backdrop.shadows.copy()
    if not people:
        return shadows
    half = np.array([item.size[:2] for item in people]) / 2
    outlines = corners(np.array([item.pose for item in people]), half * 0.95)
    for outline, item in zip(outlines, people, strict=True):
        ground.draw_shadow(shadows, backdrop.surface_map, outline, item.size[2] * 0.9, light.sun, 215)
        if item.category.startswith("vehicle."):
            cells = backdrop.surface_map.to_cells(outline)
            ground.fill(shadows, cells, 255)
    return shadows


@dataclasses.dataclass(frozen=True)
class Picture:
    """One rendered camera image."""

    jpeg: bytes
    depth_png: bytes
    """16-bit PNG of round(metres * 256); 0 is sky."""
    buffer: FrameBuffer


def take_picture(
    backdrop: Backdrop,
    quads: Quads,
    shadows: UInt8[np.ndarray, "R C"],
    camera: Camera,
    light: Light,
    noise_seed: int,
    *,
    with_depth: bool = True,
) -> Picture:
    """Renders and encodes one view."""
    buffer = cast(quads, camera)
    image = shade(buffer, quads, camera, light, backdrop.colours, backdrop.surface_map, shadows, noise_seed)
    jpeg = _encode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    depth = _encode(".png", depth_image(buffer), [cv2.IMWRITE_PNG_COMPRESSION, 3]) if with_depth else b""
    return Picture(jpeg, depth, buffer)


def _encode(extension: str, image: np.ndarray, options: list[int]) -> bytes:
    done, data = cv2.imencode(extension, image, options)
    if not done:
        raise RuntimeError(f"OpenCV could not encode a {image.shape} image as {extension}")
    return data.tobytes()


def camera_of(
    intrinsics: Float[np.ndarray, "3 3"],
    camera_to_global: Float[np.ndarray, "4 4"],
    image_size: tuple[int, int],
) -> Camera:
    """A camera from its calibration; `image_size` is (height, width)."""
    return Camera(intrinsics, camera_to_global, image_size[0], image_size[1])

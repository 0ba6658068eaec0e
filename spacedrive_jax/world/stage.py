"""A scene made visible: the scenario's road users, the scenery around them, lights and shadows."""

from __future__ import annotations

import dataclasses
import functools

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from spacedrive_jax import exact
from spacedrive_jax.world import ground
from spacedrive_jax.world.ground import GroundColours, SurfaceMap
from spacedrive_jax.world.paths import corners, expand
from spacedrive_jax.world.render import Camera, FrameBuffer, cast, depth_image, in_view
from spacedrive_jax.world.scenario import Scenario
from spacedrive_jax.world.scenery import place_scenery
from spacedrive_jax.world.shading import Light, shade
from spacedrive_jax.world.shapes import (
    Blocks,
    Material,
    Quads,
    blocks_of,
    box,
    concatenate,
    object_quads,
    place,
    place_all,
    stop_sign,
)
from spacedrive_jax.world.town import LANE_WIDTH, POST_SETBACK, Town, stop_sign_pose
from spacedrive_jax.world.traffic import Mover

VIEW_MARGIN = 110.0
"""Metres of scenery around the ego vehicle's way."""
JPEG_QUALITY = 90
LAND_SEED = 11
"""One land for all: real and synthetic places look alike whatever the seed of traffic and light."""


@functools.lru_cache(maxsize=2048)
def traffic_light(
    position: tuple[float, float], facing: float, lane_side: tuple[float, float], state: str
) -> Quads:
    """A signal on a mast arm; what one was made of is kept, since a town has few and shows them often.

    Args:
        position: of the pole, global metres.
        facing: direction in which the lamps shine, radians.
        lane_side: vector from the pole to above the lane, metres.
        state: `green`, `amber` or `red`.
    """
    reach = exact.hypot(*lane_side)
    along = exact.arctan2(lane_side[1], lane_side[0])
    grey = (0.22, 0.23, 0.24)
    pole = place(
        concatenate(
            [
                box((0, 0, 2.9), (0.18, 0.18, 5.8), grey),
                box((reach / 2, 0, 5.7), (reach, 0.12, 0.12), grey),
            ]
        ),
        np.array([*position, 0.0]),
        along,
    )
    parts = [pole]
    above_lane = (position[0] + lane_side[0], position[1] + lane_side[1])
    for spot, z in ((above_lane, 5.3), (position, 3.2)):
        head = [box((0, 0, 0), (0.3, 0.42, 1.15), (0.07, 0.07, 0.07))]
        for offset, name, lit in (
            (0.36, "red", (1.0, 0.12, 0.08)),
            (0.0, "amber", (1.0, 0.7, 0.1)),
            (-0.36, "green", (0.15, 1.0, 0.45)),
        ):
            on = name == state
            dark = (lit[0] * 0.16, lit[1] * 0.16, lit[2] * 0.16)
            material = Material.LAMP if on else Material.PLAIN
            head.append(box((0.16, 0, offset), (0.04, 0.27, 0.27), lit if on else dark, material))
        parts.append(place(concatenate(head), np.array([*spot, z]), facing))
    return concatenate(parts)


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
    land: Blocks
    shadows: UInt8[np.ndarray, "R C"]


def build_backdrop(surface_map: SurfaceMap, light: Light, seed: int) -> Backdrop:
    """Ground, scenery and its shadows around a scene."""
    land = place_scenery(surface_map, seed)
    shadows = np.zeros_like(surface_map.classes)
    for outline, height in land.casters:
        (shadow,) = ground.shadow_outlines(outline[None], np.array([height]), light.sun)
        ground.fill_hull(shadows, surface_map.to_cells(shadow), 200)
    return Backdrop(surface_map, ground.ground_colours(surface_map), land.blocks, shadows)


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


def signal_states(scenario: Scenario, time: float) -> tuple[str, ...]:
    """What every traffic light shows at a time: of each signalised junction, arm by arm.

    Where there are none, `stop` for an arm with a stop sign and nothing for another.
    """
    states: list[str] = []
    for junction in scenario.town.junctions:
        if not junction.signalised:
            continue
        priority = scenario.cast.signals.priorities.get(junction.index)
        if priority is not None:
            states += ["stop" if priority.signed(arm) else "" for arm in junction.arms]
            continue
        green = scenario.cast.signals.green_arms(junction.index, time)
        soon = scenario.cast.signals.green_arms(junction.index, time + 1.0)
        states += ["red" if a not in green else ("green" if a in soon else "amber") for a in junction.arms]
    return tuple(states)


def signal_blocks(town: Town, states: tuple[str, ...]) -> Blocks:
    """All traffic lights and stop signs of a town, as `signal_states` says."""
    roads = {node: road for road in town.roads for node in (road.start, road.end)}
    shown = iter(states)
    parts = []
    for junction in town.junctions:
        if not junction.signalised:
            continue
        for arm in junction.arms:
            state = next(shown)
            if state == "stop":
                x, y, facing = stop_sign_pose(town, junction.index, arm)
                parts.append(place(stop_sign(), np.array([x, y, 0.0]), facing))
            if state in ("stop", ""):
                continue
            arriving = junction.arm_heading(arm) + np.pi
            forward = np.array(exact.cos_sin(arriving))
            left = np.array([-forward[1], forward[0]])
            road = roads[junction.index, arm]
            kerb = road.half_width + POST_SETBACK
            pole = junction.centre + forward * (junction.radius + 0.6) + left * town.side * kerb
            overhead = -left * town.side * (kerb - LANE_WIDTH * (road.lanes - 0.5))
            where, arm_reach = tuple(pole.tolist()), tuple(overhead.tolist())
            parts.append(traffic_light(where, arriving + np.pi, arm_reach, state))
    return blocks_of(parts)


def frame_quads(
    backdrop: Backdrop,
    people: list[Participant],
    tokens: list[str],
    signals: Blocks,
    camera: Camera | None = None,
) -> Quads:
    """Scenery, signals and participants (group = position in `people`) as one collection.

    Args:
        backdrop: the scenery.
        people: who is there,
        tokens: and the token of each.
        signals: the traffic lights.
        camera: leaves out what this view surely does not show; the rest keeps its numbers.
    """
    objects = [
        object_quads(item.category, item.size, token, braking=item.braking)
        for item, token in zip(people, tokens, strict=True)
    ]
    poses = np.array([item.pose for item in people]).reshape(-1, 3)
    centres = np.array([[item.pose[0], item.pose[1], item.size[2] / 2] for item in people]).reshape(-1, 3)
    still = (backdrop.land, signals)
    if camera is None:
        placed = place_all(objects, centres, poses[:, 2])
        return concatenate([*(blocks.quads for blocks in still), placed])
    parts, first = [], 0
    for blocks in still:
        seen = np.flatnonzero(in_view(blocks.low, blocks.high, camera))
        parts.append(blocks.select(seen, first))
        first += len(blocks.quads)
    reach = np.array([each.reach for each in objects]).reshape(-1, 1)
    seen = np.flatnonzero(in_view(centres - reach, centres + reach, camera))
    lengths = np.array([len(each) for each in objects], dtype=np.int64)
    ends = first + np.cumsum(lengths)
    placed = place_all([objects[i] for i in seen], centres[seen], poses[seen, 2])
    _, numbers = expand((ends - lengths)[seen], ends[seen])
    return concatenate([*parts, dataclasses.replace(placed, groups=seen[placed.groups], numbers=numbers)])


def frame_shadows(backdrop: Backdrop, people: list[Participant], light: Light) -> UInt8[np.ndarray, "R C"]:
    """The shadow raster with everybody's shadow and the dark patch beneath them."""
    shadows = backdrop.shadows.copy()
    for item, outline, shadow in _shadows(people, light):
        _draw_shadow(shadows, backdrop.surface_map, item, outline, shadow)
    return shadows


_Shadow = tuple[Participant, Float[np.ndarray, "4 2"], Float[np.ndarray, "8 2"]]


def _shadows(people: list[Participant], light: Light) -> list[_Shadow]:
    """Everybody with the outline on the ground and the points around the shadow, metres."""
    if not people:
        return []
    sizes = np.array([item.size for item in people])
    outlines = corners(np.array([item.pose for item in people]), sizes[:, :2] / 2 * 0.95)
    shadows = ground.shadow_outlines(outlines, sizes[:, 2] * 0.9, light.sun)
    return list(zip(people, outlines, shadows, strict=True))


def _draw_shadow(
    raster: UInt8[np.ndarray, "R C"],
    surface_map: SurfaceMap,
    item: Participant,
    outline: Float[np.ndarray, "4 2"],
    shadow: Float[np.ndarray, "8 2"],
) -> None:
    ground.fill_hull(raster, surface_map.to_cells(shadow), 215)
    if item.category.startswith("vehicle."):
        ground.fill(raster, surface_map.to_cells(outline), 255)


class MovingShadows:
    """One shadow raster in which those who move are drawn again for every image.

    What an image changed is put back for the next: a copy of the whole raster would cost more than all that
    is drawn into it.
    """

    def __init__(self, backdrop: Backdrop, light: Light) -> None:
        """Args: what stands still, and the light."""
        self._backdrop, self._light = backdrop, light
        self._raster = backdrop.shadows.copy()
        self._changed: list[tuple[slice, slice]] = []

    def draw(self, people: list[Participant], camera: Camera) -> UInt8[np.ndarray, "R C"]:
        """The raster with the shadows that a view may show; valid until the next call."""
        for where in self._changed:
            self._raster[where] = self._backdrop.shadows[where]
        self._changed.clear()
        everybody = _shadows(people, self._light)
        if not everybody:
            return self._raster
        surface_map = self._backdrop.surface_map
        points = np.stack([shadow for _, _, shadow in everybody])
        low, high = points.min(axis=1), points.max(axis=1)
        # A sample blends four cells, and a hull is filled to the sixteenth of a cell.
        slack = 2 * surface_map.resolution
        flat = np.zeros((len(low), 1))
        seen = in_view(
            np.concatenate([low - slack, flat], axis=1), np.concatenate([high + slack, flat], axis=1), camera
        )
        first = np.maximum(np.floor(surface_map.to_cells(low)).astype(int) - 1, 0)
        last = np.maximum(np.ceil(surface_map.to_cells(high)).astype(int) + 2, 0)
        for number in np.flatnonzero(seen).tolist():
            _draw_shadow(self._raster, surface_map, *everybody[number])
            (left, bottom), (right, top) = first[number].tolist(), last[number].tolist()
            self._changed.append((slice(bottom, top), slice(left, right)))
        return self._raster


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

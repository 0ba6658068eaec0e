"""A scene made visible: the scenario's road users, the scenery around them, lights and shadows.

Buildings, trees and lamp posts are a deterministic function of global position and the drivable surface:
every cell of a global grid draws its own content from a hash of its coordinates, so that the same place looks
the same from every keyframe, in every scene, and for the synthetic town and real maps alike.
"""

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
from spacedrive_jax.world.shading import Light, shade
from spacedrive_jax.world.shapes import (
    Blocks,
    Colour,
    Material,
    Quads,
    blob,
    blocks_of,
    box,
    concatenate,
    object_quads,
    place,
    place_all,
    stop_sign,
)
from spacedrive_jax.world.town import LANE_WIDTH, Town, stop_sign_pose
from spacedrive_jax.world.traffic import Mover

VIEW_MARGIN = 110.0
"""Metres of scenery around the ego vehicle's way."""
JPEG_QUALITY = 90

_FACADES: tuple[Colour, ...] = (
    (0.62, 0.42, 0.33),
    (0.70, 0.66, 0.58),
    (0.50, 0.53, 0.57),
    (0.78, 0.76, 0.71),
    (0.55, 0.47, 0.38),
    (0.40, 0.44, 0.50),
    (0.72, 0.58, 0.44),
)
LAND_SEED = 11
"""One land for all: real and synthetic places look alike whatever the seed of traffic and light."""

_BUILDING_GRID = 15.0
_TREE_GRID = 8.0
_POST_GRID = 24.0


@dataclasses.dataclass(frozen=True)
class Scenery:
    """What stands on the land, plus what throws long shadows: (outline, height) pairs."""

    blocks: Blocks
    casters: tuple[tuple[Float[np.ndarray, "_ 2"], float], ...]


def cell_generator(kind: int, column: int, row: int) -> np.random.Generator:
    """The random generator of one cell of a global grid."""
    return np.random.default_rng([kind, column + 1_000_000, row + 1_000_000])


def place_scenery(surface_map: SurfaceMap, seed: int = 0) -> Scenery:
    """Fills the land off the road.

    Args:
        surface_map: which cells are drivable; scenery keeps clear of them.
        seed: changes the whole look of the land.
    """
    distance = surface_map.drivable_distance()
    rows, columns = distance.shape
    low = np.array(surface_map.origin)
    high = low + np.array([columns, rows]) * surface_map.resolution

    def clearance(x: float, y: float) -> float:
        column, row = np.round(surface_map.to_cells(np.array([x, y]))).astype(int)
        inside = 0 <= column < columns and 0 <= row < rows
        return float(distance[row, column]) if inside else -1.0

    parts: list[Quads] = []
    casters: list[tuple[Float[np.ndarray, "K 2"], float]] = []

    def cells(size: float) -> list[tuple[int, int]]:
        first = np.floor(low / size).astype(int)
        last = np.ceil(high / size).astype(int)
        return [(c, r) for r in range(first[1], last[1]) for c in range(first[0], last[0])]

    for column, row in cells(_BUILDING_GRID):
        rng = cell_generator(3 * seed, column, row)
        x, y = (np.array([column, row]) + rng.uniform(0.35, 0.65, 2)) * _BUILDING_GRID
        free = clearance(x, y)
        kind, size, height = rng.random(), rng.uniform(9.0, 13.5, 2), rng.gamma(3.0, 4.0) + 6.0
        colour = _FACADES[int(rng.integers(len(_FACADES)))]
        turn = rng.uniform(-0.2, 0.2)
        if kind < 0.2 or free < 5.0:
            continue
        room = (free - 4.2) / exact.hypot(0.5, 0.5)
        if room < 5.5:
            continue
        size = np.minimum(size, room)
        parts.append(_building(x, y, turn, size, min(height, 55.0), colour))
        half = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * size / 2
        cos, sin = exact.cos_sin(turn)
        outline = exact.rotate(half, np.array([[cos, -sin], [sin, cos]])) + np.array([x, y])
        casters.append((outline, min(height, 25.0)))
    for column, row in cells(_TREE_GRID):
        rng = cell_generator(3 * seed + 1, column, row)
        x, y = (np.array([column, row]) + rng.uniform(0.1, 0.9, 2)) * _TREE_GRID
        free = clearance(x, y)
        present, height, radius = rng.random(), rng.uniform(4.5, 8.5), rng.uniform(1.3, 2.2)
        green = np.array([0.20, 0.34, 0.13]) * rng.uniform(0.75, 1.25)
        if not (2.2 < free < 4.0 and present < 0.75) and not (free > 12.0 and present < 0.25):
            continue
        parts.append(_tree(x, y, height, radius, (float(green[0]), float(green[1]), float(green[2]))))
        angles = np.linspace(0, 2 * np.pi, 9)[:-1]
        outline = np.array([x, y]) + radius * np.stack(exact.cos_sin(angles), axis=1)
        casters.append((outline * 1.0, height * 0.8))
    for column, row in cells(_POST_GRID):
        rng = cell_generator(3 * seed + 2, column, row)
        x, y = (np.array([column, row]) + rng.uniform(0.0, 1.0, 2)) * _POST_GRID
        spot = _nearest_kerb(distance, surface_map, x, y)
        if spot is not None:
            parts.append(_lamp_post(*spot))
    return Scenery(blocks_of(parts), tuple(casters))


def _nearest_kerb(
    distance: Float[np.ndarray, "R C"], surface_map: SurfaceMap, x: float, y: float
) -> tuple[float, float, float] | None:
    """Slides a point downhill to 0.7 m from the road; also the direction to the road."""
    rows, columns = distance.shape
    reach = max(1, round(0.8 / surface_map.resolution))
    for _ in range(4):
        column, row = np.round(surface_map.to_cells(np.array([x, y]))).astype(int)
        if not (reach <= column < columns - reach and reach <= row < rows - reach):
            return None
        here = float(distance[row, column])
        if not 0.3 < here < 9.0:
            return None
        gradient = np.array(
            [
                distance[row, column + reach] - distance[row, column - reach],
                distance[row + reach, column] - distance[row - reach, column],
            ]
        )
        norm = float(exact.norm(gradient))
        if norm < 0.2:
            return None
        direction = -gradient / norm
        if abs(here - 0.7) < 0.15:
            return x, y, exact.arctan2(direction[1], direction[0])
        x, y = np.array([x, y]) + direction * (here - 0.7)
    return None


def _building(
    x: float, y: float, turn: float, size: Float[np.ndarray, "2"], height: float, colour: Colour
) -> Quads:
    width, depth = float(size[0]), float(size[1])
    walls = box((0, 0, height / 2), (width, depth, height), colour, Material.WALL)
    walls = Quads(walls.vertices[:4], walls.colours[:4], walls.materials[:4], walls.groups[:4])
    roof = (colour[0] * 0.6, colour[1] * 0.6, colour[2] * 0.6)
    parts = [
        walls,
        box((0, 0, height + 0.3), (width + 0.5, depth + 0.5, 0.6), roof),
        box((width * 0.15, 0, height + 1.4), (width * 0.3, depth * 0.3, 1.8), (0.45, 0.45, 0.46)),
    ]
    return place(concatenate(parts), np.array([x, y, 0.0]), turn)


def _tree(x: float, y: float, height: float, radius: float, green: Colour) -> Quads:
    crown = height - radius * 1.2
    lighter = (green[0] * 1.2, green[1] * 1.2, green[2] * 1.15)
    parts = [box((0, 0, crown / 2), (0.26, 0.26, crown), (0.30, 0.22, 0.15), Material.BARK)]
    for centre, size, colour in (
        ((0.0, 0.0, 0.0), 1.0, green),
        ((0.45, 0.30, 0.50), 0.7, lighter),
        ((-0.40, -0.45, 0.35), 0.65, green),
    ):
        dx, dy, dz = (radius * part for part in centre)
        r = radius * size
        parts.append(blob((dx, dy, crown + dz), (r, r, r * 1.12), colour, Material.FOLIAGE))
    return place(concatenate(parts), np.array([x, y, 0.0]), x + y)


def _lamp_post(x: float, y: float, towards: float) -> Quads:
    grey = (0.35, 0.36, 0.38)
    parts = [
        box((0, 0, 3.3), (0.14, 0.14, 6.6), grey),
        box((0.7, 0, 6.6), (1.5, 0.09, 0.09), grey),
        box((1.35, 0, 6.52), (0.55, 0.22, 0.1), (1.0, 0.93, 0.75), Material.LAMP),
    ]
    return place(concatenate(parts), np.array([x, y, 0.0]), towards)


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
            kerb = road.half_width + 0.8
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

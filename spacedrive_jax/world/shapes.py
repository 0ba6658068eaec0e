"""What things look like: every object as a handful of flat quadrilaterals ("quads") with materials.

Vertices run counter-clockwise seen from outside; edge 0-1 is horizontal and edge 0-3 points up on walls,
so textures can be laid in metres.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from spacedrive_jax import exact
from spacedrive_jax.world.paths import expand


class Material(enum.IntEnum):
    """How a surface is shaded."""

    PLAIN = 0
    WALL = 1
    FOLIAGE = 2
    LAMP = 3
    GLASS = 4
    STRIPES = 5
    BARK = 6


@dataclasses.dataclass(frozen=True)
class Quads:
    """Flat four-cornered surfaces."""

    vertices: Float[np.ndarray, "Q 4 3"]
    colours: Float[np.ndarray, "Q 3"]
    """Red, green, blue from 0 to 1."""
    materials: Int[np.ndarray, "Q"]
    groups: Int[np.ndarray, "Q"]
    """Index of the annotated object a quad belongs to, -1 for scenery."""
    numbers: Int[np.ndarray, "Q"] | None = None
    """Where a part of a whole scene is, the place of each quad in the whole (it chooses the texture)."""

    def __len__(self) -> int:
        return len(self.vertices)

    @functools.cached_property
    def reach(self) -> float:
        """Metres from the origin within which all of it lies."""
        return float(exact.norm(self.vertices).max(initial=0.0)) + 1e-6


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Quads in blocks that are seen or not seen together: a building, a tree, a traffic light."""

    quads: Quads
    starts: Int[np.ndarray, "S"]
    """First quad of each block, and the number of all quads."""
    low: Float[np.ndarray, "B 3"]
    """Lowest coordinates of each block, metres."""
    high: Float[np.ndarray, "B 3"]
    """Highest coordinates of each block, metres."""

    def __len__(self) -> int:
        return len(self.low)

    def select(self, blocks: Int[np.ndarray, "K"], first: int) -> Quads:
        """Some of the blocks, in a whole scene in which this collection's quads begin at number `first`."""
        _, index = expand(self.starts[blocks], self.starts[blocks + 1])
        whole = self.quads
        return Quads(
            whole.vertices.take(index, axis=0),
            whole.colours.take(index, axis=0),
            whole.materials.take(index),
            whole.groups.take(index),
            first + index,
        )


def blocks_of(parts: list[Quads]) -> Blocks:
    """Collections as the blocks of one, in order."""
    parts = [part for part in parts if len(part)]
    boxes = [part.vertices.reshape(-1, 3) for part in parts]
    return Blocks(
        concatenate(parts),
        np.cumsum([0, *(len(part) for part in parts)]),
        np.array([points.min(axis=0) for points in boxes]).reshape(-1, 3),
        np.array([points.max(axis=0) for points in boxes]).reshape(-1, 3),
    )


def concatenate(parts: list[Quads]) -> Quads:
    """All quads of several collections, in order."""
    if not parts:
        return Quads(
            np.zeros((0, 4, 3)), np.zeros((0, 3)), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        )
    numbers: list[Any] = [part.numbers for part in parts]
    return Quads(
        np.concatenate([part.vertices for part in parts]),
        np.concatenate([part.colours for part in parts]),
        np.concatenate([part.materials for part in parts]),
        np.concatenate([part.groups for part in parts]),
        None if any(number is None for number in numbers) else np.concatenate(numbers),
    )


def place(quads: Quads, position: Float[np.ndarray, "3"], yaw: float, group: int = -1) -> Quads:
    """Quads of an object frame, turned by `yaw` (radians) and moved to `position` (metres)."""
    cos, sin = exact.cos_sin(yaw)
    rotation = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    vertices = exact.rotate(quads.vertices, rotation) + position
    return Quads(vertices, quads.colours, quads.materials, np.full(len(quads), group))


def place_all(
    objects: list[Quads], positions: Float[np.ndarray, "A 3"], yaws: Float[np.ndarray, "A"]
) -> Quads:
    """Many objects placed at once; the group of a quad is the position of its object in `objects`.

    Args:
        objects: quads in object frames.
        positions: of the object frames, metres.
        yaws: of the object frames, radians.
    """
    together = concatenate(objects)
    groups = np.repeat(np.arange(len(objects)), [len(quads) for quads in objects])
    cos, sin = (part[groups, None] for part in exact.cos_sin(yaws))
    x, y, z = np.moveaxis(together.vertices, -1, 0)
    turned = np.stack([cos * x - sin * y, sin * x + cos * y, z], axis=-1)
    return Quads(turned + positions[groups, None], together.colours, together.materials, groups)


_FACES = np.array(
    [
        [[1, -1, -1], [1, 1, -1], [1, 1, 1], [1, -1, 1]],  # front, +x
        [[-1, 1, -1], [-1, -1, -1], [-1, -1, 1], [-1, 1, 1]],  # back
        [[1, 1, -1], [-1, 1, -1], [-1, 1, 1], [1, 1, 1]],  # left, +y
        [[-1, -1, -1], [1, -1, -1], [1, -1, 1], [-1, -1, 1]],  # right
        [[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]],  # top
        [[-1, 1, -1], [1, 1, -1], [1, -1, -1], [-1, -1, -1]],  # bottom
    ],
    dtype=np.float64,
)

Colour = tuple[float, float, float]
Triple = tuple[float, float, float]


def box(
    centre: Triple,
    size: Triple,
    colour: Colour,
    material: Material = Material.PLAIN,
    taper: tuple[float, float] = (1.0, 1.0),
) -> Quads:
    """A box in its object frame.

    Args:
        centre: x, y, z of the box centre, metres.
        size: extent along x, y, z, metres.
        colour: of all faces.
        material: of all faces.
        taper: scale of the top face along x and y (a car's cabin, a cone).
    """
    corners = _FACES.copy()
    top = corners[..., 2] > 0
    corners[..., 0] = np.where(top, corners[..., 0] * taper[0], corners[..., 0])
    corners[..., 1] = np.where(top, corners[..., 1] * taper[1], corners[..., 1])
    vertices = corners * np.array(size) / 2 + np.array(centre)
    return _uniform(vertices, colour, material)


def _uniform(vertices: Float[np.ndarray, "Q 4 3"], colour: Colour, material: Material) -> Quads:
    count = len(vertices)
    return Quads(
        vertices, np.tile(np.array(colour), (count, 1)), np.full(count, int(material)), np.full(count, -1)
    )


_LETTERS = {
    "S": ((0, 0, 1, 0.15), (0, 0.43, 1, 0.15), (0, 0.85, 1, 0.15), (0, 0.43, 0.3, 0.5), (0.7, 0, 0.3, 0.5)),
    "T": ((0, 0.85, 1, 0.15), (0.35, 0, 0.3, 1)),
    "O": ((0, 0, 1, 0.15), (0, 0.85, 1, 0.15), (0, 0, 0.3, 1), (0.7, 0, 0.3, 1)),
    "P": ((0, 0, 0.3, 1), (0, 0.85, 1, 0.15), (0, 0.425, 1, 0.15), (0.7, 0.425, 0.3, 0.5)),
}
"""Strokes of each letter of a sign: left, bottom, width and height, in widths and heights of the letter."""


def stop_sign() -> Quads:
    """A stop sign that shows to +x, 0.9 m wide with letters of 0.3 m (MUTCD's R1-1 for two lanes)."""
    grey, red, white = (0.45, 0.46, 0.48), (0.66, 0.05, 0.07), (0.92, 0.92, 0.90)
    height, width = 2.55, 0.9

    def octagon(x: float, across: float, colour: Colour, facing: int) -> Quads:
        turned = np.stack(exact.cos_sin(np.radians(22.5 + 45.0 * np.arange(8))), axis=1)
        y, z = (turned * (across / 2 / float(turned[0, 0]))).T
        faces = [face[::facing] for face in ((0, 1, 2, 3), (0, 3, 4, 7), (4, 5, 6, 7))]
        return _uniform(
            np.array([[[x, y[i], height + z[i]] for i in face] for face in faces]), colour, Material.PLAIN
        )

    parts = [
        box((-0.06, 0.0, 1.5), (0.07, 0.07, 3.0), grey),
        octagon(-0.01, width, grey, -1),
        octagon(0.0, width, white, 1),
        octagon(0.01, width - 0.05, red, 1),
    ]
    for number, letter in enumerate("STOP"):
        for left, bottom, wide, high in _LETTERS[letter]:
            y = -0.36 + 0.19 * number + 0.15 * (left + np.array([0.0, wide, wide, 0.0]))
            z = height - 0.15 + 0.3 * (bottom + np.array([0.0, 0.0, high, high]))
            parts.append(_uniform(np.stack([np.full(4, 0.02), y, z], axis=1)[None], white, Material.PLAIN))
    return concatenate(parts)


def _wheel(x: float, y: float, radius: float, width: float) -> Quads:
    """An eight-sided wheel whose axle lies along y."""
    angles = np.radians(22.5 + 45.0 * np.arange(8))
    rim = np.array([x, radius]) + radius * np.stack(exact.cos_sin(angles), axis=1)
    faces = []
    for near in (1, -1):
        ys = y + near * width / 2
        order = [(0, 1, 2, 3), (0, 3, 4, 7), (4, 5, 6, 7)]
        for face in order:
            ring = face if near < 0 else face[::-1]
            faces.append([[rim[i, 0], ys, rim[i, 1]] for i in ring])
    for i in range(8):
        a, b = rim[i], rim[(i + 1) % 8]
        low, high = y - width / 2, y + width / 2
        faces.append([[a[0], high, a[1]], [b[0], high, b[1]], [b[0], low, b[1]], [a[0], low, a[1]]])
    return _uniform(np.array(faces), (0.05, 0.05, 0.055), Material.PLAIN)


def blob(centre: Triple, radii: Triple, colour: Colour, material: Material, rings: int = 4) -> Quads:
    """An ellipsoid of latitude and longitude quads."""
    around = 7
    latitudes = np.linspace(-np.pi / 2, np.pi / 2, rings + 1)
    longitudes = np.linspace(0, 2 * np.pi, around + 1)
    lat, lon = np.meshgrid(latitudes, longitudes, indexing="ij")
    (flat, up), (east, north) = exact.cos_sin(lat), exact.cos_sin(lon)
    points = np.stack([flat * east, flat * north, up], axis=-1)
    points = points * np.array(radii) + np.array(centre)
    faces = np.stack([points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]], axis=2)
    return _uniform(faces.reshape(-1, 4, 3), colour, material)


def look_generator(token: str) -> np.random.Generator:
    """The random generator of an object's look: the same token always looks the same."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(token.encode()).digest()[:8], "little"))


_PAINTS: tuple[Colour, ...] = (
    (0.86, 0.87, 0.88),
    (0.62, 0.64, 0.66),
    (0.10, 0.10, 0.12),
    (0.30, 0.32, 0.35),
    (0.62, 0.10, 0.09),
    (0.10, 0.20, 0.48),
    (0.16, 0.33, 0.24),
    (0.78, 0.66, 0.20),
    (0.45, 0.30, 0.20),
    (0.75, 0.76, 0.72),
)
_CLOTHES: tuple[Colour, ...] = (
    (0.15, 0.17, 0.30),
    (0.70, 0.18, 0.16),
    (0.82, 0.80, 0.74),
    (0.12, 0.12, 0.12),
    (0.22, 0.42, 0.34),
    (0.80, 0.62, 0.22),
    (0.45, 0.55, 0.75),
)
_SKIN: tuple[Colour, ...] = ((0.87, 0.68, 0.55), (0.62, 0.44, 0.32), (0.42, 0.28, 0.20))
_GLASS: Colour = (0.16, 0.20, 0.24)
_HEADLIGHT: Colour = (1.0, 0.97, 0.85)
_TAIL_LIGHT: Colour = (0.75, 0.06, 0.05)
_INSET = 0.04
"""Drawn surfaces stay this far inside the annotated box, so that noisy LiDAR points count."""


@functools.lru_cache(maxsize=8192)
def object_quads(category: str, size: Triple, token: str, *, braking: bool = False) -> Quads:
    """An annotated object in its own frame: origin at the box centre, x forward.

    Args:
        category: nuScenes category name.
        size: length, width, height of the annotated box, metres.
        token: instance token; decides colours and details.
        braking: vehicles show bright brake lights.
    """
    rng = look_generator(token)
    length, width, height = (max(extent - 2 * _INSET, 0.1) for extent in size)
    parts: list[Quads]
    if category in ("vehicle.motorcycle", "vehicle.bicycle"):
        parts = _two_wheeler(length, width, height, category, rng)
    elif category == "animal":
        parts = _animal(length, width, height)
    elif category.startswith("human.pedestrian"):
        parts = _person(length, width, height, category, rng)
    elif category == "movable_object.trafficcone":
        parts = [
            box((0, 0, 0.03), (length, width, 0.06), (0.15, 0.15, 0.15)),
            box(
                (0, 0, height / 2 + 0.03),
                (length * 0.7, width * 0.7, height - 0.06),
                (0.95, 0.35, 0.08),
                Material.STRIPES,
                (0.15, 0.15),
            ),
        ]
    elif category == "movable_object.barrier":
        parts = [
            box((0, 0, height * 0.65), (0.12, width, height * 0.65), (0.92, 0.40, 0.12), Material.STRIPES),
            box((0, -width * 0.42, height * 0.2), (length, 0.1, height * 0.4), (0.3, 0.3, 0.3)),
            box((0, width * 0.42, height * 0.2), (length, 0.1, height * 0.4), (0.3, 0.3, 0.3)),
        ]
    elif category == "static_object.bicycle_rack":
        parts = [box((0, 0, height * 0.45), (length, 0.06, 0.06), (0.6, 0.6, 0.62))]
        for x in np.arange(-length / 2 + 0.3, length / 2 - 0.2, 0.75):
            hue = _PAINTS[int(rng.integers(len(_PAINTS)))]
            parts.append(_wheel(float(x), width * 0.25, 0.3, 0.06))
            parts.append(_wheel(float(x) + 0.1, -width * 0.3, 0.3, 0.06))
            parts.append(box((float(x), 0, height * 0.55), (0.08, width * 0.8, height * 0.5), hue))
    elif category.startswith("vehicle."):
        parts = _vehicle(length, width, height, category, rng, braking)
    else:
        paint = ((0.12, 0.30, 0.20), (0.2, 0.22, 0.25), (0.5, 0.42, 0.3))[int(rng.integers(3))]
        parts = [
            box((0, 0, height * 0.45), (length, width, height * 0.9), paint),
            box((0, 0, height * 0.95), (length * 0.95, width * 0.95, height * 0.1), (0.1, 0.1, 0.1)),
        ]
    return place(concatenate(parts), np.array([0.0, 0.0, -size[2] / 2]), 0.0)


def _vehicle(
    length: float, width: float, height: float, category: str, rng: np.random.Generator, braking: bool
) -> list[Quads]:
    paint = _PAINTS[int(rng.integers(len(_PAINTS)))]
    radius = min(0.34 + 0.05 * (height > 2.2) + 0.08 * (height > 2.7), height * 0.25)
    floor = radius * 0.6
    if "bus" in category:
        paint = ((0.80, 0.82, 0.80), (0.72, 0.16, 0.14), (0.20, 0.45, 0.35))[int(rng.integers(3))]
        parts = [
            box((0, 0, (floor + height) / 2), (length, width, height - floor), paint),
            box((0, 0, height * 0.64), (length * 0.96, width + 0.02, height * 0.28), _GLASS, Material.GLASS),
            box((0, 0, height * 0.58), (length + 0.02, width * 0.9, height * 0.42), _GLASS, Material.GLASS),
        ]
    elif category in ("vehicle.truck", "vehicle.trailer") or height > 2.6:
        cargo = (0.84, 0.85, 0.84) if rng.random() < 0.6 else paint
        if category == "vehicle.construction":
            paint, cargo = (0.90, 0.66, 0.10), (0.85, 0.62, 0.10)
        cab = 0.0 if category == "vehicle.trailer" else min(2.0, length * 0.3)
        top = height * 0.82
        front = length / 2 - cab / 2
        parts = [
            box(
                (-cab / 2 - 0.05, 0, (floor + 0.35 + height) / 2),
                (length - cab - 0.1, width, height - floor - 0.35),
                cargo,
            ),
            box((0, 0, floor + 0.2), (length * 0.96, width * 0.8, 0.4), (0.12, 0.12, 0.13)),
        ]
        if cab:
            parts.append(box((front, 0, (floor + top) / 2), (cab, width * 0.96, top - floor), paint))
            parts.append(
                box((front, 0, top * 0.76), (cab + 0.03, width * 0.86, top * 0.26), _GLASS, Material.GLASS)
            )
            parts.append(
                box((front, 0, top * 0.76), (cab * 0.6, width * 0.98, top * 0.24), _GLASS, Material.GLASS)
            )
    else:
        belt = height * 0.56
        van = height > 1.85 or rng.random() < 0.12
        cabin, shift = (0.80, -0.06) if van else (0.55, -0.04)
        x = shift * length
        taper = (0.92, 0.86) if van else (0.74, 0.84)
        middle, rise = (belt + height) / 2, height - belt
        long, wide = cabin * length, width * 0.92
        glass = Material.GLASS
        parts = [
            box((0, 0, (floor + belt) / 2), (length, width, belt - floor), paint, taper=(0.97, 0.97)),
            box((0, 0, floor + 0.06), (length * 0.99, width * 0.99, 0.1), (0.08, 0.08, 0.09)),
            box((x, 0, middle), (long, wide, rise), paint, taper=taper),
            box((x, 0, middle - 0.02), (long + 0.03, wide * 0.88, rise * 0.84), _GLASS, glass, taper),
            box((x + long * 0.18, 0, middle), (long * 0.33, wide + 0.03, rise * 0.7), _GLASS, glass, taper),
            box((x - long * 0.17, 0, middle), (long * 0.31, wide + 0.03, rise * 0.7), _GLASS, glass, taper),
        ]
        if category.startswith("vehicle.emergency"):
            parts[0] = box((0, 0, (floor + belt) / 2), (length, width, belt - floor), (0.9, 0.9, 0.92))
            parts.append(
                box((x, 0, height - 0.05), (0.25, width * 0.6, 0.09), (0.1, 0.2, 1.0), Material.LAMP)
            )
    wheel_y = width / 2 - 0.11
    for x in (length * 0.31, -length * 0.31):
        parts += [_wheel(x, y, radius, 0.22) for y in (wheel_y, -wheel_y)]
    lamp_z = floor + 0.28 * min(height, 1.9)
    tail = (1.0, 0.12, 0.08) if braking else _TAIL_LIGHT
    for y in (width * 0.38, -width * 0.38):
        parts.append(
            box((length / 2 - 0.005, y, lamp_z), (0.03, width * 0.16, 0.13), _HEADLIGHT, Material.LAMP)
        )
        parts.append(box((0.005 - length / 2, y, lamp_z), (0.03, width * 0.16, 0.13), tail, Material.LAMP))
    parts.append(box((0.005 - length / 2, 0, lamp_z - 0.18), (0.02, 0.48, 0.12), (0.9, 0.9, 0.85)))
    parts.append(box((length / 2 - 0.005, 0, lamp_z - 0.1), (0.02, width * 0.5, 0.16), (0.06, 0.06, 0.07)))
    return parts


def _two_wheeler(
    length: float, width: float, height: float, category: str, rng: np.random.Generator
) -> list[Quads]:
    motor = category == "vehicle.motorcycle"
    radius = 0.3 if motor else 0.33
    thickness = 0.14 if motor else 0.06
    paint = _PAINTS[int(rng.integers(len(_PAINTS)))]
    reach = length / 2 - radius
    parts = [_wheel(reach, 0.0, radius, thickness), _wheel(-reach, 0.0, radius, thickness)]
    parts.append(box((0, 0, 0.62), (length * 0.55, 0.3 if motor else 0.07, 0.3 if motor else 0.12), paint))
    parts.append(box((reach * 0.8, 0, 0.95), (0.08, width, 0.06), (0.1, 0.1, 0.1)))
    if height > 1.35:  # with a rider
        parts += _torso(0.0, 0.78, height, 0.45, rng)
        for y in (0.14, -0.14):
            parts.append(box((0.15, y, 0.6), (0.35, 0.13, 0.42), (0.14, 0.15, 0.2)))
    return parts


def _torso(x: float, hip: float, height: float, shoulders: float, rng: np.random.Generator) -> list[Quads]:
    shirt = _CLOTHES[int(rng.integers(len(_CLOTHES)))]
    skin = _SKIN[int(rng.integers(len(_SKIN)))]
    head = 0.125 * min(height, 1.8)
    neck = height - 1.12 * 2 * head * 0.9
    return [
        box((x, 0, (hip + neck) / 2), (0.24, shoulders, neck - hip), shirt, taper=(1.0, 0.88)),
        blob((x, 0, height - head * 0.98), (head * 0.8, head * 0.72, head * 0.97), skin, Material.PLAIN),
        box((x - 0.01, 0, height - head * 0.35), (head * 1.5, head * 1.4, head * 0.66), (0.12, 0.09, 0.07)),
    ]


def _animal(length: float, width: float, height: float) -> list[Quads]:
    """Four legs, a trunk and a head."""
    fur = (0.40, 0.28, 0.18)
    parts = [
        box((-length * 0.05, 0, height * 0.58), (length * 0.75, width * 0.6, height * 0.35), fur),
        box((length * 0.4, 0, height * 0.83), (length * 0.2, width * 0.35, height * 0.34), fur),
    ]
    for x in (-length * 0.36, length * 0.26):
        leg = (length * 0.1, width * 0.15, height * 0.44)
        parts += [box((x, y, height * 0.22), leg, fur) for y in (-width * 0.2, width * 0.2)]
    return parts


def _person(
    length: float, width: float, height: float, category: str, rng: np.random.Generator
) -> list[Quads]:
    trousers = _CLOTHES[int(rng.integers(len(_CLOTHES)))]
    hip = height * 0.48
    stride = min(0.12, length * 0.2)
    shoulders = min(0.46, width * 0.8) * min(1.0, height / 1.5)
    parts = _torso(0.0, hip, height, shoulders, rng)
    if category.endswith("construction_worker"):
        parts[0] = box((0, 0, hip * 1.45), (0.27, shoulders, hip * 0.85), (0.95, 0.55, 0.1), Material.STRIPES)
        parts[2] = box((0, 0, height - 0.06), (0.24, 0.22, 0.12), (0.95, 0.85, 0.15))
    for side, y in ((1, 0.1), (-1, -0.1)):
        parts.append(box((side * stride, y * shoulders / 0.46, hip / 2), (0.17, 0.15, hip), trousers))
        arm = (-side * stride, side * (shoulders / 2 + 0.04), height * 0.62)
        parts.append(box(arm, (0.12, 0.09, height * 0.36), (0.2, 0.2, 0.25)))
    return parts

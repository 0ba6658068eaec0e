"""Turns visibility into a picture: the weather and its light, procedural textures, haze and sensor noise.

Pixels are handled channel by channel, arrays of shape (3, P), which NumPy works through without short loops.
"""

from __future__ import annotations

import dataclasses
import functools

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from spacedrive_jax import exact
from spacedrive_jax.world.ground import GroundColours, SurfaceMap
from spacedrive_jax.world.render import GROUND, SKY, Camera, FrameBuffer, inner
from spacedrive_jax.world.shapes import Material, Quads


@dataclasses.dataclass(frozen=True)
class Weather:
    """Light and air of a scene. Colours are red, green, blue from 0 to 1."""

    name: str
    sun_elevation: float
    """Degrees above the horizon."""
    sun: float
    """Strength of the direct light."""
    ambient: tuple[float, float, float]
    horizon: tuple[float, float, float]
    zenith: tuple[float, float, float]
    haze: float
    """Extinction per metre."""
    clouds: float = 0.5
    wet: float = 0.0
    night: float = 0.0


WEATHERS = (
    Weather(
        name="clear",
        sun_elevation=48.0,
        sun=0.78,
        ambient=(0.58, 0.61, 0.66),
        horizon=(0.78, 0.85, 0.92),
        zenith=(0.3, 0.5, 0.82),
        haze=0.0011,
        clouds=0.35,
    ),
    Weather(
        name="overcast",
        sun_elevation=60.0,
        sun=0.14,
        ambient=(0.92, 0.93, 0.95),
        horizon=(0.82, 0.83, 0.85),
        zenith=(0.68, 0.7, 0.74),
        haze=0.0022,
        clouds=0.8,
    ),
    Weather(
        name="late sun",
        sun_elevation=20.0,
        sun=0.85,
        ambient=(0.56, 0.56, 0.6),
        horizon=(0.95, 0.8, 0.62),
        zenith=(0.38, 0.5, 0.74),
        haze=0.0016,
        clouds=0.5,
    ),
    Weather(
        name="rain",
        sun_elevation=55.0,
        sun=0.05,
        ambient=(0.7, 0.73, 0.76),
        horizon=(0.62, 0.65, 0.68),
        zenith=(0.5, 0.53, 0.57),
        haze=0.006,
        clouds=0.9,
        wet=1.0,
    ),
    Weather(
        name="dusk",
        sun_elevation=9.0,
        sun=0.18,
        ambient=(0.46, 0.44, 0.52),
        horizon=(0.7, 0.48, 0.42),
        zenith=(0.2, 0.24, 0.42),
        haze=0.0025,
        clouds=0.5,
        wet=0.0,
        night=0.5,
    ),
    Weather(
        name="night",
        sun_elevation=40.0,
        sun=0.04,
        ambient=(0.2, 0.21, 0.26),
        horizon=(0.1, 0.1, 0.13),
        zenith=(0.02, 0.03, 0.06),
        haze=0.004,
        clouds=0.2,
        wet=0.0,
        night=1.0,
    ),
    Weather(
        name="fog",
        sun_elevation=50.0,
        sun=0.08,
        ambient=(0.84, 0.85, 0.86),
        horizon=(0.76, 0.77, 0.78),
        zenith=(0.72, 0.73, 0.75),
        haze=0.014,
        clouds=0.9,
    ),
)


@dataclasses.dataclass(frozen=True)
class Light:
    """A weather with a sun direction."""

    weather: Weather
    sun_azimuth: float
    """Radians, global frame."""

    @property
    def sun(self) -> Float[np.ndarray, "3"]:
        """Unit vector towards the sun (or the moon)."""
        flat, up = exact.cos_sin(np.radians(self.weather.sun_elevation))
        east, north = exact.cos_sin(self.sun_azimuth)
        return np.array([flat * east, flat * north, up])


def _value_noise() -> Float[np.ndarray, "256 256"]:
    """A tileable texture with detail at several scales, mean 0, roughly from -1 to 1."""
    rng = np.random.default_rng(20240611)
    total = np.zeros((256, 256))
    for cells, weight in ((8, 0.5), (32, 0.6), (128, 0.6), (256, 0.5)):
        coarse = rng.uniform(-1, 1, (cells, cells))
        repeat = 256 // cells
        tile = np.kron(coarse, np.ones((repeat, repeat)))
        for axis in (0, 1):  # the running mean of as many cells as one coarse cell has
            tile = np.sum([np.roll(tile, shift, axis) for shift in range(repeat)], axis=0) / repeat
        total += weight * tile
    return (total / np.abs(total).max()).astype(np.float32)


_NOISE = _value_noise().ravel()
_GRAIN = np.random.default_rng(7).normal(0.0, 1.0, (512, 512)).astype(np.float32)


def _noise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The texture at places in its cells: everything in sight lies within 2^31 of them."""
    place = a.astype(np.int32)
    place &= 255
    place <<= 8
    column = b.astype(np.int32)
    column &= 255
    place |= column
    return _NOISE.take(place)


def shade(
    buffer: FrameBuffer,
    quads: Quads,
    camera: Camera,
    light: Light,
    ground: GroundColours,
    surface_map: SurfaceMap,
    shadows: UInt8[np.ndarray, "R C"],
    noise_seed: int,
) -> UInt8[np.ndarray, "H W 3"]:
    """Colours every pixel.

    Args:
        buffer: what each pixel sees.
        quads: the surfaces the buffer's indices point to; their numbers choose textures.
        camera: the view.
        light: sun and weather.
        ground: colour pyramid of the ground.
        surface_map: gives the cells of `shadows`.
        shadows: 0 in full sun, 255 in full shadow.
        noise_seed: chooses the sensor noise.

    Returns:
        Red, green, blue.
    """
    weather = light.weather
    rays = camera.rays().reshape(3, -1)
    surface = buffer.surface.ravel()
    image = np.empty_like(rays)
    origin = camera.camera_to_global[:3, 3].astype(np.float32)
    focal = float(camera.intrinsics[0, 0])
    for index in (SKY, GROUND, None):
        chosen = surface >= 0 if index is None else surface == index
        seen = np.flatnonzero(chosen)
        toward = rays.take(seen, axis=1)
        if index == SKY:
            colour = _sky(toward, light)
        else:
            depth = 1.0 / buffer.inverse_depth.ravel().take(seen)
            points = toward * depth
            points += origin[:, None]
            if index == GROUND:
                colour = _shade_ground(points, depth / focal, origin, light, ground, surface_map, shadows)
            else:
                colour = _shade_quads(points, surface.take(seen), depth / focal, quads, light, toward)
            clear = _exp(-weather.haze * depth * _norm(toward))
            colour *= clear
            colour += _channels(weather.horizon) * (1 - clear)
        for channel, values in zip(image, colour, strict=True):
            channel[chosen] = values  # by the mask: several times as fast as by indices
    picture = image.reshape(3, camera.height, camera.width)
    _soften_edges(picture, buffer)
    return _expose(picture, weather, noise_seed)


def _channels(colour: tuple[float, ...]) -> Float[np.ndarray, "3 1"]:
    """A colour that multiplies with (3, P) pixels."""
    return np.array(colour, dtype=np.float32)[:, None]


def _norm(vectors: Float[np.ndarray, "3 P"]) -> Float[np.ndarray, "P"]:
    return np.sqrt(inner(vectors, vectors))


_CHUNK = 8192


def _exp(x: Float[np.ndarray, "P"]) -> Float[np.ndarray, "P"]:
    """Its many steps run through pieces that stay in the processor's cache."""
    result = np.empty(len(x), dtype=np.float32)
    for start in range(0, len(x), _CHUNK):
        result[start : start + _CHUNK] = exact.exp(x[start : start + _CHUNK])
    return result


def _soften_edges(image: Float[np.ndarray, "3 H W"], buffer: FrameBuffer) -> None:
    """Blends pixels along silhouettes with their neighbours, a cheap stand-in for anti-aliasing; in place."""
    height, width = buffer.surface.shape
    edge = np.zeros((height, width), dtype=bool)
    across = buffer.surface[:, 1:] != buffer.surface[:, :-1]
    along = buffer.surface[1:] != buffer.surface[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= along
    edge[:-1] |= along
    # Not cv2.GaussianBlur, which rounds floats as the processor's kernels do.
    side = exact.exp(-0.5 / (0.7 * 0.7))
    weights = [np.float32(weight / (1 + 2 * side)) for weight in (side, 1.0, side)]
    pixel = np.flatnonzero(edge)
    corner = pixel + pixel // width * 2  # of the 3 x 3 pixels around each, in the padded image
    padded = np.empty((3, height + 2, width + 2), dtype=np.float32)
    padded[:, 1:-1, 1:-1] = image
    padded[:, :: height + 1, 1:-1] = image[:, [1, -2]]  # mirrored about the outermost pixels
    padded[:, :, :: width + 1] = padded[:, :, [2, -3]]
    channels = padded.reshape(3, -1)
    blurred = np.zeros((3, len(pixel)), dtype=np.float32)
    for down, weight in enumerate(weights):
        for right, other in enumerate(weights):
            blurred += weight * other * channels.take(corner + (down * (width + 2) + right), axis=1)
    for channel, values in zip(image, blurred, strict=True):
        channel[edge] = values


def _sky(rays: Float[np.ndarray, "3 P"], light: Light) -> Float[np.ndarray, "3 P"]:
    weather = light.weather
    unit = rays / _norm(rays)
    up = np.clip(unit[2], 0.0, 1.0)
    blend = 1 - _exp(-4.0 * up)
    horizon = _channels(weather.horizon)
    colour = horizon * (1 - blend) + _channels(weather.zenith) * blend
    flat = 900.0 / np.maximum(unit[2], 0.03)
    cloud = _noise(unit[0] * flat * 0.05, unit[1] * flat * 0.05) * 0.6
    cloud += _noise(unit[0] * flat * 0.17 + 40, unit[1] * flat * 0.17) * 0.4
    cover = np.clip((cloud + weather.clouds - 0.45) * 2.0, 0, 1) * np.clip(up * 6, 0, 1) * 0.55
    white = _channels(weather.ambient) * 0.4 + horizon * 0.65
    colour = colour * (1 - cover) + white * cover
    towards_sun = inner(light.sun.astype(np.float32), unit)
    near_sun = np.flatnonzero(towards_sun > 0.97)  # elsewhere the glow is too weak for 8 bits
    colour[:, near_sun] += exact.power(towards_sun[near_sun], 350) * weather.sun * 1.4
    return colour


def _shade_ground(
    points: Float[np.ndarray, "3 P"],
    footprint: Float[np.ndarray, "P"],
    origin: Float[np.ndarray, "3"],
    light: Light,
    ground: GroundColours,
    surface_map: SurfaceMap,
    shadows: UInt8[np.ndarray, "R C"],
) -> Float[np.ndarray, "3 P"]:
    weather = light.weather
    x, y, _ = points
    range_ = exact.hypot(x - origin[0], y - origin[1])
    # A pixel covers more ground along the view than across it; the geometric mean picks the level.
    extent = footprint * np.sqrt(np.maximum(range_ / max(float(origin[2]), 0.1), 1.0))
    sizes = np.array(ground.sizes, dtype=np.float32)
    wanted = np.clip(np.searchsorted(sizes * np.float32(1.3), extent), 0, len(sizes) - 1)
    colour = np.empty_like(points)
    for level, (texture, size) in enumerate(zip(ground.levels, ground.sizes, strict=True)):
        chosen = np.flatnonzero(wanted == level)
        colour[:, chosen] = _sample(texture, x[chosen], y[chosen], ground.origin, size).T
    rough = _noise(x * 28, y * 28) * (np.clip(0.05 / np.maximum(extent, 1e-3), 0, 1) * 0.14)
    rough += _noise(x * 2.3 + 91, y * 2.3) * (np.clip(0.8 / np.maximum(extent, 1e-3), 0, 1) * 0.09)
    rough += _noise(x * 0.35, y * 0.35 + 17) * 0.10
    shadow = _sample(shadows, x, y, surface_map.origin, surface_map.resolution, outside=0.0)
    shadow = shadow.astype(np.float32) / 255.0
    sunny = (1 - shadow) * float(weather.sun * light.sun[2] * 1.15)
    contact = 1 - 0.35 * (1 - weather.sun) * shadow
    lit = (_channels(weather.ambient) * contact + sunny) * (1 + rough)
    if weather.wet:
        grazing = np.clip(range_ / 40.0, 0, 1) * (0.35 * weather.wet)
        colour = colour * ((1 - 0.35 * weather.wet) * (1 - grazing)) + _channels(weather.horizon) * grazing
    if weather.night:
        pool = _exp(-((range_ - 7.0) ** 2) / 90.0)  # own lights and street lamps
        lit = lit + _channels((1.0, 0.92, 0.75)) * (weather.night * (0.30 * pool + 0.10))
    return colour * lit


_FAR_GROUND = (0.40, 0.41, 0.38)
_SAMPLE_WIDTH = 4096


def _sample(
    texture: np.ndarray,
    x: Float[np.ndarray, "P"],
    y: Float[np.ndarray, "P"],
    origin: tuple[float, float],
    size: float,
    outside: float | tuple[float, ...] = _FAR_GROUND,
) -> np.ndarray:
    """Bilinear samples at global positions of a raster with cells of `size` metres."""
    rows = max(1, -(-len(x) // _SAMPLE_WIDTH))
    where = np.zeros((2, rows * _SAMPLE_WIDTH), dtype=np.float32)
    for padded, values, low in zip(where, (x, y), origin, strict=True):
        padded[: len(x)] = np.clip((values - np.float32(low)) / np.float32(size) - 0.5, -10, 32_000)
    columns, lines = where.reshape(2, rows, _SAMPLE_WIDTH)
    picked = cv2.remap(
        texture, columns, lines, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=outside
    )
    return picked.reshape(-1, *texture.shape[2:])[: len(x)]


def _shade_quads(
    points: Float[np.ndarray, "3 P"],
    index: Int[np.ndarray, "P"],
    footprint: Float[np.ndarray, "P"],
    quads: Quads,
    light: Light,
    rays: Float[np.ndarray, "3 P"],
) -> Float[np.ndarray, "3 P"]:
    weather = light.weather
    shown = np.flatnonzero(np.bincount(index, minlength=len(quads)))
    place = np.zeros(len(quads), dtype=np.int64)
    place[shown] = np.arange(len(shown))
    facet = place.take(index)  # position in the tables of the quads that are shown
    number = shown if quads.numbers is None else quads.numbers[shown]
    corners = quads.vertices[shown]
    normals = np.cross(corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1])
    normals /= exact.norm(normals)[:, None] + 1e-12
    along = corners[:, 1] - corners[:, 0]
    along = along / (exact.norm(along)[:, None] + 1e-12)
    # Sky light from above, a little bounce from below, and the sun.
    diffuse = np.clip(exact.dot(normals, light.sun), 0, None) * weather.sun
    lit = np.array(weather.ambient) * (0.78 + 0.22 * normals[:, 2:]) + diffuse[:, None]
    if weather.night:
        lit = lit + weather.night * 0.18 * np.array([1.0, 0.92, 0.78])
    paint, lit, normals, along, foot = (
        table.T.astype(np.float32, order="C")
        for table in (quads.colours[shown], lit, normals, along, corners[:, 0])
    )
    u = np.zeros(len(index), dtype=np.float32)
    for axis in range(3):
        u += (points[axis] - foot[axis].take(facet)) * along[axis].take(facet)
    v = points[2]
    rough = _noise(u * 37 + (number * 13.0).take(facet), v * 37 + (number * 7.0).take(facet))
    result = (paint * lit).take(facet, axis=1)
    result *= 1 + 0.05 * rough

    material = quads.materials[shown].astype(np.uint8).take(facet)
    wall = np.flatnonzero(material == Material.WALL)
    if len(wall):
        base = result.take(wall, axis=1)
        result[:, wall] = _walls(
            u.take(wall), v.take(wall), number, facet.take(wall), footprint.take(wall), base, light
        )
    leaves = np.flatnonzero((material == Material.FOLIAGE) | (material == Material.BARK))
    if len(leaves):
        x, y, z = points.take(leaves, axis=1)
        texture = _noise(x * 30 + z * 21, y * 30 - z * 17) + 0.7 * _noise(x * 9 + 50, z * 9 + y * 7)
        result[:, leaves] *= np.clip(1 + 0.75 * texture, 0.25, 2.0)
    stripes = np.flatnonzero(material == Material.STRIPES)
    if len(stripes):
        white = stripes[np.floor(v[stripes] * 4.0 + 0.4 * u[stripes]) % 2 == 1]
        result[:, white] = _channels((0.9, 0.9, 0.88)) * lit[:, facet[white]]
    glass = np.flatnonzero(material == Material.GLASS)
    if len(glass):
        normal = normals[:, facet[glass]]
        view = rays[:, glass] / _norm(rays[:, glass])
        mirrored_up = view[2] - 2 * inner(view, normal) * normal[2]
        reflection = _channels(weather.horizon) * np.clip(mirrored_up * 1.5 + 0.25, 0, 1)
        result[:, glass] = (paint * lit)[:, facet[glass]] * 0.6 + 0.42 * reflection
    lamps = np.flatnonzero(material == Material.LAMP)
    if len(lamps):
        glow = 0.75 + 0.5 * weather.night + 0.3 * weather.wet
        result[:, lamps] = (paint * np.maximum(glow, lit))[:, facet[lamps]]
    return result


def _walls(
    u: Float[np.ndarray, "P"],
    v: Float[np.ndarray, "P"],
    number: Int[np.ndarray, "K"],
    facet: Int[np.ndarray, "P"],
    footprint: Float[np.ndarray, "P"],
    base: Float[np.ndarray, "3 P"],
    light: Light,
) -> Float[np.ndarray, "3 P"]:
    """Facades: rows of windows, a shop front below, bands between the floors.

    Every pixel belongs to the quad `facet`, whose number makes its windows unlike its neighbours'.
    """
    weather = light.weather
    pitch = (2.4 + (number % 5) * 0.35).astype(np.float32).take(facet)
    floor = 3.1
    column, storey = np.floor(u / pitch), np.floor(v / floor)
    a, b = u / pitch - column, v / floor - storey
    shop = storey < 1
    wide = np.where(number % 3 == 0, np.float32(0.12), np.float32(0.24)).take(facet)
    window = (a > wide) & (a < 1 - wide) & (b > 0.28) & (b < 0.84)
    window = np.where(shop, (a > 0.06) & (a < 0.94) & (b > 0.12) & (b < 0.78), window)
    dice = _noise(column * 41 + (number * 7.0).take(facet), storey * 59 + (number * 3.0).take(facet))
    dice = dice * 0.5 + 0.5
    pane = _channels(weather.horizon) * (0.22 + 0.38 * dice) + _channels((0.02, 0.04, 0.06))
    pane *= 1 - 0.6 * weather.night
    if weather.night > 0.3:
        lights_on = np.flatnonzero(dice > 0.62 - 0.1 * weather.night)
        pane[:, lights_on] = _channels((1.0, 0.82, 0.5)) * (0.35 + 0.5 * dice[lights_on])
    frame = (np.abs(a - 0.5) < 0.018) & ~shop
    band = (b < 0.06) | ((b > 0.9) & shop)
    # From afar a facade shows the average of wall and window.
    detail = np.clip(1.6 - footprint / np.float32(0.45), 0, 1)
    glazed = np.where(window, detail, 0) + 0.38 * (1 - detail)
    walled = np.where(window, 0, detail) * np.where(band, np.float32(0.72), 1) + 0.62 * (1 - detail)
    walled += np.where(frame, 0.8 * glazed, 0)
    return base * walled + pane * np.where(frame, 0, glazed)


def _expose(
    image: Float[np.ndarray, "3 H W"], weather: Weather, noise_seed: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Vignette, sensor noise, soft shoulder, 8 bits; `image` is used up."""
    height, width = image.shape[1:]
    down, right = np.random.default_rng(noise_seed).integers(0, len(_GRAIN), 2)
    grain = _tiled_grain(height, width)[down : down + height, right : right + width]
    image *= _vignette(height, width)
    image += grain * np.float32(0.006 + 0.010 * weather.night)
    values = image.ravel()
    bright = np.flatnonzero(values > 0.8)
    # 0.8 + 0.2 tanh((x - 0.8) / 0.2)
    values[bright] = 1.0 - 0.4 / (_exp((values.take(bright) - 0.8) * 10.0) + 1.0)
    np.clip(image, 0, 1, out=image)
    image *= 255
    image += 0.5
    return cv2.merge(list(image.astype(np.uint8)))


@functools.lru_cache(maxsize=8)
def _vignette(height: int, width: int) -> Float[np.ndarray, "H W"]:
    """What the lens leaves of the light, darker towards the corners."""
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]
    return 1 - 0.10 * (x**2 + y**2)


@functools.lru_cache(maxsize=8)
def _tiled_grain(height: int, width: int) -> Float[np.ndarray, "R C"]:
    """The sensor noise often enough beside itself that an image fits in from any place of the first tile."""
    return np.tile(_GRAIN, (2 + height // len(_GRAIN), 2 + width // len(_GRAIN)))

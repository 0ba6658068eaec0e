"""Turns visibility into a picture: light, weather, procedural textures, haze and sensor noise."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from data_prep.synthetic.ground import GroundColours, SurfaceMap
from data_prep.synthetic.render import GROUND, SKY, Camera, FrameBuffer
from data_prep.synthetic.shapes import Material, Quads


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
    Weather("clear", 48.0, 0.62, (0.50, 0.53, 0.58), (0.78, 0.85, 0.92), (0.30, 0.50, 0.82), 0.0011, 0.35),
    Weather("overcast", 60.0, 0.12, (0.80, 0.81, 0.83), (0.82, 0.83, 0.85), (0.68, 0.70, 0.74), 0.0022, 0.8),
    Weather("late sun", 20.0, 0.72, (0.42, 0.43, 0.50), (0.95, 0.80, 0.62), (0.38, 0.50, 0.74), 0.0016, 0.5),
    Weather("rain", 55.0, 0.05, (0.58, 0.61, 0.65), (0.62, 0.65, 0.68), (0.50, 0.53, 0.57), 0.0060, 0.9, 1.0),
    Weather("dusk", 9.0, 0.18, (0.34, 0.33, 0.42), (0.70, 0.48, 0.42), (0.20, 0.24, 0.42), 0.0025, 0.5, 0.0, 0.5),
    Weather("night", 40.0, 0.04, (0.13, 0.14, 0.19), (0.10, 0.10, 0.13), (0.02, 0.03, 0.06), 0.0040, 0.2, 0.0, 1.0),
    Weather("fog", 50.0, 0.08, (0.72, 0.73, 0.74), (0.76, 0.77, 0.78), (0.72, 0.73, 0.75), 0.0140, 0.9),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Light:
    """A weather with a sun direction."""

    weather: Weather
    sun_azimuth: float
    """Radians, global frame."""

    @property
    def sun(self) -> Float[np.ndarray, "3"]:
        """Unit vector towards the sun (or the moon)."""
        elevation = np.radians(self.weather.sun_elevation)
        flat = np.cos(elevation)
        return np.array([
            flat * np.cos(self.sun_azimuth), flat * np.sin(self.sun_azimuth), np.sin(elevation)
        ])  # fmt: skip


def _value_noise() -> Float[np.ndarray, "256 256"]:
    """A tileable texture with detail at several scales, mean 0, roughly from -1 to 1."""
    rng = np.random.default_rng(20240611)
    total = np.zeros((256, 256))
    for cells, weight in ((8, 0.5), (32, 0.6), (128, 0.6), (256, 0.5)):
        coarse = rng.uniform(-1, 1, (cells, cells))
        repeat = 256 // cells
        tile = np.kron(coarse, np.ones((repeat, repeat)))
        kernel = np.ones(repeat) / repeat
        for axis in (0, 1):
            tile = np.apply_along_axis(
                lambda row, k=kernel: np.real(np.fft.ifft(np.fft.fft(row) * np.fft.fft(k, 256))), axis, tile
            )
        total += weight * tile
    return (total / np.abs(total).max()).astype(np.float32)


_NOISE = _value_noise()
_GRAIN = np.random.default_rng(7).normal(0.0, 1.0, (512, 512)).astype(np.float32)


def _noise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _NOISE[a.astype(np.int64) & 255, b.astype(np.int64) & 255]


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
        quads: the surfaces the buffer's indices point to.
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
    rays = camera.rays()
    image = np.empty((camera.height, camera.width, 3), dtype=np.float32)
    sky = buffer.surface == SKY
    image[sky] = _sky(rays[sky], light)
    seen = ~sky
    depth = np.zeros(sky.shape, dtype=np.float32)
    depth[seen] = 1.0 / buffer.inverse_depth[seen]
    origin = camera.camera_to_global[:3, 3].astype(np.float32)
    focal = float(camera.intrinsics[0, 0])
    on_ground = buffer.surface == GROUND
    points = rays[on_ground] * depth[on_ground, None] + origin
    image[on_ground] = _shade_ground(
        points, depth[on_ground] / focal, origin, light, ground, surface_map, shadows
    )
    on_quad = buffer.surface >= 0
    points = rays[on_quad] * depth[on_quad, None] + origin
    image[on_quad] = _shade_quads(
        points, buffer.surface[on_quad], depth[on_quad] / focal, quads, light, rays[on_quad], origin
    )
    distance = depth[seen] * np.linalg.norm(rays[seen], axis=1)
    clear = np.exp(-weather.haze * distance)[:, None]
    image[seen] = image[seen] * clear + np.array(weather.horizon, dtype=np.float32) * (1 - clear)
    return _expose(image, weather, noise_seed)


def _sky(rays: Float[np.ndarray, "P 3"], light: Light) -> Float[np.ndarray, "P 3"]:
    weather = light.weather
    unit = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    up = np.clip(unit[:, 2], 0.0, 1.0)
    blend = (1 - np.exp(-4.0 * up))[:, None]
    horizon, zenith = np.array(weather.horizon), np.array(weather.zenith)
    colour = horizon * (1 - blend) + zenith * blend
    flat = 900.0 / np.maximum(unit[:, 2], 0.03)
    cloud = _noise(unit[:, 0] * flat * 0.05, unit[:, 1] * flat * 0.05) * 0.6
    cloud += _noise(unit[:, 0] * flat * 0.17 + 40, unit[:, 1] * flat * 0.17) * 0.4
    cover = np.clip((cloud + weather.clouds - 0.45) * 2.0, 0, 1) * np.clip(up * 6, 0, 1) * 0.55
    white = np.array(weather.ambient) * 0.4 + horizon * 0.65
    colour = colour * (1 - cover[:, None]) + white * cover[:, None]
    glow = np.clip(unit @ light.sun, 0, 1) ** 350 * weather.sun * 1.4
    return (colour + glow[:, None]).astype(np.float32)


def _shade_ground(
    points: Float[np.ndarray, "P 3"],
    footprint: Float[np.ndarray, "P"],
    origin: Float[np.ndarray, "3"],
    light: Light,
    ground: GroundColours,
    surface_map: SurfaceMap,
    shadows: UInt8[np.ndarray, "R C"],
) -> Float[np.ndarray, "P 3"]:
    weather = light.weather
    xy = points[:, :2]
    range_ = np.hypot(xy[:, 0] - origin[0], xy[:, 1] - origin[1])
    # A pixel covers more ground along the view than across it; the geometric mean picks the level.
    extent = footprint * np.sqrt(np.maximum(range_ / max(float(origin[2]), 0.1), 1.0))
    sizes = np.array(ground.sizes)
    wanted = np.clip(np.searchsorted(sizes * 1.3, extent), 0, len(sizes) - 1)
    colour = np.tile(np.array([0.36, 0.37, 0.34], dtype=np.float32), (len(xy), 1))
    for level, (texture, size) in enumerate(zip(ground.levels, ground.sizes, strict=True)):
        chosen = np.flatnonzero(wanted == level)
        cells = np.floor((xy[chosen] - np.array(ground.origin, dtype=np.float32)) / size).astype(np.int64)
        rows, columns = texture.shape[:2]
        valid = (cells[:, 0] >= 0) & (cells[:, 0] < columns) & (cells[:, 1] >= 0) & (cells[:, 1] < rows)
        colour[chosen[valid]] = texture[cells[valid, 1], cells[valid, 0]]
    fine = np.clip(0.05 / np.maximum(extent, 1e-3), 0, 1) * 0.14
    rough = _noise(xy[:, 0] * 28, xy[:, 1] * 28) * fine
    rough += (
        _noise(xy[:, 0] * 2.3 + 91, xy[:, 1] * 2.3) * 0.09 * np.clip(0.8 / np.maximum(extent, 1e-3), 0, 1)
    )
    rough += _noise(xy[:, 0] * 0.35, xy[:, 1] * 0.35 + 17) * 0.10
    cells = np.floor((xy - np.array(surface_map.origin, dtype=np.float32)) / surface_map.resolution)
    cells = cells.astype(np.int64)
    rows, columns = shadows.shape
    valid = (cells[:, 0] >= 0) & (cells[:, 0] < columns) & (cells[:, 1] >= 0) & (cells[:, 1] < rows)
    shadow = np.zeros(len(xy), dtype=np.float32)
    shadow[valid] = shadows[cells[valid, 1], cells[valid, 0]] / 255.0
    sunny = weather.sun * light.sun[2] * (1 - shadow) * 1.15
    contact = 1 - 0.35 * shadow * (1 - weather.sun)
    lit = (np.array(weather.ambient, dtype=np.float32) * contact[:, None] + sunny[:, None]) * (1 + rough)[
        :, None
    ]
    if weather.wet:
        grazing = np.clip(range_ / 40.0, 0, 1)[:, None] * 0.35 * weather.wet
        colour = colour * (1 - 0.35 * weather.wet) * (1 - grazing) + np.array(weather.horizon) * grazing
    if weather.night:
        pool = np.exp(-((range_ - 7.0) ** 2) / 90.0)[:, None]  # own lights and street lamps
        lit = lit + weather.night * (0.30 * pool + 0.10) * np.array([1.0, 0.92, 0.75])
    return (colour * lit).astype(np.float32)


def _shade_quads(
    points: Float[np.ndarray, "P 3"],
    index: np.ndarray,
    footprint: Float[np.ndarray, "P"],
    quads: Quads,
    light: Light,
    rays: Float[np.ndarray, "P 3"],
    origin: Float[np.ndarray, "3"],
) -> Float[np.ndarray, "P 3"]:
    weather = light.weather
    corners = quads.vertices
    normals = np.cross(corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    along = corners[:, 1] - corners[:, 0]
    along = along / (np.linalg.norm(along, axis=1, keepdims=True) + 1e-12)
    ambient = np.array(weather.ambient)
    # Sky light from above, a little bounce from below, and the sun.
    diffuse = np.clip(normals @ light.sun, 0, None) * weather.sun
    lit = ambient * (0.78 + 0.22 * normals[:, 2:]) + diffuse[:, None]
    if weather.night:
        lit = lit + weather.night * 0.18 * np.array([1.0, 0.92, 0.78])
    colour = quads.colours[index].astype(np.float32)
    lit_pixels = lit[index].astype(np.float32)
    material = quads.materials[index]
    u = np.einsum("pc,pc->p", points - corners[index, 0], along[index])
    v = points[:, 2]
    result = colour * lit_pixels * (1 + 0.05 * _noise(u * 37 + index * 13, v * 37 + index * 7))[:, None]

    wall = np.flatnonzero(material == Material.WALL)
    if len(wall):
        result[wall] = _walls(u[wall], v[wall], index[wall], footprint[wall], result[wall], light)
    leaves = np.flatnonzero((material == Material.FOLIAGE) | (material == Material.BARK))
    if len(leaves):
        where = points[leaves]
        texture = _noise(where[:, 0] * 30 + where[:, 2] * 21, where[:, 1] * 30 - where[:, 2] * 17)
        texture += 0.7 * _noise(where[:, 0] * 9 + 50, where[:, 2] * 9 + where[:, 1] * 7)
        result[leaves] *= np.clip(1 + 0.75 * texture, 0.25, 2.0)[:, None]
    stripes = np.flatnonzero(material == Material.STRIPES)
    if len(stripes):
        phase = np.floor(v[stripes] * 4.0 + 0.4 * u[stripes]) % 2 == 1
        white = np.array([0.9, 0.9, 0.88], dtype=np.float32) * lit_pixels[stripes]
        result[stripes] = np.where(phase[:, None], white, result[stripes])
    glass = np.flatnonzero(material == Material.GLASS)
    if len(glass):
        normal = normals[index[glass]]
        view = rays[glass] / np.linalg.norm(rays[glass], axis=1, keepdims=True)
        mirrored = view - 2 * np.einsum("pc,pc->p", view, normal)[:, None] * normal
        up = np.clip(mirrored[:, 2] * 1.5 + 0.25, 0, 1)[:, None]
        reflection = np.array(weather.horizon) * up
        result[glass] = colour[glass] * lit_pixels[glass] * 0.6 + 0.42 * reflection
    lamps = np.flatnonzero(material == Material.LAMP)
    if len(lamps):
        glow = 0.75 + 0.5 * weather.night + 0.3 * weather.wet
        result[lamps] = colour[lamps] * np.maximum(glow, lit_pixels[lamps])
    return result


def _walls(
    u: np.ndarray, v: np.ndarray, index: np.ndarray, footprint: np.ndarray, base: np.ndarray, light: Light
) -> np.ndarray:
    """Facades: rows of windows, a shop front below, bands between the floors."""
    weather = light.weather
    pitch = 2.4 + (index % 5) * 0.35
    floor = 3.1
    column, storey = np.floor(u / pitch), np.floor(v / floor)
    a, b = u / pitch - column, v / floor - storey
    shop = storey < 1
    wide = np.where(index % 3 == 0, 0.12, 0.24)
    window = (a > wide) & (a < 1 - wide) & (b > 0.28) & (b < 0.84)
    window = np.where(shop, (a > 0.06) & (a < 0.94) & (b > 0.12) & (b < 0.78), window)
    dice = _noise(column * 41 + index * 7, storey * 59 + index * 3) * 0.5 + 0.5
    lights_on = dice > 0.62 - 0.1 * weather.night
    day = np.array(weather.horizon) * (0.22 + 0.38 * dice[:, None]) + np.array([0.02, 0.04, 0.06])
    warm = np.array([1.0, 0.82, 0.5]) * (0.35 + 0.5 * dice[:, None])
    pane = np.where((lights_on & (weather.night > 0.3))[:, None], warm, day * (1 - 0.6 * weather.night))
    frame = (np.abs(a - 0.5) < 0.018) & ~shop
    pane = np.where(frame[:, None], base * 0.8, pane)
    band = (b < 0.06) | ((b > 0.9) & shop)
    wall = np.where(band[:, None], base * 0.72, base)
    detailed = np.where(window[:, None], pane, wall)
    average = base * 0.62 + pane * 0.38
    detail = np.clip(1.6 - footprint / 0.45, 0, 1)[:, None]
    return (detailed * detail + average * (1 - detail)).astype(np.float32)


def _expose(
    image: Float[np.ndarray, "H W 3"], weather: Weather, noise_seed: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Vignette, sensor noise, soft shoulder, 8 bits."""
    height, width = image.shape[:2]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]
    image *= (1 - 0.10 * (x**2 + y**2))[..., None]
    shift = np.random.default_rng(noise_seed).integers(0, 512, 2)
    rows, columns = (np.arange(height) + shift[0]) & 511, (np.arange(width) + shift[1]) & 511
    image += (_GRAIN[np.ix_(rows, columns)] * (0.006 + 0.010 * weather.night))[..., None]
    shoulder = np.where(image > 0.8, 0.8 + 0.2 * np.tanh((image - 0.8) / 0.2), image)
    return (np.clip(shoulder, 0, 1) * 255 + 0.5).astype(np.uint8)

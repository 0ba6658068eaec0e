"""Turns visibility into a picture: light, weather, procedural textures, haze and sensor noise."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from data_prep.synthetic.ground import GroundColours, SurfaceMap
from data_prep.synthetic.render import GROUND, SKY, Camera, FrameBuffer
from data_prep.synthetic.shapes import Material, Quads
from data_prep.synthetic.weather import Light, Weather


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
    rays = camera.rays().reshape(-1, 3)
    surface = buffer.surface.ravel()
    image = np.empty((len(surface), 3), dtype=np.float32)
    origin = camera.camera_to_global[:3, 3].astype(np.float32)
    focal = float(camera.intrinsics[0, 0])
    sky = np.flatnonzero(surface == SKY)
    image[sky] = _sky(rays[sky], light)
    for on_ground in (True, False):
        seen = np.flatnonzero(surface == GROUND if on_ground else surface >= 0)
        depth = 1.0 / buffer.inverse_depth.ravel()[seen]
        toward = rays[seen]
        points = toward * depth[:, None] + origin
        if on_ground:
            colour = _shade_ground(points, depth / focal, origin, light, ground, surface_map, shadows)
        else:
            colour = _shade_quads(points, surface[seen], depth / focal, quads, light, toward)
        distance = depth * np.sqrt(np.einsum("pc,pc->p", toward, toward))
        clear = np.exp(-weather.haze * distance)[:, None]
        image[seen] = colour * clear + np.array(weather.horizon, dtype=np.float32) * (1 - clear)
    picture = image.reshape(camera.height, camera.width, 3)
    return _expose(_soften_edges(picture, buffer), weather, noise_seed)


def _soften_edges(image: Float[np.ndarray, "H W 3"], buffer: FrameBuffer) -> Float[np.ndarray, "H W 3"]:
    """Blends pixels along silhouettes with their neighbours, a cheap stand-in for anti-aliasing."""
    edge = np.zeros(buffer.surface.shape, dtype=bool)
    across = buffer.surface[:, 1:] != buffer.surface[:, :-1]
    along = buffer.surface[1:] != buffer.surface[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= along
    edge[:-1] |= along
    blurred = cv2.GaussianBlur(image, (3, 3), 0.7)
    image[edge] = blurred[edge]
    return image


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
    colour = np.empty((len(xy), 3), dtype=np.float32)
    for level, (texture, size) in enumerate(zip(ground.levels, ground.sizes, strict=True)):
        chosen = np.flatnonzero(wanted == level)
        if not len(chosen):
            continue
        colour[chosen] = _sample(texture, (xy[chosen] - np.array(ground.origin, dtype=np.float32)) / size)
    fine = np.clip(0.05 / np.maximum(extent, 1e-3), 0, 1) * 0.14
    rough = _noise(xy[:, 0] * 28, xy[:, 1] * 28) * fine
    rough += (
        _noise(xy[:, 0] * 2.3 + 91, xy[:, 1] * 2.3) * 0.09 * np.clip(0.8 / np.maximum(extent, 1e-3), 0, 1)
    )
    rough += _noise(xy[:, 0] * 0.35, xy[:, 1] * 0.35 + 17) * 0.10
    cells = (xy - np.array(surface_map.origin, dtype=np.float32)) / surface_map.resolution
    shadow = _sample(shadows, cells, outside=0.0).astype(np.float32) / 255.0
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


_FAR_GROUND = (0.40, 0.41, 0.38)
_SAMPLE_WIDTH = 4096


def _sample(
    texture: np.ndarray, cells: Float[np.ndarray, "P 2"], outside: float | tuple[float, ...] = _FAR_GROUND
) -> np.ndarray:
    """Bilinear samples of a raster at (column, row) positions, cell k spanning k to k + 1."""
    rows = max(1, -(-len(cells) // _SAMPLE_WIDTH))
    padded = np.zeros((rows * _SAMPLE_WIDTH, 2), dtype=np.float32)
    padded[: len(cells)] = np.clip(cells - 0.5, -10, 32_000)
    where = padded.reshape(rows, _SAMPLE_WIDTH, 2)
    picked = cv2.remap(
        texture, where, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=outside
    )
    return picked.reshape(-1, *texture.shape[2:])[: len(cells)]


def _shade_quads(
    points: Float[np.ndarray, "P 3"],
    index: np.ndarray,
    footprint: Float[np.ndarray, "P"],
    quads: Quads,
    light: Light,
    rays: Float[np.ndarray, "P 3"],
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
    u = np.einsum(
        "pc,pc->p", points - corners[:, 0].astype(np.float32)[index], along.astype(np.float32)[index]
    )
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
    pitch = (2.4 + (index % 5) * 0.35).astype(np.float32)
    floor = 3.1
    column, storey = np.floor(u / pitch), np.floor(v / floor)
    a, b = u / pitch - column, v / floor - storey
    shop = storey < 1
    wide = np.where(index % 3 == 0, 0.12, 0.24)
    window = (a > wide) & (a < 1 - wide) & (b > 0.28) & (b < 0.84)
    window = np.where(shop, (a > 0.06) & (a < 0.94) & (b > 0.12) & (b < 0.78), window)
    dice = _noise(column * 41 + index * 7, storey * 59 + index * 3) * 0.5 + 0.5
    lights_on = dice > 0.62 - 0.1 * weather.night
    horizon = np.array(weather.horizon, dtype=np.float32)
    day = horizon * (0.22 + 0.38 * dice[:, None]) + np.array([0.02, 0.04, 0.06], dtype=np.float32)
    warm = np.array([1.0, 0.82, 0.5], dtype=np.float32) * (0.35 + 0.5 * dice[:, None])
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

"""Which surface each pixel sees and how deep: exact visibility of quads and the ground plane.

Every quad is tested at pixel centres with homogeneous edge functions (Olano and Greer, 1997), so nothing
has to be clipped, and its inverse depth is an affine function of the pixel, so depth is exact. Rows of all
quads are filled together (see `spans`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, UInt16

from spacedrive_jax import exact
from spacedrive_jax.world import paths
from spacedrive_jax.world.shapes import Quads

NEAR = 0.25
GROUND = -2
SKY = -1
_TOLERANCE = 1e-6
"""Pixels by which a pixel centre may miss an edge; closes the seams between neighbours."""
_BACKGROUND = 0xFFFFFFFF
"""Low half of the depth key of a pixel that shows ground or sky."""


@dataclasses.dataclass(frozen=True)
class FrameBuffer:
    """What the camera sees at every pixel centre."""

    inverse_depth: Float[np.ndarray, "H W"]
    """1 / (z in the camera frame), 1/m; 0 where the sky is."""
    surface: Int[np.ndarray, "H W"]
    """Quad index, `GROUND` or `SKY`."""
    covered: dict[int, int]
    """Pixels each group of quads would cover if nothing stood before it."""


@dataclasses.dataclass(frozen=True)
class Camera:
    """A pinhole camera: x right, y down, z forward; pixel centres at integer coordinates."""

    intrinsics: Float[np.ndarray, "3 3"]
    camera_to_global: Float[np.ndarray, "4 4"]
    height: int
    width: int

    def rays(self) -> Float[np.ndarray, "3 H W"]:
        """Global-frame ray of every pixel, scaled so that its camera-frame z is 1."""
        to_global = exact.matmul(self.camera_to_global[:3, :3], exact.inverse_3x3(self.intrinsics))
        per_column, per_row, start = to_global.astype(np.float32).T[..., None, None]
        u = np.arange(self.width, dtype=np.float32)
        v = np.arange(self.height, dtype=np.float32)[:, None]
        return per_row * v + start + per_column * u


def cast(quads: Quads, camera: Camera) -> FrameBuffer:
    """Finds the nearest surface of every pixel.

    Args:
        quads: everything that stands on the ground, global frame.
        camera: the view.

    Returns:
        The buffer; the ground is the plane z = 0 of the global frame.
    """
    height, width = camera.height, camera.width
    ground = _ground(camera)
    prepared = _prepare(quads, camera)
    facet, row = paths.expand(prepared.top, prepared.bottom)  # scan lines: one row of one quad each
    edges = prepared.edges[..., facet]
    low, high = paths.intervals(edges[1] * row + edges[2], edges[0])
    first = np.ceil(np.clip(low, 0.0, width) - _TOLERANCE).astype(np.int64)
    last = np.floor(np.clip(high, -1.0, width - 1.0) + _TOLERANCE).astype(np.int64) + 1
    line, column = paths.expand(first, last)
    slope, down, start = prepared.planes[:, facet]
    inverse = (slope[line] * column + (down * row + start)[line]).astype(np.float32)
    pixel = row[line] * width + column
    # Positive floats sort like their bits: the largest key is the nearest surface, then the first quad.
    keys = (inverse.view(np.int32).astype(np.int64) << 32) | (_BACKGROUND - 1 - facet)[line]
    nearest = (ground.view(np.int32).astype(np.int64) << 32) | _BACKGROUND
    np.maximum.at(nearest, pixel, keys)
    rank = _BACKGROUND - 1 - (nearest & _BACKGROUND)
    background = np.where(ground > 0, GROUND, SKY)
    surface = np.where(rank < 0, background, np.append(prepared.quads, SKY)[rank]).astype(np.int32)
    inverse_depth = (nearest >> 32).astype(np.int32).view(np.float32)
    return FrameBuffer(
        inverse_depth.reshape(height, width),
        surface.reshape(height, width),
        _covered(quads.groups[prepared.quads][facet][line], pixel, height * width),
    )


def _ground(camera: Camera) -> Float[np.ndarray, "P"]:
    """Inverse depth of the plane z = 0 at every pixel, 0 above the horizon."""
    down = exact.rotate(camera.camera_to_global[2, :3], exact.inverse_3x3(camera.intrinsics).T)
    u, v = np.arange(camera.width), np.arange(camera.height)
    ground = -(down[0] * u + (down[1] * v + down[2])[:, None]) / camera.camera_to_global[2, 3]
    return np.where(ground > 1e-4, ground, 0.0).astype(np.float32).ravel()


def _covered(groups: Int[np.ndarray, "K"], pixels: Int[np.ndarray, "K"], image_pixels: int) -> dict[int, int]:
    """Different pixels of each group; `groups` is -1 where a pixel belongs to scenery."""
    grouped = groups >= 0
    pairs = np.sort(groups[grouped] * image_pixels + pixels[grouped])
    different = pairs[np.diff(pairs, prepend=-1) > 0]
    counts = np.bincount(different // image_pixels)
    return {int(group): int(counts[group]) for group in np.flatnonzero(counts)}


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """Quads that may be seen, as homogeneous functions of the pixel (u, v, 1)."""

    quads: Int[np.ndarray, "Q"]
    """Index of each."""
    top: Int[np.ndarray, "Q"]
    bottom: Int[np.ndarray, "Q"]
    """First row, and one past the last row, each may cover."""
    edges: Float[np.ndarray, "3 5 Q"]
    """Not negative inside: the four edges and the near plane."""
    planes: Float[np.ndarray, "3 Q"]
    """Inverse depth, 1/m."""


def _prepare(quads: Quads, camera: Camera) -> _Prepared:
    chosen = np.flatnonzero(_in_frustum(quads.vertices, camera))
    rotation, position = camera.camera_to_global[:3, :3], camera.camera_to_global[:3, 3]
    points = quads.vertices[chosen] - position
    normals = np.cross(points[:, 2] - points[:, 0], points[:, 3] - points[:, 1])
    distance = exact.dot(normals, points[:, 0])
    facing = np.flatnonzero(distance < -1e-9)
    chosen, normals, distance = chosen[facing], normals[facing], distance[facing]
    points = exact.rotate(points[facing], rotation.T)  # (Q, 4, 3), camera frame

    low, high = _projected_bounds(exact.rotate(points, camera.intrinsics))
    last_pixel = np.array([camera.width, camera.height]) - 1.0
    begin = np.ceil(np.maximum(low, 0.0) - _TOLERANCE).astype(np.int64)
    end = np.floor(np.minimum(high, last_pixel) + _TOLERANCE).astype(np.int64) + 1
    filled = np.flatnonzero((end > begin).all(axis=1))
    chosen, points = chosen[filled], points[filled]

    inverse = exact.inverse_3x3(camera.intrinsics)
    planes = exact.rotate(normals[filled], exact.matmul(rotation, inverse).T) / distance[filled, None]
    edges = np.cross(points, np.roll(points, -1, axis=1))
    sign = np.sign(exact.dot(edges, points.mean(axis=1)[:, None]))
    edges = exact.rotate(edges * sign[..., None], inverse.T)
    near = np.array([0.0, 0.0, 1.0 / NEAR]) - planes
    halves = np.concatenate([edges, near[:, None]], axis=1)
    coefficients = np.ascontiguousarray(halves.T), np.ascontiguousarray(planes.T)
    return _Prepared(chosen, begin[filled, 1], end[filled, 1], *coefficients)


def _in_frustum(vertices: Float[np.ndarray, "Q 4 3"], camera: Camera) -> Bool[np.ndarray, "Q"]:
    """False where all four corners lie outside the same side of the view or nearer than `NEAR`."""
    right, bottom = camera.width - 0.5, camera.height - 0.5
    sides = np.array([[1, 0, 0.5], [-1, 0, right], [0, 1, 0.5], [0, -1, bottom], [0, 0, 1]])
    normals = exact.rotate(exact.matmul(sides, camera.intrinsics), camera.camera_to_global[:3, :3])
    limits = exact.dot(normals, camera.camera_to_global[:3, 3]) + np.array([0, 0, 0, 0, NEAR])
    inside = np.ones(len(vertices), dtype=bool)
    x, y, z = np.moveaxis(vertices, -1, 0)
    for (a, b, c), limit in zip(normals, limits, strict=True):
        first, second, third, fourth = (a * x + b * y + c * z > limit).T
        inside &= first | second | third | fourth
    return inside


def _projected_bounds(
    pixels: Float[np.ndarray, "Q 4 3"],
) -> tuple[Float[np.ndarray, "Q 2"], Float[np.ndarray, "Q 2"]]:
    """Bounding rectangle of each quad, cut at the near plane. `pixels` are homogeneous."""
    following = np.roll(pixels, -1, axis=1)
    here, there = pixels[..., 2], following[..., 2]
    crosses = (here > NEAR) != (there > NEAR)
    fraction = np.where(crosses, (NEAR - here) / np.where(crosses, there - here, 1.0), 0.0)
    cut = pixels + fraction[..., None] * (following - pixels)
    candidates = np.concatenate([pixels, cut], axis=1)
    valid = np.concatenate([here > NEAR, crosses], axis=1)
    projected = candidates[..., :2] / np.where(valid, candidates[..., 2], 1.0)[..., None]
    low = np.where(valid[..., None], projected, np.inf).min(axis=1)
    high = np.where(valid[..., None], projected, -np.inf).max(axis=1)
    return np.clip(low, -1e6, 1e6), np.clip(high, -1e6, 1e6)


def depth_image(buffer: FrameBuffer, scale: float = 256.0) -> UInt16[np.ndarray, "H W"]:
    """The 16-bit depth image: round(metres * scale), 0 for the sky and beyond the 16-bit range."""
    with np.errstate(divide="ignore"):
        metres = np.where(buffer.inverse_depth > 0, 1.0 / buffer.inverse_depth, 0.0)
    steps = np.round(metres * scale)
    return np.where(steps < 65536, steps, 0).astype(np.uint16)

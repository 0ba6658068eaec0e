"""Which surface each pixel sees and how deep: exact visibility of quads and the ground plane.

Every quad is tested at pixel centres with homogeneous edge functions (Olano and Greer, 1997), so nothing
has to be clipped, and its inverse depth is an affine function of the pixel, so depth is exact. Rows of all
quads are filled together (see `paths.intervals`).
"""

from __future__ import annotations

import dataclasses
import functools

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


@dataclasses.dataclass(frozen=True)
class FrameBuffer:
    """What the camera sees at every pixel centre."""

    inverse_depth: Float[np.ndarray, "H W"]
    """1 / (z in the camera frame), 1/m; 0 where the sky is."""
    surface: Int[np.ndarray, "H W"]
    """Quad index, `GROUND` or `SKY`."""
    lines: Int[np.ndarray, "4 M"]
    """Group, row, first column and one past the last of every scan line of an annotated object's quad."""

    @functools.cached_property
    def covered(self) -> dict[int, int]:
        """Pixels each group of quads would cover if nothing stood before it."""
        group, row, first, last = self.lines[:, self.lines[3] > self.lines[2]]
        if not len(group):
            return {}
        height, width = self.surface.shape
        own = (group * height + row) * width  # of a row of a group: rows never overlap
        order = np.lexsort((first, own))
        begin, end = (own + first)[order], (own + last)[order]
        before = np.concatenate([[0], np.maximum.accumulate(end)[:-1]])
        fresh = np.maximum(end - np.maximum(begin, before), 0)
        counts = np.bincount(group[order], weights=fresh)
        return {int(each): int(counts[each]) for each in np.flatnonzero(counts)}


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
    ground = ground_depth(camera)
    seen = fragments(quads, camera)
    nearest, surface = nearest_of(seen, ground)
    groups = quads.groups.take(seen.quads)
    annotated = np.flatnonzero(groups >= 0)
    lines = (groups, seen.rows, seen.columns, seen.columns + seen.counts)
    return FrameBuffer(
        nearest.reshape(camera.height, camera.width),
        surface.reshape(camera.height, camera.width),
        np.stack([values.take(annotated) for values in lines]),
    )


@dataclasses.dataclass(frozen=True)
class Fragments:
    """Every pixel of every quad that faces the camera, line by line: a line is one row of one quad."""

    quads: Int[np.ndarray, "M"]
    """Of each line, in order."""
    rows: Int[np.ndarray, "M"]
    columns: Int[np.ndarray, "M"]
    """First column of each line."""
    counts: Int[np.ndarray, "M"]
    """Pixels of each line."""
    pixels: Int[np.ndarray, "K"]
    """Place in the image, row by row."""
    inverse_depth: Float[np.ndarray, "K"]
    """1/m."""


def fragments(quads: Quads, camera: Camera) -> Fragments:
    """Draws all quads, each as if it were alone."""
    width = camera.width
    prepared = _prepare(quads, camera)
    facet, row = paths.expand(prepared.top, prepared.bottom)
    edges = prepared.edges.take(facet, axis=2)
    low, high = paths.intervals(edges[1] * row + edges[2], edges[0])
    first = np.ceil(np.clip(low, 0.0, width) - _TOLERANCE).astype(np.int64)
    last = np.floor(np.clip(high, -1.0, width - 1.0) + _TOLERANCE).astype(np.int64) + 1
    counts = np.maximum(last - first, 0)
    slope, down, start = prepared.planes.take(facet, axis=1)
    before = np.cumsum(counts) - counts
    number = np.arange(int(counts.sum()))
    inverse = number + np.repeat((first - before).astype(np.float64), counts)  # the column of each
    inverse *= np.repeat(slope, counts)
    inverse += np.repeat(down * row + start, counts)
    pixels = number
    pixels += np.repeat(first - before + row * width, counts)
    return Fragments(prepared.quads.take(facet), row, first, counts, pixels, inverse.astype(np.float32))


def nearest_of(
    seen: Fragments, ground: Float[np.ndarray, "P"]
) -> tuple[Float[np.ndarray, "P"], Int[np.ndarray, "P"]]:
    """The z-buffer: inverse depth of the nearest surface of every pixel, and which it is.

    Args:
        seen: what competes.
        ground: inverse depth of the ground at every pixel, 0 where the sky is.
    """
    nearest = ground.copy()
    np.maximum.at(nearest, seen.pixels, seen.inverse_depth)
    # Where two quads are equally near the first one counts: it is written last.
    winners = np.flatnonzero(seen.inverse_depth == nearest.take(seen.pixels))[::-1]
    surface = np.zeros(len(ground), dtype=np.int32)
    surface[seen.pixels.take(winners)] = np.repeat(seen.quads.astype(np.int32), seen.counts).take(winners)
    background = np.where(ground > 0, np.int32(GROUND), np.int32(SKY))
    return nearest, np.where(nearest > ground, surface, background)


def ground_depth(camera: Camera) -> Float[np.ndarray, "P"]:
    """Inverse depth of the plane z = 0 at every pixel, 0 above the horizon."""
    down = exact.rotate(camera.camera_to_global[2, :3], exact.inverse_3x3(camera.intrinsics).T)
    u, v = np.arange(camera.width), np.arange(camera.height)
    ground = down[0] * u + (down[1] * v + down[2])[:, None]
    ground /= -camera.camera_to_global[2, 3]  # the same bits: a sign is not rounded
    return np.where(ground > 1e-4, ground, 0.0).astype(np.float32).ravel()


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


_Corners = Float[np.ndarray, "3 4 Q"]
"""x, y, z of the four corners of quads: NumPy works through long rows, not through triples."""


def _prepare(quads: Quads, camera: Camera) -> _Prepared:
    rotation, position = camera.camera_to_global[:3, :3], camera.camera_to_global[:3, 3]
    corners = np.ascontiguousarray(quads.vertices.T)
    chosen = np.flatnonzero(_in_frustum(corners, camera))
    points = corners.take(chosen, axis=2) - position[:, None, None]
    normals = _cross(points[:, 2] - points[:, 0], points[:, 3] - points[:, 1])
    distance = inner(normals, points[:, 0])
    facing = np.flatnonzero(distance < -1e-9)
    chosen, normals, distance = chosen[facing], normals.take(facing, axis=1), distance[facing]
    points = _turned(points.take(facing, axis=2), rotation.T)  # camera frame

    low, high = _projected_bounds(_turned(points, camera.intrinsics))
    last_pixel = np.array([[camera.width], [camera.height]]) - 1.0
    begin = np.ceil(np.maximum(low, 0.0) - _TOLERANCE).astype(np.int64)
    end = np.floor(np.minimum(high, last_pixel) + _TOLERANCE).astype(np.int64) + 1
    filled = np.flatnonzero((end > begin).all(axis=0))
    chosen, points = chosen[filled], points.take(filled, axis=2)

    inverse = exact.inverse_3x3(camera.intrinsics)
    planes = _turned(normals.take(filled, axis=1), exact.matmul(rotation, inverse).T) / distance[filled]
    edges = _cross(points, np.roll(points, -1, axis=1))
    middle = (points[:, 0] + points[:, 1] + points[:, 2] + points[:, 3]) / 4
    edges *= np.sign(inner(edges, middle[:, None]))
    near = np.array([[0.0], [0.0], [1.0 / NEAR]]) - planes
    halves = np.concatenate([_turned(edges, inverse.T), near[:, None]], axis=1)
    return _Prepared(chosen, begin[1, filled], end[1, filled], halves, planes)


def _cross(left: Float[np.ndarray, "3 *Q"], right: Float[np.ndarray, "3 *Q"]) -> Float[np.ndarray, "3 *Q"]:
    """Cross products along the first axis."""
    (a, b, c), (d, e, f) = left, right
    return np.stack([b * f - c * e, c * d - a * f, a * e - b * d])


def inner(left: Float[np.ndarray, "3 *#Q"], right: Float[np.ndarray, "3 *#Q"]) -> Float[np.ndarray, "*Q"]:
    """Inner products along the first axis, summed in order."""
    return left[0] * right[0] + left[1] * right[1] + left[2] * right[2]


def _turned(vectors: Float[np.ndarray, "3 *Q"], rotation: Float[np.ndarray, "3 3"]) -> np.ndarray:
    """`rotation` applied along the first axis, summed in order."""
    x, y, z = vectors
    return np.stack([x * a + y * b + z * c for a, b, c in rotation.tolist()])


def _sides(camera: Camera) -> tuple[Float[np.ndarray, "5 3"], Float[np.ndarray, "5"]]:
    """Normals and limits of the view's four sides and its near plane: inside, normal . point > limit."""
    right, bottom = camera.width - 0.5, camera.height - 0.5
    sides = np.array([[1, 0, 0.5], [-1, 0, right], [0, 1, 0.5], [0, -1, bottom], [0, 0, 1]])
    normals = exact.rotate(exact.matmul(sides, camera.intrinsics), camera.camera_to_global[:3, :3])
    return normals, exact.dot(normals, camera.camera_to_global[:3, 3]) + np.array([0, 0, 0, 0, NEAR])


def _in_frustum(corners: _Corners, camera: Camera) -> Bool[np.ndarray, "Q"]:
    """False where all four corners lie outside the same side of the view or nearer than `NEAR`."""
    inside = np.ones(corners.shape[2], dtype=bool)
    x, y, z = corners
    for (a, b, c), limit in zip(*_sides(camera), strict=True):
        inside &= (a * x + b * y + c * z > limit).any(axis=0)
    return inside


def in_view(
    low: Float[np.ndarray, "B 3"], high: Float[np.ndarray, "B 3"], camera: Camera
) -> Bool[np.ndarray, "B"]:
    """False where a box along the axes of the global frame is surely not seen.

    Args:
        low: lowest coordinates of each box, metres.
        high: highest coordinates of each box, metres.
        camera: the view.
    """
    inside = np.ones(len(low), dtype=bool)
    low, high = (np.ascontiguousarray(corner.T) for corner in (low, high))
    for normal, limit in zip(*_sides(camera), strict=True):
        farthest = np.maximum(low * normal[:, None], high * normal[:, None])
        inside &= farthest[0] + farthest[1] + farthest[2] > limit - _SLACK
    return inside


_SLACK = 1e-3
"""By which a box must be outside: far more than the rounding of its corners, in metres times pixels."""


def _projected_bounds(pixels: _Corners) -> tuple[Float[np.ndarray, "2 Q"], Float[np.ndarray, "2 Q"]]:
    """Bounding rectangle of each quad, cut at the near plane. `pixels` are homogeneous."""
    before = (pixels[2] > NEAR).all(axis=0)
    low, high = np.empty((2, 2, len(before)))
    whole = np.flatnonzero(before)
    projected = pixels[:2].take(whole, axis=2)
    projected /= pixels[2].take(whole, axis=1)
    low[:, whole], high[:, whole] = projected.min(axis=1), projected.max(axis=1)
    cut = np.flatnonzero(~before)
    low[:, cut], high[:, cut] = _cut_bounds(pixels.take(cut, axis=2))
    return np.clip(low, -1e6, 1e6), np.clip(high, -1e6, 1e6)


def _cut_bounds(pixels: _Corners) -> tuple[Float[np.ndarray, "2 Q"], Float[np.ndarray, "2 Q"]]:
    """The same of quads with a corner behind the near plane: of what is left of them."""
    following = np.roll(pixels, -1, axis=1)
    here, there = pixels[2], following[2]
    crosses = (here > NEAR) != (there > NEAR)
    fraction = np.where(crosses, (NEAR - here) / np.where(crosses, there - here, 1.0), 0.0)
    candidates = np.concatenate([pixels, pixels + fraction * (following - pixels)], axis=1)
    valid = np.concatenate([here > NEAR, crosses])
    projected = candidates[:2] / np.where(valid, candidates[2], 1.0)
    return np.where(valid, projected, np.inf).min(axis=1), np.where(valid, projected, -np.inf).max(axis=1)


def depth_image(buffer: FrameBuffer, scale: float = 256.0) -> UInt16[np.ndarray, "H W"]:
    """The 16-bit depth image: round(metres * scale), 0 for the sky and beyond the 16-bit range."""
    with np.errstate(divide="ignore"):
        metres = np.where(buffer.inverse_depth > 0, 1.0 / buffer.inverse_depth, 0.0)
    steps = np.round(metres * scale)
    return np.where(steps < 65536, steps, 0).astype(np.uint16)

"""Which surface each pixel sees and how deep: exact visibility of quads and the ground plane.

Every quad is tested at pixel centres with homogeneous edge functions (Olano and Greer, 1997), so nothing
has to be clipped, and its inverse depth is an affine function of the pixel, so depth is exact.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from data_prep.synthetic.shapes import Quads

NEAR = 0.25
GROUND = -2
SKY = -1


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

    def rays(self) -> Float[np.ndarray, "H W 3"]:
        """Global-frame ray of every pixel, scaled so that its camera-frame z is 1."""
        inverse = np.linalg.inv(self.intrinsics)
        to_global = (self.camera_to_global[:3, :3] @ inverse).astype(np.float32)
        u = np.arange(self.width, dtype=np.float32)
        v = np.arange(self.height, dtype=np.float32)
        rows = v[:, None, None] * to_global[:, 1] + to_global[:, 2]
        return rows + u[None, :, None] * to_global[:, 0]


def cast(quads: Quads, camera: Camera) -> FrameBuffer:
    """Finds the nearest surface of every pixel.

    Args:
        quads: everything that stands on the ground, global frame, grouped objects contiguous.
        camera: the view.

    Returns:
        The buffer; the ground is the plane z = 0 of the global frame.
    """
    height, width = camera.height, camera.width
    rotation, position = camera.camera_to_global[:3, :3], camera.camera_to_global[:3, 3]
    down = rotation[2] @ np.linalg.inv(camera.intrinsics)  # global z of a pixel's ray, affine in the pixel
    u, v = np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64)
    ground = -(down[0] * u[None] + (down[1] * v + down[2])[:, None]) / position[2]
    inverse_depth = np.maximum(ground, 0.0).astype(np.float32)
    surface = np.where(ground > 1e-4, GROUND, SKY).astype(np.int32)
    inverse_depth[surface == SKY] = 0.0
    covered: dict[int, int] = {}
    prepared = _prepare(quads, camera)
    scratch: _Scratch | None = None
    for index, bounds, edges, plane in zip(*prepared, strict=True):
        left, right, top, bottom = bounds
        columns, rows = u[left:right].astype(np.float32), v[top:bottom].astype(np.float32)
        inside = None
        for edge in edges:
            values = edge[0] * columns[None] + (edge[1] * rows + edge[2])[:, None] >= 0
            inside = values if inside is None else inside & values
        inverse = plane[0] * columns[None] + (plane[1] * rows + plane[2])[:, None]
        inside = inside & (inverse < 1.0 / NEAR)
        group = int(quads.groups[index])
        if group >= 0:
            if scratch is None or scratch.group != group:
                _flush(scratch, covered)
                scratch = _Scratch(group, np.zeros((height, width), dtype=bool), [height, 0, width, 0])
            scratch.add(inside, left, right, top, bottom)
        window = inverse_depth[top:bottom, left:right]
        closer = inside & (inverse > window)
        window[closer] = inverse[closer]
        surface[top:bottom, left:right][closer] = index
    _flush(scratch, covered)
    return FrameBuffer(inverse_depth, surface, covered)


@dataclasses.dataclass
class _Scratch:
    """Pixels one group covers, whatever hides it."""

    group: int
    mask: np.ndarray
    bounds: list[int]

    def add(self, inside: np.ndarray, left: int, right: int, top: int, bottom: int) -> None:
        self.mask[top:bottom, left:right] |= inside
        low_row, high_row, low_column, high_column = self.bounds
        self.bounds = [
            min(low_row, top), max(high_row, bottom), min(low_column, left), max(high_column, right)
        ]  # fmt: skip


def _flush(scratch: _Scratch | None, covered: dict[int, int]) -> None:
    if scratch is not None:
        top, bottom, left, right = scratch.bounds
        pixels = int(np.count_nonzero(scratch.mask[top:bottom, left:right]))
        covered[scratch.group] = covered.get(scratch.group, 0) + pixels


def _prepare(quads: Quads, camera: Camera) -> tuple[list, list, list, list]:
    """Index, pixel bounds, edge functions and inverse-depth plane of every quad that may be seen."""
    rotation, position = camera.camera_to_global[:3, :3], camera.camera_to_global[:3, 3]
    points = (quads.vertices - position) @ rotation  # (Q, 4, 3), camera frame
    normals = np.cross(points[:, 2] - points[:, 0], points[:, 3] - points[:, 1])
    distance = np.einsum("qc,qc->q", normals, points[:, 0])
    depth = points[..., 2]
    facing = (distance < -1e-9) & (depth.max(axis=1) > NEAR)
    pixels = points @ camera.intrinsics.T
    # Cheap frustum test first: all four corners on the outer side of one image border.
    outside = (
        (pixels[..., 0] < -0.5 * depth).all(1)
        | (pixels[..., 0] > (camera.width - 0.5) * depth).all(1)
        | (pixels[..., 1] < -0.5 * depth).all(1)
        | (pixels[..., 1] > (camera.height - 0.5) * depth).all(1)
    )
    chosen = np.flatnonzero(facing & ~outside)
    points, normals, distance, pixels = points[chosen], normals[chosen], distance[chosen], pixels[chosen]

    low, high = _projected_bounds(pixels)
    left = np.clip(np.ceil(low[:, 0]), 0, camera.width).astype(int)
    right = np.clip(np.floor(high[:, 0]) + 1, 0, camera.width).astype(int)
    top = np.clip(np.ceil(low[:, 1]), 0, camera.height).astype(int)
    bottom = np.clip(np.floor(high[:, 1]) + 1, 0, camera.height).astype(int)
    filled = (right > left) & (bottom > top)

    inverse = np.linalg.inv(camera.intrinsics)
    planes = (normals @ inverse) / distance[:, None]
    edges = np.cross(points, np.roll(points, -1, axis=1))
    centroid = points.mean(axis=1)
    sign = np.sign(np.einsum("qkc,qc->qk", edges, centroid))
    edges = (edges * sign[..., None]) @ inverse
    edges /= np.abs(edges).max(axis=2, keepdims=True) + 1e-30
    keep = np.flatnonzero(filled)
    keep = keep[np.lexsort((depth[chosen][keep].min(axis=1), quads.groups[chosen[keep]]))]
    bounds = np.stack([left, right, top, bottom], axis=1)[keep]
    return (
        chosen[keep].tolist(),
        bounds.tolist(),
        list(edges[keep].astype(np.float32)),
        list(planes[keep].astype(np.float32)),
    )


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


def depth_image(buffer: FrameBuffer, scale: float = 256.0) -> Int[np.ndarray, "H W"]:
    """The 16-bit depth image: round(metres * scale), 0 for the sky and beyond the 16-bit range."""
    with np.errstate(divide="ignore"):
        metres = np.where(buffer.inverse_depth > 0, 1.0 / buffer.inverse_depth, 0.0)
    steps = np.round(metres * scale)
    return np.where(steps < 65536, steps, 0).astype(np.uint16)

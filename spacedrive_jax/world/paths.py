"""Planar geometry: polylines (resampling, offsetting, headings, curvature), boxes, convex shapes on a raster.

Shapes are rastered all at once, by where each scan line enters and leaves them. An edge of a shape is an
affine function along a scan line, not negative inside; so a scan line cuts a convex shape in one interval,
and thousands of shapes need a handful of array operations instead of a loop.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.spatial import cKDTree

from spacedrive_jax import exact


def intervals(
    offsets: Float[np.ndarray, "E M"], slopes: Float[np.ndarray, "E M"]
) -> tuple[Float[np.ndarray, "M"], Float[np.ndarray, "M"]]:
    """Where `offset + slope * t` is not negative for all E edges of a scan line.

    Returns:
        Lowest and highest t; low > high where the line misses the shape.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = -offsets / slopes
    low = np.where(slopes > 0, crossing, -np.inf).max(axis=0)
    high = np.where(slopes < 0, crossing, np.inf).min(axis=0)
    never = ((slopes == 0) & (offsets < 0)).any(axis=0)
    low[never], high[never] = np.inf, -np.inf
    return low, high


def expand(
    first: Int[np.ndarray, "M"], last: Int[np.ndarray, "M"]
) -> tuple[Int[np.ndarray, "K"], Int[np.ndarray, "K"]]:
    """Lists the whole numbers of many ranges, one range after the other.

    Args:
        first: first number of each range.
        last: one past the last number; ranges with last <= first are empty.

    Returns:
        The range each number comes from (its index in `first`), and the numbers.
    """
    counts = np.maximum(last - first, 0)
    owners = np.repeat(np.arange(len(first)), counts)
    starts = np.cumsum(counts) - counts
    return owners, np.arange(len(owners)) + np.repeat(first - starts, counts)


Points = Float[np.ndarray, "K 2"]


def arc_lengths(points: Points) -> Float[np.ndarray, "K"]:
    """Distance travelled along a polyline at each of its points, metres, starting at 0."""
    steps = exact.norm(np.diff(points, axis=0))
    return np.concatenate([[0.0], np.cumsum(steps)])


def resample(points: Points, spacing: float) -> Float[np.ndarray, "resampled 2"]:
    """The same polyline with (nearly) equal steps.

    Args:
        points: polyline, metres.
        spacing: wanted step in metres; the true step divides the length evenly, ends are kept.
    """
    lengths = arc_lengths(points)
    count = max(2, round(lengths[-1] / spacing) + 1)
    wanted = np.linspace(0.0, lengths[-1], count)
    return np.stack([np.interp(wanted, lengths, points[:, axis]) for axis in range(2)], axis=1)


def left_normals(points: Points) -> Float[np.ndarray, "K 2"]:
    """Unit normals pointing to the left of the direction of travel."""
    tangent = np.gradient(points, axis=0)
    tangent /= exact.norm(tangent)[:, None]
    return np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)


def offset(points: Points, distance: float) -> Points:
    """The polyline moved `distance` metres to its left (negative: right)."""
    return points + distance * left_normals(points)


def bezier(
    start: Float[np.ndarray, "2"],
    start_heading: float,
    end: Float[np.ndarray, "2"],
    end_heading: float,
    handle: float,
) -> Float[np.ndarray, "K 2"]:
    """A cubic Bezier curve between two directed points.

    Args:
        start: first point.
        start_heading: direction of travel at the start, radians.
        end: last point.
        end_heading: direction of travel at the end, radians.
        handle: length of both handles as a fraction of the chord; 0.39 makes a near circular quarter turn.

    Returns:
        Points about 0.5 m apart.
    """
    chord = float(exact.norm(end - start))
    first = start + handle * chord * np.array(exact.cos_sin(start_heading))
    last = end - handle * chord * np.array(exact.cos_sin(end_heading))
    t = np.linspace(0.0, 1.0, max(8, int(chord * 2)))[:, None]
    rest = 1 - t
    curve = rest * rest * (rest * start + 3 * t * first) + t * t * (3 * rest * last + t * end)
    return resample(curve, 0.5)


def smooth(points: Points, sigma: float) -> Points:
    """Gaussian smoothing of an evenly spaced polyline; `sigma` in samples, ends stay where they are."""
    reach = int(4 * sigma + 0.5)
    padding = int(4 * sigma) + 1
    head = points[0] - (points[1] - points[0]) * np.arange(padding, 0, -1)[:, None]
    tail = points[-1] + (points[-1] - points[-2]) * np.arange(1, padding + 1)[:, None]
    padded = np.concatenate([head, points, tail])
    offsets = np.arange(-reach, reach + 1)
    weights = exact.exp(-0.5 / (sigma * sigma) * (offsets * offsets))
    weights /= weights.sum()
    total = np.zeros_like(points)
    for offset_, weight in zip(offsets.tolist(), weights.tolist(), strict=True):
        total += weight * padded[padding + offset_ : padding + offset_ + len(points)]
    return total


def headings(points: Points) -> Float[np.ndarray, "K"]:
    """Continuous (unwrapped) direction of travel at each point, radians."""
    tangent = np.gradient(points, axis=0)
    return np.unwrap(exact.arctan2(tangent[:, 1], tangent[:, 0]))


def curvatures(points: Points) -> Float[np.ndarray, "K"]:
    """Signed curvature in 1/m, positive when turning left."""
    return np.gradient(headings(points), arc_lengths(points))


def corners(poses: Float[np.ndarray, "A 3"], half: Float[np.ndarray, "A 2"]) -> Float[np.ndarray, "A 4 2"]:
    """Footprint corners of boxes given by centre pose (x, y, heading) and half length and width."""
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    local = signs * half[:, None]
    cos, sin = (part[:, None] for part in exact.cos_sin(poses[:, 2]))
    x = cos * local[..., 0] - sin * local[..., 1]
    y = sin * local[..., 0] + cos * local[..., 1]
    return np.stack([x, y], axis=-1) + poses[:, None, :2]


def separated(
    points: Float[np.ndarray, "M 4 2"], poses: Float[np.ndarray, "M 3"], half: Float[np.ndarray, "M 2"]
) -> Bool[np.ndarray, " M"]:
    """Whether a side of each box has all four points of the other before it.

    Args:
        points: corners of the other boxes.
        poses: centre x, y and heading of each box.
        half: half length and half width of each.
    """
    relative = points - poses[:, None, :2]
    cos, sin = (part[:, None] for part in exact.cos_sin(poses[:, 2]))
    along = cos * relative[..., 0] + sin * relative[..., 1]
    aside = cos * relative[..., 1] - sin * relative[..., 0]
    result = np.zeros(len(points), bool)
    for values, extent in ((along, half[:, 0]), (aside, half[:, 1])):
        result |= (values.min(axis=1) >= extent) | (values.max(axis=1) <= -extent)
    return result


def overlapping_pairs(
    poses: Float[np.ndarray, "A 3"], half: Float[np.ndarray, "A 2"]
) -> Int[np.ndarray, "M 2"]:
    """Pairs (a < b) of oriented rectangles that overlap, by the separating axis theorem.

    Args:
        poses: centre x, y and heading of each rectangle.
        half: half length and half width of each.
    """
    radii = exact.norm(half)
    pairs = cKDTree(poses[:, :2]).query_pairs(2 * radii.max(), output_type="ndarray")
    apart = exact.norm(poses[pairs[:, 0], :2] - poses[pairs[:, 1], :2]) > radii[pairs].sum(axis=1)
    pairs = pairs[~apart]
    points = corners(poses, half)
    separated = np.zeros(len(pairs), dtype=bool)
    for first, second in ((0, 1), (1, 0)):
        own, other = pairs[:, first], pairs[:, second]
        relative = points[other] - poses[own, None, :2]
        cos, sin = (part[:, None] for part in exact.cos_sin(poses[own, 2]))
        along = cos * relative[..., 0] + sin * relative[..., 1]
        aside = cos * relative[..., 1] - sin * relative[..., 0]
        for values, extent in ((along, half[own, 0]), (aside, half[own, 1])):
            separated |= (values.min(axis=1) > extent) | (values.max(axis=1) < -extent)
    return pairs[~separated]

"""Convex shapes on a raster, all of them at once: where each scan line enters and leaves a shape.

An edge of a shape is an affine function along a scan line, not negative inside; so a scan line cuts a convex
shape in one interval, and thousands of shapes need a handful of array operations instead of a loop.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


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

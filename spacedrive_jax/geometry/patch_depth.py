"""Pools a depth map onto a patch grid with the published window rule."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

Pooling = Literal["min", "median", "mean"]


@functools.lru_cache(maxsize=64)
def windows(size: int, cells: int) -> tuple[Int[np.ndarray, "cells K"], Bool[np.ndarray, "cells K"]]:
    """Indices of every window along one axis, padded to the widest window.

    Window i covers [round(i*size/cells), round((i+1)*size/cells)), with Python's round (half to even), as
    in the published code. A window can be empty where cells > size.

    Returns:
        indices: in [0, size), padding repeats a valid index; valid: which of them belong to the window.
    """
    edges = np.array([round(i * size / cells) for i in range(cells + 1)])
    start, stop = edges[:-1], edges[1:]
    steps = np.arange(max(1, int((stop - start).max())))
    indices = start[:, None] + steps[None, :]
    valid = indices < stop[:, None]
    return np.minimum(indices, size - 1), valid


def pool_depth(
    depth: Float[Any, "*B H W"], grid: tuple[int, int], pooling: Pooling = "min"
) -> Float[Any, "*B h w"]:
    """Pools depth over the windows of a patch grid; jitted by its callers, or plain numpy on the host.

    Args:
        depth: metres; a jax or a numpy array decides where the work is done.
        grid: (h, w) cells.
        pooling: `min` (the paper's), `median` (the lower of two middle values, as torch.median) or `mean`.

    Returns:
        One depth per cell, metres; 0 for an empty window, as in the published code.
    """
    xp: ModuleType = jnp if isinstance(depth, jax.Array) else np
    rows, row_valid = windows(depth.shape[-2], grid[0])
    columns, column_valid = windows(depth.shape[-1], grid[1])
    # Rows first, then columns: (..., h, Kr, w, Kc) -> (..., h, w, Kr*Kc)
    gathered = depth[..., rows[:, :, None, None], columns[None, None, :, :]]
    gathered = xp.swapaxes(gathered, -3, -2)
    gathered = gathered.reshape(*gathered.shape[:-2], -1)
    valid = (row_valid[:, None, :, None] & column_valid[None, :, None, :]).reshape(*grid, -1)
    count = valid.sum(-1)
    if pooling == "mean":
        return xp.where(valid, gathered, 0).sum(-1) / np.maximum(count, 1)
    far = xp.where(valid, gathered, xp.inf)
    if pooling == "min":
        pooled = far.min(-1)
    else:
        middle = np.maximum(count - 1, 0)[..., None] // 2
        index = xp.broadcast_to(middle, (*gathered.shape[:-1], 1))
        pooled = xp.take_along_axis(xp.sort(far, axis=-1), index, axis=-1)[..., 0]
    return xp.where(count > 0, pooled, 0).astype(depth.dtype)

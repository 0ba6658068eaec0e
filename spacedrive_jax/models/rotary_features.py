"""Rotary encoding of 3D points on feature vectors (paper table 4, `use_rope` of the published code)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BASE = 10000.0
"""Ratio of the frequencies; the published code has no option for it."""


def axis_dims(width: int) -> tuple[int, int, int]:
    """Channels that x, y and z rotate: thirds of the width, the remainder to the first axes."""
    return tuple(width // 3 + (axis < width % 3) for axis in range(3))  # type: ignore[return-value]


def inverse_frequencies(width: int, base: float = BASE) -> Float[np.ndarray, "F"]:
    """Radians per metre, one table for all axes, made for the even part of the widest axis."""
    rotated = axis_dims(width)[0] // 2 * 2
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    return (1.0 / (base ** exponents.astype(np.float64))).astype(np.float32)


def rotate_features(
    features: Float[Array, "... D"], points: Float[Array, "... 3"], base: float = BASE
) -> Float[Array, "... D"]:
    """Rotates features by their points.

    Each axis turns its own third of the channels; channel i of a third's first half pairs with channel i of
    its second half, and an odd last channel stays as it is.

    Args:
        features: any width.
        points: metres, ego frame.
        base: ratio of the frequencies.
    """
    frequencies = jnp.asarray(inverse_frequencies(features.shape[-1], base))
    parts, start = [], 0
    for axis, dims in enumerate(axis_dims(features.shape[-1])):
        half = dims // 2
        part = features[..., start : start + dims].astype(jnp.float32)
        angles = points[..., axis : axis + 1].astype(jnp.float32) * frequencies[:half]
        first, second = part[..., :half], part[..., half : 2 * half]
        cosine, sine = jnp.cos(angles), jnp.sin(angles)
        parts += [first * cosine - second * sine, second * cosine + first * sine, part[..., 2 * half :]]
        start += dims
    return jnp.concatenate(parts, axis=-1).astype(features.dtype)

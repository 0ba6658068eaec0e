"""Sin-cos encoding of 3D coordinates: the paper's default phi (section 3.2; `PE` in the published code)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def axis_width(model_width: int) -> int:
    """Channels per coordinate axis: the smallest even number whose triple covers `model_width`.

    Three axes of this width are concatenated and cut to the model width, so the z axis may lose its last
    channels (64 -> 22 per axis, of which z keeps 20), as in the published code.
    """
    return 2 * math.ceil(model_width / 6)


def frequencies(width: int, base: float = 20000.0, scaling: float = 1.0) -> Float[np.ndarray, "F"]:
    """Angular frequencies of one axis: scaling * base^(-2k/width), radians per metre.

    Args:
        width: channels of the axis (even); half of them are sines, half cosines.
        base: ratio between the highest and (almost) the lowest frequency; the paper uses 20000.
        scaling: multiplies every frequency.
    """
    # At 100 rad a last-bit difference in a frequency moves an angle by 1e-5, so the published rounding is
    # kept: float32 exponent, the power rounded to float32, then its float32 reciprocal.
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    powers = (float(base) ** exponents.astype(np.float64)).astype(np.float32)
    return np.float32(scaling) / powers


def encode(
    points: Float[Array, "... 3"], axis_frequencies: Float[Array, "*axes F"], model_width: int
) -> Float[Array, "... D"]:
    """Encodes points, unscaled (alpha is the caller's).

    Args:
        points: metres, ego frame.
        axis_frequencies: radians per metre, from `frequencies`; one table (F,) for all axes or one each
            (3, F).
        model_width: D.

    Returns:
        Layout x | y | z, each interleaved sin, cos, cut or zero-padded to D; float32 (angles lose meaning
        in bfloat16).
    """
    angles = points.astype(jnp.float32)[..., None] * jnp.asarray(axis_frequencies, jnp.float32)
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)  # (..., 3, F, 2)
    encoding = waves.reshape(*points.shape[:-1], -1)[..., :model_width]
    missing = model_width - encoding.shape[-1]
    return jnp.pad(encoding, [(0, 0)] * (encoding.ndim - 1) + [(0, missing)])

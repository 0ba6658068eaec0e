"""Frequency tables of the other two wave encodings of the published code: NeRF and FoNE.

The default table, sin-cos, is `spacedrive_jax.positional.sincos.frequencies`; all three are encoded by
`spacedrive_jax.positional.sincos.encode`.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float


def nerf_frequencies(width: int, octaves: float = 10.0) -> Float[np.ndarray, "F"]:
    """Rising frequencies pi * 2^(octaves * 2k/width), radians per metre (Mildenhall et al. 2020).

    Args:
        width: channels of one axis (even).
        octaves: doublings from the lowest to (almost) the highest frequency.
    """
    # At thousands of radians the published rounding matters: float32 products, in this order.
    exponents = np.float32(octaves) * np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    powers = 2.0 ** exponents.astype(np.float64)
    return np.float32(np.pi) * powers.astype(np.float32)


def fone_frequencies(encoding_width: int, base: float = 10.0, scaling: float = 1.0) -> Float[np.ndarray, "F"]:
    """Falling frequencies 2 pi * scaling * base^-k: one wave per digit (FoNE, Zhou et al. 2025).

    Args:
        encoding_width: channels of the whole encoding, three axes of sines and cosines; what lies behind
            them in the model width stays zero.
        base: of the digits.
        scaling: multiplies every frequency; 1 gives the units digit a period of one metre.
    """
    digits = np.arange(math.ceil(encoding_width / 6), dtype=np.float64)
    return (2 * np.pi * scaling * float(base) ** -digits).astype(np.float32)

"""Rotary position embeddings: 1-D and multimodal (three axes) for the decoder, 2-D for the vision tower.

Channels are paired across the two halves of a head (channel j with j + head_dim / 2), as in LLaMA.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class RotaryTables(NamedTuple):
    """Cosines and sines of the rotary angles, float32, half a head wide."""

    cos: Float[Array, "... S half"]
    sin: Float[Array, "... S half"]


def inverse_frequencies(count: int, theta: float) -> Float[np.ndarray, " count"]:
    """Angular frequencies theta ** (-j / count) for j = 0 .. count - 1, radians per position."""
    exponents = np.arange(0, 2 * count, 2, dtype=np.float32) / np.float32(2 * count)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def decoder_rotary(positions: Int[Array, "A B S"], sections: tuple[int, ...], theta: float) -> RotaryTables:
    """Rotary tables of the decoder: each section of the frequencies follows its own position axis.

    With three sections this is the multimodal embedding of Qwen2-VL (Wang et al. 2024, section 2.1); with
    one it is the ordinary 1-D embedding on the first axis.

    Args:
        positions: Position of every token on each axis (time, row, column); text has the same on all.
        sections: Number of frequencies that follow each axis; sums to half of the head size.
        theta: Base of the frequencies.

    Returns:
        Tables of shape (B, S, head_dim / 2).
    """
    axis_of_frequency = np.repeat(np.arange(len(sections)), sections)
    frequencies = inverse_frequencies(sum(sections), theta)
    per_frequency = jnp.moveaxis(positions.astype(jnp.float32)[axis_of_frequency], 0, -1)
    angles = per_frequency * frequencies
    return RotaryTables(jnp.cos(angles), jnp.sin(angles))


def vision_rotary(
    rows: Int[np.ndarray, " P"], columns: Int[np.ndarray, " P"], head_dim: int, theta: float = 10000.0
) -> RotaryTables:
    """Rotary tables of the vision tower: a quarter of the channels follows the row, a quarter the column.

    Args:
        rows: Patch row of every patch in the sequence.
        columns: Patch column of every patch in the sequence.
        head_dim: Channels of a head.
        theta: Base of the frequencies.

    Returns:
        Tables of shape (P, head_dim / 2).
    """
    frequencies = inverse_frequencies(head_dim // 4, theta)
    angles = np.concatenate(
        [axis.astype(np.float32)[:, None] * frequencies for axis in (rows, columns)], axis=-1
    )
    return RotaryTables(jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles)))


def rotate(heads: Float[Array, "... S K H"], tables: RotaryTables) -> Float[Array, "... S K H"]:
    """Turns every head by its token's angles, in float32, and returns the dtype that came in."""
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cos, sin = tables.cos[..., None, :], tables.sin[..., None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(heads.dtype)

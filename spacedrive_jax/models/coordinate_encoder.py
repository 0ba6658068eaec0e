"""The universal coordinate encoder phi with its scale alpha, and the encoder of the ego status.

With it the rotary encoding of points on feature vectors (paper table 4, `use_rope` of the published code).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from spacedrive_jax.bounds import FROM_ZERO, POSITIVE, Bound, Bounds, check_bounds
from spacedrive_jax.constants import NUM_PAST, NUM_TARGET_POINTS
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.partitioning import FROM_WIDTH

Linear = functools.partial(nnx.Linear, precision=jax.lax.Precision.HIGHEST)
"""A layer that reads or writes metres. Left to themselves TPUs round its float32 inputs to bfloat16, 60 m to
a quarter of a metre, and GPUs to TF32."""

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
        along = points[..., axis : axis + 1].astype(jnp.float32)
        angles = along * jax.lax.broadcast_to_rank(frequencies[:half], along.ndim)
        first, second = part[..., :half], part[..., half : 2 * half]
        cosine, sine = jnp.cos(angles), jnp.sin(angles)
        parts += [first * cosine - second * sine, second * cosine + first * sine, part[..., 2 * half :]]
        start += dims
    return jnp.concatenate(parts, axis=-1).astype(features.dtype)


# Sin-cos encoding of 3D coordinates: the paper's default phi (section 3.2; `PE` in the published code).


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
    frequencies = jnp.asarray(axis_frequencies, jnp.float32)
    angles = points.astype(jnp.float32)[..., None] * jax.lax.broadcast_to_rank(frequencies, points.ndim + 1)
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)  # (..., 3, F, 2)
    encoding = waves.reshape(*points.shape[:-1], -1)[..., :model_width]
    missing = model_width - encoding.shape[-1]
    return jnp.pad(encoding, [(0, 0)] * (encoding.ndim - 1) + [(0, missing)])


# Frequency tables of the other two wave encodings of the published code: NeRF and FoNE.


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


EncoderKind = Literal["sincos", "nerf", "fone", "mlp"]


@dataclasses.dataclass(frozen=True)
class CoordinateEncoderConfig:
    """How 3D points become embeddings (paper section 3.2, tables 4, 5 and E)."""

    kind: EncoderKind = "sincos"
    """`sincos` (the paper's), `nerf`, `fone`, or `mlp`: a learned Linear(3, D) -> ReLU -> Linear(D, D)."""
    base: float = 20000.0
    """Ratio of the sin-cos frequencies; octaves for `nerf` (10 in its paper); base of the digits for
    `fone`."""
    frequency_scaling: float = 1.0
    """Multiplies the frequencies of `sincos` and `fone`."""
    fone_width: int = 24
    """Channels that `fone` fills; the rest of the model width stays zero."""
    learnable_frequencies: bool = False
    """Learn a table of frequencies for each axis, starting at the fixed one (not in the paper, which names
    it as future work)."""
    alpha: float = 0.1
    """Initial scale of every encoding; the learned `mlp` has no scale."""
    learnable_alpha: bool = True
    """Learn alpha (one scalar shared by patches, past positions and text) or keep it fixed."""

    BOUNDS: ClassVar[Bounds] = {
        "base": POSITIVE,
        "frequency_scaling": POSITIVE,
        "fone_width": Bound(6),
        "alpha": FROM_ZERO,
    }

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model.encoder")


def frequency_table(config: CoordinateEncoderConfig, model_width: int) -> Float[np.ndarray, "F"]:
    """The fixed frequencies of a wave encoding, radians per metre, shared by the axes."""
    width = axis_width(model_width)
    if config.kind == "nerf":
        return nerf_frequencies(width, config.base)
    if config.kind == "fone":
        return fone_frequencies(config.fone_width, config.base, config.frequency_scaling)
    return frequencies(width, config.base, config.frequency_scaling)


class CoordinateEncoder(nnx.Module):
    """phi: one encoder for patches, past ego positions and coordinates in the text."""

    def __init__(
        self, config: CoordinateEncoderConfig, model_width: int, *, rngs: nnx.Rngs | None = None
    ) -> None:
        """Builds the encoder.

        Args:
            config: kind and scale.
            model_width: D.
            rngs: random streams (`params`), which only the learned `mlp` draws from.
        """
        self.config = config
        self.model_width = model_width
        self.alpha = nnx.Param(jnp.asarray(config.alpha, jnp.float32)) if config.learnable_alpha else None
        learned = config.kind == "mlp"
        table = frequency_table(config, model_width)
        self.frequencies = nnx.Param(jnp.tile(table, (3, 1))) if config.learnable_frequencies else None
        streams = rngs if rngs is not None else nnx.Rngs(0)
        self.hidden = Linear(3, model_width, rngs=streams) if learned else None
        self.output = Linear(model_width, model_width, rngs=streams) if learned else None

    def __call__(self, points: Float[Array, "... 3"]) -> Float[Array, "... D"]:
        """Encodes and scales by alpha: (..., 3) metres in the ego frame -> (..., D) float32.

        Raises:
            ConfigError: the last axis is not x, y, z.
        """
        points = jnp.asarray(points)
        if points.shape[-1:] != (3,):
            raise ConfigError(
                f"points of shape {points.shape} are not (..., 3), x y z in metres: waypoints stand on the "
                "ground, z 0"
            )
        return self.scale * self.waves(points) if self.hidden is None else self.learned(points)

    def past(self, points: Float[Array, "... 3"]) -> Float[Array, "... D"]:
        """Past ego positions keep the scaled waves even where an `mlp` encodes all else (fidelity Q34)."""
        return self.scale * self.waves(points)

    @property
    def scale(self) -> Float[Array, ""] | float:
        """The factor on every encoding."""
        return self.config.alpha if self.alpha is None else self.alpha[...]

    def waves(self, points: Float[Array, "... 3"]) -> Float[Array, "... D"]:
        """The unscaled wave encoding."""
        table = (
            jnp.asarray(frequency_table(self.config, self.model_width))
            if self.frequencies is None
            else self.frequencies[...]
        )
        return encode(points, table, self.model_width)

    def learned(self, points: Float[Array, "... 3"]) -> Float[Array, "... D"]:
        """The learned encoding."""
        assert self.hidden is not None
        assert self.output is not None
        return self.output(jax.nn.relu(self.hidden(points.astype(jnp.float32))))


def status_units() -> Float[np.ndarray, "74"]:
    """What is usual of each number of the ego status: by these `ego_units` divides it.

    Two past states and the present one (command, orientation, acceleration, rotation rate, velocity), then
    the two past poses. The orientation is divided by infinity, left out that is: where north lies no driver
    needs, and with it a small model learns the places of its training by heart.
    """
    state = [4.0, *[np.inf] * 4, 3.0, 3.0, 10.0, *[0.2] * 3, *[8.0] * 3]
    pose = np.ones((4, 4))
    pose[:3, 3] = 5.0
    return np.concatenate([np.tile(state, NUM_PAST + 1), np.tile(pose.ravel(), NUM_PAST)]).astype(np.float32)


TARGET_POINT_UNIT = 10.0
"""Metres, for target points beside the ego status."""


LEAST_LEG = 0.01
"""Metres along an axis: target points that are nearer to each other are the same one."""
STRIP = 1.5
"""Metres between the middles of the strips beside the route that the ego feature's MLP reads."""
REACHES = (10.0, 25.0)
"""Metres within which something ahead is told: as exp(-distance / reach), 0 for far away."""


def closeness_along_route(
    points: Float[Array, "... N 3"], target_points: Float[Array, "... points 3"], strips: int
) -> Float[Array, "... closeness"]:
    """How close the nearest point is in each of some strips that run along the route.

    The route is the line from the rear axle through the target points and straight on behind the last. A
    strip reaches `STRIP` to either side of a line beside it; the nearer to its edge, the less a point counts,
    so that no rounding decides what is in it.

    Args:
        points: of the visual tokens, metres, ego frame.
        target_points: the route's next nodes, metres, ego frame; all zero where a sample names none.
        strips: how many, `STRIP` apart, from right to left; with an odd number the middle one is the route's.

    Returns:
        exp(-distance / reach) by distance along the route from the rear axle, one strip behind the other for
        each of `REACHES`; 0 where a strip holds no point, and without a route.
    """
    points = points[..., None, :2].astype(jnp.float32)
    nodes = target_points[..., :2].astype(jnp.float32)
    offsets = STRIP * (jnp.arange(strips, dtype=jnp.float32) - (strips - 1) / 2)
    offsets = jax.lax.broadcast_to_rank(offsets, points.ndim)
    starts = jnp.concatenate([jnp.zeros_like(nodes[..., :1, :]), nodes[..., :-1, :]], axis=-2)
    legs = nodes - starts
    length = jnp.linalg.norm(legs, axis=-1)
    # A route that ends repeats its last node: such a leg has no direction, and the one before it goes on.
    # A difference has the same bits on every processor, a length may not have.
    there = jnp.max(jnp.abs(legs), axis=-1) > LEAST_LEG
    last = there & ~jnp.flip(jnp.cumsum(jnp.flip(there, -1), -1) > 1, -1)
    direction = legs / jnp.where(there, length, 1.0)[..., None]
    begin = jnp.cumsum(length, axis=-1) - length
    relative = points - starts[..., None, :, :]
    along = jnp.sum(relative * direction[..., None, :, :], axis=-1)
    aside = direction[..., None, :, 0] * relative[..., 1] - direction[..., None, :, 1] * relative[..., 0]
    foot = jnp.clip(along, 0.0, jnp.where(last, jnp.inf, length)[..., None, :])
    apart = jnp.hypot((along - foot)[..., None], aside[..., None] - offsets)
    weight = jnp.clip(1.0 - apart / STRIP, 0.0, 1.0) * there[..., None, :, None].astype(jnp.float32)
    distance = (begin[..., None, :] + foot)[..., None]
    near = [jnp.max(weight * jnp.exp(-distance / reach), axis=(-3, -2)) for reach in REACHES]
    return jnp.concatenate(near, axis=-1)


class EgoStatusEncoder(nnx.Module):
    """The ego feature token: a two-layer MLP over the 74 ego status numbers (SpaceDrive+)."""

    def __init__(
        self,
        status_size: int,
        model_width: int,
        *,
        units: bool = False,
        target_points: bool = False,
        strips: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws a fresh encoder.

        Args:
            status_size: E.
            model_width: D.
            units: divide every number by what is usual of it.
            target_points: read the target points as well.
            strips: read how close the nearest point is in so many strips along the route as well.
            rngs: random streams (`params`).
        """
        self.units, self.reads_target_points, self.strips = units, target_points, strips
        inputs = status_size + 2 * NUM_TARGET_POINTS * target_points + len(REACHES) * strips
        self.hidden = Linear(inputs, model_width, rngs=rngs)
        self.output = Linear(model_width, model_width, kernel_metadata=FROM_WIDTH, rngs=rngs)

    def __call__(
        self,
        status: Float[Array, "... E"],
        target_points: Float[Array, "... points 3"] | None = None,
        closeness: Float[Array, "... closeness"] | None = None,
    ) -> Float[Array, "... D"]:
        """(..., 74) ego status; (..., 2, 3) metres where it reads target points, and what
        `closeness_along_route` gives where it reads strips -> (..., D) float32.
        """
        status = status.astype(jnp.float32)
        if self.units:
            status = status / jax.lax.broadcast_to_rank(status_units(), status.ndim)
        if self.reads_target_points:
            assert target_points is not None
            flat = target_points[..., :2].reshape(*target_points.shape[:-2], -1) / TARGET_POINT_UNIT
            status = jnp.concatenate([status, flat], axis=-1)
        if self.strips:
            assert closeness is not None
            status = jnp.concatenate([status, closeness], axis=-1)
        return self.output(jax.nn.relu(self.hidden(status)))

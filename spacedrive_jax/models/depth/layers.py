"""What the depth networks share: resizing as PyTorch does it, convolutions, and what they predict."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spacedrive_jax.models.config import ComputeConfig

# Image resizing with PyTorch's conventions, where `jax.image.resize` differs from them or costs more.
#
# All functions resize the two axes before the channels, (..., H, W, C), to a static size. The sampling
# positions and weights are constants, computed on the host in float64.


CUBIC_A = -0.75
"""PyTorch's cubic convolution parameter (`jax.image.resize` and Pillow use -0.5)."""

Alignment = Literal["half_pixel", "corners"]
"""Which points of the two grids coincide: the images' borders, or the centres of the corner pixels."""


def sample_positions(source: int, target: int, alignment: Alignment) -> Float[np.ndarray, "T"]:
    """Where each target pixel lies on the source axis, in source pixel indices.

    Args:
        source: pixels of the source axis.
        target: pixels of the target axis.
        alignment: `half_pixel` is PyTorch's align_corners=False, `corners` its align_corners=True.
    """
    index = np.arange(target, dtype=np.float64)
    if alignment == "half_pixel":
        return (index + 0.5) * source / target - 0.5
    return index * ((source - 1) / (target - 1) if target > 1 else 0.0)


def bilinear(
    x: Float[Array, "*B H W C"], size: tuple[int, int], alignment: Alignment = "half_pixel"
) -> Float[Array, "*B h w C"]:
    """Bilinear resize without antialiasing, edges clamped.

    Two taps per axis: far cheaper at these sizes than the dense weight matrices of `jax.image.resize`.
    """
    for axis, target in ((-3, size[0]), (-2, size[1])):
        if x.shape[axis] != target:
            x = _two_taps(x, axis, target, alignment)
    return x


def bicubic(x: Float[Array, "*B H W C"], size: tuple[int, int]) -> Float[Array, "*B h w C"]:
    """Bicubic resize (a = -0.75, half-pixel, no antialiasing, edge pixels repeated), for small maps."""
    rows = cubic_weights(x.shape[-3], size[0]).astype(x.dtype)
    columns = cubic_weights(x.shape[-2], size[1]).astype(x.dtype)
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum("hH,...HWC->...hWC", rows, x, precision=highest)
    return jnp.einsum("wW,...hWC->...hwC", columns, x, precision=highest)


def cubic_weights(source: int, target: int) -> Float[np.ndarray, "T S"]:
    """The matrix of a bicubic resize of one axis; rows sum to one."""
    position = sample_positions(source, target, "half_pixel")
    base = np.floor(position).astype(int)
    weights = np.zeros((target, source))
    for tap in range(-1, 3):
        column = np.clip(base + tap, 0, source - 1)
        np.add.at(weights, (np.arange(target), column), _cubic_kernel(np.abs(position - (base + tap))))
    return weights


def _cubic_kernel(distance: Float[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
    """Keys' cubic convolution kernel at a distance in [0, 2]."""
    near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * CUBIC_A - 4 * CUBIC_A
    return np.where(distance <= 1, near, far)


def _two_taps(x: Float[Array, "..."], axis: int, target: int, alignment: Alignment) -> Float[Array, "..."]:
    source = x.shape[axis]
    position = np.clip(sample_positions(source, target, alignment), 0, source - 1)
    low: Int[np.ndarray, "T"] = np.minimum(np.floor(position).astype(int), max(source - 2, 0))
    fraction = (position - low).astype(np.float32).reshape(-1, *[1] * (-axis - 1)).astype(x.dtype)
    first = jnp.take(x, low, axis=axis)
    second = jnp.take(x, np.minimum(low + 1, source - 1), axis=axis)
    return first * (1 - fraction) + second * fraction


# Convolutions shared by the two depth decoders.


def convolution(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    compute: ComputeConfig,
    rngs: nnx.Rngs,
    padding: str | tuple[tuple[int, int], ...] = "SAME",
    stride: int = 1,
    bias: bool = True,
) -> nnx.Conv:
    """A convolution over (B, H, W, C) in the compute dtype."""
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel, kernel),
        strides=stride,
        padding=padding,
        use_bias=bias,
        dtype=compute.activation_dtype,
        param_dtype=compute.storage_dtype,
        rngs=rngs,
    )


class PatchUpsample(nnx.Module):
    """A transposed convolution whose kernel equals its stride: every pixel becomes a k x k block."""

    def __init__(
        self, in_channels: int, out_channels: int, factor: int, *, compute: ComputeConfig, rngs: nnx.Rngs
    ) -> None:
        draw = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=-1)
        shape = (in_channels, factor, factor, out_channels)
        self.kernel = nnx.Param(draw(rngs.params(), shape, compute.storage_dtype))
        self.bias = nnx.Param(jnp.zeros(out_channels, compute.storage_dtype))
        self.dtype = compute.activation_dtype

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w E"]:
        """Upsamples by the kernel's size."""
        kernel = self.kernel[...].astype(self.dtype)
        blocks = jnp.einsum("bhwc,cije->bhiwje", x.astype(self.dtype), kernel)
        batch, rows, factor, columns, _, channels = blocks.shape
        spread = blocks.reshape(batch, rows * factor, columns * factor, channels)
        return spread + self.bias[...].astype(self.dtype)


class DepthPrediction(NamedTuple):
    """Depth of a batch of images, at the images' size."""

    depth: Float[Array, "B H W"]
    """z in the camera frame, metres."""
    confidence: Float[Array, "B H W"] | None
    """UniDepth's estimate of its error in log space: it ranks the pixels of one image, higher is worse.
    None where the network gives none."""
    intrinsics: Float[Array, "B 3 3"] | None
    """As the network sees the camera, pixels; None where it has no notion of one."""

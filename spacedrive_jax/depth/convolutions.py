"""Convolutions shared by the two depth decoders."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from spacedrive_jax.vlm.config import ComputeConfig


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

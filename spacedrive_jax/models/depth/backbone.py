"""What both depth networks share: resizing as PyTorch does it, convolutions, DINOv2, what they predict.

DINOv2 (Oquab et al. 2024) is the vision transformer under both. Blocks are stacked and scanned; the outputs
after some of them ("taps") are what the depth decoders read.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spacedrive_jax.bounds import COUNT, POSITIVE, SIDE, Bounds, check_bounds
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.attention import IMAGE_AXES, attend
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.layers import scan_layers, stack_layers

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


IMAGE_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
"""ImageNet's, RGB, of values in [0, 1]."""
IMAGE_STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Architecture. The defaults are ViT-S/14."""

    width: int = 384
    depth: int = 12
    heads: int = 6
    taps: tuple[int, ...] = (3, 6, 9, 12)
    """After how many blocks an output is taken; the last is `depth`."""
    patch_size: int = 14
    position_grid: tuple[int, int] = (37, 37)
    """Patches that the position table was made for; other grids resize it."""
    mlp_ratio: int = 4
    block_norm_eps: float = 1e-6
    final_norm_eps: float = 1e-6

    BOUNDS: ClassVar[Bounds] = {
        "width": SIDE,
        "depth": SIDE,
        "heads": SIDE,
        "taps": COUNT,
        "patch_size": SIDE,
        "position_grid": SIDE,
        "mlp_ratio": SIDE,
        "block_norm_eps": POSITIVE,
        "final_norm_eps": POSITIVE,
    }

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS)
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} must be a multiple of heads {self.heads}")
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or self.taps[-1] != self.depth:
            raise ConfigError(f"taps {self.taps} must rise from 1 or more to depth {self.depth}")

    @classmethod
    def named(cls, name: str, **changes: Any) -> Dinov2Config:
        """The published sizes.

        Args:
            name: `vits14`, `vitb14` or `vitl14`.
            changes: fields to replace.
        """
        return dataclasses.replace(SIZES[name], **changes)


SIZES = {
    "vits14": Dinov2Config(),
    "vitb14": Dinov2Config(width=768, heads=12),
    "vitl14": Dinov2Config(width=1024, depth=24, heads=16, taps=(6, 12, 18, 24)),
}


def layer_norm(features: int, eps: float, *, compute: ComputeConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm with the two-pass variance that PyTorch uses; statistics in float32."""
    return nnx.LayerNorm(
        features,
        epsilon=eps,
        use_fast_variance=False,
        dtype=compute.activation_dtype,
        param_dtype=compute.storage_dtype,
        rngs=rngs,
    )


def linear(
    in_features: int, out_features: int, *, compute: ComputeConfig, rngs: nnx.Rngs, bias: bool = True
) -> nnx.Linear:
    """A linear layer in the compute dtype."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=bias,
        dtype=compute.activation_dtype,
        param_dtype=compute.storage_dtype,
        rngs=rngs,
    )


class Dinov2Block(nnx.Module):
    """x + g1 * attention(norm(x)), then x + g2 * mlp(norm(x))."""

    def __init__(self, config: Dinov2Config, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        width = config.width
        make = functools.partial(linear, compute=compute, rngs=rngs)
        norm = functools.partial(layer_norm, width, config.block_norm_eps, compute=compute, rngs=rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.qkv = make(width, 3 * width)
        self.attention_out = make(width, width)
        self.attention_scale = nnx.Param(jnp.ones(width, compute.storage_dtype))
        self.mlp_in = make(width, config.mlp_ratio * width)
        self.mlp_out = make(config.mlp_ratio * width, width)
        self.mlp_scale = nnx.Param(jnp.ones(width, compute.storage_dtype))
        self.heads = config.heads
        self.attention_choice = compute.attention

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        """Runs the block."""
        qkv = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = (qkv[:, :, index] for index in range(3))
        attended = attend(q, k, v, choice=self.attention_choice, axes=IMAGE_AXES)
        x = x + self.attention_scale[...].astype(x.dtype) * self.attention_out(attended.reshape(x.shape))
        hidden = jax.nn.gelu(self.mlp_in(self.mlp_norm(x)), approximate=False)
        return x + self.mlp_scale[...].astype(x.dtype) * self.mlp_out(hidden)


class Dinov2(nnx.Module):
    """The backbone."""

    def __init__(self, config: Dinov2Config, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws a fresh backbone.

        Args:
            config: architecture.
            compute: dtypes, rematerialisation, attention kernel.
            rngs: random streams (`params`).
        """
        self.config, self.compute = config, compute
        patch = config.patch_size
        self.patch_embedding = linear(patch * patch * 3, config.width, compute=compute, rngs=rngs)
        draw = jax.nn.initializers.truncated_normal(0.02)
        rows, columns = config.position_grid
        dtype = compute.storage_dtype
        self.class_token = nnx.Param(draw(rngs.params(), (config.width,), dtype))
        self.class_position = nnx.Param(draw(rngs.params(), (config.width,), dtype))
        self.positions = nnx.Param(draw(rngs.params(), (rows, columns, config.width), dtype))
        self.blocks = stack_layers(
            lambda streams: Dinov2Block(config, compute=compute, rngs=streams), config.depth, rngs
        )
        self.final_norm = layer_norm(config.width, config.final_norm_eps, compute=compute, rngs=rngs)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patch rows and columns of an image.

        Raises:
            ConfigError: the image is not a whole number of patches.
        """
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ConfigError(f"image {height}x{width} must be a multiple of {patch} on both sides")
        return height // patch, width // patch

    def resized_positions(self, grid: tuple[int, int]) -> Float[Array, "P D"]:
        """The position table of the patches on another grid, row-major."""
        table = self.positions[...].astype(jnp.float32)
        if grid != self.config.position_grid:
            table = bicubic(table, grid)
        return table.reshape(-1, table.shape[-1])

    def embed(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B P D"]:
        """Normalised images to the tokens that enter the first block: class token, then row-major patches."""
        batch, height, width, _ = images.shape
        rows, columns = self.grid(height, width)
        patch = self.config.patch_size
        # A convolution whose kernel equals its stride is a matrix product over patches.
        patches = images.reshape(batch, rows, patch, columns, patch, 3).swapaxes(2, 3)
        tokens = self.patch_embedding(patches.reshape(batch, rows * columns, -1))
        tokens = tokens + self.resized_positions((rows, columns)).astype(tokens.dtype)
        first = (self.class_token[...] + self.class_position[...]).astype(tokens.dtype)
        return jnp.concatenate([jnp.broadcast_to(first, (batch, 1, first.size)), tokens], axis=1)

    def block_outputs(self, tokens: Float[Array, "B P D"]) -> Float[Array, "T B P D"]:
        """The outputs after the tapped blocks, before the final norm.

        Every block writes into the slot of the next tap, so the tapped block is the last to write there; only
        the taps are kept, not all layers.
        """
        slots = np.searchsorted(self.config.taps, np.arange(1, self.config.depth + 1)).astype(np.int32)

        def apply(block: Dinov2Block, carry: Any, slot: Any) -> tuple[Any, None]:
            x, taps = carry
            x = block(x)
            return (x, jax.lax.dynamic_update_index_in_dim(taps, x, slot, 0)), None

        taps = jnp.zeros((len(self.config.taps), *tokens.shape), tokens.dtype)
        (_, taps), _ = scan_layers(self.blocks, apply, (tokens, taps), jnp.asarray(slots), self.compute)
        return taps

    def __call__(
        self, images: Float[Array, "B H W 3"]
    ) -> tuple[Float[Array, "T B h w D"], Float[Array, "T B D"]]:
        """Encodes normalised images.

        Args:
            images: RGB, mean and standard deviation normalised, sides a multiple of the patch size.

        Returns:
            Patch features and class tokens of every tap, after the final norm.
        """
        outputs = self.final_norm(self.block_outputs(self.embed(images)))
        rows, columns = self.grid(*images.shape[1:3])
        features = outputs[:, :, 1:].reshape(*outputs.shape[:2], rows, columns, -1)
        return features, outputs[:, :, 0]

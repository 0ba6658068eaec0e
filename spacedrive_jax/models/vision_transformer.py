"""Vision transformers: what CLIP, SigLIP, InternViT and Qwen3-VL's tower share.

Pre-norm blocks with full attention over the tokens of an image, and the way from an image to patches and from
patches to fewer, wider tokens. What differs (class token, positions, norms around the stack) is the family's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.attention import IMAGE_AXES, attend
from spacedrive_jax.models.config import ComputeConfig, VisionConfig
from spacedrive_jax.models.layers import LayerNorm, Projection, parameter
from spacedrive_jax.models.partitioning import constrain
from spacedrive_jax.models.positions import RotaryTables, rotate

Activation = Callable[[Float[Array, "..."]], Float[Array, "..."]]


class VisionSelfAttention(nnx.Module):
    """Self-attention over all tokens of an image; queries, keys and values from three products or one."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        qkv_bias: bool = True,
        fused_qkv: bool = False,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
    ) -> None:
        heads, names = (config.num_heads, config.head_dim), ("vision_heads", "head_dim")
        model, outer = (config.hidden_size,), ("vision_embed",)
        make = functools.partial(Projection, compute=compute, rngs=rngs)
        self.fused_qkv = fused_qkv
        if fused_qkv:
            self.qkv = make(model, (3, *heads), outer, (None, *names), bias=qkv_bias)
        else:
            self.q = make(model, heads, outer, names, bias=qkv_bias)
            self.k = make(model, heads, outer, names, bias=qkv_bias)
            self.v = make(model, heads, outer, names, bias=qkv_bias)
        self.o = make(heads, model, names, outer, bias=True)
        self.attention_choice = compute.attention

    def __call__(self, x: Float[Array, "I P D"], rotary: RotaryTables | None = None) -> Float[Array, "I P D"]:
        """Attends over the whole image, queries and keys turned where there are angles."""
        q, k, v = jnp.moveaxis(self.qkv(x), -3, 0) if self.fused_qkv else (self.q(x), self.k(x), self.v(x))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.o(attend(q, k, v, choice=self.attention_choice, axes=IMAGE_AXES))


class VisionBlock(nnx.Module):
    """One block: x + attention(norm(x)), then x + mlp(norm(x)); both scaled by channel where asked for."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        activation: Activation,
        qkv_bias: bool = True,
        fused_qkv: bool = False,
        layer_scale: float | None = None,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws a block.

        Args:
            config: Sizes and the norms' epsilon.
            activation: Of the MLP, between `up` and `down`.
            qkv_bias: Whether queries, keys and values have biases.
            fused_qkv: Whether the three come from one product.
            layer_scale: First value of the learnt scales on what attention and MLP add (Touvron et al. 2021);
                None for none.
            compute: Dtypes, rematerialisation, attention kernel.
            rngs: Random streams (`params`).
        """
        width, inner = (config.hidden_size,), (config.intermediate_size,)
        norm = functools.partial(
            LayerNorm, config.hidden_size, config.norm_eps, name="vision_embed", compute=compute, rngs=rngs
        )
        make = functools.partial(Projection, bias=True, compute=compute, rngs=rngs)
        self.attention_norm = norm()
        self.attention = VisionSelfAttention(
            config, qkv_bias=qkv_bias, fused_qkv=fused_qkv, compute=compute, rngs=rngs
        )
        self.mlp_norm = norm()
        self.up = make(width, inner, ("vision_embed",), ("vision_mlp",))
        self.down = make(inner, width, ("vision_mlp",), ("vision_embed",))
        self.activation = activation

        def scale() -> nnx.Param | None:
            if layer_scale is None:
                return None
            start = jax.nn.initializers.constant(layer_scale)
            return parameter(
                nnx.Param, start, width, ("vision_embed",), dtype=compute.storage_dtype, rngs=rngs
            )

        self.attention_scale = scale()
        self.mlp_scale = scale()

    def __call__(self, x: Float[Array, "I P D"], rotary: RotaryTables | None = None) -> Float[Array, "I P D"]:
        """Runs the block; the angles are attention's."""
        attended = self.attention(self.attention_norm(x), rotary)
        x = constrain(x + _scaled(attended, self.attention_scale), *_AXES)
        return constrain(x + _scaled(self.mlp(self.mlp_norm(x)), self.mlp_scale), *_AXES)

    def mlp(self, x: Float[Array, "I P D"]) -> Float[Array, "I P D"]:
        """Two layers with the activation between them."""
        return self.down(self.activation(self.up(x)))


_AXES = ("images", None, None)


def _scaled(x: Float[Array, "I P D"], scale: nnx.Param | None) -> Float[Array, "I P D"]:
    return x if scale is None else x * scale[...].astype(x.dtype)


def block_flops(config: VisionConfig, tokens: int) -> int:
    """Operations of one block's forward pass over an image of so many tokens."""
    width = config.hidden_size
    products = 2 * tokens * (4 * width * width + 2 * width * config.intermediate_size)
    return products + 4 * tokens**2 * width


def flatten_patches(
    pixel_values: Num[np.ndarray | Array, "... C H W"], patch_size: int
) -> Num[np.ndarray | Array, "... P K"]:
    """Cuts images, as the published image processors hand them over, into the flattened patches towers take.

    Args:
        pixel_values: Images, normalised or not.
        patch_size: Side of a patch in pixels.

    Returns:
        Patches in row-major order, each channels x rows x columns in one axis.

    Raises:
        ConfigError: If the image does not divide into patches.
    """
    *lead, channels, height, width = pixel_values.shape
    if height % patch_size or width % patch_size:
        raise ConfigError(f"images of {height}x{width} pixels do not divide into patches of {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    cut = pixel_values.reshape(*lead, channels, rows, patch_size, columns, patch_size)
    count = len(lead)
    order = (*range(count), *(count + axis for axis in (1, 3, 0, 2, 4)))
    return cut.transpose(order).reshape(*lead, rows * columns, channels * patch_size**2)


def pixel_shuffle(x: Float[Array, "I P D"], grid: tuple[int, int], factor: int) -> Float[Array, "I V E"]:
    """Makes one token of every factor x factor patches (space to depth; Shi et al. 2016 run backwards).

    Args:
        x: Patches in row-major order.
        grid: Patch rows and columns, multiples of `factor`.
        factor: Side of a token in patches.

    Returns:
        Tokens in row-major order; their channels are those of the patches, row by row.
    """
    (rows, columns), (images, _, width) = grid, x.shape
    cut = x.reshape(images, rows // factor, factor, columns // factor, factor, width)
    return jnp.swapaxes(cut, 2, 3).reshape(images, -1, factor * factor * width)


def check_patches(pixel_values: Float[Array, "I P C"], grid: tuple[int, int], config: VisionConfig) -> None:
    """Refuses pixels that are not the flattened patches of a grid.

    Raises:
        ConfigError: They are not.
    """
    patches = grid[0] * grid[1]
    if pixel_values.ndim != 3 or pixel_values.shape[1:] != (patches, config.patch_channels):
        raise ConfigError(
            f"pixel_values {pixel_values.shape} must be (images, {patches}, {config.patch_channels}): "
            f"flattened patches (`flatten_patches`) of a grid of {grid[0]}x{grid[1]}"
        )

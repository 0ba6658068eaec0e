"""Vision transformers: what CLIP, SigLIP, InternViT and Qwen's towers share.

`VisionTransformer` is the tower of families whose images are squares of one size, `VisionBlock` its block,
which Qwen3-VL's has too; `pixel_shuffle` and `Projector` lead from patches to fewer, wider tokens of the
language model's width; `window_layout` says where patches stand that attend within windows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.attention import IMAGE_AXES, attend
from spacedrive_jax.models.config import ComputeConfig, SquareVisionConfig, VisionConfig
from spacedrive_jax.models.layers import (
    INIT_STD,
    LayerNorm,
    Projection,
    RMSNorm,
    layer_scaled,
    parameter,
    scan_layers,
    stack_layers,
)
from spacedrive_jax.models.partitioning import constrain
from spacedrive_jax.models.positions import RotaryTables, rotate

Activation = Callable[[Float[Array, "..."]], Float[Array, "..."]]


def erf_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by the error function."""
    return jax.nn.gelu(x, approximate=False)


def tanh_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU's approximation by the hyperbolic tangent."""
    return jax.nn.gelu(x, approximate=True)


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
            config: sizes and the norms' epsilon.
            activation: of the MLP, between `up` and `down`.
            qkv_bias: whether queries, keys and values have biases.
            fused_qkv: whether the three come from one product.
            layer_scale: first value of the learnt scales on what attention and MLP add (Touvron et al. 2021);
                None for none.
            compute: dtypes, rematerialisation, attention kernel.
            rngs: random streams (`params`).
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
        x = constrain(x + layer_scaled(attended, self.attention_scale), *_AXES)
        return constrain(x + layer_scaled(self.mlp(self.mlp_norm(x)), self.mlp_scale), *_AXES)

    def mlp(self, x: Float[Array, "I P D"]) -> Float[Array, "I P D"]:
        """Two layers with the activation between them."""
        return self.down(self.activation(self.up(x)))


_AXES = ("images", None, None)


class VisionTransformer(nnx.Module):
    """A tower for square images: patch embedding, learnt positions, pre-norm blocks, norms around them.

    A class token, where there is one, takes part in attention and is dropped.
    """

    def __init__(
        self,
        config: SquareVisionConfig,
        *,
        activation: Activation,
        patch_bias: bool = True,
        class_token: bool = False,
        first_norm: bool = False,
        last_norm: bool = True,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws a fresh tower.

        Args:
            config: architecture.
            activation: see `VisionBlock`, as for `qkv_bias` and `layer_scale`.
            patch_bias: whether the patch embedding has a bias.
            class_token: whether one more token stands before the patches.
            first_norm: whether a norm stands before the blocks.
            last_norm: whether one stands behind them.
            qkv_bias: see `activation`.
            layer_scale: likewise.
            compute: dtypes, rematerialisation, attention kernel.
            rngs: random streams (`params`).
        """
        self.config = config
        self.compute = compute
        width, names = (config.hidden_size,), ("vision_embed",)
        normal = jax.nn.initializers.normal(INIT_STD)
        learnt = functools.partial(parameter, nnx.Param, normal, dtype=compute.storage_dtype, rngs=rngs)
        norm = functools.partial(
            LayerNorm, *width, config.norm_eps, name=names[0], compute=compute, rngs=rngs
        )
        self.patch_embedding = Projection(
            (config.patch_channels,), width, (None,), names, bias=patch_bias, compute=compute, rngs=rngs
        )
        self.class_embedding = learnt(width, names) if class_token else None
        places = config.grid_side**2 + class_token
        self.position_embedding = learnt((places, *width), (None, *names))
        self.first_norm = norm() if first_norm else None
        block = functools.partial(
            VisionBlock,
            config,
            activation=activation,
            qkv_bias=qkv_bias,
            layer_scale=layer_scale,
            compute=compute,
        )
        self.layers = stack_layers(lambda streams: block(rngs=streams), config.depth, rngs)
        self.last_norm = norm() if last_norm else None

    def __call__(self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]) -> Float[Array, "I P D"]:
        """Encodes images.

        Args:
            pixel_values: flattened normalised patches in row-major order (`flatten_patches`).
            grid: patch rows and columns.

        Returns:
            The patches' features in row-major order.

        Raises:
            ConfigError: the tower cannot take the grid, or the pixels do not fit it.
        """
        positions = self.positions(grid)
        check_patches(pixel_values, grid, self.config)
        hidden = self.patch_embedding(constrain(pixel_values, *_AXES))
        if self.class_embedding is not None:
            first = self.class_embedding[...].astype(hidden.dtype)
            first = jnp.broadcast_to(first, (hidden.shape[0], 1, self.config.hidden_size))
            hidden = jnp.concatenate([first, hidden], axis=1)
        hidden = hidden + positions[None].astype(hidden.dtype)
        if self.first_norm is not None:
            hidden = self.first_norm(hidden)
        hidden = self.run_blocks(hidden)
        return hidden if self.class_embedding is None else hidden[:, 1:]

    def positions(self, grid: tuple[int, int]) -> Float[Array, "T D"]:
        """The learnt positions of a grid, that of the class token before them.

        Raises:
            ConfigError: it is another than they are learnt for.
        """
        side, pixels = self.config.grid_side, self.config.image_size
        if tuple(grid) != (side, side):
            raise ConfigError(
                f"image grid {grid[0]}x{grid[1]} must be {side}x{side} patches: this tower's positions are "
                f"learnt for images of {pixels}x{pixels} pixels"
            )
        return self.position_embedding[...]

    def run_blocks(self, hidden: Float[Array, "I T D"]) -> Float[Array, "I T D"]:
        """All blocks, and the norm behind them."""

        def apply(block: VisionBlock, hidden: Any, _: None) -> tuple[Any, None]:
            return block(hidden), None

        hidden, _ = scan_layers(self.layers, apply, hidden, None, self.compute)
        return hidden if self.last_norm is None else self.last_norm(hidden)


class Projector(nnx.Module):
    """Two layers with GELU from a tower's features to the language model's width.

    Consecutive features that make up `inputs` channels are put together first. Where there is a norm it
    stands before that, or behind.
    """

    def __init__(
        self,
        inputs: int,
        inner: int,
        outputs: int,
        *,
        norm: LayerNorm | RMSNorm | None = None,
        norm_merged: bool = False,
        bias: bool = True,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
    ) -> None:
        make = functools.partial(Projection, bias=bias, compute=compute, rngs=rngs)
        self.inputs = inputs
        self.norm = norm
        self.norm_merged = norm_merged
        self.hidden = make((inputs,), (inner,), ("vision_embed",), ("vision_mlp",))
        self.out = make((inner,), (outputs,), ("vision_mlp",), ("embed",))

    def __call__(self, x: Float[Array, "I P C"]) -> Float[Array, "I V D"]:
        """Makes visual tokens of features."""
        if self.norm is not None and not self.norm_merged:
            x = self.norm(x)
        x = x.reshape(x.shape[0], -1, self.inputs)
        if self.norm is not None and self.norm_merged:
            x = self.norm(x)
        return self.out(erf_gelu(self.hidden(x)))


def block_flops(config: VisionConfig, tokens: int) -> int:
    """Operations of one block's forward pass over an image of so many tokens."""
    width = config.hidden_size
    products = 2 * tokens * (4 * width * width + 2 * width * config.intermediate_size)
    return products + 4 * tokens**2 * width


def tower_flops(
    config: VisionConfig, patch_grid: tuple[int, int], *, blocks: int | None = None, class_token: bool = False
) -> int:
    """Operations of a tower's forward pass over one image: patch embedding, and all blocks or so many."""
    patches = patch_grid[0] * patch_grid[1]
    embedding = 2 * patches * config.patch_channels * config.hidden_size
    return embedding + (config.depth if blocks is None else blocks) * block_flops(
        config, patches + class_token
    )


def projector_flops(tokens: int, inputs: int, inner: int, outputs: int) -> int:
    """Operations of `Projector` over so many visual tokens."""
    return 2 * tokens * inner * (inputs + outputs)


def pixel_shuffle(x: Float[Array, "I P D"], grid: tuple[int, int], factor: int) -> Float[Array, "I V E"]:
    """Makes one token of every factor x factor patches (space to depth; Shi et al. 2016 run backwards).

    Args:
        x: patches in row-major order.
        grid: patch rows and columns, multiples of `factor`.
        factor: side of a token in patches.

    Returns:
        Tokens in row-major order; their channels are those of the patches, row by row.
    """
    (rows, columns), (images, _, width) = grid, x.shape
    cut = x.reshape(images, rows // factor, factor, columns // factor, factor, width)
    return jnp.swapaxes(cut, 2, 3).reshape(images, -1, factor * factor * width)


def check_patches(pixel_values: Float[Array, "I P C"], grid: tuple[int, int], config: VisionConfig) -> None:
    """Refuses pixels that are not the flattened patches of a grid.

    Raises:
        ConfigError: they are not.
    """
    patches = grid[0] * grid[1]
    if pixel_values.ndim != 3 or pixel_values.shape[1:] != (patches, config.patch_channels):
        raise ConfigError(
            f"pixel_values {pixel_values.shape} must be (images, {patches}, {config.patch_channels}): "
            f"flattened patches (`flatten_patches`) of a grid of {grid[0]}x{grid[1]}"
        )


# Window order: where each patch of a fixed grid stands, as integer tables worked out on the host.
#
# Qwen2.5-VL's tower runs in window order, all patches of one attention window next to each other, the 2x2
# patches of a merged token next to each other within it; windows at the right and lower border may be
# smaller than the rest. One window for the whole image gives the order of Qwen's image processor.


@dataclasses.dataclass(frozen=True, eq=False)
class WindowLayout:
    """The tables of one grid. P patches, V merged tokens, W windows of at most `capacity` patches.

    `patch_order[p]` is the processor's index of the patch at place p in window order, `token_order[v]` the
    row-major index of merged token v in window order and `token_inverse` the way back. `rows` and `columns`
    are patch coordinates in window order. `slots[w, s]` is the place of patch s of window w (its last patch
    again where the window is not full), `window_lengths[w]` its number of patches, and `places[p]` the slot
    of place p among the W * capacity. `ragged` tells whether any window is not full.
    """

    patch_order: Int[np.ndarray, " P"]
    token_order: Int[np.ndarray, " V"]
    token_inverse: Int[np.ndarray, " V"]
    rows: Int[np.ndarray, " P"]
    columns: Int[np.ndarray, " P"]
    slots: Int[np.ndarray, "W capacity"]
    window_lengths: Int[np.ndarray, " W"]
    places: Int[np.ndarray, " P"]

    @property
    def ragged(self) -> bool:
        """Whether some window is smaller than the rest."""
        return bool((self.window_lengths != self.slots.shape[1]).any())


@functools.lru_cache(maxsize=64)
def window_layout(grid: tuple[int, int], merge_size: int, window_tokens: int) -> WindowLayout:
    """Works out window order for a grid of patches.

    Args:
        grid: patch rows and columns of the image.
        merge_size: side of a merged token in patches.
        window_tokens: side of a window in merged tokens.

    Returns:
        The layout.

    Raises:
        ConfigError: the grid does not divide into merged tokens.
    """
    height, width = grid
    if height < 1 or width < 1 or height % merge_size or width % merge_size:
        raise ConfigError(
            f"an image grid of {height}x{width} patches does not divide into {merge_size}x{merge_size} "
            "merged tokens; resize the image so that both sides are multiples"
        )
    token_rows, token_columns = np.indices((height // merge_size, width // merge_size)).reshape(2, -1)
    windows_across = -(-width // (merge_size * window_tokens))
    window_of_token = token_rows // window_tokens * windows_across + token_columns // window_tokens
    token_order = np.argsort(window_of_token, kind="stable")  # row-major within a window

    merged_patches = merge_size**2
    patch_order = (token_order[:, None] * merged_patches + np.arange(merged_patches)).reshape(-1)
    inner_rows, inner_columns = np.indices((merge_size, merge_size)).reshape(2, -1)
    rows = (token_rows[token_order, None] * merge_size + inner_rows).reshape(-1)
    columns = (token_columns[token_order, None] * merge_size + inner_columns).reshape(-1)

    window_lengths = np.bincount(window_of_token) * merged_patches
    capacity = int(window_lengths.max())
    starts = np.cumsum(window_lengths) - window_lengths
    slots = starts[:, None] + np.minimum(np.arange(capacity), window_lengths[:, None] - 1)
    window_of_place = np.repeat(np.arange(len(window_lengths)), window_lengths)
    places = window_of_place * capacity + np.arange(height * width) - starts[window_of_place]
    return WindowLayout(
        patch_order=patch_order,
        token_order=token_order,
        token_inverse=np.argsort(token_order),
        rows=rows,
        columns=columns,
        slots=slots,
        window_lengths=window_lengths,
        places=places,
    )


def full_attention_flags(depth: int, blocks: tuple[int, ...]) -> Bool[np.ndarray, " depth"]:
    """One flag per block: True where it attends to the whole image."""
    flags = np.zeros(depth, dtype=bool)
    flags[list(blocks)] = True
    return flags

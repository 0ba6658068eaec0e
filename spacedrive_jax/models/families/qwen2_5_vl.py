"""Qwen2.5-VL: vision tower and decoder as one module (Bai et al. 2025)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.attention import IMAGE_AXES, attend
from spacedrive_jax.models.config import ComputeConfig, QwenVisionConfig, QwenVLConfig
from spacedrive_jax.models.layers import Projection, RMSNorm, SwiGLU, scan_layers, stack_layers
from spacedrive_jax.models.partitioning import constrain
from spacedrive_jax.models.positions import (
    MropePositions,
    RotaryTables,
    find_image_spans,
    mrope_positions,
    rotate,
    vision_rotary,
)
from spacedrive_jax.models.vision_language import VisionLanguageModel

# Where each patch of a fixed grid stands in window order: integer tables, worked out on the host.
#
# The vision tower runs in *window order*: all patches of one attention window next to each other, the 2x2
# patches of a merged token next to each other within it. Windows at the right and lower border may be
# smaller than the rest.


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
        grid: Patch rows and columns of the image.
        merge_size: Side of a merged token in patches.
        window_tokens: Side of a window in merged tokens.

    Returns:
        The layout.

    Raises:
        ConfigError: If the grid does not divide into merged tokens.
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


# The Qwen2.5-VL vision tower (Bai et al. 2025, section 2.1.1).
#
# Patches to visual tokens: patch embedding, blocks with 2-D rotary embedding that attend within windows (a
# few to the whole image), and a merger of 2x2 patches into one token of the decoder's width. Shapes are
# static for a grid; images of one call share it, and a caller with several grids loops over them.


Heads = Float[Array, "I P K H"]


class VisionAttention(nnx.Module):
    """Self-attention over patches in window order, within windows or over the whole image."""

    def __init__(self, config: QwenVisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        heads, names = (config.num_heads, config.head_dim), ("vision_heads", "head_dim")
        model = (config.hidden_size,)
        make = functools.partial(Projection, bias=True, compute=compute, rngs=rngs)
        self.qkv = make(model, (3, *heads), ("vision_embed",), (None, *names))
        self.o = make(heads, model, names, ("vision_embed",))
        self.attention_choice = compute.attention

    def __call__(
        self, x: Float[Array, "I P D"], rotary: RotaryTables, layout: WindowLayout, full: Bool[Array, ""]
    ) -> Float[Array, "I P D"]:
        """Attends over the whole image where `full`, else within each window."""
        q, k, v = jnp.moveaxis(self.qkv(x), -3, 0)
        q, k = rotate(q, rotary), rotate(k, rotary)
        # A branch, not a mask: a windowed block must not pay for the square of the patch count.
        attended = jax.lax.cond(
            full, self._whole_image, functools.partial(self._windowed, layout=layout), q, k, v
        )
        return self.o(attended)

    def _whole_image(self, q: Heads, k: Heads, v: Heads) -> Heads:
        return attend(q, k, v, choice=self.attention_choice, axes=IMAGE_AXES)

    def _windowed(self, q: Heads, k: Heads, v: Heads, *, layout: WindowLayout) -> Heads:
        images, _, heads, channels = q.shape
        windows, capacity = layout.slots.shape
        if layout.ragged:
            # Smaller windows are filled up with copies, which the key lengths hide.
            q, k, v = (each[:, layout.slots.reshape(-1)] for each in (q, k, v))
        q, k, v = (each.reshape(images * windows, capacity, heads, channels) for each in (q, k, v))
        lengths = jnp.tile(jnp.asarray(layout.window_lengths, jnp.int32), images) if layout.ragged else None
        attended = attend(q, k, v, choice=self.attention_choice, lengths=lengths, axes=IMAGE_AXES)
        attended = attended.reshape(images, windows * capacity, heads, channels)
        return attended[:, layout.places] if layout.ragged else attended


class VisionBlock(nnx.Module):
    """One block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: QwenVisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        norm = functools.partial(
            RMSNorm, config.hidden_size, config.norm_eps, name="vision_embed", compute=compute, rngs=rngs
        )
        self.attention_norm = norm()
        self.attention = VisionAttention(config, compute=compute, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = SwiGLU(
            config.hidden_size,
            config.intermediate_size,
            ("vision_embed", "vision_mlp"),
            bias=True,
            compute=compute,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "I P D"], rotary: RotaryTables, layout: WindowLayout, full: Bool[Array, ""]
    ) -> Float[Array, "I P D"]:
        """Runs the block."""
        x = constrain(x + self.attention(self.attention_norm(x), rotary, layout, full), "images", None, None)
        return constrain(x + self.mlp(self.mlp_norm(x)), "images", None, None)


class PatchMerger(nnx.Module):
    """Norm, then a two-layer MLP over the channels of the patches that make one token."""

    def __init__(self, config: QwenVisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        self.merged_size = merged = config.hidden_size * config.merge_size**2
        make = functools.partial(Projection, bias=True, compute=compute, rngs=rngs)
        self.norm = RMSNorm(
            config.hidden_size, config.norm_eps, name="vision_embed", compute=compute, rngs=rngs
        )
        self.hidden = make((merged,), (merged,), ("vision_embed",), ("vision_mlp",))
        self.out = make((merged,), (config.out_hidden_size,), ("vision_mlp",), ("embed",))

    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "I V O"]:
        """Merges every run of patches (four for merge size 2) into one token."""
        merged = self.norm(x).reshape(x.shape[0], -1, self.merged_size)
        return self.out(jax.nn.gelu(self.hidden(merged), approximate=False))


class QwenVision(nnx.Module):
    """The whole tower."""

    def __init__(self, config: QwenVisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws a fresh tower.

        Args:
            config: Architecture.
            compute: Dtypes, rematerialisation, attention kernel.
            rngs: Random streams (`params`).
        """
        self.config = config
        self.compute = compute
        self.patch_embedding = Projection(
            (config.patch_channels,),
            (config.hidden_size,),
            (None,),
            ("vision_embed",),
            bias=False,
            compute=compute,
            rngs=rngs,
        )
        self.layers = stack_layers(
            lambda streams: VisionBlock(config, compute=compute, rngs=streams), config.depth, rngs
        )
        self.merger = PatchMerger(config, compute=compute, rngs=rngs)

    def __call__(self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]) -> Float[Array, "I V D"]:
        """Encodes images of one size.

        Args:
            pixel_values: Flattened patches as transformers' Qwen2-VL image processor lays them out:
                normalised channels x 2 equal frames x 14 x 14, patches of a 2x2 block next to each other.
            grid: Patch rows and columns, the same for all images; static.

        Returns:
            Visual tokens in row-major order of the merged grid, in the decoder's width.

        Raises:
            ConfigError: If the pixels do not fit the grid or the grid does not divide into merged tokens.
        """
        config = self.config
        layout = window_layout(grid, config.merge_size, config.window_tokens)
        if pixel_values.ndim != 3 or pixel_values.shape[1:] != (grid[0] * grid[1], config.patch_channels):
            raise ConfigError(
                f"pixel_values {pixel_values.shape} must be (images, {grid[0] * grid[1]}, "
                f"{config.patch_channels}) for a grid of {grid[0]}x{grid[1]} patches"
            )
        rotary = vision_rotary(layout.rows, layout.columns, config.head_dim)
        full = jnp.asarray(full_attention_flags(config.depth, config.full_attention_blocks))

        def apply(block: VisionBlock, hidden: Any, full: Any) -> tuple[Any, None]:
            return block(hidden, rotary, layout, full), None

        pixel_values = constrain(pixel_values, "images", None, None)
        hidden = constrain(self.patch_embedding(pixel_values[:, layout.patch_order]), "images", None, None)
        hidden, _ = scan_layers(self.layers, apply, hidden, full, self.compute)
        return self.merger(hidden)[:, layout.token_inverse]


class QwenVL(VisionLanguageModel):
    """The vision-language model; its vision tower hands over tokens of the decoder's width."""

    config: QwenVLConfig

    def draw_vision(self, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws the tower."""
        self.vision = QwenVision(self.config.vision, compute=compute, rngs=rngs)

    def encode_images(
        self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]
    ) -> Float[Array, "I V D"]:
        """Visual tokens of images that share a patch grid; see `QwenVision`."""
        return self.vision(pixel_values, grid)

    def sequence_positions(
        self, token_ids: Int[np.ndarray, " S"], visual_grids: Sequence[tuple[int, int]]
    ) -> MropePositions:
        """Multimodal positions; every run of image tokens is an image."""
        spans = find_image_spans(token_ids, visual_grids, self.config.image_token_id)
        return mrope_positions(len(token_ids), spans)

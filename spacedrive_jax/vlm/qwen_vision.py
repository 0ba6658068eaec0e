"""The Qwen2.5-VL vision tower (Bai et al. 2025, section 2.1.1).

Patches to visual tokens: patch embedding, blocks with 2-D rotary embedding that attend within windows (a few
to the whole image), and a merger of 2x2 patches into one token of the decoder's width. Shapes are static for
a grid; images of one call share it, and a caller with several grids loops over them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from spacedrive_jax.console import UserError
from spacedrive_jax.vlm.attention import IMAGE_AXES, attend
from spacedrive_jax.vlm.config import ComputeConfig, QwenVisionConfig
from spacedrive_jax.vlm.layers import Projection, RMSNorm, SwiGLU
from spacedrive_jax.vlm.logical_axes import constrain
from spacedrive_jax.vlm.rotary import RotaryTables, rotate, vision_rotary
from spacedrive_jax.vlm.stack import scan_layers, stack_layers
from spacedrive_jax.vlm.windows import WindowLayout, full_attention_flags, window_layout

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
        merged = config.hidden_size * config.merge_size**2
        make = functools.partial(Projection, bias=True, compute=compute, rngs=rngs)
        self.norm = RMSNorm(
            config.hidden_size, config.norm_eps, name="vision_embed", compute=compute, rngs=rngs
        )
        self.hidden = make((merged,), (merged,), ("vision_embed",), ("vision_mlp",))
        self.out = make((merged,), (config.out_hidden_size,), ("vision_mlp",), ("embed",))

    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "I V O"]:
        """Merges every run of patches (four for merge size 2) into one token."""
        merged = self.norm(x).reshape(x.shape[0], -1, self.hidden.kernel.shape[0])
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
            UserError: If the pixels do not fit the grid or the grid does not divide into merged tokens.
        """
        config = self.config
        layout = window_layout(grid, config.merge_size, config.window_tokens)
        if pixel_values.ndim != 3 or pixel_values.shape[1:] != (grid[0] * grid[1], config.patch_channels):
            raise UserError(
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

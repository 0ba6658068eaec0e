"""LLaVA-1.5: CLIP, a two-layer projector and a LLaMA decoder as one module (Liu et al. 2024)."""

from __future__ import annotations

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
from spacedrive_jax.models.config import ClipVisionConfig, ComputeConfig, LlavaConfig
from spacedrive_jax.models.layers import INIT_STD, LayerNorm, Projection, parameter, scan_layers, stack_layers
from spacedrive_jax.models.partitioning import constrain
from spacedrive_jax.models.positions import MropePositions
from spacedrive_jax.models.vision_language import VisionLanguageModel

# The CLIP vision transformer as LLaVA-1.5 uses it (Radford et al. 2021; Liu et al. 2024, section 3).
#
# Patches to features: patch embedding, a class token, learnt positions, pre-norm blocks with full
# attention. The features are a hidden state before the last one; the class token takes part in attention
# and is dropped.


class ClipAttention(nnx.Module):
    """Self-attention over all tokens of an image."""

    def __init__(self, config: ClipVisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        heads, names = (config.num_heads, config.head_dim), ("vision_heads", "head_dim")
        model, outer = (config.hidden_size,), ("vision_embed",)
        make = functools.partial(Projection, bias=True, compute=compute, rngs=rngs)
        self.q = make(model, heads, outer, names)
        self.k = make(model, heads, outer, names)
        self.v = make(model, heads, outer, names)
        self.o = make(heads, model, names, outer)
        self.attention_choice = compute.attention

    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "I P D"]:
        """Attends over the whole image."""
        return self.o(attend(self.q(x), self.k(x), self.v(x), choice=self.attention_choice, axes=IMAGE_AXES))


class ClipBlock(nnx.Module):
    """One block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ClipVisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        width, inner = (config.hidden_size,), (config.intermediate_size,)
        norm = functools.partial(
            LayerNorm, config.hidden_size, config.norm_eps, name="vision_embed", compute=compute, rngs=rngs
        )
        make = functools.partial(Projection, bias=True, compute=compute, rngs=rngs)
        self.attention_norm = norm()
        self.attention = ClipAttention(config, compute=compute, rngs=rngs)
        self.mlp_norm = norm()
        self.up = make(width, inner, ("vision_embed",), ("vision_mlp",))
        self.down = make(inner, width, ("vision_mlp",), ("vision_embed",))

    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "I P D"]:
        """Runs the block."""
        x = constrain(x + self.attention(self.attention_norm(x)), "images", None, None)
        return constrain(x + self.down(quick_gelu(self.up(self.mlp_norm(x)))), "images", None, None)


class ClipVision(nnx.Module):
    """The whole tower, those parts included that only the checkpoint needs (last block, last norm)."""

    def __init__(self, config: ClipVisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws a fresh tower.

        Args:
            config: Architecture.
            compute: Dtypes, rematerialisation, attention kernel.
            rngs: Random streams (`params`).
        """
        self.config = config
        self.compute = compute
        width = config.hidden_size
        learnt = functools.partial(
            parameter,
            nnx.Param,
            jax.nn.initializers.normal(INIT_STD),
            dtype=compute.storage_dtype,
            rngs=rngs,
        )
        norm = functools.partial(
            LayerNorm, width, config.norm_eps, name="vision_embed", compute=compute, rngs=rngs
        )
        self.patch_embedding = Projection(
            (config.patch_channels,),
            (width,),
            (None,),
            ("vision_embed",),
            bias=False,
            compute=compute,
            rngs=rngs,
        )
        self.class_embedding = learnt((width,), ("vision_embed",))
        self.position_embedding = learnt((config.grid_side**2 + 1, width), (None, "vision_embed"))
        self.first_norm = norm()
        self.layers = stack_layers(
            lambda streams: ClipBlock(config, compute=compute, rngs=streams), config.depth, rngs
        )
        self.last_norm = norm()

    def __call__(self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]) -> Float[Array, "I P D"]:
        """Encodes images.

        Args:
            pixel_values: Flattened normalised patches in row-major order (`flatten_patches`).
            grid: Patch rows and columns; the tower knows one size only.

        Returns:
            The patches' hidden states at `feature_layer`, in row-major order.

        Raises:
            ConfigError: If the grid is not the tower's or the pixels do not fit it.
        """
        config = self.config
        side = config.grid_side
        if tuple(grid) != (side, side):
            raise ConfigError(
                f"image grid {grid[0]}x{grid[1]} must be {side}x{side} patches: CLIP's positions are learnt "
                f"for images of {config.image_size}x{config.image_size} pixels"
            )
        if pixel_values.ndim != 3 or pixel_values.shape[1:] != (side * side, config.patch_channels):
            raise ConfigError(
                f"pixel_values {pixel_values.shape} must be (images, {side * side}, "
                f"{config.patch_channels}): flattened patches (vlm.flatten_patches)"
            )

        def apply(block: ClipBlock, hidden: Any, used: Bool[Array, ""]) -> tuple[Any, None]:
            # The stack stays whole: cutting unused blocks off would copy the rest at every call.
            return jax.lax.cond(used, block, lambda unchanged: unchanged, hidden), None

        patches = self.patch_embedding(constrain(pixel_values, "images", None, None))
        first = jnp.broadcast_to(
            self.class_embedding[...].astype(patches.dtype), (len(patches), 1, config.hidden_size)
        )
        hidden = jnp.concatenate([first, patches], axis=1)
        hidden = self.first_norm(hidden + self.position_embedding[...].astype(hidden.dtype))
        used = jnp.asarray(np.arange(config.depth) < config.used_blocks)
        hidden, _ = scan_layers(self.layers, apply, hidden, used, self.compute)
        return hidden[:, 1:]


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """CLIP's approximation of GELU, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def flatten_patches(
    pixel_values: Float[np.ndarray | Array, "... C H W"], patch_size: int
) -> Float[np.ndarray | Array, "... P K"]:
    """Cuts images, as CLIP's image processor hands them over, into the flattened patches the tower takes.

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


class Projector(nnx.Module):
    """A two-layer MLP from the vision tower's width to the decoder's."""

    def __init__(self, config: LlavaConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        narrow, wide = (config.vision.hidden_size,), (config.decoder.hidden_size,)
        make = functools.partial(Projection, bias=config.projector_bias, compute=compute, rngs=rngs)
        self.hidden = make(narrow, wide, ("vision_embed",), ("vision_mlp",))
        self.out = make(wide, wide, ("vision_mlp",), ("embed",))

    def __call__(self, x: Float[Array, "I V C"]) -> Float[Array, "I V D"]:
        """Maps each visual token."""
        return self.out(jax.nn.gelu(self.hidden(x), approximate=False))


class Llava(VisionLanguageModel):
    """The vision-language model; every patch of an image is a visual token."""

    config: LlavaConfig

    def draw_vision(self, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws tower and projector."""
        self.vision = ClipVision(self.config.vision, compute=compute, rngs=rngs)
        self.projector = Projector(self.config, compute=compute, rngs=rngs)

    def encode_images(
        self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]
    ) -> Float[Array, "I V D"]:
        """Visual tokens, one per patch; see `ClipVision`."""
        return self.projector(self.vision(pixel_values, grid))

    def sequence_positions(
        self, token_ids: Int[np.ndarray, " S"], visual_grids: Sequence[tuple[int, int]]
    ) -> MropePositions:
        """Plain positions 0, 1, 2, ... on every axis, images or not."""
        expected = sum(rows * columns for rows, columns in visual_grids)
        found = int(np.count_nonzero(np.asarray(token_ids) == self.config.image_token_id))
        if found != expected:
            raise ConfigError(
                f"the text has {found} image tokens (id {self.config.image_token_id}) but the "
                f"{len(visual_grids)} images have {expected} visual tokens"
            )
        places = np.arange(len(token_ids), dtype=np.int32)
        return MropePositions(np.broadcast_to(places, (3, len(places))), 0)

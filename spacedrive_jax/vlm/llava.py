"""LLaVA-1.5: CLIP, a two-layer projector and a LLaMA decoder as one module (Liu et al. 2024)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spacedrive_jax.console import UserError
from spacedrive_jax.vlm.clip_vision import ClipVision
from spacedrive_jax.vlm.config import ComputeConfig, LlavaConfig
from spacedrive_jax.vlm.layers import Projection
from spacedrive_jax.vlm.positions import MropePositions
from spacedrive_jax.vlm.vision_language import VisionLanguageModel


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
            raise UserError(
                f"the text has {found} image tokens (id {self.config.image_token_id}) but the "
                f"{len(visual_grids)} images have {expected} visual tokens"
            )
        places = np.arange(len(token_ids), dtype=np.int32)
        return MropePositions(np.broadcast_to(places, (3, len(places))), 0)

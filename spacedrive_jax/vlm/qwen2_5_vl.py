"""Qwen2.5-VL: vision tower and decoder as one module (Bai et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spacedrive_jax.vlm.config import ComputeConfig, QwenVLConfig
from spacedrive_jax.vlm.positions import MropePositions, find_image_spans, mrope_positions
from spacedrive_jax.vlm.qwen_vision import QwenVision
from spacedrive_jax.vlm.vision_language import VisionLanguageModel


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

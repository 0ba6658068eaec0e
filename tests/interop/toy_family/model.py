"""A family of its own for tests: Qwen2.5-VL's tower and decoder in other sizes, with another chat."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from jaxtyping import Array, Float

from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig, LoraConfig, VLConfig
from spacedrive_jax.models.families.qwen2_5_vl import (
    MultimodalRope,
    QwenImageProcessor,
    QwenVision,
    QwenVisionConfig,
    QwenVLConfig,
    vision_flops,
)
from spacedrive_jax.models.family import ChatTemplate, Family, Message, Tokenizer
from spacedrive_jax.models.positions import mrope_positions

EYES = QwenVisionConfig(
    hidden_size=16,
    intermediate_size=20,
    depth=2,
    num_heads=2,
    full_attention_blocks=(0,),
    patch_size=7,
    window_size=28,
    out_hidden_size=24,
)


@dataclasses.dataclass(frozen=True)
class ToyConfig(VLConfig):
    decoder: LanguageModelConfig = LanguageModelConfig(
        vocab_size=520,
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        mrope_section=(1, 1, 1),
    )
    vision: QwenVisionConfig = EYES
    image_token_id: int = 508
    greeting: str = "hello"

    @property
    def as_qwen(self) -> QwenVLConfig:
        """What a Qwen of the same sizes would be."""
        return QwenVLConfig(self.decoder, self.vision, image_token_id=self.image_token_id)


class ToyVL(MultimodalRope):
    config: ToyConfig

    def draw_vision(self, *, compute: ComputeConfig, rngs) -> None:
        self.eyes = QwenVision(self.config.vision, compute=compute, rngs=rngs)

    def encode_images(
        self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]
    ) -> Float[Array, "I V D"]:
        return self.eyes(pixel_values, grid)


class ToyChat(ChatTemplate):
    """`<toy:user>question<toy:end><toy:model>answer<toy:end>`: answers and their ends are supervised."""

    special_tokens: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "image": ("<toy:image>",),
            "turn_end": ("<toy:end>",),
            "padding": ("<toy:pad>",),
            "user": ("<toy:user>",),
            "model": ("<toy:model>",),
        }
    )
    added_tokens = ("<toy:image>", "<toy:end>", "<toy:pad>", "<toy:user>", "<toy:model>")

    answer_header = "<toy:model>"

    def image(self, tokens_per_image: int) -> str:
        return "<toy:image>" * tokens_per_image

    def turn(self, message: Message) -> str:
        header = self.answer_header if message.role == "assistant" else "<toy:user>"
        return f"{header}{message.content}<toy:end>"

    def ego_feature(self, tokenizer: Tokenizer) -> tuple[list[int], int]:
        return [tokenizer.special["image"]], 0

    def image_end(self, tokenizer: Tokenizer) -> int:
        return tokenizer.special["image"]


FAMILY = Family(
    name="toy_vl",
    config=ToyConfig,
    model=ToyVL,
    chat=ToyChat(),
    image_processor=QwenImageProcessor,
    position_ids=mrope_positions,
    vision_flops=lambda config, patch_grid: vision_flops(config.as_qwen, patch_grid),
    lora=lambda rank: LoraConfig(rank=rank, alpha=2.0 * rank, targets=("q", "v")),
    interop="tests.interop.toy_family.interop",
)

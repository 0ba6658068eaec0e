"""A family of its own for tests: Qwen2.5-VL's tower and decoder in other sizes, with another chat."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Float, Int

from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig, LoraConfig, VLConfig
from spacedrive_jax.models.families.qwen2_5_vl import (
    QwenImageProcessor,
    QwenVision,
    QwenVisionConfig,
    QwenVLConfig,
    vision_flops,
)
from spacedrive_jax.models.family import (
    IGNORE,
    IMAGE_PLACEHOLDER,
    ChatTemplate,
    ChatTokens,
    Family,
    Message,
    Tokenizer,
)
from spacedrive_jax.models.positions import ImageSpan, RopePositions, find_image_spans, mrope_positions
from spacedrive_jax.models.vision_language import VisionLanguageModel

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


class ToyVL(VisionLanguageModel):
    config: ToyConfig

    def draw_vision(self, *, compute: ComputeConfig, rngs) -> None:
        self.eyes = QwenVision(self.config.vision, compute=compute, rngs=rngs)

    def encode_images(
        self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]
    ) -> Float[Array, "I V D"]:
        return self.eyes(pixel_values, grid)

    def sequence_positions(
        self, token_ids: Int[np.ndarray, " S"], visual_grids: Sequence[tuple[int, int]]
    ) -> RopePositions:
        spans = find_image_spans(token_ids, visual_grids, self.config.image_token_id)
        return mrope_positions(len(token_ids), spans)


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

    def apply_chat_template(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tokens_per_image: int,
        *,
        add_generation_prompt: bool = False,
        supervise_positions: bool = False,
    ) -> ChatTokens:
        special = tokenizer.special
        token_ids, labels = [], []
        for message in messages:
            content = message.content.replace(IMAGE_PLACEHOLDER, "<toy:image>" * tokens_per_image)
            ids = [*tokenizer.encode(content), special["turn_end"]]
            ignored = None if supervise_positions else tokenizer.position
            answers = message.role == "assistant"
            token_ids += [special["model" if answers else "user"], *ids]
            labels += [IGNORE, *(IGNORE if not answers or each == ignored else each for each in ids)]
        if add_generation_prompt:
            token_ids.append(special["model"])
            labels.append(IGNORE)
        images = [index for index, token in enumerate(token_ids) if token == special["image"]]
        return ChatTokens(token_ids, labels, images[::tokens_per_image])

    def ego_feature(self, tokenizer: Tokenizer) -> tuple[list[int], int]:
        return [tokenizer.special["image"]], 0

    def image_end(self, tokenizer: Tokenizer) -> int:
        return tokenizer.special["image"]


def position_ids(length: int, images: Sequence[ImageSpan]) -> RopePositions:
    """As Qwen2.5-VL."""
    return mrope_positions(length, images)


FAMILY = Family(
    name="toy_vl",
    config=ToyConfig,
    model=ToyVL,
    chat=ToyChat(),
    image_processor=QwenImageProcessor,
    position_ids=position_ids,
    vision_flops=lambda config, patch_grid: vision_flops(config.as_qwen, patch_grid),
    lora=lambda rank: LoraConfig(rank=rank, alpha=2.0 * rank, targets=("q", "v")),
    interop="tests.interop.toy_family.interop",
)

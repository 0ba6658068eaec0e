"""A family of vision-language models as one object: everything that sets it apart from the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from spacedrive_jax.models.chat import ChatTemplate
from spacedrive_jax.models.config import LoraConfig, VLConfig
from spacedrive_jax.models.image_processor import ImageProcessor
from spacedrive_jax.models.positions import ImageSpan, RopePositions
from spacedrive_jax.models.vision_language import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class Family:
    """What the rest of the project asks of a family; nothing else may depend on which one it is."""

    name: str
    """transformers' `model_type`; also the tag of its configs in JSON."""
    config: type[VLConfig]
    model: Callable[..., VisionLanguageModel]
    """Constructor: (config, *, compute, rngs, lora=None, new_tokens=None)."""
    chat: ChatTemplate
    image_processor: type[ImageProcessor]
    position_ids: Callable[[int, Sequence[ImageSpan]], RopePositions]
    """From a sequence's length and its images to the rotary positions."""
    vision_flops: Callable[[Any, tuple[int, int]], int]
    """From the config and the patch grid to the operations of the tower's forward pass over one image."""
    lora: Callable[[int], LoraConfig]
    """SpaceDrive's adapters at a rank."""
    interop: str
    """Module that knows the family's files as others have them; it defines `FORMAT`
    (`interop.families.Format`)."""

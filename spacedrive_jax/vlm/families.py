"""The families of models, and what sets each apart: its class, its tables, its names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from spacedrive_jax.vlm import llava_conversion, qwen_conversion
from spacedrive_jax.vlm.config import LlavaConfig, QwenVLConfig, VLConfig
from spacedrive_jax.vlm.conversion import Rule
from spacedrive_jax.vlm.hf_fields import Fields
from spacedrive_jax.vlm.llava import Llava
from spacedrive_jax.vlm.llava_hf_config import read_llava_config, write_llava_config
from spacedrive_jax.vlm.qwen2_5_vl import QwenVL
from spacedrive_jax.vlm.qwen_hf_config import read_qwen_config, write_qwen_config
from spacedrive_jax.vlm.vision_language import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table below."""

    config: type[VLConfig]
    model: Callable[..., VisionLanguageModel]
    """Constructor: (config, *, compute, rngs, lora=None, new_tokens=None)."""
    rules: Callable[[Any], tuple[Rule, ...]]
    """From the config to the conversion table of the base weights."""
    read_config: Callable[[Fields, str], VLConfig]
    """From the parsed config.json and its name."""
    write_config: Callable[[Any], dict[str, Any]]
    canonical_name: Callable[[str], str]
    """From any name a tensor goes by to the one in `rules`."""
    hub_name: Callable[[str], str]


FAMILIES = {
    "qwen2_5_vl": Family(
        config=QwenVLConfig,
        model=QwenVL,
        rules=qwen_conversion.qwen_rules,
        read_config=read_qwen_config,
        write_config=write_qwen_config,
        canonical_name=qwen_conversion.canonical_name,
        hub_name=qwen_conversion.hub_name,
    ),
    "llava": Family(
        config=LlavaConfig,
        model=Llava,
        rules=llava_conversion.llava_rules,
        read_config=read_llava_config,
        write_config=write_llava_config,
        canonical_name=llava_conversion.canonical_name,
        hub_name=llava_conversion.hub_name,
    ),
}
"""By transformers' `model_type`."""


def family_of(config: VLConfig) -> Family:
    """The family a config belongs to."""
    return next(family for family in FAMILIES.values() if isinstance(config, family.config))

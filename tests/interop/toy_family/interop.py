"""The toy family's files: a config.json with words of its own, tensors under `eyes.` and `brain.`."""

from __future__ import annotations

import dataclasses
from typing import Any

from spacedrive_jax.interop.hf_fields import (
    Field,
    Fields,
    decoder_fields,
    decoder_sizes,
    ids,
    layers,
    part,
    read_fields,
    real,
    required,
    size,
    write_fields,
)
from spacedrive_jax.interop.qwen2_5_vl import qwen_rules
from spacedrive_jax.interop.weight_table import Format, Rule
from spacedrive_jax.models.config import LanguageModelConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVisionConfig
from tests.interop.toy_family.model import ToyConfig

EYES = (
    Field("hidden_size", "width"),
    Field("intermediate_size", "inner"),
    Field("depth", "blocks", layers),
    Field("num_heads", "heads"),
    Field("full_attention_blocks", "wide_blocks", ids),
    Field("window_size", "window"),
    Field("patch_size", "patch"),
)


def rules(config: ToyConfig) -> tuple[Rule, ...]:
    """Qwen's, but that the tower is called `eyes` in the model too."""
    return tuple(
        dataclasses.replace(rule, target=("eyes", *rule.target[1:])) if rule.target[0] == "vision" else rule
        for rule in qwen_rules(config.as_qwen)
    )


def read_config(fields: Fields, origin: str) -> ToyConfig:
    brain, eyes = part(fields, "brain_config", origin), part(fields, "eyes_config", origin)
    sizes = decoder_sizes(brain, origin, {"norm_eps": 1e-6}, grouped=False)
    width = sizes["hidden_size"]
    return ToyConfig(
        decoder=LanguageModelConfig(
            **sizes,
            head_dim=width // sizes["num_heads"],
            rope_theta=real(brain, "rope_theta", origin, 1e6),
            mrope_section=ids(brain, "axes", origin),
            tie_word_embeddings=bool(brain.get("tie_word_embeddings", False)),
        ),
        vision=QwenVisionConfig(**read_fields(EYES, eyes, origin, {}), out_hidden_size=width),
        image_token_id=size(fields, "picture", origin),
        greeting=str(required(fields, "greeting", origin)),
    )


def write_config(config: ToyConfig) -> dict[str, Any]:
    return {
        "model_type": "toy_vl",
        "picture": config.image_token_id,
        "greeting": config.greeting,
        "brain_config": decoder_fields(config.decoder) | {"axes": list(config.decoder.mrope_section)},
        "eyes_config": write_fields(EYES, config.vision),
    }


FORMAT = Format(
    rules=rules,
    read_config=read_config,
    write_config=write_config,
    prefixes=(("brain.head.", "lm_head."), ("brain.", "model.language_model."), ("eyes.", "model.visual.")),
    text_part="brain_config",
)

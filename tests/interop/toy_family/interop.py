"""The toy family's files: a config.json with words of its own, tensors under `eyes.` and `brain.`."""

from __future__ import annotations

import dataclasses
from typing import Any

from spacedrive_jax.interop.hf_fields import Fields, decoder_fields, ids, part, real, required, size
from spacedrive_jax.interop.qwen2_5_vl import qwen_rules
from spacedrive_jax.interop.weight_table import Format, Rule, reversed_prefixes, with_prefix
from spacedrive_jax.models.config import LanguageModelConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVisionConfig
from tests.interop.toy_family.model import ToyConfig

PREFIXES = (("brain.head.", "lm_head."), ("brain.", "model.language_model."), ("eyes.", "model.visual."))


def rules(config: ToyConfig) -> tuple[Rule, ...]:
    """Qwen's, but that the tower is called `eyes` in the model too."""
    return tuple(
        dataclasses.replace(rule, target=("eyes", *rule.target[1:])) if rule.target[0] == "vision" else rule
        for rule in qwen_rules(config.as_qwen)
    )


def read_config(fields: Fields, origin: str) -> ToyConfig:
    brain, eyes = part(fields, "brain_config", origin), part(fields, "eyes_config", origin)
    width, heads = size(brain, "hidden_size", origin), size(brain, "num_attention_heads", origin)
    return ToyConfig(
        decoder=LanguageModelConfig(
            vocab_size=size(brain, "vocab_size", origin),
            hidden_size=width,
            intermediate_size=size(brain, "intermediate_size", origin),
            num_layers=size(brain, "num_hidden_layers", origin),
            num_heads=heads,
            num_kv_heads=size(brain, "num_key_value_heads", origin),
            head_dim=width // heads,
            rope_theta=real(brain, "rope_theta", origin, 1e6),
            mrope_section=ids(brain, "axes", origin),
            norm_eps=real(brain, "rms_norm_eps", origin, 1e-6),
            tie_word_embeddings=bool(brain.get("tie_word_embeddings", False)),
        ),
        vision=QwenVisionConfig(
            hidden_size=size(eyes, "width", origin),
            intermediate_size=size(eyes, "inner", origin),
            depth=size(eyes, "blocks", origin),
            num_heads=size(eyes, "heads", origin),
            full_attention_blocks=ids(eyes, "wide_blocks", origin),
            window_size=size(eyes, "window", origin),
            patch_size=size(eyes, "patch", origin),
            out_hidden_size=width,
        ),
        image_token_id=size(fields, "picture", origin),
        greeting=str(required(fields, "greeting", origin)),
    )


def write_config(config: ToyConfig) -> dict[str, Any]:
    vision = config.vision
    return {
        "model_type": "toy_vl",
        "picture": config.image_token_id,
        "greeting": config.greeting,
        "brain_config": decoder_fields(config.decoder) | {"axes": list(config.decoder.mrope_section)},
        "eyes_config": {
            "width": vision.hidden_size,
            "inner": vision.intermediate_size,
            "blocks": vision.depth,
            "heads": vision.num_heads,
            "wide_blocks": list(vision.full_attention_blocks),
            "window": vision.window_size,
            "patch": vision.patch_size,
        },
    }


FORMAT = Format(
    rules=rules,
    read_config=read_config,
    write_config=write_config,
    canonical_name=lambda name: with_prefix(name, PREFIXES),
    hub_name=lambda name: with_prefix(name, reversed_prefixes(PREFIXES)),
    text_part="brain_config",
)

"""SmolVLM's files: config.json of SmolVLM2 (`smolvlm`) and of the first SmolVLM (`idefics3`), tensor names.

Fields left out take transformers' defaults. Both write `model.text_model.*`, `model.vision_model.*`,
`model.connector.*` and `lm_head.weight`, on the hub and in transformers' state dict; the table has the
decoder under the name that all families' have.
"""

from __future__ import annotations

from typing import Any

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.interop.hf_fields import (
    SQUARE_TOWER,
    Fields,
    decoder_fields,
    expect,
    is_tied,
    part,
    plain_decoder,
    read_fields,
    size,
    text_fields,
    token_id,
    write_fields,
)
from spacedrive_jax.interop.weight_table import (
    Format,
    Rule,
    decoder_rules,
    linear_rules,
    norm_rules,
    vision_block_rules,
)
from spacedrive_jax.models.families.smolvlm import SiglipVisionConfig, SmolVLMConfig

_TOWER = "model.vision_model"
_PREFIXES = (("model.text_model.", "model.language_model."),)
_NAMES = {
    "smolvlm": ("SmolVLMForConditionalGeneration", "smolvlm_vision"),
    "idefics3": ("Idefics3ForConditionalGeneration", "idefics3_vision"),
}
"""Class and `model_type` of the vision part."""


def smolvlm_rules(config: SmolVLMConfig) -> tuple[Rule, ...]:
    """The table of the base weights of SmolVLM (adapters and new-token rows are no part of it)."""
    vision = config.vision
    merged = vision.hidden_size * vision.merge_size**2
    return (
        *_vision_rules(vision),
        *linear_rules(
            "model.connector.modality_projection.proj",
            ("connector",),
            (config.decoder.hidden_size, merged),
            bias=False,
        ),
        *decoder_rules(config.decoder),
    )


def _vision_rules(config: SiglipVisionConfig) -> tuple[Rule, ...]:
    width = config.hidden_size
    patch = (width, config.in_channels, config.patch_size, config.patch_size)
    embeddings, embedding = f"{_TOWER}.embeddings", ("vision", "patch_embedding")
    places = (config.grid_side**2, width)
    return (
        Rule(f"{embeddings}.patch_embedding.weight", (*embedding, "kernel"), patch, in_axes=1),
        Rule(f"{embeddings}.patch_embedding.bias", (*embedding, "bias"), (width,)),
        Rule(f"{embeddings}.position_embedding.weight", ("vision", "position_embedding"), places),
        *norm_rules(f"{_TOWER}.post_layernorm", ("vision", "last_norm"), width),
        *vision_block_rules(f"{_TOWER}.encoder.layers.{{layer}}", config),
    )


def read_smolvlm_config(fields: Fields, origin: str) -> SmolVLMConfig:
    """Reads the parsed config; `read_hf_config` is the public way here."""
    text, vision = text_fields(fields, origin, flat=False), part(fields, "vision_config", origin)
    # transformers has another epsilon where there is no text part at all.
    usual_eps = 1e-5 if fields.get("text_config") is None else None
    tied = is_tied(fields, text, origin, default=False)
    return SmolVLMConfig(
        decoder=plain_decoder(text, origin, "llama", tied=tied, norm_eps=usual_eps),
        vision=_vision(vision, size(fields, "scale_factor", origin, 2), origin),
        image_token_id=token_id(fields, "image_token_id", origin, 128257),
        model_type="idefics3" if fields.get("model_type") == "idefics3" else "smolvlm",
    )


def _vision(vision: Fields, merge_size: int, origin: str) -> SiglipVisionConfig:
    expect(vision, "hidden_act", "gelu_pytorch_tanh", origin)
    kinds = ("idefics3", "smolvlm", "idefics3_vision", "smolvlm_vision", "")
    if vision.get("model_type", "") not in kinds:
        raise ConfigError(f"{origin}: vision_config is of {vision['model_type']!r}, expected SigLIP's tower")
    usual = {
        "hidden_size": 1152,
        "intermediate_size": 3072,
        "depth": 12,
        "num_heads": 16,
        "norm_eps": 1e-6,
        "patch_size": 32,
        "in_channels": 3,
        "image_size": 224,
    }
    return SiglipVisionConfig(**read_fields(SQUARE_TOWER, vision, origin, usual), merge_size=merge_size)


def write_smolvlm_config(config: SmolVLMConfig) -> dict[str, Any]:
    """The config as transformers 4.52 and 5 read it."""
    decoder, vision = config.decoder, config.vision
    architecture, tower = _NAMES[config.model_type]
    return {
        "architectures": [architecture],
        "model_type": config.model_type,
        "image_token_id": config.image_token_id,
        "scale_factor": vision.merge_size,
        "vocab_size": decoder.vocab_size,
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "text_config": {
            "model_type": "llama",
            "head_dim": decoder.head_dim,
            **decoder_fields(decoder),
            # LLaMA's own ids 1 and 2 are other tokens here; generation_config.json names those that end.
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        },
        "vision_config": {
            "model_type": tower,
            **write_fields(SQUARE_TOWER, vision),
            "hidden_act": "gelu_pytorch_tanh",
        },
    }


FORMAT = Format(
    rules=smolvlm_rules,
    read_config=read_smolvlm_config,
    write_config=write_smolvlm_config,
    prefixes=_PREFIXES,
    module_prefixes=_PREFIXES,
)

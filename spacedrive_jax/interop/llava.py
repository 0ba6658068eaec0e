"""LLaVA-1.5's config.json, as transformers 4 and 5 write it, and the two-way table of its weights.

Fields left out take transformers' defaults: those of LLaMA-7B in the text part, of CLIP ViT-B/32 in a vision
part that is there, of ViT-L/14-336 where it is not.
"""

from __future__ import annotations

from typing import Any

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.interop.hf_fields import (
    SQUARE_TOWER,
    Fields,
    decoder_fields,
    expect,
    flag,
    part,
    plain_decoder,
    read_fields,
    text_fields,
    token_id,
    write_fields,
)
from spacedrive_jax.interop.weight_table import (
    Format,
    Published,
    Rule,
    decoder_rules,
    linear_rules,
    norm_rules,
    vision_block_rules,
)
from spacedrive_jax.models.families.llava import ClipVisionConfig, LlavaConfig

# The two-way table of LLaVA-1.5 and the names its tensors go by.
#
# Four are in use. The table has those of transformers 5's state dict: `model.language_model.*`,
# `model.vision_tower.*`, `model.multi_modal_projector.*`, `lm_head.*`. transformers 4.52's has
# `vision_tower.vision_model` instead of `vision_tower`. Checkpoints, on the hub and as transformers 5 saves
# them, say `language_model.model.*`, `language_model.lm_head.*`, `vision_tower.*`,
# `multi_modal_projector.*`, those on the hub with `vision_model` too.


_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"


def llava_rules(config: LlavaConfig) -> tuple[Rule, ...]:
    """The table of the base weights of LLaVA-1.5 (adapters and new-token rows are no part of it)."""
    narrow, wide, bias = config.vision.hidden_size, config.decoder.hidden_size, config.projector_bias
    return (
        *_vision_rules(config.vision),
        *linear_rules(f"{_PROJECTOR}.linear_1", ("projector", "hidden"), (wide, narrow), bias=bias),
        *linear_rules(f"{_PROJECTOR}.linear_2", ("projector", "out"), (wide, wide), bias=bias),
        *decoder_rules(config.decoder),
    )


def _vision_rules(config: ClipVisionConfig) -> tuple[Rule, ...]:
    width = config.hidden_size
    patch = (width, config.in_channels, config.patch_size, config.patch_size)
    places = config.grid_side**2 + 1
    embeddings = f"{_TOWER}.embeddings"
    return (
        Rule(f"{embeddings}.class_embedding", ("vision", "class_embedding"), (width,)),
        Rule(
            f"{embeddings}.patch_embedding.weight", ("vision", "patch_embedding", "kernel"), patch, in_axes=1
        ),
        Rule(f"{embeddings}.position_embedding.weight", ("vision", "position_embedding"), (places, width)),
        # transformers' own spelling.
        *norm_rules(f"{_TOWER}.pre_layrnorm", ("vision", "first_norm"), width),
        *norm_rules(f"{_TOWER}.post_layernorm", ("vision", "last_norm"), width),
        *vision_block_rules(f"{_TOWER}.encoder.layers.{{layer}}", config),
    )


def read_llava_config(fields: Fields, origin: str) -> LlavaConfig:
    """Reads the parsed config; `read_hf_config` is the public way here."""
    text = text_fields(fields, origin, flat=False)
    vision = part(fields, "vision_config", origin) if fields.get("vision_config") is not None else None
    expect(fields, "projector_hidden_act", "gelu", origin)
    expect(fields, "vision_feature_select_strategy", "default", origin)
    layer = fields.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or layer >= 0:
        raise ConfigError(f"{origin}: vision_feature_layer {layer!r} must be one number below 0")
    return LlavaConfig(
        # The outer field is no guide to tying: transformers 4 writes its own default there.
        decoder=plain_decoder(text, origin, "llama", tied=flag(text, "tie_word_embeddings", origin, False)),
        vision=ClipVisionConfig(feature_layer=layer) if vision is None else _vision(vision, layer, origin),
        image_token_id=_image_token(fields, origin),
        projector_bias=flag(fields, "multimodal_projector_bias", origin, True),
    )


def _image_token(fields: Fields, origin: str) -> int:
    """Transformers 4 says `image_token_index`, 5 `image_token_id`; a file with both must mean one."""
    index = token_id(fields, "image_token_index", origin, 32000)
    token = token_id(fields, "image_token_id", origin, index)
    if fields.get("image_token_index") is not None and token != index:
        raise ConfigError(f"{origin}: image_token_index is {index}, but image_token_id is {token}")
    return token


def write_llava_config(config: LlavaConfig) -> dict[str, Any]:
    """The config as transformers 4.52 and 5 read it."""
    decoder, vision = config.decoder, config.vision
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "image_seq_length": vision.grid_side**2,
        "multimodal_projector_bias": config.projector_bias,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "text_config": {
            "model_type": "llama",
            "head_dim": decoder.head_dim,
            **decoder_fields(decoder),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **write_fields(SQUARE_TOWER, vision),
            "hidden_act": "quick_gelu",
        },
    }


def _vision(vision: Fields, layer: int, origin: str) -> ClipVisionConfig:
    expect(vision, "model_type", "clip_vision_model", origin)
    expect(vision, "hidden_act", "quick_gelu", origin)
    usual = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "depth": 12,
        "num_heads": 12,
        "norm_eps": 1e-5,
        "patch_size": 32,
        "in_channels": 3,
        "image_size": 224,
    }
    return ClipVisionConfig(**read_fields(SQUARE_TOWER, vision, origin, usual), feature_layer=layer)


FORMAT = Format(
    rules=llava_rules,
    read_config=read_llava_config,
    write_config=write_llava_config,
    prefixes=(
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.vision_model.", f"{_TOWER}."),
        ("multi_modal_projector.", f"{_PROJECTOR}."),
    ),
    older_prefixes=(
        (f"{_TOWER}.vision_model.", f"{_TOWER}."),
        ("vision_tower.vision_model.", f"{_TOWER}."),
        ("vision_tower.", f"{_TOWER}."),
    ),
    published=Published(
        presets=("base_vlm_llava", "base_vlm_plus_llava"),
        trains_table_rows=True,
        ignores=frozenset({"use_rope", "include_semantic_posemb"}),
    ),
)

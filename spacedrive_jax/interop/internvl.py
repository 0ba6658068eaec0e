"""InternVL3's files in transformers' layout (`OpenGVLab/InternVL3-*-hf`): config.json, tensor names.

Fields left out take transformers' defaults. Checkpoints on the hub, as transformers saves them, say
`language_model.model.*`, `language_model.lm_head.*`, `vision_tower.*`, `multi_modal_projector.*`; its state
dict says `model.language_model.*`, `lm_head.*` and so on, which the table has.
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
    is_tied,
    part,
    plain_decoder,
    read_fields,
    real,
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
from spacedrive_jax.models.families.internvl import InternVisionConfig, InternVLConfig

_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"


def internvl_rules(config: InternVLConfig) -> tuple[Rule, ...]:
    """The table of the base weights of InternVL3 (adapters and new-token rows are no part of it)."""
    wide, merged = config.decoder.hidden_size, config.vision.hidden_size * config.vision.merge_size**2
    return (
        *_vision_rules(config.vision),
        *norm_rules(f"{_PROJECTOR}.layer_norm", ("projector", "norm"), merged),
        *linear_rules(f"{_PROJECTOR}.linear_1", ("projector", "hidden"), (wide, merged)),
        *linear_rules(f"{_PROJECTOR}.linear_2", ("projector", "out"), (wide, wide)),
        *decoder_rules(config.decoder),
    )


def _vision_rules(config: InternVisionConfig) -> tuple[Rule, ...]:
    width = config.hidden_size
    block, blocks = f"{_TOWER}.encoder.layer.{{layer}}", ("vision", "layers")
    patch = (width, config.in_channels, config.patch_size, config.patch_size)
    embeddings, embedding = f"{_TOWER}.embeddings", ("vision", "patch_embedding")
    places = (1, config.grid_side**2 + 1, width)
    rules = [
        Rule(f"{embeddings}.patch_embeddings.projection.weight", (*embedding, "kernel"), patch, in_axes=1),
        Rule(f"{embeddings}.patch_embeddings.projection.bias", (*embedding, "bias"), (width,)),
        Rule(f"{embeddings}.cls_token", ("vision", "class_embedding"), (1, 1, width)),
        Rule(f"{embeddings}.position_embeddings", ("vision", "position_embedding"), places),
        Rule(f"{block}.lambda_1", (*blocks, "attention_scale"), (width,), 0, config.depth),
        Rule(f"{block}.lambda_2", (*blocks, "mlp_scale"), (width,), 0, config.depth),
        *vision_block_rules(
            block,
            config,
            norms=("layernorm_before", "layernorm_after"),
            attention="attention",
            out="projection_layer",
            qkv_bias=config.attention_bias,
        ),
    ]
    if config.last_norm:
        rules += norm_rules(f"{_TOWER}.layernorm", ("vision", "last_norm"), width)
    return tuple(rules)


def read_internvl_config(fields: Fields, origin: str) -> InternVLConfig:
    """Reads the parsed config; `read_hf_config` is the public way here."""
    text, vision = text_fields(fields, origin, flat=False), part(fields, "vision_config", origin)
    expect(fields, "projector_hidden_act", "gelu", origin)
    expect(fields, "vision_feature_select_strategy", "default", origin)
    expect(fields, "vision_feature_layer", -1, origin)
    ratio = real(fields, "downsample_ratio", origin, 0.5)
    merge_size = int(1 / ratio)
    if merge_size * ratio != 1:
        raise ConfigError(f"{origin}: downsample_ratio {ratio} must be one over a whole number")
    return InternVLConfig(
        decoder=plain_decoder(text, origin, "qwen2", tied=is_tied(fields, text, origin, default=True)),
        vision=_vision(vision, merge_size, origin),
        image_token_id=token_id(fields, "image_token_id", origin, 151667),
    )


def _vision(vision: Fields, merge_size: int, origin: str) -> InternVisionConfig:
    expect(vision, "model_type", "internvl_vision", origin)
    expect(vision, "hidden_act", "gelu", origin)
    # InternViT-6B, of InternVL3-38B and larger, has other norms.
    expect(vision, "norm_type", "layer_norm", origin)
    expect(vision, "use_qk_norm", False, origin)
    expect(vision, "use_mask_token", False, origin)
    expect(vision, "use_absolute_position_embeddings", True, origin)
    usual = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "depth": 24,
        "num_heads": 16,
        "norm_eps": 1e-6,
        "patch_size": 14,
        "in_channels": 3,
        "image_size": 448,
    }
    return InternVisionConfig(
        **read_fields(SQUARE_TOWER, vision, origin, usual),
        merge_size=merge_size,
        attention_bias=flag(vision, "attention_bias", origin, False),
        last_norm=not flag(vision, "use_mean_pooling", origin, True),
        layer_scale=real(vision, "layer_scale_init_value", origin, 0.1),
    )


def write_internvl_config(config: InternVLConfig) -> dict[str, Any]:
    """The config as transformers 4.52 and 5 read it."""
    decoder, vision = config.decoder, config.vision
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": config.image_token_id,
        "image_seq_length": (vision.grid_side // vision.merge_size) ** 2,
        "downsample_ratio": 1 / vision.merge_size,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "text_config": {"model_type": "qwen2", "head_dim": decoder.head_dim, **decoder_fields(decoder)},
        "vision_config": {
            "model_type": "internvl_vision",
            **write_fields(SQUARE_TOWER, vision),
            "image_size": [vision.image_size, vision.image_size],
            "patch_size": [vision.patch_size, vision.patch_size],
            "attention_bias": vision.attention_bias,
            "hidden_act": "gelu",
            "layer_scale_init_value": vision.layer_scale,
            "norm_type": "layer_norm",
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": not vision.last_norm,
            "use_qk_norm": False,
        },
    }


FORMAT = Format(
    rules=internvl_rules,
    read_config=read_internvl_config,
    write_config=write_internvl_config,
    prefixes=(
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("language_model.", "model.language_model."),
        ("vision_tower.", f"{_TOWER}."),
        ("multi_modal_projector.", f"{_PROJECTOR}."),
    ),
)

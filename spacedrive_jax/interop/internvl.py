"""InternVL3's files in transformers' layout (`OpenGVLab/InternVL3-*-hf`): config.json, tensor names.

Fields left out take transformers' defaults. Checkpoints on the hub, as transformers saves them, say
`language_model.model.*`, `language_model.lm_head.*`, `vision_tower.*`, `multi_modal_projector.*`; its state
dict says `model.language_model.*`, `lm_head.*` and so on, which the table has.
"""

from __future__ import annotations

from typing import Any

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.interop.hf_fields import (
    MOST_LAYERS,
    Fields,
    decoder_fields,
    expect,
    is_tied,
    part,
    plain_decoder,
    real,
    size,
    square_side,
    text_fields,
)
from spacedrive_jax.interop.weight_table import (
    Format,
    ParameterPath,
    Rule,
    decoder_rules,
    linear_rules,
    reversed_prefixes,
    with_prefix,
)
from spacedrive_jax.models.families.internvl import InternVisionConfig, InternVLConfig

_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
_PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("language_model.", "model.language_model."),
    ("vision_tower.", f"{_TOWER}."),
    ("multi_modal_projector.", f"{_PROJECTOR}."),
)


def internvl_rules(config: InternVLConfig) -> tuple[Rule, ...]:
    """The table of the base weights of InternVL3 (adapters and new-token rows are no part of it)."""
    wide, merged = config.decoder.hidden_size, config.vision.hidden_size * config.vision.merge_size**2
    return (
        *_vision_rules(config.vision),
        *_norm(f"{_PROJECTOR}.layer_norm", ("projector", "norm"), merged),
        *linear_rules(f"{_PROJECTOR}.linear_1", ("projector", "hidden"), (wide, merged)),
        *linear_rules(f"{_PROJECTOR}.linear_2", ("projector", "out"), (wide, wide)),
        *decoder_rules(config.decoder),
    )


def canonical_name(name: str) -> str:
    """Hub or transformers name to the one the table has."""
    return with_prefix(name, _PREFIXES)


def hub_name(name: str) -> str:
    """The name a tensor has in checkpoints on the hub (`canonical_name` undoes it)."""
    return with_prefix(name, reversed_prefixes(_PREFIXES))


def _norm(source: str, path: ParameterPath, width: int, *, layers: int | None = None) -> list[Rule]:
    return [
        Rule(f"{source}.weight", (*path, "scale"), (width,), 0, layers),
        Rule(f"{source}.bias", (*path, "bias"), (width,), 0, layers),
    ]


def _vision_rules(config: InternVisionConfig) -> tuple[Rule, ...]:
    width, inner, depth = config.hidden_size, config.intermediate_size, config.depth
    block, blocks = f"{_TOWER}.encoder.layer.{{layer}}", ("vision", "layers")
    patch = (width, config.in_channels, config.patch_size, config.patch_size)
    embeddings, embedding = f"{_TOWER}.embeddings", ("vision", "patch_embedding")
    places = (1, config.grid_side**2 + 1, width)
    rules = [
        Rule(f"{embeddings}.patch_embeddings.projection.weight", (*embedding, "kernel"), patch, in_axes=1),
        Rule(f"{embeddings}.patch_embeddings.projection.bias", (*embedding, "bias"), (width,)),
        Rule(f"{embeddings}.cls_token", ("vision", "class_embedding"), (1, 1, width)),
        Rule(f"{embeddings}.position_embeddings", ("vision", "position_embedding"), places),
        *_norm(f"{block}.layernorm_before", (*blocks, "attention_norm"), width, layers=depth),
        *_norm(f"{block}.layernorm_after", (*blocks, "mlp_norm"), width, layers=depth),
        Rule(f"{block}.lambda_1", (*blocks, "attention_scale"), (width,), 0, depth),
        Rule(f"{block}.lambda_2", (*blocks, "mlp_scale"), (width,), 0, depth),
        *linear_rules(f"{block}.mlp.fc1", (*blocks, "up"), (inner, width), layers=depth),
        *linear_rules(f"{block}.mlp.fc2", (*blocks, "down"), (width, inner), layers=depth),
    ]
    for source, target in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("projection_layer", "o")):
        rules += linear_rules(
            f"{block}.attention.{source}",
            (*blocks, "attention", target),
            (width, width),
            bias=target == "o" or config.attention_bias,
            in_axes=2 if target == "o" else 1,
            layers=depth,
        )
    if config.last_norm:
        rules += _norm(f"{_TOWER}.layernorm", ("vision", "last_norm"), width)
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
        decoder=plain_decoder(text, origin, "qwen2", tied=is_tied(fields, text, default=True)),
        vision=_vision(vision, merge_size, origin),
        image_token_id=size(fields, "image_token_id", origin, 151667, least=0),
    )


def _vision(vision: Fields, merge_size: int, origin: str) -> InternVisionConfig:
    expect(vision, "model_type", "internvl_vision", origin)
    expect(vision, "hidden_act", "gelu", origin)
    # InternViT-6B, of InternVL3-38B and larger, has other norms.
    expect(vision, "norm_type", "layer_norm", origin)
    expect(vision, "use_qk_norm", False, origin)
    expect(vision, "use_mask_token", False, origin)
    expect(vision, "use_absolute_position_embeddings", True, origin)
    return InternVisionConfig(
        hidden_size=size(vision, "hidden_size", origin, 1024),
        intermediate_size=size(vision, "intermediate_size", origin, 4096),
        depth=size(vision, "num_hidden_layers", origin, 24, most=MOST_LAYERS),
        num_heads=size(vision, "num_attention_heads", origin, 16),
        norm_eps=real(vision, "layer_norm_eps", origin, 1e-6),
        patch_size=square_side(vision, "patch_size", origin, 14),
        in_channels=size(vision, "num_channels", origin, 3),
        merge_size=merge_size,
        image_size=square_side(vision, "image_size", origin, 448),
        attention_bias=bool(vision.get("attention_bias", False)),
        last_norm=not vision.get("use_mean_pooling", True),
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
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.num_heads,
            "num_channels": vision.in_channels,
            "image_size": [vision.image_size, vision.image_size],
            "patch_size": [vision.patch_size, vision.patch_size],
            "attention_bias": vision.attention_bias,
            "hidden_act": "gelu",
            "layer_norm_eps": vision.norm_eps,
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
    canonical_name=canonical_name,
    hub_name=hub_name,
)

"""Qwen3-VL's config.json and the two-way table of its weights (dense models).

Checkpoints on the hub have `text_config` with `rope_scaling`, transformers 5 writes `rope_parameters`. Fields
left out take transformers' defaults. Tensors go by one name everywhere: transformers' state dict's.
"""

from __future__ import annotations

from typing import Any

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.interop.hf_fields import (
    MOST_LAYERS,
    Fields,
    decoder_fields,
    expect,
    expect_full_attention,
    head_size,
    ids,
    part,
    real,
    rotary_fields,
    rotary_theta,
    rotary_type,
    size,
)
from spacedrive_jax.interop.weight_table import Format, ParameterPath, Rule, decoder_rules, linear_rules
from spacedrive_jax.models.config import LanguageModelConfig
from spacedrive_jax.models.families.qwen3_vl import Qwen3VisionConfig, Qwen3VLConfig

_TOWER = "model.visual"


def qwen3_rules(config: Qwen3VLConfig) -> tuple[Rule, ...]:
    """The table of the base weights of Qwen3-VL (adapters and new-token rows are no part of it)."""
    return (*_vision_rules(config.vision), *decoder_rules(config.decoder))


def _norm(source: str, path: ParameterPath, width: int, layers: int | None) -> list[Rule]:
    return [
        Rule(f"{source}.weight", (*path, "scale"), (width,), 0, layers),
        Rule(f"{source}.bias", (*path, "bias"), (width,), 0, layers),
    ]


def _vision_rules(config: Qwen3VisionConfig) -> tuple[Rule, ...]:
    width, inner, depth = config.hidden_size, config.intermediate_size, config.depth
    merged = width * config.merge_size**2
    block, blocks = f"{_TOWER}.blocks.{{layer}}", ("vision", "layers")
    patch = (config.temporal_patch_size, config.patch_size, config.patch_size)

    def merger(source: str, path: ParameterPath, normed: int, layers: int | None) -> list[Rule]:
        return [
            *_norm(f"{source}.norm", (*path, "norm"), normed, layers),
            *linear_rules(f"{source}.linear_fc1", (*path, "hidden"), (merged, merged), layers=layers),
            *linear_rules(
                f"{source}.linear_fc2", (*path, "out"), (config.out_hidden_size, merged), layers=layers
            ),
        ]

    rules = [
        Rule(
            f"{_TOWER}.patch_embed.proj.weight",
            ("vision", "patch_embedding", "kernel"),
            (width, config.in_channels, *patch),
            in_axes=1,
        ),
        Rule(f"{_TOWER}.patch_embed.proj.bias", ("vision", "patch_embedding", "bias"), (width,)),
        Rule(
            f"{_TOWER}.pos_embed.weight",
            ("vision", "position_embedding"),
            (config.num_position_embeddings, width),
        ),
        *_norm(f"{block}.norm1", (*blocks, "attention_norm"), width, depth),
        *_norm(f"{block}.norm2", (*blocks, "mlp_norm"), width, depth),
        *linear_rules(f"{block}.attn.qkv", (*blocks, "attention", "qkv"), (3 * width, width), layers=depth),
        *linear_rules(
            f"{block}.attn.proj", (*blocks, "attention", "o"), (width, width), in_axes=2, layers=depth
        ),
        *linear_rules(f"{block}.mlp.linear_fc1", (*blocks, "up"), (inner, width), layers=depth),
        *linear_rules(f"{block}.mlp.linear_fc2", (*blocks, "down"), (width, inner), layers=depth),
        *merger(f"{_TOWER}.merger", ("vision", "merger"), width, None),
    ]
    if config.deepstack_blocks:
        stacked = ("vision", "deepstack", "layers")
        source = f"{_TOWER}.deepstack_merger_list.{{layer}}"
        rules += merger(source, stacked, merged, len(config.deepstack_blocks))
    return tuple(rules)


def read_qwen3_config(fields: Fields, origin: str) -> Qwen3VLConfig:
    """Reads the parsed config; `read_hf_config` is the public way here."""
    text = part(fields, "text_config", origin)
    return Qwen3VLConfig(
        decoder=_decoder(text, fields, origin),
        vision=_vision(part(fields, "vision_config", origin), origin),
        image_token_id=size(fields, "image_token_id", origin, 151655, least=0),
        vision_start_token_id=size(fields, "vision_start_token_id", origin, 151652, least=0),
        vision_end_token_id=size(fields, "vision_end_token_id", origin, 151653, least=0),
    )


def _decoder(text: Fields, whole: Fields, origin: str) -> LanguageModelConfig:
    expect(text, "model_type", "qwen3_vl_text", origin)
    expect(text, "hidden_act", "silu", origin)
    expect(text, "attention_bias", False, origin)
    kind = rotary_type(text, origin)
    if kind not in ("default", "mrope"):
        raise ConfigError(f"{origin}: rotary embedding of type {kind!r} is not supported, only plain M-RoPE")
    expect_full_attention(text, origin)
    rope = rotary_fields(text, origin)
    expect(rope, "mrope_interleaved", True, origin)
    hidden, heads = (
        size(text, name, origin, default)
        for name, default in (("hidden_size", 4096), ("num_attention_heads", 32))
    )
    return LanguageModelConfig(
        vocab_size=size(text, "vocab_size", origin, 151936),
        hidden_size=hidden,
        intermediate_size=size(text, "intermediate_size", origin, 22016),
        num_layers=size(text, "num_hidden_layers", origin, 32, most=MOST_LAYERS),
        num_heads=heads,
        # null is as many as queries, a field left out the class's number.
        num_kv_heads=size(
            text, "num_key_value_heads", origin, heads if "num_key_value_heads" in text else 32
        ),
        head_dim=head_size(text, origin, hidden, heads) if "head_dim" in text else 128,
        rope_theta=rotary_theta(text, origin, 500_000.0),
        mrope_section=ids(rope, "mrope_section", origin, (24, 20, 20)),
        mrope_interleaved=True,
        norm_eps=real(text, "rms_norm_eps", origin, 1e-6),
        qkv_bias=False,
        qk_norm=True,
        tie_word_embeddings=bool(whole.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    )


def _vision(vision: Fields, origin: str) -> Qwen3VisionConfig:
    expect(vision, "hidden_act", "gelu_pytorch_tanh", origin)
    rope = part(vision, "rope_parameters", origin)
    expect(rope, "rope_type", "axial", origin)
    if real(rope, "rope_theta", origin, 10_000.0) != 10_000.0:
        raise ConfigError(f"{origin}: vision_config.rope_parameters.rope_theta must be 10000")
    return Qwen3VisionConfig(
        hidden_size=size(vision, "hidden_size", origin, 1152),
        intermediate_size=size(vision, "intermediate_size", origin, 4304),
        depth=size(vision, "depth", origin, 27, most=MOST_LAYERS),
        num_heads=size(vision, "num_heads", origin, 16),
        patch_size=size(vision, "patch_size", origin, 16),
        temporal_patch_size=size(vision, "temporal_patch_size", origin, 2),
        in_channels=size(vision, "in_channels", origin, 3),
        merge_size=size(vision, "spatial_merge_size", origin, 2),
        out_hidden_size=size(vision, "out_hidden_size", origin, 3584),
        num_position_embeddings=size(vision, "num_position_embeddings", origin, 2304),
        deepstack_blocks=ids(vision, "deepstack_visual_indexes", origin, (8, 16, 24)),
    )


def write_qwen3_config(config: Qwen3VLConfig) -> dict[str, Any]:
    """The config as transformers 4.57 and 5 read it."""
    decoder, vision = config.decoder, config.vision
    if decoder.qkv_bias or not (decoder.qk_norm and decoder.mrope_interleaved):
        raise ConfigError(
            "transformers' Qwen3-VL needs qk_norm, mrope_interleaved and no qkv_bias; this decoder has "
            f"qk_norm {decoder.qk_norm}, mrope_interleaved {decoder.mrope_interleaved}, "
            f"qkv_bias {decoder.qkv_bias}"
        )
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": config.image_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "text_config": {
            "model_type": "qwen3_vl_text",
            **decoder_fields(decoder),
            "head_dim": decoder.head_dim,
            "attention_bias": False,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": list(decoder.mrope_section),
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "in_channels": vision.in_channels,
            "spatial_merge_size": vision.merge_size,
            "out_hidden_size": vision.out_hidden_size,
            "num_position_embeddings": vision.num_position_embeddings,
            "deepstack_visual_indexes": list(vision.deepstack_blocks),
            "hidden_act": "gelu_pytorch_tanh",
        },
    }


FORMAT = Format(
    rules=qwen3_rules,
    read_config=read_qwen3_config,
    write_config=write_qwen3_config,
    canonical_name=str,
    hub_name=str,
)

"""Qwen3-VL's config.json and the two-way table of its weights (dense models).

Checkpoints on the hub have `text_config` with `rope_scaling`, transformers 5 writes `rope_parameters`. Fields
left out take transformers' defaults. Tensors go by one name everywhere: transformers' state dict's.
"""

from __future__ import annotations

from typing import Any

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.interop.hf_fields import (
    QWEN_TOKENS,
    QWEN_TOKENS_USUAL,
    QWEN_TOWER,
    Field,
    Fields,
    decoder_fields,
    decoder_sizes,
    expect,
    expect_mrope,
    flag,
    head_size,
    ids,
    part,
    read_fields,
    real,
    rotary_fields,
    rotary_theta,
    write_fields,
)
from spacedrive_jax.interop.weight_table import (
    Format,
    ParameterPath,
    Rule,
    decoder_rules,
    linear_rules,
    norm_rules,
)
from spacedrive_jax.models.config import LanguageModelConfig
from spacedrive_jax.models.families.qwen3_vl import Qwen3VisionConfig, Qwen3VLConfig

_TOWER = "model.visual"
_TOWER_FIELDS = (
    *QWEN_TOWER,
    Field("num_position_embeddings"),
    Field("deepstack_blocks", "deepstack_visual_indexes", ids),
)


def qwen3_rules(config: Qwen3VLConfig) -> tuple[Rule, ...]:
    """The table of the base weights of Qwen3-VL (adapters and new-token rows are no part of it)."""
    return (*_vision_rules(config.vision), *decoder_rules(config.decoder))


def _vision_rules(config: Qwen3VisionConfig) -> tuple[Rule, ...]:
    width, inner, depth = config.hidden_size, config.intermediate_size, config.depth
    merged = width * config.merge_size**2
    block, blocks = f"{_TOWER}.blocks.{{layer}}", ("vision", "layers")
    patch = (config.temporal_patch_size, config.patch_size, config.patch_size)

    def merger(source: str, path: ParameterPath, normed: int, layers: int | None) -> list[Rule]:
        return [
            *norm_rules(f"{source}.norm", (*path, "norm"), normed, layers=layers),
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
        *norm_rules(f"{block}.norm1", (*blocks, "attention_norm"), width, layers=depth),
        *norm_rules(f"{block}.norm2", (*blocks, "mlp_norm"), width, layers=depth),
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
        **read_fields(QWEN_TOKENS, fields, origin, QWEN_TOKENS_USUAL),
    )


def _decoder(text: Fields, whole: Fields, origin: str) -> LanguageModelConfig:
    expect(text, "model_type", "qwen3_vl_text", origin)
    expect(text, "hidden_act", "silu", origin)
    expect(text, "attention_bias", False, origin)
    expect_mrope(text, origin)
    rope = rotary_fields(text, origin)
    expect(rope, "mrope_interleaved", True, origin)
    usual = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 32,
        "norm_eps": 1e-6,
    }
    sizes = decoder_sizes(text, origin, usual)
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    return LanguageModelConfig(
        **sizes,
        head_dim=head_size(text, origin, hidden, heads) if "head_dim" in text else 128,
        rope_theta=rotary_theta(text, origin, 500_000.0),
        mrope_section=ids(rope, "mrope_section", origin, (24, 20, 20)),
        mrope_interleaved=True,
        qkv_bias=False,
        qk_norm=True,
        tie_word_embeddings=any(flag(each, "tie_word_embeddings", origin, False) for each in (whole, text)),
    )


def _vision(vision: Fields, origin: str) -> Qwen3VisionConfig:
    expect(vision, "hidden_act", "gelu_pytorch_tanh", origin)
    rope = part(vision, "rope_parameters", origin)
    expect(rope, "rope_type", "axial", origin)
    if real(rope, "rope_theta", origin, 10_000.0) != 10_000.0:
        raise ConfigError(f"{origin}: vision_config.rope_parameters.rope_theta must be 10000")
    usual = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "depth": 27,
        "num_heads": 16,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "merge_size": 2,
        "out_hidden_size": 3584,
        "num_position_embeddings": 2304,
        "deepstack_blocks": (8, 16, 24),
    }
    return Qwen3VisionConfig(**read_fields(_TOWER_FIELDS, vision, origin, usual))


def write_qwen3_config(config: Qwen3VLConfig) -> dict[str, Any]:
    """The config as transformers 4.57 and 5 read it."""
    decoder, vision = config.decoder, config.vision
    if decoder.qkv_bias or not (decoder.qk_norm and decoder.mrope_interleaved):
        raise ConfigError(
            "transformers' Qwen3-VL needs qk_norm, mrope_interleaved and no qkv_bias; this language model "
            f"has qk_norm {decoder.qk_norm}, mrope_interleaved {decoder.mrope_interleaved}, "
            f"qkv_bias {decoder.qkv_bias}"
        )
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **write_fields(QWEN_TOKENS, config),
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
            **write_fields(_TOWER_FIELDS, vision),
            "hidden_act": "gelu_pytorch_tanh",
        },
    }


FORMAT = Format(
    rules=qwen3_rules,
    read_config=read_qwen3_config,
    write_config=write_qwen3_config,
)

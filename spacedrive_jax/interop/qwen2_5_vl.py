"""Qwen2.5-VL's config.json and the two-way table of its weights.

Three layouts are in use: flat (the hub's checkpoints), with `text_config` (transformers 4.52) and with
`rope_parameters` (transformers 5). Fields left out take transformers' defaults.
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
    rotary_fields,
    rotary_theta,
    size,
    text_fields,
    write_fields,
)
from spacedrive_jax.interop.weight_table import Format, Published, Rule, decoder_rules, linear_rules
from spacedrive_jax.models.config import LanguageModelConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVisionConfig, QwenVLConfig

# The two-way table of Qwen2.5-VL and the names its tensors go by.
#
# Two are in use: transformers' state dict (`model.visual.*`, `model.language_model.*`), which the table
# has, and checkpoints on the hub, which drop parts of those prefixes (`visual.*`, `model.*`).


_TOWER = (*QWEN_TOWER, Field("full_attention_blocks", "fullatt_block_indexes", ids), Field("window_size"))


def qwen_rules(config: QwenVLConfig) -> tuple[Rule, ...]:
    """The table of the base weights of Qwen2.5-VL (adapters and new-token rows are no part of it)."""
    return (*_vision_rules(config.vision), *decoder_rules(config.decoder))


def _vision_rules(config: QwenVisionConfig) -> tuple[Rule, ...]:
    width, inner = config.hidden_size, config.intermediate_size
    merged = width * config.merge_size**2
    prefix = "model.visual"

    def linear(
        source: str, target: str, sizes: tuple[int, int], *, block: bool, in_axes: int = 1
    ) -> tuple[Rule, ...]:
        source = f"{prefix}.blocks.{{layer}}.{source}" if block else f"{prefix}.{source}"
        path = ("vision", *(("layers",) if block else ()), *target.split("."))
        return linear_rules(source, path, sizes, in_axes=in_axes, layers=config.depth if block else None)

    def norm(number: int, target: str) -> Rule:
        path = ("vision", "layers", target, "scale")
        return Rule(f"{prefix}.blocks.{{layer}}.norm{number}.weight", path, (width,), 0, config.depth)

    patch = (config.temporal_patch_size, config.patch_size, config.patch_size)
    return (
        Rule(
            f"{prefix}.patch_embed.proj.weight",
            ("vision", "patch_embedding", "kernel"),
            (width, config.in_channels, *patch),
            in_axes=1,
        ),
        norm(1, "attention_norm"),
        norm(2, "mlp_norm"),
        *linear("attn.qkv", "attention.qkv", (3 * width, width), block=True),
        *linear("attn.proj", "attention.o", (width, width), block=True, in_axes=2),
        *linear("mlp.gate_proj", "mlp.gate", (inner, width), block=True),
        *linear("mlp.up_proj", "mlp.up", (inner, width), block=True),
        *linear("mlp.down_proj", "mlp.down", (width, inner), block=True),
        Rule(f"{prefix}.merger.ln_q.weight", ("vision", "merger", "norm", "scale"), (width,)),
        *linear("merger.mlp.0", "merger.hidden", (merged, merged), block=False),
        *linear("merger.mlp.2", "merger.out", (config.out_hidden_size, merged), block=False),
    )


def read_qwen_config(fields: Fields, origin: str) -> QwenVLConfig:
    """Reads the parsed config; `read_hf_config` is the public way here."""
    text = text_fields(fields, origin, flat=True)
    vision = part(fields, "vision_config", origin)
    return QwenVLConfig(
        decoder=_decoder(text, fields, origin),
        vision=_vision(vision, origin),
        **read_fields(QWEN_TOKENS, fields, origin, QWEN_TOKENS_USUAL),
    )


def write_qwen_config(config: QwenVLConfig) -> dict[str, Any]:
    """The config in the layout with `text_config`, which transformers 4.52 and 5 read."""
    decoder, vision = config.decoder, config.vision
    if decoder.hidden_size != decoder.num_heads * decoder.head_dim or not decoder.qkv_bias:
        raise ConfigError(
            "transformers' Qwen2.5-VL needs hidden_size == num_heads * head_dim and qkv_bias; this language "
            f"model has hidden_size {decoder.hidden_size}, {decoder.num_heads} heads of {decoder.head_dim}, "
            f"qkv_bias {decoder.qkv_bias}"
        )
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **write_fields(QWEN_TOKENS, config),
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            **decoder_fields(decoder),
            "rope_scaling": {"rope_type": "default", "mrope_section": list(decoder.mrope_section)},
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            **write_fields(_TOWER, vision),
            "hidden_act": "silu",
        },
    }


def _decoder(text: Fields, whole: Fields, origin: str) -> LanguageModelConfig:
    expect_mrope(text, origin)
    expect(text, "hidden_act", "silu", origin)
    sizes = decoder_sizes(text, origin, {"norm_eps": 1e-5}, grouped=False)
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    sections = ids(rotary_fields(text, origin), "mrope_section", origin)
    head_dim = head_size(text, origin, hidden, heads)
    if head_dim * heads != hidden:
        raise ConfigError(f"{origin}: head_dim {head_dim} times {heads} heads is not hidden_size {hidden}")
    if 2 * sum(sections) != head_dim:
        raise ConfigError(
            f"{origin}: mrope_section {list(sections)} does not sum to half of head_dim {head_dim}"
        )
    return LanguageModelConfig(
        **sizes,
        head_dim=head_dim,
        rope_theta=rotary_theta(text, origin, 1_000_000.0),
        mrope_section=sections,
        qkv_bias=True,
        tie_word_embeddings=any(flag(each, "tie_word_embeddings", origin, False) for each in (whole, text)),
    )


def _vision(vision: Fields, origin: str) -> QwenVisionConfig:
    expect(vision, "hidden_act", "silu", origin)
    usual = {
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "depth": 32,
        "num_heads": 16,
        "patch_size": size(vision, "spatial_patch_size", origin, 14),
        "temporal_patch_size": 2,
        "in_channels": size(vision, "in_chans", origin, 3),
        "merge_size": 2,
        "out_hidden_size": 3584,
        "full_attention_blocks": (7, 15, 23, 31),
        "window_size": 112,
    }
    return QwenVisionConfig(**read_fields(_TOWER, vision, origin, usual))


FORMAT = Format(
    rules=qwen_rules,
    read_config=read_qwen_config,
    write_config=write_qwen_config,
    prefixes=(("visual.", "model.visual."), ("model.", "model.language_model.")),
    published=Published(presets=("spacedrive_qwen_7b", "table1_spacedrive_plus")),
)

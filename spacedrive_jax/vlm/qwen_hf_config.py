"""Qwen2.5-VL's config.json.

Three layouts are in use: flat (the hub's checkpoints), with `text_config` (transformers 4.52) and with
`rope_parameters` (transformers 5). Fields left out take transformers' defaults.
"""

from __future__ import annotations

from typing import Any

from spacedrive_jax.console import UserError
from spacedrive_jax.vlm.config import DecoderConfig, QwenVisionConfig, QwenVLConfig
from spacedrive_jax.vlm.hf_fields import (
    Fields,
    decoder_fields,
    expect,
    required,
    rotary_fields,
    rotary_theta,
    rotary_type,
)


def read_qwen_config(fields: Fields, origin: str) -> QwenVLConfig:
    """Reads the parsed config; `read_hf_config` is the public way here."""
    text = fields.get("text_config") or fields
    vision = fields.get("vision_config") or {}
    return QwenVLConfig(
        decoder=_decoder(text, fields, origin),
        vision=_vision(vision, origin),
        image_token_id=fields.get("image_token_id", 151655),
        vision_start_token_id=fields.get("vision_start_token_id", 151652),
        vision_end_token_id=fields.get("vision_end_token_id", 151653),
    )


def write_qwen_config(config: QwenVLConfig) -> dict[str, Any]:
    """The config in the layout with `text_config`, which transformers 4.52 and 5 read."""
    decoder, vision = config.decoder, config.vision
    if decoder.hidden_size != decoder.num_heads * decoder.head_dim or not decoder.qkv_bias:
        raise UserError(
            "transformers' Qwen2.5-VL needs hidden_size == num_heads * head_dim and qkv_bias; this decoder "
            f"has hidden_size {decoder.hidden_size}, {decoder.num_heads} heads of {decoder.head_dim}, "
            f"qkv_bias {decoder.qkv_bias}"
        )
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": config.image_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "tie_word_embeddings": decoder.tied_head,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            **decoder_fields(decoder),
            "rope_scaling": {"rope_type": "default", "mrope_section": list(decoder.rope_sections)},
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "fullatt_block_indexes": list(vision.full_attention_blocks),
            "window_size": vision.window_size,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "in_channels": vision.in_channels,
            "spatial_merge_size": vision.merge_size,
            "out_hidden_size": vision.out_hidden_size,
            "hidden_act": "silu",
        },
    }


def _decoder(text: Fields, whole: Fields, origin: str) -> DecoderConfig:
    if rotary_type(text) not in ("default", "mrope"):
        raise UserError(
            f"{origin}: rotary embedding of type {rotary_type(text)!r} is not supported, only plain M-RoPE"
        )
    if text.get("use_sliding_window"):
        raise UserError(f"{origin}: sliding-window attention is not supported (use_sliding_window)")
    expect(text, "hidden_act", "silu", origin)
    heads = required(text, "num_attention_heads", origin)
    hidden = required(text, "hidden_size", origin)
    return DecoderConfig(
        vocab_size=required(text, "vocab_size", origin),
        hidden_size=hidden,
        intermediate_size=required(text, "intermediate_size", origin),
        num_layers=required(text, "num_hidden_layers", origin),
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=hidden // heads,
        rope_theta=rotary_theta(text, 1_000_000.0),
        rope_sections=tuple(required(rotary_fields(text), "mrope_section", origin)),
        norm_eps=text.get("rms_norm_eps", 1e-5),
        qkv_bias=True,
        tied_head=bool(whole.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    )


def _vision(vision: Fields, origin: str) -> QwenVisionConfig:
    expect(vision, "hidden_act", "silu", origin)
    return QwenVisionConfig(
        hidden_size=vision.get("hidden_size", 3584),
        intermediate_size=vision.get("intermediate_size", 3420),
        depth=vision.get("depth", 32),
        num_heads=vision.get("num_heads", 16),
        full_attention_blocks=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
        window_size=vision.get("window_size", 112),
        patch_size=vision.get("patch_size", vision.get("spatial_patch_size", 14)),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
        merge_size=vision.get("spatial_merge_size", 2),
        out_hidden_size=vision.get("out_hidden_size", 3584),
    )

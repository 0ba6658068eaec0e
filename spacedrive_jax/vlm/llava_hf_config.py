"""LLaVA-1.5's config.json, as transformers 4 and 5 write it.

Fields left out take transformers' defaults: those of LLaMA-7B in the text part, of CLIP ViT-B/32 in a vision
part that is there, of ViT-L/14-336 where it is not.
"""

from __future__ import annotations

from typing import Any

from spacedrive_jax.console import UserError
from spacedrive_jax.vlm.config import ClipVisionConfig, DecoderConfig, LlavaConfig
from spacedrive_jax.vlm.hf_fields import Fields, decoder_fields, expect, rotary_theta, rotary_type


def read_llava_config(fields: Fields, origin: str) -> LlavaConfig:
    """Reads the parsed config; `read_hf_config` is the public way here."""
    text, vision = fields.get("text_config") or {}, fields.get("vision_config")
    expect(fields, "projector_hidden_act", "gelu", origin)
    expect(fields, "vision_feature_select_strategy", "default", origin)
    layer = fields.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or layer >= 0:
        raise UserError(f"{origin}: vision_feature_layer {layer!r} must be one number below 0")
    return LlavaConfig(
        decoder=_decoder(text, origin),
        vision=ClipVisionConfig(feature_layer=layer) if vision is None else _vision(vision, layer, origin),
        image_token_id=fields.get("image_token_index", fields.get("image_token_id", 32000)),
        projector_bias=fields.get("multimodal_projector_bias", True),
    )


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
        "tie_word_embeddings": decoder.tied_head,
        "text_config": {
            "model_type": "llama",
            "head_dim": decoder.head_dim,
            **decoder_fields(decoder),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": vision.in_channels,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": vision.norm_eps,
        },
    }


def _decoder(text: Fields, origin: str) -> DecoderConfig:
    expect(text, "model_type", "llama", origin)
    expect(text, "hidden_act", "silu", origin)
    expect(text, "attention_bias", False, origin)
    expect(text, "mlp_bias", False, origin)
    if rotary_type(text) != "default":
        raise UserError(f"{origin}: rotary embedding of type {rotary_type(text)!r} is not supported")
    hidden, heads = text.get("hidden_size", 4096), text.get("num_attention_heads", 32)
    head_dim = text.get("head_dim") or hidden // heads
    return DecoderConfig(
        vocab_size=text.get("vocab_size", 32000),
        hidden_size=hidden,
        intermediate_size=text.get("intermediate_size", 11008),
        num_layers=text.get("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=rotary_theta(text, 10_000.0),
        rope_sections=(head_dim // 2,),
        norm_eps=text.get("rms_norm_eps", 1e-6),
        qkv_bias=False,
        # The outer field is no guide: transformers 4 writes its own default there.
        tied_head=bool(text.get("tie_word_embeddings", False)),
    )


def _vision(vision: Fields, layer: int, origin: str) -> ClipVisionConfig:
    expect(vision, "model_type", "clip_vision_model", origin)
    expect(vision, "hidden_act", "quick_gelu", origin)
    return ClipVisionConfig(
        hidden_size=vision.get("hidden_size", 768),
        intermediate_size=vision.get("intermediate_size", 3072),
        depth=vision.get("num_hidden_layers", 12),
        num_heads=vision.get("num_attention_heads", 12),
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 32),
        in_channels=vision.get("num_channels", 3),
        feature_layer=layer,
        norm_eps=vision.get("layer_norm_eps", 1e-5),
    )

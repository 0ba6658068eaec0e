"""Vision-language models in flax.nnx: Qwen2.5-VL and LLaVA-1.5, exact against transformers."""

from spacedrive_jax.vlm.cache import KVCache
from spacedrive_jax.vlm.checkpoint import TRAINABLE, from_hf, to_hf
from spacedrive_jax.vlm.clip_vision import flatten_patches
from spacedrive_jax.vlm.config import (
    ClipVisionConfig,
    ComputeConfig,
    DecoderConfig,
    LlavaConfig,
    LoraConfig,
    NewTokensConfig,
    QwenVisionConfig,
    QwenVLConfig,
    VLConfig,
)
from spacedrive_jax.vlm.decoder import Decoder, NewTokenParam
from spacedrive_jax.vlm.families import FAMILIES, Family, family_of
from spacedrive_jax.vlm.generation import generate
from spacedrive_jax.vlm.hf_config import read_hf_config
from spacedrive_jax.vlm.initialization import ShardingOf, initialize
from spacedrive_jax.vlm.llava import Llava
from spacedrive_jax.vlm.peft import load_adapter, read_peft_config, save_adapter
from spacedrive_jax.vlm.positions import ImageSpan, find_image_spans, mrope_positions
from spacedrive_jax.vlm.qwen2_5_vl import QwenVL
from spacedrive_jax.vlm.vision_language import VisionLanguageModel, place_rows

__all__ = [
    "FAMILIES",
    "TRAINABLE",
    "ClipVisionConfig",
    "ComputeConfig",
    "Decoder",
    "DecoderConfig",
    "Family",
    "ImageSpan",
    "KVCache",
    "Llava",
    "LlavaConfig",
    "LoraConfig",
    "NewTokenParam",
    "NewTokensConfig",
    "QwenVL",
    "QwenVLConfig",
    "QwenVisionConfig",
    "ShardingOf",
    "VLConfig",
    "VisionLanguageModel",
    "family_of",
    "find_image_spans",
    "flatten_patches",
    "from_hf",
    "generate",
    "initialize",
    "load_adapter",
    "mrope_positions",
    "place_rows",
    "read_hf_config",
    "read_peft_config",
    "save_adapter",
    "to_hf",
]

"""Tiny runs of SpaceDrive on every family of vision-language models of the newer kinds; for tests."""

import dataclasses
from pathlib import Path

from spacedrive_jax.config import Config
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.models.config import LanguageModelConfig, VLConfig
from spacedrive_jax.models.families import FAMILIES
from spacedrive_jax.models.families.internvl import InternVisionConfig, InternVLConfig
from spacedrive_jax.models.families.qwen3_vl import Qwen3VisionConfig, Qwen3VLConfig
from spacedrive_jax.models.families.smolvlm import SiglipVisionConfig, SmolVLMConfig
from tests.training.runs import tiny

SQUARE_NAMES = ("smolvlm", "internvl")
NAMES = (*SQUARE_NAMES, "qwen3_vl")
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 8}
SQUARE = {**TOWER, "depth": 2, "merge_size": 2, "image_size": 32}


def tiny_vlm(name: str) -> VLConfig:
    """Two blocks of width 32 over the demo's vocabulary; four visual tokens a view."""
    tokenizer = load_tokenizer(None, FAMILIES[name].chat)
    decoder = LanguageModelConfig(
        vocab_size=tokenizer.vocabulary_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mrope_section=(4, 2, 2) if name == "qwen3_vl" else (8,),
        mrope_interleaved=name == "qwen3_vl",
        qkv_bias=name == "internvl",
        qk_norm=name == "qwen3_vl",
    )
    if name == "internvl":
        return InternVLConfig(decoder, InternVisionConfig(**SQUARE), tokenizer.image)
    if name == "smolvlm":
        return SmolVLMConfig(decoder, SiglipVisionConfig(**SQUARE), tokenizer.image)
    deepstack = {"depth": 3, "num_position_embeddings": 9, "deepstack_blocks": (0, 1)}
    vision = Qwen3VisionConfig(**TOWER, **deepstack, out_hidden_size=32)
    return Qwen3VLConfig(decoder, vision, image_token_id=tokenizer.image)


def family_run(name: str, records: Path, run_dir: Path, *, lora: bool = False, **train_fields) -> Config:
    """A run like `tests.training.runs.tiny`, on another family."""
    run = tiny(records, run_dir, **train_fields)
    model = dataclasses.replace(run.model, vlm=tiny_vlm(name), use_lora=lora, lora=FAMILIES[name].lora(2))
    size = (32, 32) if name == "qwen3_vl" else (48, 64)
    data = dataclasses.replace(run.data, image_size=size, sequence_length=192)
    return dataclasses.replace(run, model=model, data=data)

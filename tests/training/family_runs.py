"""Tiny runs of SpaceDrive on every family of vision-language models that has a square tower; for tests."""

import dataclasses
from pathlib import Path

from spacedrive_jax.config import Config
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.models.config import LanguageModelConfig, VLConfig
from spacedrive_jax.models.families import FAMILIES
from spacedrive_jax.models.families.internvl import InternVisionConfig, InternVLConfig
from spacedrive_jax.models.families.smolvlm import SiglipVisionConfig, SmolVLMConfig
from tests.training.runs import tiny

NAMES = ("smolvlm", "internvl")
TOWER = {"hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2}
TOWER |= {"patch_size": 8, "merge_size": 2, "image_size": 32}


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
        mrope_section=(8,),
        qkv_bias=name == "internvl",
    )
    if name == "internvl":
        return InternVLConfig(decoder, InternVisionConfig(**TOWER), tokenizer.image)
    return SmolVLMConfig(decoder, SiglipVisionConfig(**TOWER), tokenizer.image)


def family_run(name: str, records: Path, run_dir: Path, *, lora: bool = False, **train_fields) -> Config:
    """A run like `tests.training.runs.tiny`, on another family."""
    run = tiny(records, run_dir, **train_fields)
    model = dataclasses.replace(run.model, vlm=tiny_vlm(name), use_lora=lora)
    data = dataclasses.replace(run.data, image_size=(48, 64), sequence_length=192)
    return dataclasses.replace(run, model=model, data=data)

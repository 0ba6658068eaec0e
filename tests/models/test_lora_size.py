"""The trainable parameters of the paper's supplement: 10.09 M, 40.37 M, 80.74 M at rank 16, 64, 128."""

from __future__ import annotations

import math

import pytest
from flax import nnx

from spacedrive_jax.models.config import ComputeConfig, LoraConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.families.llava import LlavaConfig
from spacedrive_jax.models.families.llava import lora as llava_lora
from spacedrive_jax.models.families.qwen2_5_vl import QwenVLConfig


def sizes(config, kind, lora, new_tokens=None):
    model = nnx.eval_shape(
        lambda: family_of(config).model(
            config, compute=ComputeConfig(), rngs=nnx.Rngs(0), lora=lora, new_tokens=new_tokens
        )
    )
    return [math.prod(leaf.shape) for _, leaf in nnx.to_flat_state(nnx.state(model, kind))]


@pytest.mark.parametrize(("rank", "millions"), [(16, 10.09), (64, 40.37), (128, 80.74)])
def test_adapters_of_qwen_7b(rank, millions):
    found = sizes(QwenVLConfig.qwen2_5_vl_7b(), nnx.LoRAParam, LoraConfig(rank=rank))
    assert len(found) == 8
    assert round(sum(found) / 1e6, 2) == millions


def test_adapters_of_llava_7b():
    """k, v, o of 32 layers, each 4096 to 4096, rank r on both sides."""
    found = sizes(LlavaConfig.llava_1_5_7b(), nnx.LoRAParam, llava_lora(16))
    assert sum(found) == 32 * 3 * 16 * (4096 + 4096)


def test_adapters_copy_nothing_of_the_base():
    config = QwenVLConfig.qwen2_5_vl_7b()
    base = (nnx.Not(nnx.LoRAParam),)
    assert sizes(config, *base, LoraConfig()) == sizes(config, *base, None)

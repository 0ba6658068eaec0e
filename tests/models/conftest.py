from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.interop.hf_checkpoint import fill, from_hf
from spacedrive_jax.interop.safetensors_folder import SafetensorsFolder
from spacedrive_jax.interop.weight_table import check_names_and_shapes, lora_rules, new_token_rules
from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig, LoraConfig, NewTokensConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVisionConfig, QwenVL, QwenVLConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen_plus_train"
GOLDEN_LORA = LoraConfig(rank=4, alpha=16.0, dropout=0.05)
GOLDEN_NEW_TOKENS = NewTokensConfig(first_id=510, count=2)


@pytest.fixture(scope="session")
def golden_arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "arrays.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def golden_model() -> QwenVL:
    model = from_hf(GOLDEN, lora=GOLDEN_LORA, new_tokens=GOLDEN_NEW_TOKENS)
    adapters = SafetensorsFolder(GOLDEN / "adapters.safetensors")
    decoder = model.config.decoder
    rules = (*lora_rules(decoder, GOLDEN_LORA), *new_token_rules(decoder, GOLDEN_NEW_TOKENS))
    check_names_and_shapes(rules, adapters.shapes(), origin="adapters")
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    fill(flat, rules, adapters)
    return nnx.merge(graph, nnx.from_flat_state(flat))


def tiny_config(**decoder: object) -> QwenVLConfig:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mrope_section": (1, 1, 2),
    }
    return QwenVLConfig(
        decoder=LanguageModelConfig(**{**sizes, **decoder}),
        vision=QwenVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            depth=3,
            num_heads=2,
            full_attention_blocks=(1,),
            patch_size=4,
            window_size=16,
            out_hidden_size=32,
        ),
        image_token_id=90,
        vision_start_token_id=91,
        vision_end_token_id=92,
    )


def random_module(build, seed: int = 0, scale: float = 0.1):
    """The module that `build` would draw, filled from numpy instead: nothing is compiled."""
    graph, abstract = nnx.split(nnx.eval_shape(build))
    generator = np.random.default_rng(seed)
    flat = []
    for path, variable in nnx.to_flat_state(abstract):
        centre = 1.0 if path[-1] == "scale" else 0.0
        value = generator.normal(centre, scale, variable.shape)
        flat.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(flat))


@pytest.fixture(scope="session")
def tiny_model() -> QwenVL:
    return random_module(lambda: QwenVL(tiny_config(), compute=ComputeConfig(), rngs=nnx.Rngs(0)))

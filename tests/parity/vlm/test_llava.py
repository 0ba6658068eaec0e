"""Tiny random LLaVA-1.5 checkpoints, written by transformers, against its own numbers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from spacedrive_jax.interop.hf_checkpoint import from_hf
from spacedrive_jax.models.families.llava import Llava
from spacedrive_jax.models.families.llava import lora as llava_lora
from spacedrive_jax.models.image_processor import flatten_patches
from tests.parity.vlm.comparison import (
    assert_bit_exact_export,
    assert_close,
    assert_same_adapters,
    assert_same_answers,
    assert_same_hidden_states_and_logits,
    assert_same_pixels,
    right_padded,
)

torch = pytest.importorskip("torch", reason="parity tests need torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

IMAGE, GRID, VISUAL = 501, (4, 4), 16


class Case(NamedTuple):
    images: int
    kv_heads: int
    tied: bool = False
    feature_layer: int = -2


CASES = {
    "two_images": Case(images=2, kv_heads=4),
    "grouped_heads_tied": Case(images=1, kv_heads=2, tied=True, feature_layer=-1),
}


class Pair(NamedTuple):
    case: Case
    theirs: torch.nn.Module
    ours: Llava
    folder: Path


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request, tmp_path_factory) -> Pair:
    case = CASES[request.param]
    config = transformers.LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": case.kv_heads,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": case.tied,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        image_token_index=IMAGE,
        vision_feature_layer=case.feature_layer,
        tie_word_embeddings=case.tied,
    )
    torch.manual_seed(list(CASES).index(request.param))
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(0.0, 2.0 * parameter[0].numel() ** -0.5)
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    theirs.save_pretrained(folder, max_shard_size="200KB")
    return Pair(case, theirs, from_hf(folder), folder)


class Inputs(NamedTuple):
    token_ids: np.ndarray
    lengths: np.ndarray
    pixels: np.ndarray

    @property
    def patches(self) -> np.ndarray:
        return flatten_patches(self.pixels, 14)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Two prompts of unequal lengths, right-padded; the first one's images stand side by side."""
    generator = np.random.default_rng(seed)
    images = [IMAGE] * VISUAL

    def text(words: int) -> list[int]:
        return generator.integers(0, 500, words).tolist()

    prompts = [
        [*text(5), *images * case.images, *text(4)],
        [piece for _ in range(case.images) for piece in (*text(1), *images)] + text(3),
    ]
    token_ids, lengths = right_padded(prompts)
    pixels = generator.standard_normal((2, case.images, 3, 56, 56)).astype(np.float32)
    return Inputs(token_ids, lengths, pixels)


def torch_inputs(inputs: Inputs, row: int) -> dict:
    token_ids = torch.tensor(inputs.token_ids[row : row + 1, : inputs.lengths[row]], dtype=torch.long)
    return {
        "input_ids": token_ids,
        "attention_mask": torch.ones_like(token_ids),
        "pixel_values": torch.tensor(inputs.pixels[row]),
    }


def compared(pair: Pair, inputs: Inputs) -> tuple:
    """What the comparisons of both models take."""
    images = {"pixel_values": inputs.patches, "image_grid_thw": (1, *GRID)}
    arguments = [torch_inputs(inputs, row) for row in range(2)]
    return pair.ours, pair.theirs, inputs.token_ids, inputs.lengths, images, arguments


def test_features_hidden_states_and_logits(pair):
    inputs = make_inputs(pair.case)
    assert_same_hidden_states_and_logits(*compared(pair, inputs))
    patches = jnp.asarray(inputs.patches)
    features = pair.ours.encode_images(patches.reshape(-1, *patches.shape[2:]), GRID)
    features = features.reshape(len(patches), -1, features.shape[-1])
    for row, ours in enumerate(features):
        with torch.no_grad():
            theirs = pair.theirs(**torch_inputs(inputs, row)).image_hidden_states
        assert_close(ours, torch.cat(list(theirs)).reshape(ours.shape), "features")


def test_processed_images(pair):
    size = {"height": 56, "width": 56}
    processor = transformers.LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size=size)
    assert_same_pixels(pair.ours, processor, lambda pixels: flatten_patches(pixels, 14))


def test_generated_ids(pair):
    assert_same_answers(*compared(pair, make_inputs(pair.case, seed=2)))


@pytest.mark.parametrize("naming", ["hub", "transformers"])
def test_export_is_bit_exact_and_loads_in_transformers(pair, tmp_path, naming):
    assert_bit_exact_export(
        pair.ours, pair.theirs, tmp_path / "exported", naming=naming, max_shard_bytes=300_000
    )


def test_adapters_gradients_and_round_trip_with_peft(pair, tmp_path):
    peft = pytest.importorskip("peft")
    targets = llava_lora(16).targets
    modules = rf".*language_model.*\.({'|'.join(targets)})_proj"
    settings = peft.LoraConfig(r=4, lora_alpha=4, lora_dropout=0.05, target_modules=modules)
    inputs = make_inputs(pair.case, seed=3)
    token_ids = inputs.token_ids[:1, : inputs.lengths[0]]
    images, arguments = (
        {"pixel_values": inputs.patches[:1], "image_grid_thw": (1, *GRID)},
        torch_inputs(inputs, 0),
    )
    assert_same_adapters(pair.folder, pair.theirs, settings, token_ids, images, arguments, tmp_path)

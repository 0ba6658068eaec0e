"""Tiny random LLaVA-1.5 checkpoints, written by transformers, against its own numbers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from spacedrive_jax.interop.hf_checkpoint import from_hf, to_hf
from spacedrive_jax.interop.peft import load_adapter, read_peft_config, save_adapter
from spacedrive_jax.models.families.llava import Llava
from spacedrive_jax.models.families.llava import lora as llava_lora
from spacedrive_jax.models.image_processor import flatten_patches
from tests.parity.vlm.comparison import (
    assert_close,
    assert_same_lora_gradients,
    assert_same_pixels,
    hidden_states,
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
    lengths = np.array([len(each) for each in prompts])
    token_ids = np.zeros((2, lengths.max()), np.int32)
    for row, each in zip(token_ids, prompts, strict=True):
        row[: len(each)] = each
    pixels = generator.standard_normal((2, case.images, 3, 56, 56)).astype(np.float32)
    return Inputs(token_ids, lengths, pixels)


def torch_inputs(inputs: Inputs, row: int) -> dict:
    token_ids = torch.tensor(inputs.token_ids[row : row + 1, : inputs.lengths[row]], dtype=torch.long)
    return {
        "input_ids": token_ids,
        "attention_mask": torch.ones_like(token_ids),
        "pixel_values": torch.tensor(inputs.pixels[row]),
    }


def test_features_hidden_states_and_logits(pair):
    inputs = make_inputs(pair.case)
    ours = pair.ours.logits(inputs.token_ids, images=inputs.patches, image_grid=GRID, lengths=inputs.lengths)
    patches = jnp.asarray(inputs.patches)
    features = pair.ours.encode_images(patches.reshape(-1, *patches.shape[2:]), GRID)
    features = features.reshape(len(patches), -1, features.shape[-1])
    hidden = hidden_states(pair.ours, inputs.token_ids, patches, GRID, inputs.lengths)
    for row, length in enumerate(inputs.lengths):
        with torch.no_grad():
            theirs = pair.theirs(**torch_inputs(inputs, row), output_hidden_states=True)
        their_features = theirs.image_hidden_states
        assert_close(features[row], torch.cat(list(their_features)).reshape(features[row].shape), "features")
        assert len(theirs.hidden_states) == len(hidden)
        for layer, each in enumerate(theirs.hidden_states):
            assert_close(hidden[layer, row, :length], each[0], f"hidden state {layer}")
        assert_close(ours[row, :length], theirs.logits[0], "logits")


def test_processed_images(pair):
    size = {"height": 56, "width": 56}
    processor = transformers.LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size=size)
    assert_same_pixels(pair.ours, processor, lambda pixels: flatten_patches(pixels, 14))


def test_generated_ids(pair):
    inputs = make_inputs(pair.case, seed=2)
    ours = pair.ours.generate(
        inputs.token_ids,
        images=inputs.patches,
        image_grid=GRID,
        lengths=inputs.lengths,
        max_new_tokens=12,
        stop_ids=(),
    )
    for row, length in enumerate(inputs.lengths):
        with torch.no_grad():
            theirs = pair.theirs.generate(
                **torch_inputs(inputs, row),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        np.testing.assert_array_equal(ours[row], theirs[0, length:].numpy())
    assert len(np.unique(ours)) > 4  # not one token again and again


@pytest.mark.parametrize("naming", ["hub", "transformers"])
def test_export_is_bit_exact_and_loads_in_transformers(pair, tmp_path, naming):
    folder = tmp_path / "exported"
    to_hf(pair.ours, folder, naming=naming, max_shard_bytes=300_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    again, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs, exported = pair.theirs.state_dict(), again.state_dict()
    assert theirs.keys() == exported.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, exported[name]), name


def test_adapters_gradients_and_round_trip_with_peft(pair, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)

    def base():
        return transformers.LlavaForConditionalGeneration.from_pretrained(pair.folder, dtype=torch.float32)

    settings = peft.LoraConfig(
        r=4, lora_alpha=4, lora_dropout=0.05, target_modules=r".*language_model.*\.(k|v|o)_proj"
    )
    adapted = peft.get_peft_model(base(), settings).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    adapted.save_pretrained(tmp_path / "theirs")

    lora = read_peft_config(tmp_path / "theirs")
    assert (lora.rank, lora.scaling, set(lora.targets)) == (4, 1.0, set(llava_lora(16).targets))
    model = from_hf(pair.folder, lora=lora)
    load_adapter(model, tmp_path / "theirs")
    inputs = make_inputs(pair.case, seed=3)
    length = inputs.lengths[0]
    ours = model.logits(inputs.token_ids[:1, :length], images=inputs.patches[:1], image_grid=GRID)
    with torch.no_grad():
        theirs = adapted(**torch_inputs(inputs, 0)).logits[0]
        plain = pair.theirs(**torch_inputs(inputs, 0)).logits[0]
    assert (theirs - plain).abs().max() > 0.01
    assert_close(ours[0], theirs, "adapted logits")
    assert_same_lora_gradients(
        model, adapted, torch_inputs(inputs, 0), inputs.token_ids[:1, :length], inputs.patches[:1], GRID
    )

    save_adapter(model, tmp_path / "ours", base_model=str(pair.folder))
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert adapted.state_dict().keys() == again.state_dict().keys()
    for name, tensor in adapted.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(again(**torch_inputs(inputs, 0)).logits[0], theirs)

    to_hf(model, tmp_path / "merged", merged=True)
    merged = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    with torch.no_grad():
        folded = merged.eval()(**torch_inputs(inputs, 0)).logits[0]
    assert_close(ours[0, :length], folded, "logits of the merged export")

"""Tiny random Qwen3-VL checkpoints, written by transformers, against its own numbers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from spacedrive_jax import open_model
from spacedrive_jax.models.families.qwen3_vl import Qwen3VL
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

IMAGE, VISION_START, VISION_END = 501, 502, 503
PATCH, K = 8, 3 * 2 * 8 * 8


class Case(NamedTuple):
    grids: tuple[tuple[int, int], ...]
    """Of each prompt's images."""
    tied: bool = False
    deepstack: tuple[int, ...] = (0, 2)
    section: tuple[int, ...] = (4, 2, 2)
    shard_size: str = "5GB"


CASES = {
    "one_image": Case(grids=((6, 10),)),
    "sizes_differ_tied": Case(grids=((4, 6), (8, 2), (4, 6)), tied=True, shard_size="100KB"),
    "no_deepstack_short_sections": Case(grids=((4, 4),), deepstack=(), section=(2, 3, 3)),
    "text_only": Case(grids=()),
}


class Pair(NamedTuple):
    case: Case
    theirs: torch.nn.Module
    ours: Qwen3VL
    folder: Path


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request, tmp_path_factory) -> Pair:
    case = CASES[request.param]
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": list(case.section),
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": case.tied,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "patch_size": PATCH,
            "out_hidden_size": 48,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": list(case.deepstack),
        },
        image_token_id=IMAGE,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        video_token_id=504,
        tie_word_embeddings=case.tied,
    )
    torch.manual_seed(list(CASES).index(request.param))
    theirs = transformers.Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # spread the norms and biases, sharpen the rest
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.1)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    theirs.save_pretrained(folder, max_shard_size=case.shard_size)
    ours = open_model(folder)
    assert isinstance(ours, Qwen3VL)
    return Pair(case, theirs, ours, folder)


class Inputs(NamedTuple):
    token_ids: np.ndarray
    lengths: np.ndarray
    patches: list[np.ndarray]
    """Of each prompt."""
    grids: tuple[tuple[int, int], ...]

    @property
    def grid_thw(self) -> np.ndarray:
        return np.array([(1, *grid) for grid in self.grids])

    @property
    def images(self) -> dict:
        if not self.grids:
            return {"pixel_values": None, "image_grid_thw": None}
        return {
            "pixel_values": np.concatenate(self.patches),
            "image_grid_thw": np.tile(self.grid_thw, (2, 1)),
        }


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Two prompts of unequal lengths, right-padded, with the same sizes of images."""
    generator = np.random.default_rng(seed)

    def prompt(words: int) -> np.ndarray:
        pieces = []
        for rows, columns in case.grids:
            image = [VISION_START, *[IMAGE] * (rows * columns // 4), VISION_END]
            pieces += [generator.integers(0, 500, words), image]
        return np.concatenate([*pieces, generator.integers(0, 500, words)]).astype(np.int32)

    token_ids, lengths = right_padded([prompt(5), prompt(3)])
    count = sum(rows * columns for rows, columns in case.grids)
    patches = [generator.standard_normal((count, K)).astype(np.float32) for _ in lengths]
    return Inputs(token_ids, lengths, patches, case.grids)


def torch_inputs(inputs: Inputs, row: int) -> dict:
    token_ids = inputs.token_ids[row : row + 1, : inputs.lengths[row]]
    values = {"input_ids": torch.tensor(token_ids, dtype=torch.long)}
    values["attention_mask"] = torch.ones_like(values["input_ids"])
    if inputs.grids:
        values["pixel_values"] = torch.tensor(inputs.patches[row])
        values["image_grid_thw"] = torch.tensor([[1, *grid] for grid in inputs.grids])
        values["mm_token_type_ids"] = (values["input_ids"] == IMAGE).long()
    return values


def compared(pair: Pair, inputs: Inputs) -> tuple:
    """What the comparisons of both models take."""
    arguments = [torch_inputs(inputs, row) for row in range(2)]
    return pair.ours, pair.theirs, inputs.token_ids, inputs.lengths, inputs.images, arguments


def test_logits_and_hidden_states(pair):
    assert_same_hidden_states_and_logits(*compared(pair, make_inputs(pair.case)))


def test_visual_tokens_and_deepstack(pair):
    inputs = make_inputs(pair.case, seed=1)
    if not inputs.grids:
        pytest.skip("no images in this case")
    rows, columns = inputs.grids[0]
    patches = inputs.patches[0][: rows * columns]
    with torch.no_grad():
        theirs = pair.theirs.model.visual(
            torch.tensor(patches), grid_thw=torch.tensor([[1, *inputs.grids[0]]])
        )
    ours = pair.ours.visual_features(patches[None], inputs.grids[0])
    assert_close(ours.tokens[0], theirs.pooler_output, "visual tokens")
    assert (ours.deepstack is None) == (not pair.case.deepstack)
    for number, each in enumerate(theirs.deepstack_features):
        assert_close(ours.deepstack[number, 0], each, f"deepstack {number}")


def test_generated_ids(pair):
    assert_same_answers(*compared(pair, make_inputs(pair.case, seed=2)))


@pytest.mark.parametrize("own_settings", [False, True])
def test_processed_images(pair, tmp_path, own_settings):
    if not pair.case.grids:
        pytest.skip("no images in this case")
    kind = transformers.Qwen2VLImageProcessorPil
    released = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": PATCH}
    released["size"] = {"shortest_edge": 65536, "longest_edge": 16777216}
    smaller = {"patch_size": PATCH, "size": {"shortest_edge": 600, "longest_edge": 5000}}
    theirs = kind(**(smaller if own_settings else released))
    model = pair.ours
    if own_settings:
        for file in pair.folder.iterdir():
            (tmp_path / file.name).symlink_to(file)
        theirs.save_pretrained(tmp_path)
        model = open_model(tmp_path)
    assert_same_pixels(model, theirs)


@pytest.mark.parametrize("naming", ["hub", "transformers"])
def test_export_is_bit_exact_and_loads_in_transformers(pair, tmp_path, naming):
    again = assert_bit_exact_export(
        pair.ours, pair.theirs, tmp_path / "exported", naming=naming, max_shard_bytes=200_000
    )
    assert again.config.text_config.rope_parameters == pair.theirs.config.text_config.rope_parameters
    inputs = make_inputs(pair.case, seed=5)
    with torch.no_grad():
        before, after = (model(**torch_inputs(inputs, 0)).logits for model in (pair.theirs, again))
    assert torch.equal(before, after)


def test_adapters_gradients_and_round_trip_with_peft(pair, tmp_path):
    peft = pytest.importorskip("peft")
    modules = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    settings = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.05, target_modules=modules)
    inputs = make_inputs(pair.case, seed=3)
    token_ids = inputs.token_ids[:1, : inputs.lengths[0]]
    alone = (None, None) if not inputs.grids else (inputs.patches[0], inputs.grid_thw)
    images = dict(zip(("pixel_values", "image_grid_thw"), alone, strict=True))
    arguments = torch_inputs(inputs, 0)
    assert_same_adapters(pair.folder, pair.theirs, settings, token_ids, images, arguments, tmp_path)

"""Tiny random Qwen2.5-VL checkpoints, written by transformers, against its own numbers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from spacedrive_jax.interop.hf_checkpoint import from_hf
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVL
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


class Case(NamedTuple):
    images: int
    grid: tuple[int, int]
    tied: bool = False
    shard_size: str = "5GB"


CASES = {
    "one_image_46x46": Case(images=1, grid=(46, 46)),
    "six_images_ragged_windows": Case(images=6, grid=(6, 10), shard_size="200KB"),
    "tied_tall": Case(images=2, grid=(22, 4), tied=True),
    "text_only": Case(images=0, grid=(4, 4)),
}


class Pair(NamedTuple):
    case: Case
    theirs: torch.nn.Module
    ours: QwenVL
    folder: Path


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request, tmp_path_factory) -> Pair:
    case = CASES[request.param]
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": case.tied,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
        },
        image_token_id=IMAGE,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        video_token_id=504,
        tie_word_embeddings=case.tied,
    )
    torch.manual_seed(list(CASES).index(request.param))
    theirs = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # spread the norms and biases, sharpen the rest
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name or "ln_q" in name else 0.0, 0.1)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    theirs.save_pretrained(folder, max_shard_size=case.shard_size)
    return Pair(case, theirs, from_hf(folder), folder)


class Inputs(NamedTuple):
    token_ids: np.ndarray
    lengths: np.ndarray
    pixels: np.ndarray | None
    grid: tuple[int, int] | None

    @property
    def grid_thw(self) -> tuple[int, int, int] | None:
        return None if self.grid is None else (1, *self.grid)

    @property
    def images(self) -> dict:
        return {"pixel_values": self.pixels, "image_grid_thw": self.grid_thw}


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Two prompts of unequal lengths, right-padded."""
    generator = np.random.default_rng(seed)
    visual = case.grid[0] * case.grid[1] // 4

    def prompt(words: int) -> np.ndarray:
        text = generator.integers(0, 500, (case.images + 1, words))
        image = [VISION_START, *[IMAGE] * visual, VISION_END]
        pieces = [np.concatenate([text[i], image]) for i in range(case.images)]
        return np.concatenate([*pieces, text[-1]]).astype(np.int32)

    token_ids, lengths = right_padded([prompt(5), prompt(3)])
    if case.images == 0:
        return Inputs(token_ids, lengths, None, None)
    shape = (2, case.images, case.grid[0] * case.grid[1], 1176)
    return Inputs(token_ids, lengths, generator.standard_normal(shape).astype(np.float32), case.grid)


def torch_inputs(inputs: Inputs, row: int) -> dict:
    token_ids = inputs.token_ids[row : row + 1, : inputs.lengths[row]]
    values = {"input_ids": torch.tensor(token_ids, dtype=torch.long)}
    values["attention_mask"] = torch.ones_like(values["input_ids"])
    if inputs.pixels is not None:
        images = inputs.pixels.shape[1]
        values["pixel_values"] = torch.tensor(inputs.pixels[row].reshape(-1, 1176))
        values["image_grid_thw"] = torch.tensor([[1, *inputs.grid]] * images)
        values["mm_token_type_ids"] = (values["input_ids"] == IMAGE).long()
    return values


def compared(pair: Pair, inputs: Inputs) -> tuple:
    """What the comparisons of both models take."""
    arguments = [torch_inputs(inputs, row) for row in range(2)]
    return pair.ours, pair.theirs, inputs.token_ids, inputs.lengths, inputs.images, arguments


def test_logits_and_hidden_states(pair):
    assert_same_hidden_states_and_logits(*compared(pair, make_inputs(pair.case)))


def test_half_precision_errs_no_more_than_transformers_does(pair):
    inputs = make_inputs(pair.case, seed=4)
    half = ComputeConfig(dtype="bfloat16", param_dtype="bfloat16")
    ours = from_hf(pair.folder, compute=half).logits(
        inputs.token_ids, pixel_values=inputs.pixels, image_grid_thw=inputs.grid_thw, lengths=inputs.lengths
    )
    their_half = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        pair.folder, dtype=torch.bfloat16
    ).eval()
    with torch.no_grad():
        exact = pair.theirs(**torch_inputs(inputs, 0)).logits[0].numpy()
        theirs = their_half(**torch_inputs(inputs, 0)).logits[0].float().numpy()
    our_error = np.abs(np.asarray(ours[0, : inputs.lengths[0]]) - exact).mean()
    their_error = np.abs(theirs - exact).mean()
    print(f"mean error in bfloat16: ours {our_error:.4f}, transformers {their_error:.4f}")
    assert our_error < 1.2 * their_error


def test_visual_tokens(pair):
    inputs = make_inputs(pair.case, seed=1)
    if inputs.pixels is None:
        pytest.skip("no images in this case")
    with torch.no_grad():
        theirs = pair.theirs.model.visual(
            torch.tensor(inputs.pixels[0].reshape(-1, 1176)),
            grid_thw=torch.tensor([[1, *inputs.grid]] * pair.case.images),
        ).pooler_output
    ours = pair.ours.encode_images(jnp.asarray(inputs.pixels[0]), inputs.grid)
    assert_close(ours.reshape(theirs.shape), theirs, "visual tokens")


def test_processed_images(pair):
    settings = {"patch_size": 14, "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}}
    assert_same_pixels(pair.ours, transformers.Qwen2VLImageProcessorPil(**settings))


def test_images_of_different_sizes_in_one_sample(pair):
    generator = np.random.default_rng(5)
    grids = ((4, 6), (10, 12), (4, 6))
    images = [[VISION_START, *[IMAGE] * (rows * columns // 4), VISION_END] for rows, columns in grids]
    token_ids = np.array([[7, *images[0], *generator.integers(0, 500, 3), *images[1], *images[2], 9]])
    patches = generator.standard_normal((24 + 120 + 24, 1176)).astype(np.float32)
    ours = pair.ours.logits(
        token_ids, pixel_values=patches, image_grid_thw=np.array([(1, *grid) for grid in grids])
    )
    ids = torch.tensor(token_ids)
    with torch.no_grad():
        theirs = pair.theirs(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.tensor(patches),
            image_grid_thw=torch.tensor([[1, *grid] for grid in grids]),
            mm_token_type_ids=(ids == IMAGE).long(),
        )
    assert_close(ours[0], theirs.logits[0], "logits")


def test_generated_ids_with_cache_batched_and_alone(pair):
    inputs = make_inputs(pair.case, seed=2)
    ours = assert_same_answers(*compared(pair, inputs))
    for row, length in enumerate(inputs.lengths):
        alone = pair.ours.generate(
            inputs.token_ids[row : row + 1, :length],
            pixel_values=None if inputs.pixels is None else inputs.pixels[row : row + 1],
            image_grid_thw=inputs.grid_thw,
            max_new_tokens=12,
            stop_ids=(),
        )
        np.testing.assert_array_equal(ours[row], alone[0])


@pytest.mark.parametrize("naming", ["hub", "transformers"])
def test_export_is_bit_exact_and_loads_in_transformers(pair, tmp_path, naming):
    again = assert_bit_exact_export(
        pair.ours, pair.theirs, tmp_path / "exported", naming=naming, max_shard_bytes=300_000
    )
    assert again.config.text_config.rope_parameters == pair.theirs.config.text_config.rope_parameters


def test_adapters_gradients_and_round_trip_with_peft(pair, tmp_path):
    peft = pytest.importorskip("peft")
    modules = r".*language_model.*\.(q|k|v|o)_proj"
    settings = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.05, target_modules=modules)
    inputs = make_inputs(pair.case, seed=3)
    token_ids = inputs.token_ids[:1, : inputs.lengths[0]]
    pixels = None if inputs.pixels is None else inputs.pixels[:1]
    images = {"pixel_values": pixels, "image_grid_thw": inputs.grid_thw}
    arguments = torch_inputs(inputs, 0)
    assert_same_adapters(pair.folder, pair.theirs, settings, token_ids, images, arguments, tmp_path)

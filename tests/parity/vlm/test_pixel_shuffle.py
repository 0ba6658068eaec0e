"""Tiny random SmolVLM (both its `model_type`s) and InternVL3 checkpoints against transformers in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from spacedrive_jax import open_model
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.interop.hf_checkpoint import from_hf
from spacedrive_jax.models.families import smolvlm
from spacedrive_jax.models.family import IMAGE_PLACEHOLDER, Message
from spacedrive_jax.models.vision_language import VisionLanguageModel
from tests.parity.vlm.comparison import (
    assert_bit_exact_export,
    assert_close,
    assert_same_adapters,
    assert_same_answers,
    assert_same_hidden_states_and_logits,
    right_padded,
)

torch = pytest.importorskip("torch", reason="parity tests need torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

IMAGE = 501
TEXT = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}


class Case(NamedTuple):
    family: str
    images: int
    tied: bool = False
    image_size: int = 56
    patch_size: int = 14
    merge_size: int = 2
    vision: tuple[tuple[str, Any], ...] = ()
    text: tuple[tuple[str, Any], ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        return (self.image_size // self.patch_size,) * 2

    @property
    def visual(self) -> int:
        return (self.grid[0] // self.merge_size) ** 2

    @property
    def decoder(self) -> str:
        return "language_model" if self.family == "internvl" else "text_model"


CASES = {
    "smolvlm_two_images": Case("smolvlm", images=2),
    # As at the released 384 pixels, the patches leave a border out: 48 of 52 pixels.
    "idefics3_tied_border": Case("idefics3", 1, True, image_size=52, patch_size=8, merge_size=3),
    # As released: dynamic scaling, which does nothing up to the trained length.
    "internvl_two_images": Case(
        "internvl",
        images=2,
        vision=(("attention_bias", True),),
        text=(("rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}),),
    ),
    "internvl_tied_norm": Case("internvl", 1, True, vision=(("use_mean_pooling", False),)),
}
CLASSES = {"smolvlm": "SmolVLM", "idefics3": "Idefics3", "internvl": "InternVL"}


class Pair(NamedTuple):
    case: Case
    theirs: torch.nn.Module
    ours: VisionLanguageModel
    folder: Path
    processor: Any

    @property
    def kind(self) -> Any:
        return type(self.theirs)


def their_config(case: Case) -> Any:
    kind = getattr(transformers, f"{CLASSES[case.family]}Config")
    intern = case.family == "internvl"
    text = {"model_type": "qwen2" if intern else "llama", "tie_word_embeddings": case.tied, **TEXT}
    ratio = {"downsample_ratio": 1 / case.merge_size} if intern else {"scale_factor": case.merge_size}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": case.image_size, "patch_size": case.patch_size, **dict(case.vision)}
    return kind(
        text_config=text | dict(case.text) | {"rms_norm_eps": 1e-5, "pad_token_id": 0},
        vision_config=vision,
        image_token_id=IMAGE,
        tie_word_embeddings=case.tied,
        **ratio,
    )


def their_processor(case: Case) -> Any:
    if case.family == "internvl":
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        size = {"height": case.image_size, "width": case.image_size}
        return GotOcr2ImageProcessorPil(
            size=size, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
        )
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    return SmolVLMImageProcessorPil(
        size={"longest_edge": 3 * case.image_size},
        max_image_size={"longest_edge": case.image_size},
        do_image_splitting=False,
    )


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request, tmp_path_factory) -> Pair:
    case = CASES[request.param]
    torch.manual_seed(list(CASES).index(request.param))
    kind = getattr(transformers, f"{CLASSES[case.family]}ForConditionalGeneration")
    theirs = kind(their_config(case)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(0.0, 2.0 * parameter[0].numel() ** -0.5)
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    theirs.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    processor = their_processor(case)
    processor.save_pretrained(folder)
    return Pair(case, theirs, open_model(folder), folder, processor)


class Inputs(NamedTuple):
    token_ids: np.ndarray
    lengths: np.ndarray
    photos: list[list[np.ndarray]]


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Two prompts of unequal lengths, right-padded; the first one's images stand side by side."""
    generator = np.random.default_rng(seed)
    images = [IMAGE] * case.visual

    def text(words: int) -> list[int]:
        return generator.integers(0, 500, words).tolist()

    prompts = [
        [*text(5), *images * case.images, *text(4)],
        [piece for _ in range(case.images) for piece in (*text(1), *images)] + text(3),
    ]
    token_ids, lengths = right_padded(prompts)

    def photo() -> np.ndarray:
        size = generator.integers(20, 160, 2)
        return generator.integers(0, 256, (*size, 3), dtype=np.uint8)

    return Inputs(token_ids, lengths, [[photo() for _ in range(case.images)] for _ in range(2)])


def pixels_of(pair: Pair, photos: list[np.ndarray]) -> np.ndarray:
    """What transformers' processor makes of them: (images, channels, rows, columns)."""
    made = pair.processor([Image.fromarray(each) for each in photos], return_tensors="np")["pixel_values"]
    return np.asarray(made).reshape(len(photos), 3, *made.shape[-2:])


def torch_inputs(pair: Pair, inputs: Inputs, row: int) -> dict[str, Any]:
    token_ids = torch.tensor(inputs.token_ids[row : row + 1, : inputs.lengths[row]], dtype=torch.long)
    pixels = torch.tensor(pixels_of(pair, inputs.photos[row]))
    return {
        "input_ids": token_ids,
        "attention_mask": torch.ones_like(token_ids),
        "pixel_values": pixels if pair.case.family == "internvl" else pixels[None],
    }


def our_images(pair: Pair, inputs: Inputs) -> dict[str, Any]:
    patches, grid = pair.ours.process([each for sample in inputs.photos for each in sample])
    return {"pixel_values": patches, "image_grid_thw": grid}


def compared(pair: Pair, inputs: Inputs) -> tuple[Any, ...]:
    """What the comparisons of both models take."""
    arguments = [torch_inputs(pair, inputs, row) for row in range(2)]
    return pair.ours, pair.theirs, inputs.token_ids, inputs.lengths, our_images(pair, inputs), arguments


def test_processor_pixels_are_bit_equal(pair):
    photos = make_inputs(pair.case, seed=5).photos
    sizes = [(31, 97), (150, 20), (pair.case.image_size,) * 2]
    generator = np.random.default_rng(3)
    photos = [*photos[0], *(generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes)]
    patches, grid = pair.ours.process(photos)
    np.testing.assert_array_equal(grid, [(1, *pair.case.grid)] * len(photos))
    side, seen = pair.case.patch_size, pair.case.grid[0] * pair.case.patch_size
    expected = pixels_of(pair, photos)[..., :seen, :seen]
    assert expected.dtype == patches.dtype == np.float32
    cut = expected.reshape(len(photos), 3, pair.case.grid[0], side, pair.case.grid[1], side)
    np.testing.assert_array_equal(patches, cut.transpose(0, 2, 4, 1, 3, 5).reshape(patches.shape))


def test_smolvlms_conversation_is_that_of_its_template():
    """The published template, rendered, with an image's tokens spread as its processor does."""
    jinja2 = pytest.importorskip("jinja2")
    from transformers.models.smolvlm import processing_smolvlm

    def content(text: str) -> list[dict[str, str]]:
        first, *rest = text.split(IMAGE_PLACEHOLDER)
        parts = [{"type": "text", "text": first}]
        for piece in rest:
            parts += [{"type": "image"}, {"type": "text", "text": piece}]
        return [each for each in parts if each.get("text") != ""]

    messages = [Message("user", "<image>\n<image>\nWhere to?"), Message("assistant", "Left.")]
    messages.append(Message("user", "Sure?"))
    their_messages = [{"role": each.role, "content": content(each.content)} for each in messages]
    template = jinja2.Template(processing_smolvlm.DEFAULT_CHAT_TEMPLATE)
    rendered = template.render(messages=their_messages, add_generation_prompt=True)
    image = processing_smolvlm.get_image_prompt_string(
        0,
        0,
        3,
        fake_token_around_image="<fake_token_around_image>",
        image_token="<image>",
        global_image_token="<global-img>",
    )
    tokenizer = load_tokenizer(None, smolvlm.FAMILY.chat)
    ours = smolvlm.FAMILY.chat.apply_chat_template(tokenizer, messages, 3, add_generation_prompt=True)
    assert tokenizer.decode(ours.token_ids) == rendered.replace("<image>", image)


def test_features_hidden_states_and_logits(pair):
    inputs = make_inputs(pair.case)
    assert_same_hidden_states_and_logits(*compared(pair, inputs))
    given = our_images(pair, inputs)
    patches = jnp.asarray(given["pixel_values"]).reshape(
        2 * pair.case.images, -1, given["pixel_values"].shape[-1]
    )
    features = pair.ours.encode_images(patches, pair.case.grid)
    features = features.reshape(2, -1, features.shape[-1])
    for row, ours in enumerate(features):
        with torch.no_grad():
            theirs = pair.theirs.get_image_features(
                torch_inputs(pair, inputs, row)["pixel_values"]
            ).pooler_output
        if isinstance(theirs, list | tuple):
            theirs = torch.cat(theirs)
        assert_close(ours, theirs.reshape(ours.shape), "features")


def test_generated_ids(pair):
    assert_same_answers(*compared(pair, make_inputs(pair.case, seed=2)))


def test_answers_end_where_transformers_ends_them(pair, tmp_path):
    inputs = make_inputs(pair.case, seed=2)
    images = our_images(pair, inputs)
    never = pair.ours.generate(
        inputs.token_ids, lengths=inputs.lengths, max_new_tokens=12, stop_ids=(), **images
    )
    folder = shutil.copytree(pair.folder, tmp_path / "folder")
    file = folder / "generation_config.json"
    ends = [int(never[0, 3]), int(never[-1, 7])]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ends, "pad_token_id": 0}))
    ours = open_model(folder).generate(inputs.token_ids, lengths=inputs.lengths, max_new_tokens=12, **images)
    theirs = pair.kind.from_pretrained(folder, dtype=torch.float32).eval()
    for row, length in enumerate(inputs.lengths):
        with torch.no_grad():
            found = theirs.generate(**torch_inputs(pair, inputs, row), max_new_tokens=12, do_sample=False)
        found = found[0, length:].numpy()
        np.testing.assert_array_equal(ours[row, : len(found)], found)
        assert not ours[row, len(found) :].any()


@pytest.mark.parametrize("naming", ["hub", "transformers"])
def test_export_is_bit_exact_and_loads_in_transformers(pair, tmp_path, naming):
    folder = tmp_path / "exported"
    again = assert_bit_exact_export(pair.ours, pair.theirs, folder, naming=naming, max_shard_bytes=200_000)
    inputs = make_inputs(pair.case)
    with torch.no_grad():
        arguments = torch_inputs(pair, inputs, 0)
        # Of equal weights; torch's last bit depends on where in memory they lie.
        assert_close(again(**arguments).logits, pair.theirs(**arguments).logits, "logits")
    assert from_hf(folder).config == pair.ours.config


def test_adapters_gradients_and_round_trip_with_peft(pair, tmp_path):
    peft = pytest.importorskip("peft")
    modules = rf".*{pair.case.decoder}.*\.(q|k|v|o|gate|up|down)_proj"
    settings = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=modules)
    inputs = make_inputs(pair.case, seed=3)
    patches, grid = pair.ours.process(inputs.photos[0])
    token_ids = inputs.token_ids[:1, : inputs.lengths[0]]
    images, arguments = {"pixel_values": patches, "image_grid_thw": grid}, torch_inputs(pair, inputs, 0)
    assert_same_adapters(pair.folder, pair.theirs, settings, token_ids, images, arguments, tmp_path)

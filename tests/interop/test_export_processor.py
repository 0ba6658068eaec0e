"""What stands beside exported weights: transformers loads tokenizer and processor, and stops."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

import spacedrive_jax.cli.main
from spacedrive_jax.data.tokenizer import INDICATOR, POSITION, load_tokenizer
from spacedrive_jax.interop.exporting import base_licence, model_card, write_processor
from spacedrive_jax.interop.hf_checkpoint import to_hf
from spacedrive_jax.models.families import FAMILIES, family_of
from spacedrive_jax.training.checkpoints import read_metadata
from spacedrive_jax.training.run_folder import note_predictions
from tests.models.conftest import random_module
from tests.tiny_config import config as tiny
from tests.training.runs import make_records, save_untrained

TEMPLATE = (
    "{% for each in messages %}<|im_start|>{{ each['role'] }}\n{{ each['content'] }}<|im_end|>\n{% endfor %}"
)
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.2, 0.2],
}


def write(folder, **files):
    for name, content in files.items():
        file = folder / name.replace("_json", ".json").replace("_jinja", ".jinja").replace("_md", ".md")
        file.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A released base of tiny size, with everything a hub's folder has."""
    folder = tmp_path_factory.mktemp("hub") / "Tiny-VL-Instruct"
    vlm = tiny.model.vlm
    model = random_module(
        lambda: family_of(vlm).model(vlm, compute=tiny.model.compute, rngs=nnx.Rngs(0)), scale=0.5
    )
    to_hf(model, folder)
    loaded = load_tokenizer(None, family_of(vlm).chat)
    (folder / "tokenizer.json").write_text(loaded.tokenizer.to_str())
    write(
        folder,
        tokenizer_config_json={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",  # as in the hub's base models: no answer of ours ends there
            "pad_token": "<|endoftext|>",
            "model_max_length": 131072,
            "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
        },
        generation_config_json={"do_sample": True, "temperature": 0.1, "top_k": 1, "eos_token_id": [0]},
        preprocessor_config_json=PREPROCESSOR,
        chat_template_jinja=TEMPLATE,
        vocab_json={"<|endoftext|>": 0},
        README_md="---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny",
    )
    return folder


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = dataclasses.replace(
        tiny,
        run_dir=str(folder / "run"),
        model=dataclasses.replace(tiny.model, use_lora=True, weights=str(base)),
        data=dataclasses.replace(
            tiny.data, tokenizer=str(base), records=str(make_records(folder / "records"))
        ),
    )
    save_untrained(config)
    facts = {"sha256": "theirs", "records_fingerprint": "records", "split": "val", "average": False}
    facts |= {"trainable_fingerprint": read_metadata(config.directory, 1)["trainable_fingerprint"]}
    note_predictions(config.directory, facts)
    (folder / "run" / "predictions.omnidrive.json").write_text(
        json.dumps(
            {
                "protocol": "omnidrive",
                "samples": 56,
                "records": {"fingerprint": "records", "split": "val"},
                "predictions_sha256": "theirs",
                "l2": {"1s": 0.5, "2s": 1.0, "3s": 1.5, "avg": 1.0},
                "collision": {"1s": 0.0, "2s": 0.0, "3s": 3.0, "avg": 1.0},
            }
        )
    )
    out = folder / "exported"
    words = ["export-weights", "--to", "hf", str(folder / "run"), "--out", str(out)]
    assert spacedrive_jax.cli.main.main(words) == 0
    return out


def test_the_tokenizer_comes_back_with_the_runs_tokens_and_end(exported, base):
    ours = load_tokenizer(base, family_of(tiny.model.vlm).chat)
    theirs = AutoTokenizer.from_pretrained(exported)
    text = f"<|im_start|>user\nDrive to {INDICATOR}{POSITION}.<|im_end|>"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.turn_end
    assert theirs.pad_token == "<|endoftext|>"
    assert theirs.convert_tokens_to_ids([INDICATOR, POSITION]) == [ours.indicator, ours.position]
    chat = theirs.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert chat == "<|im_start|>user\nHello<|im_end|>\n"
    assert not (exported / "vocab.json").exists(), "an older layout without the run's tokens"


def test_the_processor_is_the_bases(exported):
    processor = AutoImageProcessor.from_pretrained(exported)
    assert type(processor).__name__.startswith("Qwen2VLImageProcessor")
    assert list(processor.image_mean) == PREPROCESSOR["image_mean"]
    image = np.full((56, 56, 3), 255, np.uint8)
    assert processor(image, return_tensors="np")["pixel_values"].shape == (16, 1176)


def test_answers_end_where_the_runs_do(exported):
    fields = json.loads((exported / "generation_config.json").read_text())
    tokenizer = load_tokenizer(exported, family_of(tiny.model.vlm).chat)
    assert fields["eos_token_id"] == [tokenizer.turn_end, 0]
    assert fields["do_sample"] is False
    assert not {"temperature", "top_k"} & fields.keys()


def test_the_card_says_what_it_is(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\nlicense: apache-2.0\n")
    for said in (
        "Tiny-VL-Instruct",
        "| omnidrive | val | 56 | 0.50 / 1.00 / 1.50 | 1.00 | 1.00 |",
        "AutoProcessor",
    ):
        assert said in card
    assert str(exported.parent) not in card


def test_a_llava_folder_loads_whole_by_autoprocessor(tmp_path):
    """Qwen's processor class wants torchvision for its films; LLaVA's needs nothing."""
    chat = FAMILIES["llava"].chat
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    (base / "tokenizer.json").write_text(load_tokenizer(None, chat).tokenizer.to_str())
    write(
        base,
        tokenizer_config_json={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"},
        preprocessor_config_json={
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "crop_size": {"height": 28, "width": 28},
            "size": {"shortest_edge": 28},
        },
        processor_config_json={
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "image_token": "<image>",
        },
        chat_template_jinja="USER: {{ messages[0]['content'] }} ASSISTANT:",
    )
    write_processor(out, None, FAMILIES["llava"].config(), [base])
    write(out, config_json={"model_type": "llava"})
    processor = AutoProcessor.from_pretrained(out)
    assert type(processor).__name__ == "LlavaProcessor"
    assert processor.tokenizer.eos_token == "</s>"
    assert processor.apply_chat_template([{"role": "user", "content": "Hi"}]) == "USER: Hi ASSISTANT:"


def test_licences_are_read_or_said_to_be_unknown(base, tmp_path):
    assert base_licence(base) == "apache-2.0"
    assert base_licence(tmp_path) is None
    assert base_licence(None) is None
    fields = {"name": "x", "kind": "safetensors", "licence": None, "details": {}}
    assert "no base to inherit one from" in model_card(base=None, **fields)
    assert "names none that could be read" in model_card(base="B", **fields)
    assert "None were recorded" in model_card(base="B", **fields)

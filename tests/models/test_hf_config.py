from __future__ import annotations

import json

import pytest

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.interop.hf_config import read_hf_config, write_hf_config
from spacedrive_jax.models.families.qwen2_5_vl import QwenVLConfig

from .conftest import GOLDEN, tiny_config

HUB_7B = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "temporal_patch_size": 2,
    },
}


def nested(**rope):
    text = {name: value for name, value in HUB_7B.items() if name not in ("vision_config", "rope_scaling")}
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {**text, **rope},
        "vision_config": HUB_7B["vision_config"],
    }


def test_flat_hub_layout_is_the_preset():
    assert read_hf_config(HUB_7B) == QwenVLConfig.qwen2_5_vl_7b()


def test_text_config_layout():
    rope = {"rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [16, 24, 24]}}
    assert read_hf_config(nested(**rope)) == QwenVLConfig.qwen2_5_vl_7b()


def test_rope_parameters_layout():
    values = nested(
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, "mrope_section": [16, 24, 24]}
    )
    del values["text_config"]["rope_theta"]
    config = read_hf_config(values)
    assert config.decoder.rope_theta == 5e5
    assert config.decoder.mrope_section == (16, 24, 24)


def test_three_billion_preset_is_tied():
    config = QwenVLConfig.qwen2_5_vl_3b()
    assert config.decoder.tie_word_embeddings
    assert read_hf_config(write_hf_config(config)) == config


def test_configs_are_hashable_and_survive_a_round_trip():
    config = tiny_config()
    assert hash(config) == hash(tiny_config())
    assert read_hf_config(json.loads(json.dumps(write_hf_config(config)))) == config


@pytest.mark.parametrize("name", ["image_token_id", "vision_start_token_id", "vision_end_token_id"])
def test_a_token_may_have_the_first_id(name):
    assert getattr(read_hf_config({**HUB_7B, name: 0}), name) == 0


def test_folder_of_the_golden_model():
    config = read_hf_config(GOLDEN)
    assert config.image_token_id == 509
    assert config.decoder.mrope_section == (2, 5, 5)
    assert config.vision.full_attention_blocks == (1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, "'yarn'"),
        ({"rope_scaling": {"type": "mrope"}}, "'mrope_section' is missing"),
        ({"hidden_size": 2048}, "must equal the width of the language model"),
    ],
)
def test_what_is_not_supported_is_refused(change, message):
    values = {**HUB_7B, **change}
    if "hidden_size" in change:
        values["num_attention_heads"] = 16
    with pytest.raises(SpaceDriveError, match=message):
        read_hf_config(values)


def test_missing_sizes_and_files_are_named(tmp_path):
    values = {name: value for name, value in HUB_7B.items() if name != "vocab_size"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(SpaceDriveError, match=r"config\.json: field 'vocab_size' is missing"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpaceDriveError, match="cannot read"):
        read_hf_config(tmp_path)


def test_the_two_names_of_the_rotary_settings_are_put_together():
    values = nested(
        rope_parameters={"rope_theta": 5e5}, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}
    )
    del values["text_config"]["rope_theta"]
    assert read_hf_config(values).decoder.rope_theta == 5e5
    assert read_hf_config(values).decoder.mrope_section == (16, 24, 24)


def test_fields_beside_text_config_are_read_where_it_lacks_them():
    values = nested(rope_scaling=HUB_7B["rope_scaling"])
    values["rms_norm_eps"] = values["text_config"].pop("rms_norm_eps")
    values["rope_theta"] = values["text_config"].pop("rope_theta")
    assert read_hf_config(values) == QwenVLConfig.qwen2_5_vl_7b()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rope_theta": 10000.0}, "rope_theta stands there twice"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps stands there twice"),
        ({"hidden_act": "gelu", "text_config": {"hidden_act": "silu"}}, "hidden_act stands there twice"),
    ],
)
def test_two_places_that_disagree_are_refused(change, problem):
    values = nested(rope_scaling=HUB_7B["rope_scaling"])
    values["text_config"] |= change.get("text_config", {})
    with pytest.raises(SpaceDriveError, match=problem):
        read_hf_config(values | {name: value for name, value in change.items() if name != "text_config"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": "many"}, "hidden_size is 'many'"),
        ({"hidden_size": True}, "hidden_size is 'True'"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is '1000000000000'"),
        ({"num_attention_heads": 0}, "num_attention_heads is '0'"),
        ({"num_attention_heads": 27}, "no multiple of num_attention_heads"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is 'inf'"),
        ({"vision_config": []}, r"vision_config is '\[\]', expected an object"),
        ({"rope_scaling": "mrope"}, "rope_scaling is 'mrope', expected an object"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": 3}}, "mrope_section is '3'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, "half of head_dim"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": ["qwen2_5_vl"]}, "model_type"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
    ],
)
def test_values_that_cannot_be_are_named(change, problem):
    with pytest.raises(SpaceDriveError, match=problem):
        read_hf_config(HUB_7B | change)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b"[" * 5000 + b"]" * 5000])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SpaceDriveError, match=r"config\.json"):
        read_hf_config(tmp_path)

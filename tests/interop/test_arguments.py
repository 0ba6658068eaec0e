"""Published constructor arguments and configs as this project's."""

import json
from pathlib import Path

import pytest

from spacedrive_jax.data.transforms import DataConfig
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.interop.spacedrive_config import (
    data_config,
    model_config,
    parse_published_config,
    read_published_config,
    train_config,
)
from spacedrive_jax.models.config import ComputeConfig, LoraConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVLConfig

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = json.loads((GOLDEN / "spacedrive_train" / "config.json").read_text())["spacedrive_args"]

MMCV = """
_base_ = ['../nus-3d.py']
result = open('never_written', 'w')
pe_scaling = 0.1
base = 'workspace/'
fone_dim = 8 * 3
model = dict(type='SpaceDrive', save_path=base + 'x', pe_scaling=pe_scaling, fone_dim=fone_dim, huber=-1)
train_pipeline = [
    dict(type='Resize', scale=(640, 640)),
    dict(type='LoadAnnoatationVQA', planning_only=True, pseudo_coords=False),
]
"""


def model_of(**changes):
    rank = LoraConfig(rank=PUBLISHED["llm_lora_rank"])
    return model_config(PUBLISHED | changes, QwenVLConfig.qwen2_5_vl_7b(), rank, ComputeConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1, "another": 2}, "another is no argument .*; surprise is no argument"),
        ({"pe_decode_method": "l2_coords"}, "l2_coords"),
        ({"ego_status": "language"}, "ego_status 'language'"),
        ({"ego_status_len": 3}, "ego_status_len 3"),
        ({"llm_lora_rank": 64}, "llm_lora_rank 64, but the adapters have rank 4"),
        ({"input_pe_mlp": True, "pe_decode_method": "l2_coords_mlp"}, "input_pe_mlp has two layers only"),
        ({"use_vae_to_replace_mlp": True, "pe_decode_method": "cosine"}, "use_vae_to_replace_mlp acts only"),
        ({"use_vae_to_replace_mlp": True, "single_token_output": True}, "beside single_token_output"),
        ({"depth_model_type": "zoe"}, "depth_model_type 'zoe'"),
        ({"frozen": True}, "frozen True"),
        ({"pe_type": "fourier"}, "pe_type 'fourier'"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(changes, message):
    with pytest.raises(SpaceDriveError, match=message):
        model_of(**changes)


def test_absent_arguments_are_the_published_constructors():
    model = model_config({}, QwenVLConfig.qwen2_5_vl_7b(), LoraConfig(), ComputeConfig())
    assert (model.encoder.alpha, model.encoder.learnable_alpha, model.visual_positions) == (
        1.0,
        False,
        "none",
    )
    assert model.decoder.kind == "grid_cosine"
    training = train_config({})
    assert (training.position_weight, training.supervision) == (0.5, "all")


def test_data_and_conversation():
    loader = {"planning_only": False, "load_high_level_command": True, "load_ego_command_in_question": True}
    data = data_config(PUBLISHED | {"supervise_semantic_posemb": True}, loader, DataConfig())
    talk = data.conversation
    assert (data.channel_order, data.command, data.depth.sources) == ("bgr", "released", ("unidepth",))
    assert (talk.tasks, talk.command_in_answer, talk.supervise_position_tokens) == (
        "planning_and_questions",
        True,
        True,
    )
    assert data_config(PUBLISHED, {}, DataConfig()).command == DataConfig().command


def test_mmcv_configs_are_read_and_not_run(tmp_path):
    (tmp_path / "config.py").write_text(MMCV.replace("never_written", str(tmp_path / "written")))
    config = read_published_config(tmp_path / "config.py")
    assert config.model == {
        "type": "SpaceDrive",
        "save_path": "workspace/x",
        "pe_scaling": 0.1,
        "fone_dim": 24,
        "huber": -1,
    }
    assert config.loader["planning_only"] is True
    assert not (tmp_path / "written").exists()


def test_json_arguments(tmp_path):
    for content in (PUBLISHED, {"model": PUBLISHED}):
        (tmp_path / "arguments.json").write_text(json.dumps(content))
        assert read_published_config(tmp_path / "arguments.json").model == PUBLISHED


def test_configs_that_cannot_be_read_are_errors(tmp_path):
    with pytest.raises(SpaceDriveError, match="line 1: 'load\\(\\)'"):
        parse_published_config("model = dict(a=load())", "it")
    with pytest.raises(SpaceDriveError, match="_base_"):
        parse_published_config("pe_scaling = 1", "it")
    with pytest.raises(SpaceDriveError, match="not a Python config"):
        parse_published_config("model = (", "it")
    with pytest.raises(SpaceDriveError, match="cannot read"):
        read_published_config(tmp_path / "absent.json")
    for content in (b"\xff", b"[" * 5000, b"[]"):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(SpaceDriveError, match=r"a\.json"):
            read_published_config(tmp_path / "a.json")

    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(SpaceDriveError, match="object of constructor arguments"):
        read_published_config(tmp_path / "a.json")


@pytest.mark.parametrize(
    "text",
    [
        "a = [0]\n" + "a = a + a\n" * 40 + "model = dict(a=a)",
        "a = 'x'\n" + "a = a + a\n" * 40 + "model = dict(a=a)",
        "a = 9\n" + "a = a * a\n" * 40 + "model = dict(a=a)",
        "a = [0]\n" + "a = [a, a]\n" * 40 + "model = dict(a=a)",
        "model = dict(a=" + "-" * 20000 + "1)",
        "model = {[]: 1}",
        "model = dict(a=\0)",
    ],
)
def test_a_few_lines_cannot_ask_for_much(text):
    with pytest.raises(SpaceDriveError, match=r"cannot be|can be read|not a Python config"):
        parse_published_config(text, "it")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pe_freq_coeff", "x"),
        ("pe_type", []),
        ("pe_decode_method", {}),
        ("llm_lora_rank", 1.5),
        ("vis_3d_pos", "no"),
        ("ego_status_len", None),
    ],
)
def test_arguments_of_another_type_are_refused_by_name(tmp_path, name, value):
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"model": PUBLISHED | {name: value}}))
    with pytest.raises(ConfigError, match=rf"arguments\.json, model: .*{name}"):
        read_published_config(file)


def test_a_number_that_no_float_holds_is_refused(tmp_path):
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"model": PUBLISHED | {"pe_scaling": 10**400}}))
    with pytest.raises(DataError, match=r"arguments\.json .*401 digits"):
        read_published_config(file)

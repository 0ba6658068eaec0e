"""Every preset loads, comes back from JSON, and its model can be built without its numbers."""

import json
import re
from pathlib import Path

import jax
import pytest
from flax import nnx

from spacedrive_jax.cli.main import main
from spacedrive_jax.config import TrainConfig, change, from_json, load_config, preset_groups, to_json
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.models.spacedrive import SpaceDrive
from spacedrive_jax.training.losses import check_choices
from spacedrive_jax.training.state import is_trainable

PRESETS = sorted(name for _, presets in preset_groups().values() for name in presets)


def abstract_model(config):
    indicator = config.model.vlm.decoder.vocab_size - 2
    return nnx.eval_shape(lambda: SpaceDrive(config.model, indicator_id=indicator, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_whole(name):
    config = load_config(name)
    assert config.name == name
    assert from_json(to_json(config)) == config
    check_choices(config.model, config.train)


@pytest.mark.parametrize(("name", "millions"), [("spacedrive_qwen_7b", 10.09), ("table_d_rank_64", 40.37)])
def test_trainable_adapters_are_the_papers(name, millions):
    """Table D prints the number of LoRA parameters."""
    adapters = nnx.state(abstract_model(load_config(name)), nnx.LoRAParam)
    count = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert round(count / 1e6, 2) == millions


def test_every_preset_is_in_the_table_of_the_docs():
    table = (Path(__file__).parents[1] / "docs" / "reference" / "presets.md").read_text()
    assert [name for name in PRESETS if f"`{name}`" not in table] == []
    named = set(re.findall(r"`((?:table|base_vlm|spacedrive_)[a-z0-9_]+)`", table))
    assert sorted(named - set(PRESETS)) == []


def test_a_config_in_json_is_a_preset(tmp_path):
    config = load_config("table_e_base_1000")
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    assert load_config(str(file)) == config
    for content in ("{", "[]", '{"model": 3}'):
        file.write_text(content)
        with pytest.raises(SpaceDriveError, match="does not hold a config"):
            load_config(str(file))
    with pytest.raises(SpaceDriveError, match="there is no such file"):
        load_config(str(tmp_path / "absent.json"))


def test_a_file_of_ones_own_may_define_one_config_or_several(tmp_path):
    head = "from spacedrive_jax.config import Config\n"
    file = tmp_path / "with:colon" / "mine.py"
    file.parent.mkdir()
    file.write_text(head + "config = Config(name='one')\n")
    assert load_config(str(file)).name == "one"
    file.write_text(head + "PRESETS = {name: Config(name=name) for name in ('long', 'short')}\n")
    assert load_config(f"{file}:short").name == "short"
    with pytest.raises(ConfigError, match=r"defines long, short: take one as .*mine\.py:NAME"):
        load_config(str(file))
    file.write_text("PRESETS = {'mine': 3}\n")
    with pytest.raises(ConfigError, match="defines neither `config`"):
        load_config(str(file))
    for wrong, said in (
        ("x = 1\nconfig = (\n", r"mine\.py, line 2: SyntaxError: "),
        ("\n\nimport nothere_x\n", r"mine\.py, line 3: ModuleNotFoundError: No module named"),
        (head + "config = Config(nmae='one')\n", r"mine\.py, line 2: TypeError: .*nmae"),
        ("\0", r"mine\.py: SyntaxError: |mine\.py, line"),
    ):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=said):
            load_config(str(file))


def test_a_wrong_name_lists_the_presets_by_group():
    listed = r"no config 'table9'; .*presets: .*demo: demo, demo_published; .*table3_vision"
    with pytest.raises(ConfigError, match=listed):
        load_config("table9")


def test_a_path_that_is_no_config_is_called_what_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    for name, said in {
        tmp_path: f"is a folder: give the config in it, {tmp_path / 'config.json'}",
        tmp_path / "gone.py": "there is no such file",
        tmp_path / "notes.txt": "it is neither a .py nor a .json file",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(said)):
            load_config(str(name))


def test_list_names_every_preset(capsys):
    assert main(["train", "--list"]) == 0
    listed = capsys.readouterr().out
    assert [name for name in PRESETS if f"  {name}\n" not in listed] == []
    assert "paper: SpaceDrive on Qwen2.5-VL-7B: every row of the paper's tables." in listed


def test_frozen_scale_is_no_trainable():
    model = abstract_model(load_config("table5_alpha_fixed_1"))
    trainable = nnx.to_flat_state(nnx.state(model, is_trainable(True)))
    assert not any(path[0] == "encoder" for path, _ in trainable)


def test_unknown_fields_are_named():
    with pytest.raises(SpaceDriveError, match=r"model\.encoder\.alfa"):
        change(load_config("demo"), "x", {"model.encoder.alfa": 1.0})


def test_default_losses_are_the_published():
    assert (TrainConfig().position_loss, TrainConfig().huber_delta, TrainConfig().supervision) == (
        "huber",
        1.0,
        "planning",
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"train": {"steps": "many"}}, r"config\.train\.steps is 'many': Expected `int`, got `str`"),
        ({"train": {"steps": 1.5}}, r"config\.train\.steps"),
        ({"train": {"position_loss": "cube"}}, r"config\.train\.position_loss"),
        ({"train": []}, r"config\.train is '\[\]', expected an object"),
        ({"data": {"image_size": "large"}}, r"config\.data\.image_size"),
        ({"model": {"lora": {"targets": ["all"]}}}, r"config\.model\.lora\.targets"),
    ],
)
def test_a_config_file_has_values_of_the_fields_types(change, problem):
    with pytest.raises(ConfigError, match=problem):
        from_json(json.dumps(change))


@pytest.mark.parametrize("content", [b"\xff", b"[" * 5000, b"[]", b"{"])
def test_a_damaged_config_file_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json does not hold a config"):
        load_config(str(tmp_path / "config.json"))


def test_a_name_with_a_slip_comes_with_the_one_that_was_meant():
    with pytest.raises(ConfigError, match=r"'spacedrive_qwen7b'; did you mean spacedrive_qwen_7b\?"):
        load_config("spacedrive_qwen7b")

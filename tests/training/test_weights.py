"""`model.weights` settles what a run is made of, whatever the preset's sizes are."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.cli.main import main
from spacedrive_jax.config import change, load_config, to_json
from spacedrive_jax.data.tokenizer import DEMO_TOKENIZER
from spacedrive_jax.errors import CheckpointError, ConfigError
from spacedrive_jax.evaluation.validation import train
from spacedrive_jax.inference.open_model import open_trained_model
from spacedrive_jax.interop.hf_checkpoint import to_hf
from spacedrive_jax.training.checkpoints import locate
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import check_start, init_train_state, make_model
from spacedrive_jax.training.weights import with_weights
from tests.training.runs import TINY, make_records, save_untrained, tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A transformers checkpoint of two narrow layers, with the demo's vocabulary."""
    folder = tmp_path_factory.mktemp("weights") / "hf"
    to_hf(make_model(tiny(folder, folder), nnx.Rngs(0)).vlm, folder)
    shutil.copyfile(DEMO_TOKENIZER, folder / "tokenizer.json")
    return folder


def test_four_flags_train_any_preset_on_any_size(base, tmp_path, capsys):
    records, run_dir = make_records(tmp_path / "records"), tmp_path / "run"
    preset = tmp_path / "preset.py"
    preset.write_text(
        "from spacedrive_jax.config import change, load_config\n"
        "config = change(load_config('demo_published'), 'own', {'train.steps': 2, 'train.batch_size': 2, "
        "'model.use_lora': True, 'data.sequence_length': 320, 'train.validate_every': 0})\n"
    )
    arguments = [str(preset), "--model.weights", str(base), "--data.records", str(records)]
    assert main(["train", *arguments, "--run-dir", str(run_dir), "--json"]) == 0
    written = json.loads((run_dir / "config.json").read_text())
    assert written["model"]["vlm"]["decoder"]["hidden_size"] == 32
    assert written["data"]["tokenizer"] == written["model"]["weights"] == str(base)
    assert written["data"]["sequence_length"] == 320
    capsys.readouterr()

    other = ["--model.vlm.decoder.num-layers", "3", "--model.vlm.vision.depth", "4"]
    assert main(["train", *arguments, "--run-dir", str(tmp_path / "other"), *other]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.vlm.decoder.num_layers is 2 there and 3 here" in said
    assert "vision" not in said  # 4 is the preset's own
    assert not (tmp_path / "other").exists()


def test_another_family_brings_its_image_size_adapters_and_length(golden, tmp_path):
    folder = tmp_path / "llava"
    folder.mkdir()
    for file in [*(golden / "llava_plus_train").glob("model*"), golden / "llava_plus_train" / "config.json"]:
        shutil.copyfile(file, folder / file.name)
    preset = change(load_config("demo_published"), "own", {"model.weights": str(folder)})
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        with_weights(preset)
    shutil.copyfile(DEMO_TOKENIZER, folder / "tokenizer.json")
    chosen = with_weights(preset, load_config("demo_published"))
    side = chosen.model.vlm.vision.image_size
    assert chosen.data.image_size == (side, side)
    assert (
        chosen.model.lora.targets != load_config("demo_published").model.lora.targets
        or chosen.model.lora.rank == 16
    )
    kept = change(preset, "own", {"data.image_size": (28, 28), "model.lora.rank": 3})
    meant = with_weights(kept, load_config("demo_published"))
    assert meant.data.image_size == (28, 28)
    assert meant.model.lora.rank == 3


def test_a_frozen_base_of_random_numbers_has_to_be_meant(tmp_path, capsys):
    published = load_config("spacedrive_qwen_7b")
    with pytest.raises(ConfigError, match=r"spacedrive_qwen_7b trains .*--model\.weights DIR .*random-base"):
        check_start(published)
    with pytest.raises(ConfigError, match=r"base 20000 is in octaves .* --model\.encoder\.base 10"):
        check_start(change(published, "nerf", {"model.encoder.kind": "nerf"}))
    for kernel in ("splash", "cudnn"):
        with pytest.raises(ConfigError, match=f"model.compute.attention is {kernel}"):
            check_start(change(published, kernel, {"model.compute.attention": kernel}))
    check_start(change(published, "meant", {"model.random_base": True}))
    # Trained in bfloat16 it would stand still: a step is less than its numbers tell apart.
    with pytest.raises(ConfigError, match=r"use_lora False trains the base.*param_dtype float32"):
        check_start(change(published, "whole", {"model.use_lora": False}))
    check_start(change(published, "whole", {"model.use_lora": False, "model.compute.param_dtype": "float32"}))
    # Nothing scales the loss: what underflows in float16 would be learnt as zero.
    with pytest.raises(ConfigError, match=r"compute\.dtype float16 is for inference.*bfloat16"):
        check_start(change(published, "half", {"model.random_base": True, "model.compute.dtype": "float16"}))
    arguments = ["train", "spacedrive_qwen_7b", "--run-dir", str(tmp_path / "run")]
    assert main(arguments) == 1
    assert "--model.random-base" in capsys.readouterr().err
    assert main([*arguments, "--model.random-base", "--data.records", str(tmp_path / "none")]) == 1
    assert "none is not a finished records folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_another_run(tmp_path):
    before = tiny(make_records(tmp_path / "records"), tmp_path / "before")
    save_untrained(before)
    wanted = change(before, "next", {"model.weights": str(before.directory), "run_dir": None})
    same = with_weights(wanted, before)
    assert same.model.weights == str(before.directory / "checkpoints" / "1")
    mesh = make_mesh(before.mesh)
    first, _ = init_train_state(before, mesh)
    other = dataclasses.replace(same, train=dataclasses.replace(same.train, seed=5))
    again, _ = init_train_state(other, mesh)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(again), nnx.to_pure_dict(first))

    adapted = change(other, "adapted", {"model.use_lora": True})
    trainable, frozen = init_train_state(adapted, mesh)
    base = dict(nnx.to_flat_state(first))
    np.testing.assert_array_equal(
        dict(nnx.to_flat_state(frozen))["vlm", "decoder", "embedding"][...],
        base["vlm", "decoder", "embedding"][...],
    )
    rows = dict(nnx.to_flat_state(trainable))["vlm", "decoder", "new_embedding"][...]
    assert (np.asarray(base["vlm", "decoder", "embedding"][...]) == np.asarray(rows)[0]).all(axis=1).any()

    unlike = change(same, "unlike", {"model.encoder.base": 77.0})
    with pytest.raises(ConfigError, match=r"model\.encoder\.base: 20000\.0 -> 77\.0"):
        init_train_state(unlike, mesh)
    _, step = locate(before.directory)
    assert step == 1


def test_a_run_keeps_the_step_it_was_started_from(tmp_path, capsys):
    records = make_records(tmp_path / "records")
    before = tiny(records, tmp_path / "before")
    save_untrained(before)
    run_dir, first = tmp_path / "next", before.directory / "checkpoints" / "1"

    def next_run(steps, *flags):
        arguments = ["--data.records", str(records), "--model.weights", str(before.directory)]
        more = ["--run-dir", str(run_dir), "--train.steps", str(steps), *flags]
        return main(["train", str(TINY), *arguments, *more])

    assert next_run(2) == 0
    first.rename(first.with_name("7"))  # the other run has gone on and pruned the step
    assert next_run(3, "--resume", "--dry-run") == 0
    capsys.readouterr()
    assert next_run(3, "--resume") == 0
    assert f"{first}, which this run was started from, is there no longer" in capsys.readouterr().err
    written = json.loads((run_dir / "config.json").read_text())
    assert written["model"]["weights"] == str(first)
    assert open_trained_model(run_dir).config.train.steps == 3
    gone = change(tiny(records, tmp_path / "third"), "third", {"model.weights": str(first)})
    with pytest.raises(CheckpointError, match=r"no finished checkpoint at .*/1 \(.*before keeps steps 7\)"):
        train(gone)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("run/config.json", r"config\.json is missing"),
        ("adapter_config.json", "it is a PEFT adapter"),
        ("model-00001-of-00002.safetensors", "it is a transformers checkpoint"),
        ("provenance.json", "it is a records folder"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, name, said):
    folder = tmp_path / name.partition("/")[0] if "/" in name else tmp_path
    if folder == tmp_path:
        (folder / name).write_text("")
    else:
        (folder / "checkpoints" / "3").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=f"it holds those of {folder}"):
            locate(folder / "checkpoints")
        (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=said):
        locate(folder)
    with pytest.raises(CheckpointError, match="nothing has this name"):
        locate(tmp_path / "absent")


def test_a_file_that_names_its_weights_keeps_its_own_tokenizer_and_image_size(base, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    shutil.copyfile(DEMO_TOKENIZER, own / "tokenizer.json")
    settled = {"model.weights": str(base), "data.tokenizer": str(own), "data.image_size": (28, 28)}
    file = tmp_path / "config.json"
    file.write_text(to_json(change(tiny(tmp_path, tmp_path / "run"), "own", settled)))
    read = load_config(str(file))
    kept = with_weights(read, read)
    assert (kept.data.tokenizer, kept.data.image_size) == (str(own), (28, 28))
    # Where a flag names the weights, they settle what no flag does.
    plain = change(read, "own", {"model.weights": None})
    assert with_weights(change(plain, "own", {"model.weights": str(base)}), plain).data.tokenizer == str(base)

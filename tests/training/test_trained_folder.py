"""A trained run as one folder of safetensors, which every --checkpoint takes."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import spacedrive_jax.cli.main
from spacedrive_jax.config import change, from_json
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.inference.open_model import name_checkpoint, open_config, open_model, open_trained_model
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import check_start, init_train_state
from spacedrive_jax.training.weights import with_weights
from tests.training.runs import make_records, save_untrained, tiny


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handed")
    return save_untrained(tiny(make_records(folder / "records"), folder / "run"))


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "model"
    assert export(run_dir, out) == 0
    return out


def export(source, out, *more):
    words = ["export-weights", "--to", "safetensors", source, "--out", out, *more]
    return spacedrive_jax.cli.main.main([str(word) for word in words])


def values(trained):
    return {path: np.asarray(each[...]) for path, each in nnx.to_flat_state(trained.trainable)}


def test_it_holds_the_run_bit_for_bit_and_says_where_it_comes_from(run_dir, exported):
    before, after = open_trained_model(run_dir), open_model(exported)
    kept = values(after)
    for path, value in values(before).items():
        np.testing.assert_array_equal(value, kept[path])
    assert after.config.model == before.config.model
    text = (exported / "config.json").read_text() + (exported / "README.md").read_text()
    assert str(run_dir.parent) not in text, "where it was trained is nobody's business"
    card = (exported / "README.md").read_text()
    assert "# tiny" in card
    assert "Planner.load" in card
    assert "made up" in card, "the licence of the records"
    named = name_checkpoint(exported)
    assert named["trainable_fingerprint"]
    assert from_json(named["config"]).model == before.config.model, "what it is asked otherwise is told apart"


def test_half_the_bytes_for_half_the_bits(run_dir, exported, tmp_path):
    assert export(run_dir, tmp_path / "half", "--dtype", "float16") == 0
    size = {
        folder: (folder / "trained.safetensors").stat().st_size for folder in (exported, tmp_path / "half")
    }
    assert size[tmp_path / "half"] < 0.6 * size[exported]
    before, after = values(open_trained_model(run_dir)), values(open_trained_model(tmp_path / "half"))
    for path, value in before.items():
        assert after[path].dtype == value.dtype
        np.testing.assert_allclose(after[path], value, rtol=1e-3, atol=1e-6)


def test_what_was_changed_is_named(exported, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = bytearray((folder / "trained.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "trained.safetensors").write_bytes(bytes(data))
    with pytest.raises(
        SpaceDriveError, match=r"trained\.safetensors is not the file that trained\.json names"
    ):
        open_trained_model(folder)
    (folder / "trained.safetensors").write_bytes((exported / "trained.safetensors").read_bytes())
    fields = json.loads((folder / "config.json").read_text())
    fields["model"]["vlm"]["decoder"]["num_layers"] = 1
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(SpaceDriveError, match="does not fit"):
        open_trained_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(SpaceDriveError, match=r"config\.json does not hold a config"):
        open_config(folder)
    assert export(exported, tmp_path / "again") == 1
    assert "such a folder already" in capsys.readouterr().err


def test_flags_that_do_not_go_together(run_dir, exported, tmp_path, capsys):
    words = ["export-weights", "--to", "hf", str(run_dir), "--out", str(tmp_path / "o"), "--dtype", "float16"]
    assert spacedrive_jax.cli.main.main(words) == 1
    assert "--dtype and --average go with --to safetensors" in capsys.readouterr().err
    predict = ["predict", "--checkpoint", str(exported), "--records", str(tmp_path)]
    assert spacedrive_jax.cli.main.main(predict) == 1
    assert "give --out FILE" in capsys.readouterr().err
    with pytest.raises(SpaceDriveError, match="holds no moving average"):
        open_trained_model(exported, average=True)


def test_an_exported_run_is_exported_for_transformers_too(exported, tmp_path):
    out = tmp_path / "hf"
    words = ["export-weights", "--to", "hf", str(exported), "--out", str(out)]
    assert spacedrive_jax.cli.main.main(words) == 0
    stored = load_file(exported / "trained.safetensors")
    assert dataclasses.asdict(open_config(exported))["model"]["use_lora"] is False
    tensors = load_file(out / "model.safetensors")
    table = next(value for name, value in tensors.items() if "embed_tokens" in name)
    np.testing.assert_array_equal(table, stored["vlm/decoder/embedding"])


def test_a_new_run_starts_from_it(exported):
    config = dataclasses.replace(tiny(exported, exported / "none"), name="further")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=str(exported)))
    chosen = with_weights(config)
    assert chosen.data.tokenizer == str(exported)
    check_start(chosen)
    trainable, _ = init_train_state(chosen, make_mesh(chosen.mesh))
    expected = values(open_trained_model(exported))
    for path, each in nnx.to_flat_state(trainable):
        np.testing.assert_array_equal(np.asarray(each[...]), expected[path])


def test_a_start_from_what_says_nothing_of_itself_is_refused_before_anything_is_read(run_dir, tmp_path):
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(run_dir, run)
    assert export(run_dir, model) == 0
    step = next((run / "checkpoints").iterdir())
    config = tiny(run.parent, tmp_path / "further")
    for weights, damage, said in (
        (run, lambda: shutil.rmtree(step / "metadata"), "is damaged .*lacks `metadata`"),
        (model, lambda: (model / "trained.json").write_text("{}"), r"trained\.json: .*step"),
    ):
        starting = with_weights(change(config, "further", {"model.weights": str(weights)}))
        check_start(starting)
        damage()
        with pytest.raises(SpaceDriveError, match=said):
            check_start(starting)


def test_a_run_with_adapters_goes_to_the_published_layout_from_its_folder_too(run_dir, tmp_path):
    config = change(open_config(run_dir), "lora", {"run_dir": str(tmp_path / "run"), "model.use_lora": True})
    run = save_untrained(change(config, "lora", {"model.random_base": True}))
    assert export(run, tmp_path / "model") == 0
    written = []
    for source in (run, tmp_path / "model"):
        out = tmp_path / f"{len(written)}.pth"
        words = ["export-weights", "--to", "spacedrive", str(source), "--out", str(out)]
        assert spacedrive_jax.cli.main.main(words) == 0
        written.append(out.read_bytes())
    assert len(written[0]) == len(written[1])

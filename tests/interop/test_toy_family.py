"""A third family of vision-language models is one model file, one interop file and one registration."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from spacedrive_jax import batch_spec, fake_batch, open_model
from spacedrive_jax.cli.main import main
from spacedrive_jax.config import from_json, load_config, to_json
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.interop.hf_checkpoint import to_hf
from spacedrive_jax.interop.hf_config import read_hf_config
from spacedrive_jax.models.config import ComputeConfig, LoraConfig
from spacedrive_jax.models.families import FAMILIES, family_of, register
from spacedrive_jax.models.families.qwen2_5_vl import QwenVL
from spacedrive_jax.training.sharding import make_mesh, place_batch, replicated
from spacedrive_jax.training.state import init_train_state
from spacedrive_jax.training.step import make_train_step
from tests.conftest import ROOT
from tests.interop.conftest import write_tokenizer
from tests.interop.toy_family.model import FAMILY, ToyChat, ToyConfig, ToyVL
from tests.models.conftest import random_module
from tests.record_factory import encode_png, make_record
from tests.training.runs import TINY


@pytest.fixture(scope="module", autouse=True)
def registered():
    register(FAMILY)
    yield
    del FAMILIES[FAMILY.name]


@pytest.fixture(scope="module")
def qwen():
    config = ToyConfig().as_qwen
    return random_module(lambda: QwenVL(config, compute=ComputeConfig(), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def folder(qwen, tmp_path_factory):
    """The weights of a Qwen as the toy's authors would publish them: their names, their config.json."""
    place = tmp_path_factory.mktemp("published")
    to_hf(qwen, place / "qwen")
    tensors = {}
    for file in (place / "qwen").glob("model*.safetensors"):
        tensors |= load_file(file)
    toy = place / "toy"
    toy.mkdir()
    names = ((r"^lm_head\.", "brain.head."), (r"^visual\.", "eyes."), (r"^model\.", "brain."))
    for pattern, name in names:
        tensors = {re.sub(pattern, name, each): value for each, value in tensors.items()}
    assert {name.split(".")[0] for name in tensors} == {"brain", "eyes"}
    save_file(tensors, toy / "model.safetensors")
    brain = {"vocab_size": 520, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    brain |= {"num_attention_heads": 4, "num_key_value_heads": 2, "axes": [1, 1, 1]}
    eyes = {"width": 16, "inner": 20, "blocks": 2, "heads": 2, "wide_blocks": [0], "window": 28, "patch": 7}
    config = {"model_type": "toy_vl", "picture": 508, "greeting": "hello", "note": "kept"}
    (toy / "config.json").write_text(json.dumps(config | {"brain_config": brain, "eyes_config": eyes}))
    return toy


def run_config():
    tiny = load_config(str(TINY))
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, vlm=ToyConfig(), use_lora=True, lora=FAMILY.lora(2)),
        data=dataclasses.replace(tiny.data, sequence_length=320),
        train=dataclasses.replace(tiny.train, batch_size=1),
    )


def test_nothing_else_knows_of_it():
    files = sorted(file.name for file in (ROOT / "tests" / "interop" / "toy_family").glob("*.py"))
    assert files == ["interop.py", "model.py"]
    for room in ("spacedrive_jax", "data_prep", "configs"):
        assert not [file for file in (ROOT / room).rglob("*.py") if "toy_vl" in file.read_text()]
    assert family_of(ToyConfig()) is FAMILY
    with pytest.raises(ConfigError, match="registered already"):
        register(dataclasses.replace(FAMILY, name="another"))


def test_it_opens_from_its_own_files_and_scores_as_a_qwen_does(folder, qwen):
    model = open_model(folder)
    assert isinstance(model, ToyVL)
    assert model.config == ToyConfig()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 500, (2, 30))
    tokens[:, 5:9] = 508
    patches = rng.normal(size=(2, 1, 16, 3 * 2 * 7 * 7)).astype(np.float32)
    inputs = {"pixel_values": patches, "image_grid_thw": (1, 4, 4)}
    ours, theirs = model.logits(tokens, **inputs), qwen.logits(tokens, **inputs)
    assert ours.shape == (2, 30, 520)
    np.testing.assert_array_equal(ours, theirs)
    assert np.std(ours) > 0


def test_it_goes_back_to_its_own_files(folder, tmp_path):
    to_hf(open_model(folder), tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), {}
    for file in (tmp_path / "again").glob("model*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    assert read_hf_config(tmp_path / "again") == ToyConfig()


def test_an_import_makes_room_for_the_coordinate_tokens_in_its_own_config(folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in folder.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    write_tokenizer(source, 520)
    assert main(["import-weights", "--from", "hf", str(source), "--out", str(tmp_path / "weights")]) == 0
    written = json.loads((tmp_path / "weights" / "config.json").read_text())
    assert written["note"] == "kept"
    assert written["brain_config"]["vocab_size"] == 522
    model = open_model(tmp_path / "weights")
    assert model.config.decoder.vocab_size == 522
    table = np.asarray(model.decoder.embedding[...])
    np.testing.assert_allclose(table[520:], np.tile(table[:520].mean(0), (2, 1)), atol=1e-6)


def test_a_config_of_it_comes_back_from_json():
    config = run_config()
    text = to_json(config)
    assert json.loads(text)["model"]["vlm"]["family"] == "toy_vl"
    assert from_json(text) == config
    assert config.model.lora == LoraConfig(rank=2, alpha=4.0, targets=("q", "v"))


def test_its_conversation_makes_a_sample():
    rng = np.random.default_rng(0)
    config = run_config()
    depth = encode_png((rng.uniform(3, 60, (45, 80)) * 256).astype(np.uint16))
    builder = SampleBuilder(config.data, config.model)
    sample = builder(make_record(rng, exact_depth=[depth] * 6), 0)
    spec = batch_spec(config, 1)
    assert jax.tree.map(lambda leaf: (np.shape(leaf), np.asarray(leaf).dtype), sample) == jax.tree.map(
        lambda leaf: (leaf.shape[1:], leaf.dtype), spec
    )
    ids = sample.token_ids[: int(sample.lengths)]
    assert isinstance(builder.tokenizer.chat, ToyChat)
    assert builder.tokenizer.image == ToyConfig().image_token_id
    # Six cameras of 4x4 tokens; behind them the slots of the ego feature and of two past positions.
    assert np.count_nonzero(ids == ToyConfig().image_token_id) == 6 * 16 + 1 + 2
    assert np.count_nonzero(ids == builder.tokenizer.special["turn_end"]) == 2


def test_spacedrive_on_it_takes_a_step(folder):
    config = run_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=str(folder)))
    mesh = make_mesh(config.mesh)
    step = make_train_step(config, mesh)
    trainable, frozen = init_train_state(config, mesh)
    before = jax.device_get(nnx.to_pure_dict(trainable))
    batch = place_batch(fake_batch(config), mesh)
    zero = jax.device_put(np.int32(0), replicated(mesh))
    after, _, metrics = step.run(trainable, step.initialize_optimizer(trainable), frozen, batch, zero)
    assert np.isfinite(float(metrics["loss"]))
    assert float(metrics["finite"]) == 1
    moved = jax.tree.map(lambda old, new: np.any(old != new), before, nnx.to_pure_dict(after))
    assert any(jax.tree.leaves(moved["vlm"]))  # the adapters on q and v


def test_unregistered_it_is_refused_with_the_families_there_are(folder, monkeypatch):
    monkeypatch.delitem(FAMILIES, "toy_vl")
    with pytest.raises(ConfigError, match="model_type is 'toy_vl', expected 'qwen2_5_vl' or 'llava'"):
        open_model(folder)
    with pytest.raises(ConfigError, match="ToyConfig is the config of no registered family"):
        to_json(run_config())

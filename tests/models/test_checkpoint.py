from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.interop.hf_checkpoint import from_hf, to_hf
from spacedrive_jax.interop.qwen2_5_vl import FORMAT, qwen_rules
from spacedrive_jax.interop.weight_table import lora_rules
from spacedrive_jax.models.config import ComputeConfig, LoraConfig, NewTokensConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVL, QwenVLConfig

from .conftest import GOLDEN


def load_all(folder):
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.fixture(scope="module")
def model():
    return from_hf(GOLDEN)


@pytest.fixture
def checkpoint(tmp_path):
    """A single-file copy of the golden checkpoint to damage: folder, tensors, save()."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text((GOLDEN / "config.json").read_text())
    tensors = load_all(GOLDEN)

    def save():
        save_file(tensors, folder / "model.safetensors")
        return folder

    return tensors, save


@pytest.mark.parametrize("naming", ["hub", "transformers"])
def test_export_gives_back_every_tensor_bit_for_bit(model, tmp_path, naming):
    folder = tmp_path / "exported"
    to_hf(model, folder, naming=naming, max_shard_bytes=400_000)
    expected, exported = load_all(GOLDEN), load_all(folder)
    rename = FORMAT.hub_name if naming == "hub" else str
    assert exported.keys() == {rename(name) for name in expected}
    for name, tensor in expected.items():
        np.testing.assert_array_equal(exported[rename(name)], tensor)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == exported.keys()
    assert all(file.stat().st_size < 420_000 for file in folder.glob("model-*"))
    modes = {file.stat().st_mode for file in folder.iterdir()}
    assert len(modes) == 1
    again = from_hf(folder)
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(model)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_half_precision_survives_the_round_trip(tmp_path):
    half = from_hf(GOLDEN, compute=ComputeConfig(param_dtype="bfloat16"))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(nnx.state(half)))
    to_hf(half, tmp_path / "half")
    expected, exported = load_all(GOLDEN), load_all(tmp_path / "half")
    for name, tensor in expected.items():
        np.testing.assert_array_equal(exported[FORMAT.hub_name(name)], tensor.astype(jnp.bfloat16))


def test_every_bad_tensor_is_reported_at_once(checkpoint):
    tensors, save = checkpoint
    del tensors["model.language_model.layers.2.mlp.up_proj.weight"]
    tensors["model.visual.blocks.0.norm1.weight"] = np.zeros(7, np.float32)
    tensors["model.visual.blocks.9.norm1.weight"] = np.zeros(32, np.float32)
    with pytest.raises(SpaceDriveError) as raised:
        from_hf(save())
    message = str(raised.value)
    assert "(3 tensors)" in message
    assert "missing model.language_model.layers.2.mlp.up_proj.weight (160, 96)" in message
    assert "model.visual.blocks.0.norm1.weight is (7,), the config asks for (32,)" in message
    assert "unknown model.visual.blocks.9.norm1.weight (32,)" in message


def test_hub_and_transformers_names_may_not_both_be_there(checkpoint):
    tensors, save = checkpoint
    tensors["visual.merger.ln_q.weight"] = np.zeros(32, np.float32)
    with pytest.raises(SpaceDriveError, match="comes twice"):
        from_hf(save())


def test_damaged_and_absent_files_are_named(checkpoint, tmp_path):
    _, save = checkpoint
    folder = save()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SpaceDriveError, match=r"cannot read .*model\.safetensors"):
        from_hf(folder)
    file.unlink()
    with pytest.raises(SpaceDriveError, match=r"neither model\.safetensors nor"):
        from_hf(folder)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SpaceDriveError, match="model-00001-of-00001"):
        from_hf(folder)


def test_a_failed_export_leaves_nothing(model, tmp_path, monkeypatch):
    import spacedrive_jax.interop.safetensors_folder as module

    monkeypatch.setattr(module, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(SpaceDriveError, match=r"cannot write .*exported: disk full"):
        to_hf(model, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(model, tmp_path):
    with pytest.raises(SpaceDriveError, match="exists"):
        to_hf(model, tmp_path)


def test_fresh_trainables_beside_loaded_weights(model):
    new_tokens = NewTokensConfig(first_id=500, count=3)
    adapted = from_hf(GOLDEN, lora=LoraConfig(rank=3, targets=("q", "v")), new_tokens=new_tokens, seed=5)
    attention = adapted.decoder.layers.attention
    assert attention.k.adapter is None
    a = np.asarray(attention.q.adapter.a[...])
    assert np.abs(a).max() <= 1 / math.sqrt(96)
    assert np.abs(a[0] - a[1]).max() > 0.01
    assert not np.asarray(attention.q.adapter.b[...]).any()
    np.testing.assert_array_equal(adapted.decoder.new_embedding[...], model.decoder.embedding[...][500:503])
    np.testing.assert_array_equal(adapted.decoder.new_head[...], model.decoder.head[...][500:503])
    again = from_hf(GOLDEN, lora=LoraConfig(rank=3, targets=("q", "v")), seed=5)
    np.testing.assert_array_equal(again.decoder.layers.attention.q.adapter.a[...], a)


def test_shardings_are_asked_by_name_and_obeyed(model):
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    asked = set()

    def shardings(names, shape):
        asked.add((names, shape))
        axes = {"mlp": "model", "embed": "data"}
        return jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(*(axes.get(name) for name in names))
        )

    placed = from_hf(GOLDEN, shardings=shardings, lora=LoraConfig(rank=2))
    gate = placed.decoder.layers.mlp.gate.kernel[...]
    assert gate.sharding.spec == jax.sharding.PartitionSpec(None, "data", "model")
    assert (("layers", "embed", "mlp"), (3, 96, 160)) in asked
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        other = dict(nnx.to_flat_state(nnx.state(placed)))[path]
        np.testing.assert_array_equal(other[...], variable[...])


def test_tables_cover_every_parameter_once(model):
    state = dict(nnx.to_flat_state(nnx.state(from_hf(GOLDEN, lora=LoraConfig(rank=2)))))
    rules = (*qwen_rules(model.config), *lora_rules(model.config.decoder, LoraConfig(rank=2)))
    targets = [rule.target for rule in rules]
    assert len(targets) == len(set(targets))
    assert set(targets) == set(state)


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        (QwenVLConfig.qwen2_5_vl_7b(), 729, 8_292_166_656),
        (QwenVLConfig.qwen2_5_vl_3b(), 824, 3_754_622_976),
    ],
    ids=["7b", "3b"],
)
def test_presets_have_the_tensors_of_the_published_checkpoints(config, tensors, parameters):
    rules = qwen_rules(config)
    assert sum(len(rule.source_names()) for rule in rules) == tensors
    assert sum(len(rule.source_names()) * math.prod(rule.source_shape) for rule in rules) == parameters
    abstract = nnx.eval_shape(lambda: QwenVL(config, compute=ComputeConfig(), rngs=nnx.Rngs(0)))
    sizes = {path: math.prod(variable.shape) for path, variable in nnx.to_flat_state(nnx.state(abstract))}
    assert sizes == {rule.target: len(rule.source_names()) * math.prod(rule.source_shape) for rule in rules}


@pytest.mark.parametrize("rule_number", range(0, 33, 4))
def test_each_rule_inverts_itself(model, rule_number):
    rule = qwen_rules(model.config)[rule_number]
    shape = dict(nnx.to_flat_state(nnx.state(model)))[rule.target].shape
    shape = shape if rule.layers is None else shape[1:]
    tensor = np.arange(math.prod(rule.source_shape), dtype=np.float32).reshape(rule.source_shape)
    np.testing.assert_array_equal(rule.export(rule.load(tensor, shape)), tensor)


@pytest.mark.parametrize(
    ("hub", "canonical"),
    [
        ("visual.blocks.0.norm1.weight", "model.visual.blocks.0.norm1.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_translate_both_ways(hub, canonical):
    assert FORMAT.canonical_name(hub) == canonical == FORMAT.canonical_name(canonical)
    assert FORMAT.hub_name(canonical) == hub

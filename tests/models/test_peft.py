from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.interop.peft import load_adapter, read_peft_config, save_adapter
from spacedrive_jax.models.config import ComputeConfig, LoraConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVL

from .conftest import random_module, tiny_config

LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.1, targets=("q", "v", "o"))


def build(lora=LORA, seed=0) -> QwenVL:
    return random_module(
        lambda: QwenVL(tiny_config(), compute=ComputeConfig(), rngs=nnx.Rngs(0), lora=lora), seed
    )


@pytest.fixture
def saved(tmp_path):
    model, folder = build(), tmp_path / "adapter"
    save_adapter(model, folder, base_model="tiny")
    return model, folder


def test_round_trip_into_another_model(saved):
    model, folder = saved
    assert read_peft_config(folder) == LORA
    other = build(seed=1)
    before = nnx.state(other, nnx.Not(nnx.LoRAParam))
    load_adapter(other, folder)
    for kind, source in ((nnx.LoRAParam, nnx.state(model, nnx.LoRAParam)), (nnx.Not(nnx.LoRAParam), before)):
        for ours, theirs in zip(
            jax.tree.leaves(nnx.state(other, kind)), jax.tree.leaves(source), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_the_folder_is_laid_out_as_peft_has_it(saved):
    model, folder = saved
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 3 * 3 * 2
    prefix = "base_model.model.model.language_model.layers.2.self_attn"
    a = model.decoder.layers.attention.o.adapter.a[...][2]
    np.testing.assert_array_equal(tensors[f"{prefix}.o_proj.lora_A.weight"], a.reshape(32, 3).T)
    b = model.decoder.layers.attention.v.adapter.b[...][2]
    np.testing.assert_array_equal(tensors[f"{prefix}.v_proj.lora_B.weight"], b.reshape(3, 16).T)


def test_the_mlp_has_adapters_where_they_are_asked_for(tmp_path):
    lora = LoraConfig(rank=2, alpha=4.0, dropout=0.5, targets=("k", "gate", "down"))
    model = build(lora)
    assert model.decoder.layers.mlp.up.adapter is None
    assert model.decoder.layers.mlp.gate.adapter.a.shape == (3, 32, 2)
    save_adapter(model, tmp_path / "adapter", base_model="tiny")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.language_model.layers.1.mlp"
    assert tensors[f"{prefix}.gate_proj.lora_A.weight"].shape == (2, 32)
    a = model.decoder.layers.mlp.down.adapter.a[...][1]
    np.testing.assert_array_equal(tensors[f"{prefix}.down_proj.lora_A.weight"], a.T)
    assert read_peft_config(tmp_path / "adapter") == lora
    other = build(lora, seed=1)
    load_adapter(other, tmp_path / "adapter")
    np.testing.assert_array_equal(other.decoder.layers.mlp.down.adapter.a[...][1], a)

    ids, places = jnp.arange(6)[None], jnp.broadcast_to(jnp.arange(6), (3, 1, 6))
    embeddings = model.embed(ids)
    plain, _ = model.decoder(embeddings, places)
    dropped, _ = model.decoder(embeddings, places, dropout_key=jax.random.key(0))
    again, _ = model.decoder(embeddings, places, dropout_key=jax.random.key(0))
    assert np.abs(dropped - plain).max() > 1e-6
    np.testing.assert_array_equal(again, dropped)


def test_hub_names_are_understood(saved):
    model, folder = saved
    file = folder / "adapter_model.safetensors"
    tensors = {name.replace(".language_model", ""): value for name, value in load_file(file).items()}
    save_file(tensors, file)
    other = build(seed=1)
    load_adapter(other, folder)
    a = other.decoder.layers.attention.q.adapter.a[...]
    np.testing.assert_array_equal(a, model.decoder.layers.attention.q.adapter.a[...])


@pytest.mark.parametrize(
    "lora",
    [
        None,
        LoraConfig(rank=3, alpha=3.0, targets=("q", "v", "o")),
        LoraConfig(3, 6.0),
        LoraConfig(6, 12.0, targets=("q", "v", "o")),
    ],
)
def test_a_model_built_otherwise_is_refused(saved, lora):
    with pytest.raises(SpaceDriveError, match="was built with"):
        load_adapter(build(lora), saved[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is not supported"),
        ({"use_rslora": "false"}, "use_rslora is 'false', expected true or false"),
        ({"peft_type": "IA3"}, "only peft_type LORA"),
        ({"bias": "all"}, "bias none"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' belongs to a base that PEFT changed"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": "of_next_year"}, "init_lora_weights"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_to_transform": 0}, "layers_to_transform"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"option_of_next_year": "deep"}, "option_of_next_year"),
        ({"r": "three"}, "r is 'three'"),
        ({"r": 10**12}, "r is 10"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
    ],
)
def test_other_adapters_are_refused(saved, change, message):
    _, folder = saved
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SpaceDriveError, match=message):
        load_adapter(build(), folder)


def test_a_config_that_belies_its_tensors_is_refused(saved):
    _, folder = saved
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 4}))
    with pytest.raises(SpaceDriveError, match=r"asks for \(4, 32\)"):
        load_adapter(build(read_peft_config(folder)), folder)


def test_missing_pieces_are_named(saved, tmp_path):
    model, folder = saved
    with pytest.raises(SpaceDriveError, match="exists"):
        save_adapter(model, folder, base_model="tiny")
    with pytest.raises(SpaceDriveError, match="no adapters"):
        save_adapter(build(lora=None), tmp_path / "none", base_model="tiny")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(SpaceDriveError, match=r"adapter_model\.safetensors is not there"):
        load_adapter(model, folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(SpaceDriveError, match=r"cannot read .*adapter_config\.json"):
        read_peft_config(folder)


def change_config(folder, **change):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_every_option_that_peft_writes_is_known(saved):
    """PEFT 0.21 writes all of its options, those not used as null, false or nothing."""
    _, folder = saved
    names = (
        "alora_invocation_tokens arrow_config corda_config ensure_weight_tying eva_config exclude_modules "
    )
    names += "kasa_config layer_replication layers_pattern layers_to_transform lora_bias lora_ga_config "
    names += (
        "megatron_config modules_to_save monteclora_config revision target_parameters use_bdlora use_dora "
    )
    names += "trainable_token_indices use_qalora use_rslora velora_config"
    change_config(
        folder,
        **dict.fromkeys(names.split()),
        init_lora_weights=True,
        loftq_config={},
        megatron_core="megatron.core",
        qalora_group_size=16,
        peft_version="0.21.2",
        rank_pattern={},
        alpha_pattern={},
    )
    assert read_peft_config(folder) == LORA


def test_rank_stabilised_adapters_keep_their_scale(saved):
    _, folder = saved
    change_config(folder, use_rslora=True)
    assert read_peft_config(folder).scaling == pytest.approx(6 / 3**0.5, rel=1e-15)


@pytest.mark.parametrize("content", ["[]", "{", "\xff", "[" * 5000])
def test_a_damaged_config_is_named(saved, content):
    _, folder = saved
    (folder / "adapter_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(SpaceDriveError, match=r"adapter_config\.json"):
        read_peft_config(folder)


def test_weights_that_are_no_numbers_are_refused(saved):
    model, folder = saved
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] * np.nan}, file)
    with pytest.raises(SpaceDriveError, match=f"{name} holds nan or infinity"):
        load_adapter(model, folder)


def test_quantised_adapters_are_refused(saved):
    model, folder = saved
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: (100 * value).astype(np.int8) for name, value in tensors.items()}, file)
    with pytest.raises(SpaceDriveError, match=r"is quantised .*numbers of type I8"):
        load_adapter(model, folder)

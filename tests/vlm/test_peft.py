from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from spacedrive_jax.console import UserError
from spacedrive_jax.vlm import ComputeConfig, LoraConfig, QwenVL, load_adapter, read_peft_config, save_adapter

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
    with pytest.raises(UserError, match="was built with"):
        load_adapter(build(lora), saved[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is not supported"),
        ({"peft_type": "IA3"}, "only peft_type LORA"),
        ({"bias": "all"}, "bias none"),
    ],
)
def test_other_adapters_are_refused(saved, change, message):
    _, folder = saved
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_adapter(build(), folder)


def test_a_config_that_belies_its_tensors_is_refused(saved):
    _, folder = saved
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 4}))
    with pytest.raises(UserError, match=r"asks for \(4, 32\)"):
        load_adapter(build(read_peft_config(folder)), folder)


def test_missing_pieces_are_named(saved, tmp_path):
    model, folder = saved
    with pytest.raises(UserError, match="exists"):
        save_adapter(model, folder, base_model="tiny")
    with pytest.raises(UserError, match="no adapters"):
        save_adapter(build(lora=None), tmp_path / "none", base_model="tiny")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is not there"):
        load_adapter(model, folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*adapter_config\.json"):
        read_peft_config(folder)

"""A training run's vision-language model, exported for transformers and PEFT."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import spacedrive_jax.cli.main
from spacedrive_jax.config import MeshConfig, to_json
from spacedrive_jax.interop.hf_checkpoint import from_hf
from spacedrive_jax.training import checkpoints
from spacedrive_jax.training.checkpoints import base_fingerprint
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import abstract_state, init_train_state
from tests.tiny_config import config as tiny


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run folder as training leaves it, its adapters and new rows not at their start; and its model."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    model = dataclasses.replace(tiny.model, use_lora=True)
    config = dataclasses.replace(tiny, run_dir=str(folder), model=model)
    mesh = make_mesh(MeshConfig())
    graph, _, _ = abstract_state(config, mesh)
    trainable, frozen = init_train_state(config, mesh)
    generator = np.random.default_rng(0)
    moved = nnx.from_flat_state(
        [
            (path, each.replace(jnp.asarray(generator.normal(0, 0.05, each.shape), each.dtype)))
            for path, each in nnx.to_flat_state(trainable)
        ]
    )
    folder.mkdir()
    (folder / "config.json").write_text(to_json(config))
    metadata = {"config": to_json(config), "base_fingerprint": base_fingerprint(config, frozen, mesh)}
    manager = checkpoints.open_manager(folder, keep=1)
    checkpoints.save(manager, 3, moved, {"step": np.int32(3)}, {"samples": 0}, metadata)
    with checkpoints.closing(manager):
        pass
    return folder, nnx.merge(graph, moved, frozen).vlm


def test_the_merged_model_computes_what_the_run_does(run_dir, tmp_path, capsys):
    folder, model = run_dir
    out = tmp_path / "exported"
    arguments = ["export-weights", "--to", "hf", str(folder), "--out", str(out), "--json"]
    assert spacedrive_jax.cli.main.main(arguments) == 0
    metadata = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metadata["merged_adapter_rank"] == model.decoder.lora.rank
    assert metadata["new_tokens"] == model.decoder.new_tokens.first_id
    assert {"decoder", "ego_encoder"} <= set(metadata["left_out"])
    assert (out / "tokenizer.json").is_file()
    ids = np.array([[20, 21, metadata["new_tokens"], metadata["new_tokens"] + 1, 30, 31]])
    expected = np.asarray(model.logits(ids))
    merged = np.asarray(from_hf(out).logits(ids))
    assert np.abs(merged - expected).max() < 2e-5 * np.abs(expected).max()


def test_the_adapters_come_with_the_new_tokens_rows(run_dir, tmp_path):
    folder, model = run_dir
    out = tmp_path / "exported"
    step = folder / "checkpoints" / "3"
    assert spacedrive_jax.cli.main.main(["export-weights", "--to", "peft", str(step), "--out", str(out)]) == 0
    rows = load_file(out / "new_tokens.safetensors")
    np.testing.assert_array_equal(rows["new_lm_head.weight"], model.decoder.new_head[...])
    np.testing.assert_array_equal(rows["new_embed_tokens.weight"], model.decoder.new_embedding[...])
    adapters = load_file(out / "adapter_model.safetensors")
    prefix = "base_model.model.model.language_model.layers.1.self_attn"
    a = model.decoder.layers.attention.q.adapter.a[...][1]
    np.testing.assert_array_equal(adapters[f"{prefix}.q_proj.lora_A.weight"], np.asarray(a).T)

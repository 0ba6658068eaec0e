"""A training run's vision-language model, exported for transformers and PEFT."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import spacedrive_jax.cli.main
from spacedrive_jax.config import MeshConfig, to_json
from spacedrive_jax.data.records_folder import read_provenance
from spacedrive_jax.inference.open_model import run_card
from spacedrive_jax.interop.exporting import data_licence
from spacedrive_jax.interop.hf_checkpoint import from_hf
from spacedrive_jax.json_files import write_json
from spacedrive_jax.training import checkpoints
from spacedrive_jax.training.fingerprints import base_fingerprint
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import abstract_state, init_train_state
from tests.record_factory import make_record, write_records
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


def test_a_card_tells_only_the_scores_and_data_that_belong_to_its_numbers(run_dir, tmp_path):
    folder, _ = run_dir
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    records = write_records(tmp_path / "records", {"train": [make_record(np.random.default_rng(0))]})
    fingerprint = read_provenance(records)["fingerprint"]
    known = checkpoints.read_metadata(run, 3)["trainable_fingerprint"]
    made_of = {"sha256": "digest", "records_fingerprint": "of them", "split": "val"}
    made_of |= {"trainable_fingerprint": known, "average": False}
    scores = {"1s": 0.5, "2s": 1.0, "3s": 1.5, "avg": 1.0}
    evaluation = {"protocol": "omnidrive", "samples": 7, "l2": scores, "collision": scores}
    evaluation |= {"records": {"fingerprint": "of them", "split": "val"}, "predictions_sha256": "digest"}

    def card(made_of, evaluation):
        write_json(run / "run.json", {"predicted": made_of})
        write_json(run / "predictions.omnidrive.json", evaluation)
        return run_card(run, tiny, "hf")

    assert "| omnidrive | val | 7 | 0.50 / 1.00 / 1.50 | 1.00 | 1.00 |" in card(made_of, evaluation)
    for other in (
        card(made_of | {"trainable_fingerprint": "of another step"}, evaluation),
        card(made_of | {"average": True}, evaluation),
        card(made_of, evaluation | {"predictions_sha256": "of older ones"}),
        card(made_of, evaluation | {"records": {"fingerprint": "others", "split": "val"}}),
        card(made_of, evaluation | {"records": {"fingerprint": "of them", "split": "train"}}),
    ):
        assert "None were recorded with these numbers." in other
    assert "AutoTokenizer.from_pretrained" in other  # a base that was drawn has no processor
    assert data_licence(str(records), fingerprint) != ("", "")
    assert data_licence(str(records), "other records lay there") == ("", "")

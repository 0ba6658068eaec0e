"""SpaceDrive on Qwen3-VL: deepstack in training, resumed to the same bits, one pass, eight devices."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.batch import stack
from spacedrive_jax.config import Config, MeshConfig, from_json, to_json
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.inference.answers import expected_frame
from spacedrive_jax.inference.generate import generate
from spacedrive_jax.inference.open_model import open_trained_model
from spacedrive_jax.models.config import LanguageModelConfig
from spacedrive_jax.models.families.qwen3_vl import FAMILY, Qwen3VisionConfig, Qwen3VLConfig
from spacedrive_jax.training.train import train
from tests.conftest import ROOT
from tests.training.runs import losses_of, make_records, tiny, trained_values
from tests.training.same_losses import losses_on


def qwen3_run(records: Path, run_dir: Path, *, lora: bool = False, **train_fields) -> Config:
    """Two blocks of width 32 over the demo's vocabulary; four visual tokens a view, two rows of deepstack."""
    run = tiny(records, run_dir, **train_fields)
    tokenizer = load_tokenizer(None, FAMILY.chat)
    decoder = LanguageModelConfig(
        vocab_size=tokenizer.vocabulary_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mrope_section=(4, 2, 2),
        mrope_interleaved=True,
        qkv_bias=False,
        qk_norm=True,
    )
    vision = Qwen3VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        depth=3,
        num_heads=2,
        patch_size=8,
        out_hidden_size=32,
        num_position_embeddings=9,
        deepstack_blocks=(0, 1),
    )
    vlm = Qwen3VLConfig(decoder, vision, image_token_id=tokenizer.image)
    model = dataclasses.replace(run.model, vlm=vlm, use_lora=lora, lora=FAMILY.lora(2))
    data = dataclasses.replace(run.data, image_size=(32, 32), sequence_length=192)
    return dataclasses.replace(run, model=model, data=data)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data") / "records")


@pytest.fixture(scope="module")
def run(records, tmp_path_factory):
    """A run that has learnt its answer's frame."""
    config = qwen3_run(
        records,
        tmp_path_factory.mktemp("qwen3") / "run",
        steps=120,
        learning_rate=1e-2,
        checkpoint_every=118,
        max_to_keep=2,
    )
    assert from_json(to_json(config)) == config
    train(config)
    return config


def test_deepstack_learns_and_a_run_resumes_to_the_same_bits(run):
    before, losses = trained_values(run.directory), losses_of(run.directory)
    assert losses[-1][1] < 0.5 * losses[0][1]
    # Biases begin at zero: what they are now they owe to gradients through the decoder's blocks. Nothing
    # follows the last block that could read from an image what is added behind it.
    first, last = np.asarray(before["vlm"]["vision"]["deepstack"]["layers"]["out"]["bias"])
    assert np.abs(first).max() > 1e-3
    assert not last.any()
    train(run, resume=True, step=118)
    assert losses_of(run.directory) == losses
    jax.tree.map(np.testing.assert_array_equal, trained_values(run.directory), before)


def test_one_pass_says_what_token_by_token_says(run, records):
    trained = open_trained_model(run.directory)
    builder = SampleBuilder(run.data, run.model, answer=False)
    source = open_records(records, "val")
    batch = stack([builder(source[index], index) for index in range(len(source))])
    frame = expected_frame(run, builder.tokenizer)

    @functools.partial(jax.jit, static_argnames="one_pass")
    def answer(trainable, frozen, batch, one_pass):
        whole = nnx.merge(trained.graph, trainable, frozen)
        return generate(whole, batch, builder.tokenizer, 60, frame=frame if one_pass else None)

    one, by_token = (
        jax.device_get(answer(trained.trainable, trained.frozen, batch, one_pass))
        for one_pass in (True, False)
    )
    assert one.in_one_pass.any()
    np.testing.assert_array_equal(one.token_ids, by_token.token_ids)
    np.testing.assert_array_equal(one.is_coordinate, by_token.is_coordinate)
    assert one.is_coordinate.sum() >= 6
    np.testing.assert_allclose(one.coordinates, by_token.coordinates, atol=1e-4)


def test_eight_devices_train_as_one(records):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.test_qwen3_vl", str(records)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, eight = json.loads(done.stdout.splitlines()[-1])
    assert one[0] != one[1]
    np.testing.assert_allclose(eight, one, rtol=1e-5)


if __name__ == "__main__":
    config = qwen3_run(Path(sys.argv[1]), Path("unused"), lora=True, steps=3, batch_size=8)
    print(json.dumps([losses_on(config, MeshConfig(*sizes), 3)[0] for sizes in ((1, 1, 1), (2, 2, 2))]))

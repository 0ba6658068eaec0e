"""SpaceDrive on SmolVLM, InternVL3 and Qwen3-VL: resumed to the same bits, one pass as token by token."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.batch import stack
from spacedrive_jax.config import from_json, to_json
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.inference.answers import expected_frame
from spacedrive_jax.inference.generate import answering_step, generate, planning_step
from spacedrive_jax.inference.open_model import open_trained_model
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.families.qwen3_vl import Qwen3VLConfig
from spacedrive_jax.training.losses import losses
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import abstract_state
from spacedrive_jax.training.step import batch_spec, make_train_step
from spacedrive_jax.training.train import train
from tests.training.family_runs import NAMES, family_run
from tests.training.runs import losses_of, make_records, tiny, trained_values


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data") / "records")


@pytest.mark.parametrize("name", ["qwen2_5_vl", *NAMES])
def test_ranks_and_types_are_not_promoted_silently(name, records, tmp_path):
    """What `jax_numpy_rank_promotion=raise` refuses and, in float32, `jax_numpy_dtype_promotion=strict`.

    Of the latter without the optimiser: optax's Adam promotes types itself.
    """
    config = (
        tiny(records, tmp_path) if name == "qwen2_5_vl" else family_run(name, records, tmp_path, lora=True)
    )
    mesh, batch, number = make_mesh(config.mesh), batch_spec(config), jax.ShapeDtypeStruct((), np.int32)
    graph, trainable, frozen = abstract_state(config, mesh)
    tokenizer = load_tokenizer(config.data.tokenizer, family_of(config.model.vlm).chat)

    def loss(trainable, frozen, batch):
        return losses(nnx.merge(graph, trainable, frozen), batch, config.train, jax.random.key(0)).total

    with jax.numpy_rank_promotion("raise"):
        step = make_train_step(config, mesh)
        jax.eval_shape(step.run, step.trainable, step.optimizer_state, step.frozen, batch, number)
        with jax.numpy_dtype_promotion("strict"):
            jax.eval_shape(jax.grad(loss), trainable, frozen, batch)
            for program in (
                planning_step(graph, mesh, config, tokenizer),
                answering_step(graph, mesh, tokenizer, 20, repetition_penalty=1.1),
            ):
                jax.eval_shape(program, trainable, frozen, batch)


@pytest.fixture(scope="module", params=NAMES)
def run(request, records, tmp_path_factory):
    """A run that has learnt its answer's frame."""
    config = family_run(
        request.param,
        records,
        tmp_path_factory.mktemp(request.param) / "run",
        steps=120,
        batch_size=2,
        learning_rate=1e-2,
        checkpoint_every=118,
        max_to_keep=2,
    )
    assert from_json(to_json(config)) == config
    train(config)
    return config


def test_a_run_resumes_to_the_same_bits(run):
    before, losses = trained_values(run.directory), losses_of(run.directory)
    assert losses[-1][1] < 0.5 * losses[0][1]
    if isinstance(run.model.vlm, Qwen3VLConfig):
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
        model = nnx.merge(trained.graph, trainable, frozen)
        return generate(model, batch, builder.tokenizer, 60, frame=frame if one_pass else None)

    one, by_token = (
        jax.device_get(answer(trained.trainable, trained.frozen, batch, one_pass))
        for one_pass in (True, False)
    )
    assert one.in_one_pass.any()
    np.testing.assert_array_equal(one.token_ids, by_token.token_ids)
    np.testing.assert_array_equal(one.is_coordinate, by_token.is_coordinate)
    assert one.is_coordinate.sum() >= 6
    np.testing.assert_allclose(one.coordinates, by_token.coordinates, atol=1e-4)

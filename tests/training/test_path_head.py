"""The path behind the waypoints: trained, and given in the answer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.batch import stack
from spacedrive_jax.cli.main import main
from spacedrive_jax.config import TrainConfig, change, load_config
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.inference.answers import answer_limit, expected_frame, planning_frame
from spacedrive_jax.inference.predict import predict
from spacedrive_jax.models.coordinate_decoder import CoordinateDecoderConfig
from spacedrive_jax.models.spacedrive_config import ModelConfig
from spacedrive_jax.training.losses import check_choices, losses
from spacedrive_jax.training.state import make_model
from spacedrive_jax.training.train import train
from tests.training.runs import TINY, make_records

POINTS = 3
CONFIG = change(
    load_config(str(TINY)),
    "path",
    {
        "model.path_points": POINTS,
        "data.max_coordinates": 6 + POINTS,
        "data.max_targets": 56,
        "data.sequence_length": 192,
    },
)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data") / "records")


@pytest.fixture(scope="module")
def batch(records):
    split = open_records(records, "train")
    builder = SampleBuilder(CONFIG.data, CONFIG.model)
    return jax.tree.map(jnp.asarray, stack([builder(split[index], index) for index in range(2)]))


@pytest.fixture(scope="module")
def score(batch):
    graph, state = nnx.split(make_model(CONFIG, nnx.Rngs(0)))

    def run(state, batch, weight):
        training = dataclasses.replace(
            CONFIG.train, path_weight=weight, language_weight=0.0, position_weight=0.0
        )
        parts = losses(nnx.merge(graph, state), batch, training, None)
        return parts.total, parts

    differentiate = jax.jit(jax.value_and_grad(run, has_aux=True), static_argnums=2)

    def evaluate(batch=batch, weight=1.0, gradient=True):
        if not gradient:
            return jax.jit(run, static_argnums=2)(state, batch, weight)[1]
        (_, parts), found = differentiate(state, batch, weight)
        return parts, dict(nnx.to_flat_state(found))

    return evaluate


def test_the_answer_is_laid_out_behind_the_waypoints(batch, records):
    record = open_records(records, "train")[0]
    path = record["path"][:POINTS].astype(np.float32)
    np.testing.assert_array_equal(batch.path[0], path)
    np.testing.assert_array_equal(batch.path_mask[0], record["path_mask"][:POINTS])
    np.testing.assert_array_equal(batch.coordinates[0, 6:, :2], path)
    assert int(batch.path_indices[0].min()) > int(batch.waypoint_indices[0].max())
    tokenizer = SampleBuilder(CONFIG.data, CONFIG.model).tokenizer
    assert set(np.asarray(batch.token_ids)[0][batch.path_indices[0]]) == {tokenizer.indicator}
    answer = tokenizer.decode(np.asarray(batch.target_ids[0])[np.asarray(batch.target_mask[0])].tolist())
    assert answer.startswith("Here is the planning trajectory [")
    assert " Here is the path [" in answer


def test_the_path_alone_moves_head_and_language_model(score):
    parts, gradient = score()
    assert float(parts.path) > 0
    assert np.isfinite(float(parts.total))
    norms = {path[0]: 0.0 for path in gradient}
    for path, value in gradient.items():
        norms[path[0]] += float(jnp.sum(jnp.square(value[...])))
    assert norms["decoder"] > 0
    assert norms["vlm"] > 0
    assert all(np.isfinite(each) for each in norms.values())


def test_what_the_future_does_not_reach_has_no_loss(score, batch):
    mask = np.asarray(batch.path_mask)
    assert mask.any()
    half = jnp.asarray(mask & (np.arange(POINTS) < 2))
    moved = jnp.where(half[..., None], batch.path, 1000.0)
    kept, _ = score(dataclasses.replace(batch, path_mask=half))
    same, _ = score(dataclasses.replace(batch, path_mask=half, path=moved))
    assert float(kept.path) == float(same.path)
    nothing, gradient = score(dataclasses.replace(batch, path_mask=jnp.zeros_like(half)))
    assert float(nothing.path) == 0.0
    assert all(not np.asarray(value[...]).any() for value in gradient.values())


def test_waypoint_loss_is_the_same_with_and_without_a_path(score, batch):
    parts = score(gradient=False)
    other = score(dataclasses.replace(batch, path_indices=None, path=None, path_mask=None), gradient=False)
    np.testing.assert_allclose(parts.position, other.position, rtol=1e-5)
    np.testing.assert_allclose(parts.displacement, other.displacement, rtol=1e-5)
    assert float(other.path) == 0.0


def test_train_and_predict(records, tmp_path, capsys):
    """Learns the answer by heart, then gives a path for every keyframe, in one pass or token by token."""
    run_dir = tmp_path / "run"
    config = dataclasses.replace(
        CONFIG,
        run_dir=str(run_dir),
        data=dataclasses.replace(CONFIG.data, records=str(records)),
        train=dataclasses.replace(
            CONFIG.train, steps=100, batch_size=4, learning_rate=1e-2, log_every=20, checkpoint_every=100
        ),
    )
    train(config)
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["loss_path"] < logged[0]["loss_path"]
    lines = {}
    for decoding in ("one-pass", "token-by-token"):
        file = tmp_path / f"{decoding}.jsonl"
        result = predict(run_dir, records, "val", file, batch_size=3, decoding=decoding)
        lines[decoding] = [json.loads(line) for line in file.read_text().splitlines()]
        assert (result.samples, result.unparsed) == (3, 0)
    assert result.in_one_pass == 0
    for fast, slow in zip(lines["one-pass"], lines["token-by-token"], strict=True):
        assert fast["text"] == slow["text"]
        assert (len(slow["waypoints"]), len(slow["path"])) == (6, POINTS)
        np.testing.assert_allclose(fast["path"], slow["path"], atol=2e-4)
        np.testing.assert_allclose(fast["waypoints"], slow["waypoints"], atol=2e-4)
    command = ["evaluate", "--predictions", str(tmp_path / "one-pass.jsonl"), "--records", str(records)]
    assert main([*command, "--split", "val", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 3


def test_the_frame_and_the_limit_hold_the_whole_answer():
    tokenizer = SampleBuilder(CONFIG.data, CONFIG.model).tokenizer
    frame = expected_frame(CONFIG, tokenizer)
    assert frame is not None
    assert frame.count(tokenizer.indicator) == frame.count(tokenizer.position) == 6 + POINTS
    assert len(frame) <= answer_limit(CONFIG)
    plain = change(CONFIG, "plain", {"model.path_points": 0})
    assert expected_frame(plain, tokenizer) == planning_frame(tokenizer)
    assert answer_limit(plain) == 100


def test_misfitting_choices_are_named():
    for changes in (
        {"coordinate_tokens": False},
        {"decoder": CoordinateDecoderConfig(whole_trajectory=True)},
    ):
        with pytest.raises(SpaceDriveError, match=r"model\.path_points 20 needs a token per point"):
            ModelConfig(path_points=20, **changes)
    with pytest.raises(SpaceDriveError, match="must be 0"):
        ModelConfig(path_points=-1)
    with pytest.raises(SpaceDriveError, match=r"train\.supervision planning, not all"):
        check_choices(CONFIG.model, TrainConfig(supervision="all"))

"""The whole model against numbers of the published implementation (Qwen, SpaceDrive+)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.batch import DrivingBatch, TokenType
from spacedrive_jax.config import TrainConfig
from spacedrive_jax.data.ego_status import ego_status
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.training.losses import losses, speed_change, without_past_motion
from tests.golden.verify.case_files import read_arrays
from tests.golden.verify.train import verify_train
from tests.published_case import GOLDEN, load_case
from tests.record_factory import make_record


@pytest.fixture(scope="module")
def checks():
    return {check.name: check for check in verify_train(GOLDEN / "spacedrive_train")}


@pytest.fixture(scope="module")
def case():
    return load_case("spacedrive_train")


@pytest.fixture(scope="module")
def score(case):
    """Losses of the case under other settings; compiled once per setting."""
    graph, state = nnx.split(case.model)

    @functools.partial(jax.jit, static_argnames="training")
    def run(state, batch, training):
        return losses(nnx.merge(graph, state), batch, training, None)

    return lambda batch=case.batch, **changes: run(
        state, batch, dataclasses.replace(case.training, **changes)
    )


def test_everything_recorded_is_compared(checks):
    recorded = read_arrays(GOLDEN / "spacedrive_train" / "outputs.npz")
    gradients = {name for name in recorded if name.startswith("grad/") and not name.endswith("::is_none")}
    assert gradients == {name for name in checks if name.startswith("grad/")}
    assert {"losses/total", "decoded_coords", "input_ids", "labels_for_ce", "position_ids"} <= checks.keys()


def test_step_equals_the_published_one(checks):
    assert [check for check in checks.values() if not check.passed] == []


def test_a_wrong_number_is_noticed(case, score):
    """The comparison can fail: another learning signal gives other losses."""
    parts = score(huber_delta=0.5)
    assert abs(float(parts.position) - float(case.outputs["losses/loss_pos"])) > 0.1


def test_indicator_weight_acts_on_indicators_alone(score):
    plain, weighted, none = score(), score(indicator_weight=3.0), score(indicator_weight=0.0)
    indicators = float(plain.language - none.language)
    assert indicators > 1
    np.testing.assert_allclose(weighted.language - plain.language, 2 * indicators, rtol=1e-4)


def test_position_input_feeds_encodings_or_zeros(case):
    token_type_ids = np.asarray(case.batch.token_type_ids) == TokenType.COORDINATE
    model, config = case.model, case.model.config
    try:
        model.config = dataclasses.replace(config, position_input=True, position_input_training="encodings")
        fed = np.asarray(model.embeddings(case.batch))[token_type_ids]
        expected = np.asarray(model.encoder(case.batch.coordinates))[0, : len(fed)]
        np.testing.assert_allclose(fed, expected, atol=1e-6)
        model.config = dataclasses.replace(model.config, position_input_training="zeros")
        assert not np.asarray(model.embeddings(case.batch))[token_type_ids].any()
    finally:
        model.config = config


def test_beside_the_status_stand_nodes_alone_and_never_the_answer(case):
    batch = case.batch
    np.testing.assert_array_equal(case.model._target_points(batch), 0.0)
    token_type_ids = np.array(batch.token_type_ids)
    slots = np.flatnonzero(token_type_ids[0] == TokenType.COORDINATE)
    token_type_ids[0, slots[:2]] = TokenType.TARGET_POINT
    told = dataclasses.replace(batch, token_type_ids=jnp.asarray(token_type_ids))
    nodes = np.asarray(case.model._target_points(told))
    np.testing.assert_array_equal(nodes[0], np.asarray(batch.coordinates)[0, :2])
    np.testing.assert_array_equal(nodes[1:], 0.0)


def test_the_routes_nodes_are_fed_whatever_is_fed_of_the_answer(case):
    batch, model, config = case.batch, case.model, case.model.config
    slots = np.flatnonzero(np.asarray(batch.token_type_ids)[0] == TokenType.COORDINATE)
    token_type_ids = np.array(batch.token_type_ids)
    token_type_ids[:, slots[:2]] = TokenType.TARGET_POINT
    told = dataclasses.replace(batch, token_type_ids=jnp.asarray(token_type_ids))
    nodes = np.asarray(model.encoder(batch.coordinates))[0, :2]
    plain = np.asarray(model.embeddings(batch))[0]
    try:
        for settings in (
            {"position_input": False},
            {"position_input": True, "position_input_training": "zeros"},
        ):
            model.config = dataclasses.replace(config, **settings)
            fed = np.asarray(model.embeddings(told))[0]
            np.testing.assert_allclose(fed[slots[:2]], nodes, atol=1e-6)
            rest = 0.0 if settings["position_input"] else plain[slots[2:]]
            np.testing.assert_array_equal(fed[slots[2:]], np.broadcast_to(rest, fed[slots[2:]].shape))
    finally:
        model.config = config


def test_supervising_all_coordinates_of_the_answers(case, score):
    coordinates = int(np.sum(np.asarray(case.batch.token_type_ids) == TokenType.COORDINATE))
    assert coordinates > 6  # the second turn has one in its question and some in its answer
    assert float(score(supervision="all").position) != float(score().position)


def test_no_future_no_position_loss(case, score):
    without = dataclasses.replace(case.batch, waypoint_mask=jnp.zeros_like(case.batch.waypoint_mask))
    parts = score(without)
    assert float(parts.position) == 0.0
    assert float(parts.language) == float(score().language)


def test_a_sample_that_brakes_or_speeds_up_weighs_more(case, score):
    steady = jnp.zeros_like(case.batch.waypoints).at[..., 0].set(4.0 * jnp.arange(1, 7))
    np.testing.assert_allclose(speed_change(steady.at[:, 3:, 0].add(-0.5)), -0.5)
    later = {"braking": -0.51, "accelerating": 0.51, None: 0.49}  # half a metre is the threshold
    for kind, metres in later.items():
        batch = dataclasses.replace(case.batch, waypoints=steady.at[:, 3:, 0].add(metres))
        weighed = score(batch, braking_weight=3.0, accelerating_weight=2.0).position
        weight = {"braking": 3.0, "accelerating": 2.0, None: 1.0}[kind]
        np.testing.assert_allclose(weighed, weight * score(batch).position, rtol=1e-6)
        alone = score(batch, **({f"{kind}_weight": 5.0} if kind else {"braking_weight": 5.0})).position
        np.testing.assert_allclose(alone, (5.0 if kind else 1.0) * score(batch).position, rtol=1e-6)


def test_past_motion_is_withheld_from_a_share_of_the_samples():
    """What is left is what a vehicle without memory knows, less its acceleration."""
    now = np.arange(1.0, 14.0)
    record = make_record(np.random.default_rng(0), can_bus=now, command_route=3)
    record["past_can_bus"] = np.ones((2, 13))
    known = ego_status(record, "route")
    alone = ego_status({**record, "past_mask": np.zeros(2, bool)}, "route").status.copy()
    alone[33:36] = 0.0
    assert alone[39] == now[10]  # speed
    many = 400
    batch = DrivingBatch(
        **{field.name: None for field in dataclasses.fields(DrivingBatch)}
        | {
            "token_ids": np.zeros((many, 1)),
            "ego_status": np.tile(known.status, (many, 1)),
            "past_positions": np.tile(known.past_positions, (many, 1, 1)),
        }
    )
    withheld = without_past_motion(batch, jax.random.key(0), 0.25)
    forgot = ~np.any(withheld.past_positions, axis=(1, 2))
    assert 70 < forgot.sum() < 130
    np.testing.assert_array_equal(withheld.ego_status[forgot], np.tile(alone, (forgot.sum(), 1)))
    np.testing.assert_array_equal(withheld.ego_status[~forgot], np.tile(known.status, ((~forgot).sum(), 1)))
    again, other = (without_past_motion(batch, jax.random.key(seed), 0.25) for seed in (0, 1))
    np.testing.assert_array_equal(withheld.ego_status, again.ego_status)
    assert not np.array_equal(withheld.ego_status, other.ego_status)


def test_misfitting_choices_are_refused(case):
    with pytest.raises(SpaceDriveError, match=r"train\.position_loss cosine"):
        losses(case.model, case.batch, TrainConfig(position_loss="cosine"), None)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_batch_is_refused_by_shape(case):
    sample = jax.tree.map(lambda leaf: leaf[0], case.batch)
    five = dataclasses.replace(case.batch, patch_depth=case.batch.patch_depth[:, :5])
    for wrong, said in (
        (sample, r"no leading axis of samples: .*stack\(\[sample\]\)"),
        (dataclasses.asdict(case.batch), "reads a DrivingBatch .*, not dict"),
        (five, "not of the same cameras"),
        (dataclasses.replace(case.batch, pixel_values=case.batch.pixel_values[0]), "pixel_values of shape"),
    ):
        with pytest.raises(ConfigError, match=said):
            case.model(wrong)

"""Both ways of answering against the published implementation, and against each other."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from spacedrive_jax.batch import LENGTH_STEP, prompt_length, stack, without_padding
from spacedrive_jax.data.prompts import planning_question
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.data.transforms import token_fields
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.inference.answers import Generation, answer_text, planning_frame, prediction_line
from spacedrive_jax.inference.generate import generate
from spacedrive_jax.models.coordinate_decoder import make_decoder
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.family import IGNORE, ChatTokens, Message
from tests.published_case import GOLDEN, load_case

FOLDER = GOLDEN / "spacedrive_generate"
VARIANTS = {  # position input, repetition penalty, ego status, another head
    "": (False, 1.0, "both", False),
    "_enable_pe_input": (True, 1.0, "both", False),
    "_rep_penalty_1.05": (False, 1.05, "both", False),
    "_double_indicator": (False, 1.0, "both", True),
    "_double_indicator_enable_pe_input": (True, 1.0, "both", True),
    "_no_ego": (False, 1.0, "none", False),
}


@pytest.fixture(scope="module")
def case():
    return load_case("spacedrive_generate")


@pytest.fixture(scope="module")
def answer(case):
    """Answers a batch with the case's weights, or with another head; compiled once per setting."""
    graph, state = nnx.split(case.model)
    config = case.model.config
    frame = planning_frame(case.tokenizer)

    @functools.partial(jax.jit, static_argnames=("position_input", "penalty", "one_pass", "limit"))
    def run(state, batch, position_input, penalty, one_pass, limit):
        model = nnx.merge(graph, state)
        model.config = dataclasses.replace(config, position_input=position_input)
        return generate(
            model,
            batch,
            case.tokenizer,
            limit,
            repetition_penalty=penalty,
            frame=frame if one_pass else None,
        )

    def answer(batch, *, head=None, position_input=False, penalty=1.0, one_pass=False, limit=100):
        changed = state
        if head is not None:
            changed = jax.tree.map(lambda leaf: leaf, state)
            changed["vlm"]["decoder"]["new_head"].set_value(head)
        return jax.device_get(run(changed, batch, position_input, penalty, one_pass, limit))

    return answer


@pytest.fixture(scope="module")
def double_head():
    return jnp.asarray(load_file(FOLDER / "weights_double_indicator.safetensors")["new_lm_head.weight"])


def prompt_fields(case, chat, ego_status):
    rows, columns = case.settings["grid"]
    grid = (rows // 2, columns // 2)
    return token_fields(
        family_of(case.model.config.vlm),
        case.tokenizer,
        chat,
        grid,
        ego_status,
        sequence_length=300,
        max_targets=96,
    )


def published_prompt(case, ego_status):
    ids = np.load(FOLDER / "inputs.npz")["f1/input_ids"][0].tolist()
    starts = [index + 1 for index, token in enumerate(ids) if token == case.tokenizer.special["vision_start"]]
    fields = prompt_fields(case, ChatTokens(ids, [IGNORE] * len(ids), starts), ego_status)
    return dataclasses.replace(case.batch, **jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], fields))


@pytest.mark.parametrize("one_pass", [False, True], ids=["token_by_token", "one_pass"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_equal_published(case, answer, double_head, variant, one_pass):
    position_input, penalty, ego_status, other_head = VARIANTS[variant]
    published = np.load(FOLDER / f"outputs{variant}.npz")
    batch = published_prompt(case, ego_status)
    length = int(batch.lengths[0])
    np.testing.assert_array_equal(batch.token_ids[0, :length], published["prompt_ids_after_ego"][0])
    generated = answer(
        batch,
        head=double_head if other_head else None,
        position_input=position_input,
        penalty=penalty,
        one_pass=one_pass,
    )
    count = int(generated.lengths[0])
    ids, points = generated.token_ids[0, :count], generated.coordinates[0, :count]
    np.testing.assert_array_equal(ids, published["generated_ids"])
    decoded = generated.is_coordinate[0, :count]
    np.testing.assert_array_equal(np.flatnonzero(decoded), published["pos_embedding_index"])
    np.testing.assert_allclose(points[decoded], published["coords"], atol=2e-4)
    expected = case.settings["variant_texts"].get(variant[1:]) or case.settings["text"]
    assert answer_text(case.tokenizer, ids, points, decoded) == expected
    obeys_frame = not other_head and ego_status == "both"
    assert bool(generated.in_one_pass[0]) == (one_pass and obeys_frame)


def random_batch(case, rng, size):
    """Prompts of several lengths, other pictures, distances and ego states."""
    samples = []
    for _ in range(size):
        command = int(rng.integers(9))
        question = planning_question(
            str(rng.choice(["boston", "singapore"])), None if command == 8 else command
        )
        chat = case.tokenizer.chat.apply_chat_template(
            case.tokenizer, [Message("user", question)], 15, add_generation_prompt=True
        )
        fields = prompt_fields(case, chat, str(rng.choice(["both", "none", "feature"], p=[0.6, 0.2, 0.2])))
        first = jax.tree.map(lambda leaf: np.asarray(leaf[0]), case.batch)
        pixels = first.pixel_values + rng.normal(0, rng.choice([0.3, 1, 2]), first.pixel_values.shape)
        samples.append(
            dataclasses.replace(
                first,
                **fields,
                pixel_values=pixels.astype(np.float32),
                patch_depth=(first.patch_depth * rng.uniform(0.5, 2)).astype(np.float32),
                ego_status=(first.ego_status * rng.uniform(0, 2, 74)).astype(np.float32),
                past_positions=rng.normal(0, 5, (2, 3)).astype(np.float32),
            )
        )
    return jax.tree.map(jnp.asarray, stack(samples))


def test_one_pass_equals_token_by_token_on_random_samples(case, answer, double_head):
    rng = np.random.default_rng(0)
    head = np.asarray(case.model.vlm.decoder.new_head[...])
    agreed = []
    for round_number in range(6):
        batch = random_batch(case, rng, 20)
        # From the fitted head, which keeps to the frame, towards one that repeats indicators.
        blend = (0, 0.4, 0.8)[round_number % 3]
        settings = {
            "head": jnp.asarray(head + blend * (np.asarray(double_head) - head)),
            "position_input": round_number >= 3,
            "limit": 40,
        }
        slow, fast = answer(batch, **settings), answer(batch, one_pass=True, **settings)
        np.testing.assert_array_equal(fast.token_ids, slow.token_ids)
        np.testing.assert_array_equal(fast.lengths, slow.lengths)
        np.testing.assert_array_equal(fast.is_coordinate, slow.is_coordinate)
        np.testing.assert_allclose(fast.coordinates, slow.coordinates, atol=2e-4)
        assert not slow.in_one_pass.any()
        agreed.append(fast.in_one_pass)
    share = np.mean(agreed)
    assert 0.2 < share < 0.8  # both kinds are well represented


def test_prompts_without_their_padding_are_answered_alike(case, answer):
    batch = random_batch(case, np.random.default_rng(1), 3)
    longest = int(batch.lengths.max())
    length = prompt_length(batch)
    assert longest <= length < longest + LENGTH_STEP
    cut = without_padding(batch, length)
    assert cut.token_ids.shape[1] == length < batch.token_ids.shape[1]
    whole, short = answer(batch, one_pass=True), answer(cut, one_pass=True)
    np.testing.assert_array_equal(short.token_ids, whole.token_ids)
    np.testing.assert_allclose(short.coordinates, whole.coordinates, atol=2e-4)
    assert prompt_length(dataclasses.replace(batch, lengths=np.array([300]))) == 300


def test_limits(case, answer):
    frame = planning_frame(case.tokenizer)
    batch = published_prompt(case, "both")
    for limit in (len(frame) - 1, 10):
        slow, fast = answer(batch, limit=limit), answer(batch, one_pass=True, limit=limit)
        np.testing.assert_array_equal(fast.token_ids, slow.token_ids)
        assert not fast.in_one_pass.any()
    for limit, penalty in ((0, 1.0), (5, 0.0)):
        with pytest.raises(SpaceDriveError, match="must be"):
            generate(case.model, batch, case.tokenizer, limit, repetition_penalty=penalty)


def test_one_token_for_the_whole_trajectory(case):
    config = case.model.config
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, whole_trajectory=True))
    graph, state = nnx.split(case.model)
    batch, frame = published_prompt(case, "both"), planning_frame(case.tokenizer, 1)

    @functools.partial(jax.jit, static_argnames="one_pass")
    def run(state, batch, one_pass):
        model = nnx.merge(graph, state)
        model.config = config
        model.decoder = make_decoder(config.decoder, 96, 6, rngs=nnx.Rngs(3))
        return generate(model, batch, case.tokenizer, 20, frame=frame if one_pass else None)

    slow, fast = (jax.device_get(run(state, batch, one_pass)) for one_pass in (False, True))
    assert slow.waypoints.shape == (1, 6, 3)
    np.testing.assert_allclose(fast.waypoints, slow.waypoints, atol=2e-4)
    first = int(np.flatnonzero(slow.is_coordinate[0])[0])
    np.testing.assert_allclose(slow.waypoints[0, 0], slow.coordinates[0, first], atol=1e-6)
    assert np.ptp(slow.waypoints[0, :, 0]) > 0
    np.testing.assert_array_equal(fast.token_ids, slow.token_ids)


@pytest.mark.usefixtures("unchecked")
def test_digits_are_read_from_the_text(case):
    tokenizer = case.tokenizer
    ids = tokenizer.encode("Here it is [(+1.00, -2.00), (+3.50, 0.0)" + ", (+5.0, +1.0)" * 4 + "].")
    nothing = np.zeros((1, len(ids)))
    generated = Generation(
        token_ids=np.array([ids]),
        lengths=np.array([len(ids)]),
        coordinates=np.zeros((1, len(ids), 3)),
        is_coordinate=nothing.astype(bool),
        is_position=nothing.astype(bool),
        in_one_pass=np.array([False]),
    )
    digits = dataclasses.replace(case.model.config, coordinate_tokens=False)
    builder = types.SimpleNamespace(tokenizer=tokenizer, model=digits, thinks=False)
    line = prediction_line(builder, "t", generated, 0)
    assert line["status"] == "ok"
    assert line["waypoints"][:2] == [[1.0, -2.0], [3.5, 0.0]]
    builder.model = case.model.config
    assert prediction_line(builder, "t", generated, 0)["status"] == "unparsed"


@pytest.mark.usefixtures("unchecked")
def test_digits_that_are_no_place_are_unparsed(case):
    tokenizer = load_tokenizer()  # the case's has no digits
    digits = dataclasses.replace(case.model.config, coordinate_tokens=False)
    builder = types.SimpleNamespace(tokenizer=tokenizer, model=digits, thinks=False)
    for last, status in (("100000", "ok"), ("100001", "unparsed"), ("9" * 400, "unparsed")):
        points = ", ".join(["(1.0, -2.0)"] * 5 + [f"({last}, 2.0)"])
        ids = np.array([tokenizer.encode(f"Here [{points}]")])
        nothing = np.zeros(ids.shape, bool)
        generated = Generation(
            token_ids=ids,
            lengths=np.array([ids.size]),
            coordinates=np.zeros((*ids.shape, 3)),
            is_coordinate=nothing,
            is_position=nothing,
            in_one_pass=np.array([False]),
        )
        assert prediction_line(builder, "t", generated, 0)["status"] == status


def test_frame_is_the_published_answer(case):
    frame = planning_frame(case.tokenizer)
    published = np.load(FOLDER / "outputs.npz")["generated_ids"]
    text = np.array(frame) != case.tokenizer.position
    np.testing.assert_array_equal(np.array(frame)[text], published[text])

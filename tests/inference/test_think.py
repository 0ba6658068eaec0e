"""Words over the scene before the trajectory: trained, generated, and the trajectory drafted behind them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.cli.main import main
from spacedrive_jax.config import change, load_config
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.inference.answers import expected_draft, frame_behind_reasons, planning_frame
from spacedrive_jax.inference.generate import generate
from spacedrive_jax.training.train import train
from tests.inference.test_generate import published_prompt
from tests.published_case import load_case
from tests.training.runs import TINY, losses_of, make_records

PAIRS = [
    {"question": "What matters?", "answer": "A car at (+5.00, -2.00)."},
    {"question": "What next?", "answer": "Keep lane"},
    {"question": "If you follow [(+1.00, +2.00)], what would happen?", "answer": "Crash."},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has learnt the words of its language data by heart."""
    folder = tmp_path_factory.mktemp("think")
    records = make_records(folder / "records")
    for split in ("train", "val"):
        (folder / "language" / "vqa" / split).mkdir(parents=True)
        opened = open_records(records, split)
        for index in range(len(opened)):
            file = folder / "language" / "vqa" / split / f"{opened[index]['token']}.json"
            file.write_text(json.dumps(PAIRS))
    config = change(
        load_config(str(TINY)),
        "think",
        {
            "run_dir": str(folder / "run"),
            "data.records": str(records),
            "data.conversation.tasks": "think_before_planning",
            "data.conversation.language_data": str(folder / "language"),
            "data.max_targets": 64,
            "data.sequence_length": 192,
            "train.steps": 100,
            "train.learning_rate": 1e-2,
            "train.checkpoint_every": 100,
            "train.log_every": 20,
        },
    )
    train(config)
    return config


def test_words_come_first_then_waypoints(run, capsys, tmp_path):
    losses = losses_of(run.directory)
    assert losses[-1][1] < 0.5 * losses[0][1]
    command = ["predict", "--checkpoint", str(run.directory), "--records", run.data.records, "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["samples"], printed["unparsed"], printed["in_one_pass"]) == (3, 0, 3)
    text = (run.directory / "predictions.jsonl").read_text()
    for line in map(json.loads, text.splitlines()):
        before, _, plan = line["text"].partition("Here is the planning trajectory [")
        assert before.startswith("A car at <POS_INDICATOR>(")
        assert before.endswith("). Keep lane. ")
        assert line["reasons"] == before.strip()
        assert len(line["waypoints"]) == 6
        x, y = line["waypoints"][0]
        assert plan.startswith(f"<POS_INDICATOR>({x:.2f}, {y:.2f})")
    slow = tmp_path / "slow.jsonl"
    options = ["--task", "think-before-planning", "--decoding", "token-by-token", "--out", str(slow)]
    assert main([*command, *options]) == 0
    assert slow.read_text() == text


def test_draft_behind_words_changes_nothing():
    """The published answer as if its first words were reasons, with coordinates fed back (without: above); a
    second prompt says something else.
    """
    case = load_case("spacedrive_generate")
    graph, state = nnx.split(case.model)
    frame = planning_frame(case.tokenizer)
    said, other = published_prompt(case, "both"), published_prompt(case, "none")
    batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), said, other)

    @functools.partial(jax.jit, static_argnames=("opening", "limit"))
    def answer(state, batch, opening, limit):
        model = nnx.merge(graph, state)
        model.config = dataclasses.replace(model.config, position_input=True)
        drafted = {} if opening is None else {"frame": frame, "opening": opening}
        return generate(model, batch, case.tokenizer, limit, **drafted)

    slow, fast = (jax.device_get(answer(state, batch, opening, 60)) for opening in (None, 2))
    assert fast.in_one_pass[0]
    assert not slow.in_one_pass.any()
    np.testing.assert_array_equal(fast.token_ids, slow.token_ids)
    np.testing.assert_array_equal(fast.is_position, slow.is_position)
    np.testing.assert_array_equal(fast.lengths, slow.lengths)
    np.testing.assert_allclose(fast.coordinates, slow.coordinates, atol=2e-4)


def test_frame_begins_where_the_words_end(run):
    tokenizer = load_tokenizer()
    draft = expected_draft(run, tokenizer)
    assert draft.frame == frame_behind_reasons(tokenizer)
    assert tokenizer.decode(list(draft.frame)).strip().startswith("Here is the planning trajectory [<POS_IN")
    assert tokenizer.decode(list(draft.frame[: draft.opening])).strip().startswith("Here is")
    assert draft.frame[-1] == tokenizer.turn_end
    plain = change(run, "plain", {"data.conversation.tasks": "planning"})
    assert expected_draft(plain, tokenizer).opening == 0
    digits = change(run, "digits", {"model.coordinate_tokens": False})
    assert expected_draft(digits, tokenizer) is None

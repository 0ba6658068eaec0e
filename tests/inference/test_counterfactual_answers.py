"""The counterfactual test from language data to scores."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest

from spacedrive_jax.batch import TokenType
from spacedrive_jax.cli.main import main
from spacedrive_jax.config import change, load_config
from spacedrive_jax.data.conversation import counterfactual_prompt
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.tokenizer import COORDINATE
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.inference.predict import Prompts, Question
from tests.training.runs import TINY, make_records, save_untrained

TRAJECTORIES = (
    "PT, [(+1.20, +0.10), (+2.40, +0.20)]",
    "PT, [(+3.00, 0.0), (+6.10, -0.40)]",
)
STATUS = (["Collision"], [])


def run(*arguments: object) -> int:
    return main([str(each) for each in arguments])


def tokens_of(records, split):
    opened = open_records(records, split)
    return [opened[index]["token"] for index in range(len(opened))]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data") / "records")


@pytest.fixture(scope="module")
def language_data(records, tmp_path_factory):
    """Two candidates a keyframe; one has none."""
    root = tmp_path_factory.mktemp("language")
    (root / "eval_cf").mkdir()
    candidates = [
        {"traj": trajectory, "status": status}
        for trajectory, status in zip(TRAJECTORIES, STATUS, strict=True)
    ]
    for token in tokens_of(records, "val")[:2]:
        (root / "eval_cf" / f"{token}.pkl").write_bytes(pickle.dumps(candidates))
    return root


@pytest.fixture(scope="module")
def config(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "questions"
    changes = {"run_dir": str(folder), "data.records": str(records), "data.sequence_length": 192}
    config = change(load_config(str(TINY)), "questions", changes)
    save_untrained(config)
    return config


def test_every_candidate_is_asked_about_and_scored(config, records, language_data, tmp_path, capsys):
    command = ("predict", "--checkpoint", config.directory, "--records", records, "--task", "counterfactual")
    command = (*command, "--language-data", language_data, "--max-new-tokens", 8)
    assert run(*command, "--batch-size", 3, "--json") == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    out = config.directory / "counterfactual.jsonl"
    assert {name: facts[name] for name in ("file", "samples", "keyframes", "without_candidates")} == {
        "file": str(out),
        "samples": 4,
        "keyframes": 2,
        "without_candidates": 1,
    }
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["Q"] for line in lines] == [
        f"If you follow the trajectory {trajectory}, what would happen?" for trajectory in TRAJECTORIES * 2
    ]
    asked = tokens_of(records, "val")[:2]
    assert [line["token"] for line in lines] == [asked[0]] * 2 + [asked[1]] * 2
    assert all(line["A"] for line in lines)
    assert run(*command, "--batch-size", 1, "--out", tmp_path / "again.jsonl") == 0
    assert [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()] == lines
    assert run(*command) == 1
    assert "--overwrite" in capsys.readouterr().err

    said = "".join(json.dumps(line | {"A": "It leads to Collision."}) + "\n" for line in lines)
    (tmp_path / "said.jsonl").write_text(said)
    score = ("score-counterfactual", "--predictions", tmp_path / "said.jsonl", "--json")
    assert run(*score, "--annotations", language_data / "eval_cf") == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["samples"] == 2
    assert first["rules"]["published"]["collision"]["precision"] == 1.0
    assert run(*score, "--annotations", language_data / "eval_cf", "--every-question") == 0
    every = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert every["samples"] == 4
    assert every["rules"]["published"]["collision"]["precision"] == 0.5


def test_what_cannot_be_asked_is_one_line(config, records, tmp_path, capsys):
    command = ("predict", "--checkpoint", config.directory, "--records", records, "--task", "counterfactual")
    options = ("--out", tmp_path / "out.jsonl", "--language-data", tmp_path)
    assert run(*command, *options) == 1
    assert "has no folder eval_cf" in capsys.readouterr().err
    (tmp_path / "eval_cf").mkdir()
    assert run(*command, *options) == 1
    assert "holds nothing about these 3 keyframes" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_lines_that_are_no_answers_are_named(tmp_path, language_data, capsys):
    file = tmp_path / "answers.jsonl"
    for content, message in (('{"Q": "a", "A": "b"}', "line 1"), ("{", "line 1: is not JSON")):
        file.write_text(content)
        assert (
            run("score-counterfactual", "--predictions", file, "--annotations", language_data / "eval_cf")
            == 1
        )
        assert message in capsys.readouterr().err


def test_the_prompt_follows_the_test_rule(config, records):
    record = open_records(records, "val")[0]
    text = "PT, [(+1.00, +2.00)], velocity: (+3.00, 0.0)"
    talk = counterfactual_prompt(record, text, coordinate_tokens=True)
    assert talk.turns[0].content.count(COORDINATE) == 2
    np.testing.assert_array_equal(talk.coordinates, [[1, 2], [3, 0]])
    digits = counterfactual_prompt(record, text, coordinate_tokens=False)
    assert digits.turns[0].content.endswith(f"If you follow the trajectory {text}, what would happen?")
    assert not len(digits.coordinates)


@pytest.mark.parametrize(("training", "token_type_ids"), [("encodings", 2), ("zeros", 0)])
def test_position_input_of_a_prompt(config, records, training, token_type_ids):
    model = dataclasses.replace(config.model, position_input=True, position_input_training=training)
    builder = SampleBuilder(config.data, model, answer=False)
    question = Question(0, "t", TRAJECTORIES[0])
    sample = Prompts(open_records(records, "val"), builder, [question])[0]
    assert int((sample.token_type_ids == TokenType.COORDINATE).sum()) == token_type_ids
    np.testing.assert_allclose(sample.coordinates[:2, :2], [[1.2, 0.1], [2.4, 0.2]], rtol=1e-6)

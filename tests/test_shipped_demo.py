"""The model that ships still gives its recorded answers, from the files alone."""

import json
import re

import numpy as np
import pytest

import spacedrive_jax.cli.main
from examples.build_demo import MOST_BYTES
from spacedrive_jax import Planner
from spacedrive_jax.training.trained_folder import trained_metadata
from tests.conftest import ROOT

DEMO = ROOT / "examples" / "demo"
NEAR = 0.05
"""Metres: processors round differently, and the answers are printed with two decimals."""


@pytest.fixture(scope="module")
def planner():
    return Planner.load(DEMO / "model")


@pytest.fixture(scope="module")
def answers():
    return json.loads((DEMO / "answers.json").read_text())


def test_it_gives_its_recorded_answers(planner, answers):
    records = planner.records(DEMO / "records")
    assert len(records) == len(answers) >= 4
    errors = []
    for record in records:
        expected, plan = answers[record["token"]], planner.plan(record)
        assert plan.status == expected["status"] == "ok"
        np.testing.assert_allclose(plan.waypoints, expected["waypoints"], atol=NEAR)
        words = [re.sub(r"[-\d.]+", "#", text) for text in (plan.text, expected["text"])]
        assert words[0] == words[1]
        assert plan.error == pytest.approx(expected["error"], abs=NEAR)
        still = np.sqrt((record["waypoints"] ** 2).sum(-1)).mean()
        errors.append((plan.error, still))
    # It has learnt something: whoever stands still is much further off.
    error, still = np.mean(errors, axis=0)
    assert error < still / 3


def test_it_is_small_and_says_where_it_comes_from(planner):
    size = sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file())
    assert size <= MOST_BYTES
    assert planner.config.name == "demo"
    metadata = trained_metadata(DEMO / "model")
    assert metadata.step > 0
    assert metadata.records_fingerprint
    card = (DEMO / "model" / "README.md").read_text()
    assert metadata.records_fingerprint in card
    provenance = json.loads((DEMO / "records" / "provenance.json").read_text())
    assert provenance["chosen_from"]
    assert "Apache-2.0" in provenance["licence"]


def test_the_readme_s_first_command_draws_it(tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"^python -m spacedrive_jax (show examples/demo/model .*)$", readme, re.M)
    words = command.split()
    monkeypatch.chdir(tmp_path)
    paths = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    assert spacedrive_jax.cli.main.main(paths) == 0
    image = capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / image).stat().st_size > 100_000

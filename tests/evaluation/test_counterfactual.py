from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from spacedrive_jax.cli.evaluate import ScoreCounterfactual
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.evaluation.counterfactual import (
    RULES,
    Candidate,
    Item,
    corrected_risks,
    count_risks,
    parse_candidates,
    published_risks,
)


def read_golden(folder: Path) -> list[Item]:
    entries = json.loads((folder / "counterfactual_items.json").read_text())
    return [
        Item(entry["id"], entry["pred"][0]["Q"], entry["pred"][0]["C"], parse_candidates(entry["annos"]))
        for entry in entries
        if entry["pred"]
    ]


def test_published_rule_counts_as_published(golden: Path) -> None:
    lines = json.loads((golden / "metrics" / "config.json").read_text())["counterfactual_stdout"]
    items = read_golden(golden / "metrics")
    counts, unmatched = count_risks(items, "published")
    titles = {
        "collision": "Collision",
        "red_light": "Red Light",
        "drivable_area": "Out of Drivable Area",
        "safe": "Safe",
    }
    assert f"number of samples {len(items) - len(unmatched)}" in lines
    for name, title in titles.items():
        count = counts[name]
        result = count.to_json()
        assert (
            f"{title} - TP: {count.true_positive} FP: {count.false_positive} "
            f"FN: {count.false_negative} TN: {count.true_negative}"
        ) in lines
        for ratio in ("accuracy", "precision", "recall"):
            assert f"{title} {ratio}: {result[ratio]}" in lines


@pytest.mark.parametrize(
    ("answer", "published", "corrected"),
    [
        ("It leads to a Collision with a car.", {"collision"}, {"collision"}),
        ("It leads to a collision.", set(), {"collision"}),
        ("You would collide with a bus and run the red light.", {"red_light"}, {"collision", "red_light"}),
        ("There is no Collision.", {"collision"}, set()),
        ("Reduce speed; you are prepared.", {"red_light"}, set()),
        ("You stop at the red light.", {"red_light"}, set()),
        ("You stay in the drivable area.", {"drivable_area"}, set()),
        ("You drive out of the drivable area.", {"drivable_area"}, {"drivable_area"}),
        ("It does not run the red light but leaves the driveable area", {"red_light"}, {"drivable_area"}),
        ("The trajectory is safe.", set(), set()),
    ],
)
def test_rules_side_by_side(answer: str, published: set[str], corrected: set[str]) -> None:
    assert published_risks(answer) == published
    assert corrected_risks(answer) == corrected


def test_counts_by_hand() -> None:
    candidates = [
        Candidate("PT, [(+1.00, 2.00)]", frozenset({"collision"})),
        Candidate("PT, [(9.0)]", frozenset()),
    ]
    items = [
        Item("a", "about (+1.00, 2.00)?", "Collision", candidates),
        Item("b", "about (9.0)?", "Collision", candidates),
        Item("c", "about (9.0)?", "all fine", candidates),
        Item("d", "about nothing", "Collision", candidates),
    ]
    counts, unmatched = count_risks(items, "corrected")
    assert unmatched == ("d",)
    result = counts["collision"].to_json()
    assert (result["precision"], result["recall"], result["accuracy"]) == (0.5, 1.0, pytest.approx(2 / 3))
    result = counts["safe"].to_json()
    assert (result["precision"], result["recall"]) == (1.0, 0.5)
    assert counts["red_light"].to_json()["precision"] is None


def test_command_on_folders_and_files(
    tmp_path: Path, golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = json.loads((golden / "metrics" / "counterfactual_items.json").read_text())
    answers, annotations = tmp_path / "answers", tmp_path / "annotations"
    answers.mkdir()
    annotations.mkdir()
    for entry in entries:
        (annotations / f"{entry['id']}.pkl").write_bytes(pickle.dumps(entry["annos"]))
        if entry["pred"]:
            (answers / entry["id"]).write_text(json.dumps(entry["pred"]))
    (answers / "stranger").write_text('[{"Q": "?", "A": "!"}]')
    result = ScoreCounterfactual(answers, annotations).run()
    assert result["samples"] == 23
    assert result["rules"]["published"]["collision"]["true_positive"] == 4
    assert result["unannotated"] == ["stranger"]
    assert len(result["unanswered"]) == 3
    assert "corrected rule" in capsys.readouterr().out
    (tmp_path / "a.json").write_text(json.dumps({e["id"]: e["pred"] for e in entries if e["pred"]}))
    (tmp_path / "b.json").write_text(json.dumps({e["id"]: e["annos"] for e in entries}))
    assert ScoreCounterfactual(tmp_path / "a.json", tmp_path / "b.json").run()["rules"] == result["rules"]
    assert set(result["rules"]) == set(RULES)


@pytest.mark.parametrize(
    ("answers", "annotations", "problem"),
    [
        ({"t": [{"Q": "?"}]}, {"t": []}, r'expected \[{"Q": question'),
        ({"t": [{"Q": "?", "C": "x"}]}, {"t": [{"traj": "x"}]}, "candidate 0 needs"),
        (
            {"t": [{"Q": "?", "C": "x"}]},
            {"t": [{"traj": "PT, [(1, 2)]", "status": ["Late"]}]},
            "has status 'Late'",
        ),
        ({"t": [{"Q": "?", "C": "x"}]}, {"t": [{"traj": "PT, []", "status": []}]}, "has no point, so any"),
        ({"t": [{"Q": "?", "C": "x"}]}, {"u": []}, "no keyframe in common"),
        ([], {"u": []}, "expected an object of token"),
    ],
)
def test_bad_files(tmp_path: Path, answers: object, annotations: object, problem: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(answers))
    (tmp_path / "b.json").write_text(json.dumps(annotations))
    with pytest.raises(SpaceDriveError, match=problem):
        ScoreCounterfactual(tmp_path / "a.json", tmp_path / "b.json").run()

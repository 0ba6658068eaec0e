from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from spacedrive_jax.errors import DataError, SpaceDriveError
from spacedrive_jax.evaluation.prediction_files import parse_answer, read_predictions

PATH = [[1.0, 0.0], [2.0, 0.1], [3.0, 0.2], [4.0, 0.3], [5.0, 0.4], [6.0, 0.5]]


def write(path: Path, *entries: object) -> Path:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(lines) + "\n")
    return path


def entry(token: str = "a", **changes: object) -> dict[str, object]:
    return {"token": token, "waypoints": PATH, "text": "go", "status": "ok", **changes}


def test_every_line_is_used_or_listed(tmp_path: Path) -> None:
    predictions = read_predictions(
        write(
            tmp_path / "p.jsonl",
            entry("good"),
            entry("silent", waypoints=[], status="unparsed"),
            entry("short", waypoints=PATH[:5]),
            entry("long", waypoints=[*PATH, [7.0, 0.6]]),
            entry("nan", waypoints=[*PATH[:5], [float("nan"), 0.0]]),
            "",
            entry("good", waypoints=[[9.0, 9.0]] * 6),
        )
    )
    assert set(predictions.waypoints) == {"good", "long"}
    np.testing.assert_array_equal(predictions.waypoints["good"], PATH)
    np.testing.assert_array_equal(predictions.waypoints["long"], PATH)
    assert predictions.unparsed == ("silent",)
    assert predictions.short == ("short",)
    assert predictions.long == ("long",)
    assert predictions.non_finite == ("nan",)
    assert predictions.duplicates == ("good",)
    assert predictions.tokens == {"good", "silent", "short", "long", "nan"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "expected a JSON object, found list"),
        ({"waypoints": PATH}, '"token" must be a non-empty string'),
        (entry(status="maybe"), '"status" must be one of ok, unparsed'),
        (entry(text=3), '"text" must be a string'),
        (entry(waypoints=None), '"waypoints" must be a list of six'),
        (entry(waypoints=[[1.0, 2.0, 3.0]] * 6), '"waypoints" must be a list of six'),
        (entry(waypoints=[["1", 2.0]] * 6), '"waypoints" must be a list of six'),
        (entry(waypoints=[[True, 2.0]] * 6), '"waypoints" must be a list of six'),
    ],
)
def test_malformed_lines_name_the_line(tmp_path: Path, line: object, problem: str) -> None:
    path = write(tmp_path / "p.jsonl", entry("first"), line)
    with pytest.raises(SpaceDriveError, match=r"p\.jsonl, line 2: ") as caught:
        read_predictions(path)
    assert problem in str(caught.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(SpaceDriveError, match="no prediction file"):
        read_predictions(tmp_path / "absent.jsonl")
    with pytest.raises(SpaceDriveError, match="holds no prediction"):
        read_predictions(write(tmp_path / "empty.jsonl", ""))


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl", "p.json"])
def test_a_packed_file_or_a_pipe_is_called_that(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(json.dumps(entry()).encode()))
    with pytest.raises(SpaceDriveError, match=rf"{name} is packed \(gzip\): unpack it"):
        read_predictions(tmp_path / name)
    os.mkfifo(tmp_path / f"pipe-{name}")  # as <(zcat p.jsonl.gz) is one
    with pytest.raises(SpaceDriveError, match="is a pipe, socket or device"):
        read_predictions(tmp_path / f"pipe-{name}")


def test_answers_are_parsed_as_published(golden: Path) -> None:
    cases = json.loads((golden / "metrics" / "config.json").read_text())["text_parsing"]
    assert len(cases) >= 8
    for case in cases:
        found = parse_answer(case["text"])
        if isinstance(case["coords"], list):
            np.testing.assert_array_equal(found, case["coords"], case["text"])
        else:  # nothing found, or the published script fails on the sample
            assert found is None, case["text"]


def test_published_folder(tmp_path: Path) -> None:
    answer = "Here is [" + ", ".join(f"<POS_INDICATOR>({x:.2f}, {y:.2f})" for x, y in PATH) + "]"
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "good").write_text(json.dumps([{"Q": "where to?", "A": [answer]}]))
    (folder / "talk").write_text(json.dumps([{"Q": "where to?", "A": "nowhere"}]))
    predictions = read_predictions(folder)
    np.testing.assert_array_equal(predictions.waypoints["good"], PATH)
    assert predictions.unparsed == ("talk",)
    for name in (".DS_Store", "._good"):  # a file manager's
        (folder / name).write_bytes(b"\0\5\x16\7\xff")
    assert read_predictions(folder).tokens == {"good", "talk"}
    (folder / "bad").write_text("{}")
    with pytest.raises(SpaceDriveError, match=r"bad: expected a JSON list"):
        read_predictions(folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(SpaceDriveError, match="holds no prediction"):
        read_predictions(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfe{", r"line 1: is not JSON"),
        (b'{"token": "a", "waypoints": ' + b"[" * 5000 + b"]" * 5000 + b"}", "line 1: is nested too deeply"),
        (b'{"token": "a", "token": "b"}', "line 1: is not JSON .*given twice"),
        (b'{"token": "\\ud800", "waypoints": []}', '"token" must be'),
        (
            b'{"token": "a", "waypoints": [[1e160, 0]]}'.replace(b"[[", b"[" + b"[0, 0], " * 5 + b"["),
            "1e.160 m away",
        ),
        (b'{"token": "a", "waypoints": [[' + b"9" * 400 + b", 0]]}", "has 400 digits, more than any number"),
        (b'{"token": "a", "waypoints": [[' + b"9" * 5000 + b", 0]]}", "is not JSON"),
    ],
)
def test_what_no_prediction_can_be_is_one_clear_line(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read_predictions(tmp_path / "p.jsonl")


def test_answers_can_be_written_again(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"token": "a", "waypoints": [], "text": "\\ud800 ahead"}')
    assert read_predictions(tmp_path / "p.jsonl").text == {"a": "? ahead"}

"""A checkpoint in the loop, by the command: a model's drives, collected, resumed and read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spacedrive_jax.cli.main import main
from spacedrive_jax.data.records import open_records
from tests.training.runs import make_records, save_untrained, tiny

SET = [{"kind": "start", "town": "boston-seaport", "seed": 0}]


@pytest.mark.slow
def test_a_checkpoint_drives_and_what_it_reached_can_be_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_untrained(tiny(make_records(tmp_path / "records"), tmp_path / "run"))
    (tmp_path / "set.json").write_text(json.dumps(SET))
    out, collected = tmp_path / "drives", tmp_path / "collected"
    arguments = [
        "drive",
        "--checkpoint",
        str(run),
        "--scenarios",
        str(tmp_path / "set.json"),
        "--out",
        str(out),
    ]
    arguments += ["--out", str(out), "--workers", "1", "--batch-size", "1", "--image-size", "64x36"]
    arguments += ["--collect", str(collected)]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["drives"] == 1
    assert set(facts) >= {"file", "drives", "driving_score", "success_rate", "pdm_score", "seconds"}
    assert Path(facts["page"]).is_file()
    decisions = json.loads(next(out.glob("drives/*/trace.json")).read_text())["decisions"]
    records = open_records(collected, "train")
    assert len(records) == len(decisions)
    assert records[0]["waypoint_mask"].all()
    assert records[0]["images"][0][:2] == b"\xff\xd8"

    before = (out / "results.json").read_bytes()
    assert main(arguments) == 1
    assert "--collect" in capsys.readouterr().err  # the folder is not empty
    arguments = arguments[:-2]
    assert main(arguments) == 1
    assert "--resume" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policy", "expert", "--mesh", "data=1"], "--checkpoint PATH"),
        (["--checkpoint", "ws://127.0.0.1:1", "--mesh", "data=1"], "--checkpoint PATH"),
        (["--policy", "expert", "--num-processes", "2"], "--coordinator HOST:PORT"),
        (
            ["--policy", "expert", "--coordinator", "localhost:1", "--collect", "none"],
            "collect on one host",
        ),
        ([], "one of the two"),
        (["--policy", "ego_mlp"], "--records"),
        (["--policy", "expert", "--scenarios", "none"], "choose full"),
        (["--policy", "expert", "--image-size", "big"], "WIDTHxHEIGHT"),
        (["--checkpoint", "ws://127.0.0.1:1"], "--out"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drive", *flags]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_collection_of_other_drives_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set.json").write_text(json.dumps(SET))
    collected = make_records(tmp_path / "collected")
    before = (collected / "provenance.json").read_bytes()
    arguments = ["drive", "--policy", "expert", "--scenarios", str(tmp_path / "set.json"), "--resume"]
    arguments += ["--out", str(tmp_path / "drives"), "--collect", str(collected)]
    assert main(arguments) == 1
    assert "--collect" in capsys.readouterr().err
    assert not (tmp_path / "drives").exists()
    assert (collected / "provenance.json").read_bytes() == before

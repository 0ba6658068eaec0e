"""A checkpoint in the loop, by the command: a model's drives, collected, resumed and read again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from spacedrive_jax.cli.main import main
from spacedrive_jax.data.records import open_records
from tests.conftest import ROOT
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


@pytest.mark.slow
def test_two_hosts_and_two_devices_drive_to_the_bytes_of_one(tmp_path: Path) -> None:
    run = save_untrained(tiny(make_records(tmp_path / "records"), tmp_path / "run"))
    towns = ("boston-seaport", "singapore-onenorth")
    (tmp_path / "set.json").write_text(json.dumps([SET[0] | {"town": town} for town in towns]))
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}

    def command(out: str, *more: str) -> list[str]:
        program = [sys.executable, "-m", "spacedrive_jax", "drive", "--checkpoint", str(run)]
        program += ["--scenarios", str(tmp_path / "set.json"), "--out", str(tmp_path / out)]
        return [*program, "--workers", "1", "--batch-size", "2", "--image-size", "64x36", *more]

    subprocess.run(command("one"), cwd=ROOT, env=environment, check=True)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    joined = ("--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id")
    hosts = [
        subprocess.Popen(command("hosts", *joined, str(index)), cwd=ROOT, env=environment)
        for index in range(2)
    ]
    try:
        assert [host.wait(400) for host in hosts] == [0, 0]
    finally:
        for host in hosts:
            host.kill()
    two = environment | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2"}
    subprocess.run(command("devices", "--mesh", "data=2"), cwd=ROOT, env=two, check=True)
    one = contents(tmp_path / "one")
    assert contents(tmp_path / "hosts") == one
    # Half a batch a device is another program: the same drives, their numbers to the last bits.
    assert set(contents(tmp_path / "devices")) == set(one)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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

"""Where metrics go: lines that a resume cuts back, events and W&B runs with tags in groups."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from spacedrive_jax.config import Config, load_config
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.training import trackers
from spacedrive_jax.training.trackers import Tracker, Trackers, check_trackers, tag

VALUES = {"loss": 3.0, "loss_position": 1.5, "learning_rate": 1e-3, "step_seconds": 0.5}


def config(*names: str) -> Config:
    demo = load_config("demo")
    return dataclasses.replace(demo, train=dataclasses.replace(demo.train, trackers=names))


def events(folder: Path) -> list[tuple[str, int, float]]:
    """Tag, step and value of every scalar below a folder; an event file is length, CRC, event, CRC."""
    found = []
    for file in sorted(folder.glob("events.*")):
        data, place = file.read_bytes(), 0
        while place < len(data):
            size = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + size])
            found += [
                (value.tag, event.step, value.simple_value)
                for value in event.summary.value
                if value.HasField("simple_value")
            ]
            place += 16 + size
    return found


def test_every_tracker_is_one(tmp_path):
    for name in ("jsonl", "tensorboard"):
        tracker = trackers.TRACKERS[name](tmp_path, config(), 0)
        assert isinstance(tracker, Tracker)
        tracker.close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", "loss/total"),
        ("loss_position", "loss/position"),
        ("grad_norm", "optimizer/grad_norm"),
        ("mfu", "speed/mfu"),
        ("val/l2", "val/l2"),
        ("surprise", "other/surprise"),
    ],
)
def test_tags_have_groups(name, expected):
    assert tag(name) == expected


def test_lines_keep_their_names_and_a_resume_cuts_them_back(tmp_path):
    tracker = Trackers(tmp_path, config("jsonl"), 0)
    for step in (10, 20, 30):
        tracker.write(step, VALUES)
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    tracker = Trackers(tmp_path, config("jsonl"), 20)
    tracker.write(30, {"loss": float("nan")})
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 10, **VALUES}, {"step": 20, **VALUES}, {"step": 30, "loss": None}]
    assert not (tmp_path / "tensorboard").exists()


def test_events_stand_in_a_folder_of_the_runs_name(tmp_path):
    tracker = Trackers(tmp_path / "first", config("tensorboard"), 0)
    tracker.write(10, VALUES)
    tracker.close()
    found = events(tmp_path / "first" / "tensorboard" / "first")
    assert found == [
        ("loss/total", 10, 3.0),
        ("loss/position", 10, 1.5),
        ("optimizer/learning_rate", 10, pytest.approx(1e-3)),
        ("speed/step_seconds", 10, 0.5),
    ]


def test_a_resume_hides_the_events_behind_its_start_alone(tmp_path, monkeypatch):
    purged, writer = [], trackers.SummaryWriter
    monkeypatch.setattr(
        trackers,
        "SummaryWriter",
        lambda folder, purge_step: purged.append(purge_step) or writer(folder, purge_step=purge_step),
    )
    for start in (0, 20):
        Trackers(tmp_path, config("tensorboard"), start).close()
    assert purged == [0, 21]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"requirements-wandb\.txt"):
        Trackers(tmp_path, config("wandb"), 0)


def test_a_tracker_that_cannot_begin_is_named_before_the_run_and_closes_the_others(tmp_path, monkeypatch):
    class RefusedError(Exception):
        """W&B's own."""

    def login():
        raise RefusedError("no key")

    wandb = types.SimpleNamespace(login=login, errors=types.SimpleNamespace(Error=RefusedError))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match=r"cannot begin \(no key\): `wandb login`, or WANDB_MODE=offline"):
        check_trackers(config("jsonl", "wandb"))
    check_trackers(config("wandb"), log_in=False)
    check_trackers(config("jsonl", "tensorboard"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(config("wandb"))

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"requirements-wandb\.txt"):
        check_trackers(config("wandb"))
    closed = []
    monkeypatch.setattr(trackers.JsonLinesTracker, "close", lambda self: closed.append("jsonl"))
    with pytest.raises(ConfigError, match=r"requirements-wandb\.txt"):
        Trackers(tmp_path, config("jsonl", "wandb"), 0)
    assert closed == ["jsonl"]


def test_wandb_runs_offline_and_goes_on_under_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_CONSOLE", "off")):
        monkeypatch.setenv(name, value)
    run_dir = tmp_path / "first"
    run_dir.mkdir()
    for start in (0, 10):
        tracker = Trackers(run_dir, config("wandb"), start)
        tracker.write(start + 10, VALUES)
        tracker.close()
    identity = json.loads((run_dir / "wandb.json").read_text())["id"]
    written = sorted((run_dir / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(written) in (1, 2)  # one a second
    content = b"".join(file.read_bytes() for file in written)
    for text in (b"loss/position", b"optimizer/learning_rate", b"first"):
        assert text in content

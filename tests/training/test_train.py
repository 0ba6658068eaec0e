import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from spacedrive_jax.batch import stack
from spacedrive_jax.cli.main import main
from spacedrive_jax.config import Config, MeshConfig, change, config_changes, from_json, load_config, to_json
from spacedrive_jax.data.loader import SampleClock, training_samples
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.training import run_folder, step
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.step import batch_spec
from spacedrive_jax.training.throughput import interval_line
from spacedrive_jax.training.train import train
from tests.conftest import ROOT
from tests.training.runs import TINY, losses_of, make_records, tiny, trained_values

STEPS = 12


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    return make_records(tmp_path_factory.mktemp("data") / "records")


def test_killed_run_resumes_to_the_same_bits(records, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(tiny(records, whole, steps=STEPS, past_motion_dropout=0.5))

    command = [sys.executable, "-m", "spacedrive_jax", "train", str(TINY), "--run-dir", str(killed)]
    command += ["--data.records", str(records), "--train.steps", str(STEPS)]
    command += ["--train.past-motion-dropout", "0.5"]  # drawn anew at every step, from its number
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    deadline = time.monotonic() + 300
    while not (killed / "checkpoints" / "4").is_dir():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "checkpoints" / str(STEPS)).exists()

    assert main([*command[3:], "--resume"]) == 0
    assert losses_of(killed) == losses_of(whole)
    jax.tree.map(np.testing.assert_array_equal, trained_values(killed), trained_values(whole))


def test_a_step_withholds_past_motion_where_asked(records, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        step, "without_past_motion", lambda batch, key, share: asked.append(float(share)) or batch
    )
    config = tiny(records, tmp_path, past_motion_dropout=0.25)
    batch = stack([training_samples(config.data, config.model, 4)[0]] * 4)
    for share in (0.0, 0.25):
        settings = dataclasses.replace(config.train, past_motion_dropout=share)
        made = step.make_train_step(
            dataclasses.replace(config, train=settings), make_mesh(MeshConfig(data=1), jax.devices()[:1])
        )
        number = jax.ShapeDtypeStruct((), np.int32)
        jax.eval_shape(made.run, made.trainable, made.optimizer_state, made.frozen, batch, number)
    assert asked == [0.25]


def test_noise_is_drawn_for_the_vae_where_nothing_has_dropout(records, tmp_path, monkeypatch):
    config = change(tiny(records, tmp_path), "tiny", {"model.decoder.kind": "vae"})
    assert not config.model.use_lora
    given, losses = [], step.losses
    monkeypatch.setattr(step, "losses", lambda *all, **named: given.append(all[3]) or losses(*all, **named))
    made = step.make_train_step(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    number = jax.ShapeDtypeStruct((), np.int32)
    batch = batch_spec(config)
    _, _, metrics = jax.eval_shape(made.run, made.trainable, made.optimizer_state, made.frozen, batch, number)
    assert len(given) == 1
    assert given[0] is not None
    assert "loss_divergence" in metrics  # most of an untrained VAE's loss


def test_the_parts_that_a_loss_has_are_told():
    values = dict.fromkeys(
        ("displacement_m", "grad_norm", "learning_rate", "samples_per_second", "data_wait", "step_seconds"),
        1.0,
    )
    values |= {"loss": 7.0, "loss_language": 1.0, "loss_position": 2.0, "loss_divergence": 4.0}
    said = "loss 7.0000 (language 1.0000, position 2.0000, divergence 4.0000), L2"
    assert said in interval_line(1, 2, values)


def test_training_reduces_the_loss_and_refuses_to_overwrite(records, tmp_path, capsys):
    run_dir = tmp_path / "run"
    result = train(tiny(records, run_dir, steps=30, learning_rate=5e-3))
    losses = losses_of(run_dir)
    opening, *lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith(("tiny", "step"))
    ]
    assert "0 are frozen; 10 keyframes, 4 a step; from the start to 30" in opening
    assert [line.split(" (")[0] for line in lines] == [
        f"step {step}/30: loss {loss:.4f}" for step, loss in losses
    ]
    assert all(" samples/s, " in line and "waiting for data" in line for line in lines)
    assert result.step == 30
    assert losses[-1][1] < 0.5 * losses[0][1]
    with pytest.raises(SpaceDriveError, match="holds a run already"):
        train(tiny(records, run_dir, steps=30))
    with pytest.raises(SpaceDriveError, match=r"train.learning_rate: 0.005 -> 0.001"):
        train(tiny(records, run_dir, steps=30, learning_rate=1e-3), resume=True)


def test_the_pipelines_headroom_is_measured_while_it_works(records, tmp_path):
    config = tiny(records, tmp_path / "run", steps=6)  # two epochs and a bit
    train(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    headroom = [json.loads(line).get("data_headroom") for line in lines]
    assert headroom[0] > 0
    clock = SampleClock()
    clock.add(0.25)
    clock.add(0.75)
    assert clock.take() == (1.0, 2)
    assert clock.take() == (0.0, 0)


def test_bad_input_is_refused_before_anything_is_written(records, tmp_path, capfd):
    run_dir = tmp_path / "run"
    with pytest.raises(SpaceDriveError, match="not a finished records folder"):
        train(tiny(tmp_path / "nowhere", run_dir))
    with pytest.raises(SpaceDriveError, match=r"fewer than train\.batch_size 16"):
        train(tiny(records, run_dir, batch_size=16))
    assert not run_dir.exists()
    assert main(["train", "no_such_preset"]) == 1
    assert "no config 'no_such_preset'; presets:" in capfd.readouterr().err


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Its config.json lacks the fields that have come since, which stand for what it did."""
    config = load_config("demo")
    saved = json.loads(to_json(config))
    del saved["data"]["ego_fault"], saved["train"]["grad_accum_steps"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert run_folder.check(tmp_path, config, resume=True) == []
    saved["train"]["learning_rate"] = 1.0
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(SpaceDriveError, match=r"another config: train.learning_rate: 1.0 -> [\d.]+\. Resume"):
        run_folder.check(tmp_path, config, resume=True)
    saved["train"]["of_the_future"] = 1
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(SpaceDriveError, match=r"train.of_the_future: 1 -> None"):
        run_folder.check(tmp_path, config, resume=True)


@pytest.mark.parametrize(
    ("then", "now", "free"),
    [
        ("/a/r", "/moved/r", True),
        ("/a:1,/b:1", "/moved:2,/b:2", True),
        ("/a:1,/b:1", "/a:1,/b:3", False),
        ("/a", "/a:1,/b:1", False),
    ],
)
def test_folders_of_records_may_move_but_not_their_shares(tmp_path, then, now, free):
    was, config = (config_of_records(text) for text in (then, now))
    (tmp_path / "config.json").write_text(to_json(was))
    if free:
        assert run_folder.check(tmp_path, config, resume=True) == []
    else:
        with pytest.raises(SpaceDriveError, match=f"data.records: {then} -> {now}"):
            run_folder.check(tmp_path, config, resume=True)


def config_of_records(text: str) -> Config:
    demo = load_config("demo")
    return dataclasses.replace(demo, data=dataclasses.replace(demo.data, records=text))


def test_config_round_trip_and_changes():
    config = load_config("demo")
    assert from_json(to_json(config)) == config
    old, new = json.loads(to_json(config)), json.loads(to_json(dataclasses.replace(config, name="other")))
    assert config_changes(old, new) == ["name: demo -> other"]
    with pytest.raises(SpaceDriveError, match="unknown fields surprise"):
        from_json(json.dumps({**old, "surprise": 1}))


def test_predict_writes_one_line_per_keyframe(records, tmp_path, capsys):
    run_dir = tmp_path / "run"
    train(tiny(records, run_dir))
    command = [
        "predict",
        "--checkpoint",
        str(run_dir),
        "--records",
        str(records),
        "--batch-size",
        "2",
        "--json",
    ]
    assert main([*command, "--max-new-tokens", "8"]) == 0
    metadata = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]
    assert metadata["samples"] == len(lines) == 3
    assert metadata["unparsed"] == sum(line["status"] == "unparsed" for line in lines)
    assert {"token", "waypoints", "text", "status"} <= set(lines[0])
    assert main([*command]) == 1

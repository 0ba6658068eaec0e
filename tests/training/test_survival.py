"""What a run survives: preemption, nan, full disks, changed configs, half-written checkpoints."""

import dataclasses
import json
import os
import re
import shutil
import signal
import threading
import time
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax import __version__
from spacedrive_jax.cli.main import main
from spacedrive_jax.errors import CheckpointError, SpaceDriveError
from spacedrive_jax.inference.open_model import (
    name_checkpoint,
    open_config,
    open_trained_model,
    open_vlm,
)
from spacedrive_jax.training import checkpoints, run_folder
from spacedrive_jax.training import train as loop
from spacedrive_jax.training.hosts import PreemptionWatch
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import init_train_state, learning_rate
from spacedrive_jax.training.train import train
from tests.training.runs import losses_of, make_records, tiny, trained_values

STEPS = 6


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data") / "records")


@pytest.fixture(scope="module")
def whole(records, tmp_path_factory):
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny(records, run_dir, steps=STEPS))
    return run_dir


def on_batch(monkeypatch, number, action):
    """Has `action` take place when a run places its batch of that number."""
    place, seen = loop.place_rows, [0]

    def placing(*arguments):
        seen[0] += 1
        return action(place(*arguments)) if seen[0] == number else place(*arguments)

    monkeypatch.setattr(loop, "place_rows", placing)


def poison(batch):
    return dataclasses.replace(batch, ego_status=batch.ego_status * np.float32("nan"))


@pytest.mark.usefixtures("hang_ups")
def test_a_terminal_that_is_closed_is_a_notice_too(tmp_path):
    before = signal.getsignal(signal.SIGHUP)
    manager = checkpoints.open_manager(tmp_path, keep=1)
    with PreemptionWatch() as watch:
        os.kill(os.getpid(), signal.SIGHUP)
        assert watch.stop_at(1, manager)
    manager.close()
    assert signal.getsignal(signal.SIGHUP) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_the_same(records, whole, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)

    def preempt(batch):
        os.kill(os.getpid(), number)
        return batch

    config = tiny(records, tmp_path / "run", steps=STEPS)
    with monkeypatch.context() as patch:
        on_batch(patch, 3, preempt)
        stopped = train(config)
    assert (stopped.step, stopped.finished) == (3, False)
    assert checkpoints.locate(tmp_path / "run")[1] == 3
    assert signal.getsignal(number) == before
    assert train(config, resume=True).finished
    assert losses_of(tmp_path / "run") == losses_of(whole)
    jax.tree.map(np.testing.assert_array_equal, trained_values(tmp_path / "run"), trained_values(whole))


def test_nan_stops_with_the_batch_written_down_or_is_left_out(records, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_batch(patch, 4, poison)
        with pytest.raises(FloatingPointError, match=r"step 4 has loss nan.*--skip-nonfinite"):
            train(tiny(records, run_dir, steps=STEPS))
    saved = json.loads((run_dir / "nonfinite" / "step_4.host_0.json").read_text())
    assert saved["step"] == 4
    assert len(saved["tokens"]) == 4
    assert checkpoints.locate(run_dir)[1] == 2
    with monkeypatch.context() as patch:
        on_batch(patch, 2, poison)
        patch.setattr(loop, "init_train_state", None)  # nothing is drawn only to be replaced
        result = train(tiny(records, run_dir, steps=STEPS), resume=True, skip_nonfinite=1)
    assert (result.step, result.skipped) == (STEPS, 1)
    assert [step for step, _ in losses_of(run_dir)] == [1, 2, 3, 5, 6]
    assert all(np.isfinite(loss) for _, loss in losses_of(run_dir))
    # The rate that was used: the optimiser does not count the step that was left out.
    logged = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    rates = [line["learning_rate"] for line in logged if "learning_rate" in line]
    schedule = learning_rate(tiny(records, run_dir, steps=STEPS).train)
    np.testing.assert_allclose(rates, [schedule(count) for count in (0, 1, 2, 3, 4)], rtol=1e-6)


def test_a_filling_disk_stops_the_run_with_its_work_saved(records, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    run_dir = tmp_path / "run"
    config = tiny(records, run_dir, steps=STEPS, checkpoint_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1 << 20))
        with pytest.raises(SpaceDriveError, match="make room"):
            train(config)
        free = iter([1 << 40, 1 << 40, 1 << 40, 1 << 20])
        patch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, next(free)))
        with pytest.raises(SpaceDriveError, match="stopped and saved at step 3"):
            train(config, resume=True)
    assert checkpoints.locate(run_dir)[1] == 3


def test_an_unwritable_folder_is_refused_before_training(records, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpaceDriveError, match=r"cannot write into .*a part of its path is a file"):
        train(tiny(records, tmp_path / "file" / "run"))


def test_a_half_written_checkpoint_is_not_picked_up(records, whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    newest = run_dir / "checkpoints" / str(STEPS)
    newest.rename(newest.with_name(f"{STEPS}.orbax-checkpoint-tmp-0"))
    assert checkpoints.locate(run_dir)[1] == STEPS - 2
    assert train(tiny(records, run_dir, steps=STEPS), resume=True).step == STEPS
    assert losses_of(run_dir) == losses_of(whole)


def test_changes_are_named_and_accepted_only_when_told(records, whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    changed = tiny(records, run_dir, steps=STEPS + 1, clip_norm=9.0)
    with pytest.raises(
        SpaceDriveError, match=r"another config: train\.clip_norm: 10\.0 -> 9\.0\. .*--accept-changes"
    ):
        train(changed, resume=True)
    assert train(changed, resume=True, accept_changes=True).step == STEPS + 1
    assert json.loads((run_dir / "run.json").read_text())["accepted_changes"] == [
        "train.clip_norm: 10.0 -> 9.0"
    ]
    # Its checkpoint of before the change stays one of this run, whatever was accepted since.
    again = dataclasses.replace(changed, train=dataclasses.replace(changed.train, seed=3))
    assert train(again, resume=True, accept_changes=True).step == STEPS + 1
    assert train(again, resume=True, step=STEPS).step == STEPS + 1
    assert json.loads((run_dir / "run.json").read_text())["accepted_changes"] == [
        "train.clip_norm: 10.0 -> 9.0",
        "train.seed: 888 -> 3",
    ]
    changed = again

    others = make_records(tmp_path / "others", seed=1)
    elsewhere = dataclasses.replace(changed, data=dataclasses.replace(changed.data, records=str(others)))
    elsewhere = dataclasses.replace(elsewhere, train=dataclasses.replace(elsewhere.train, steps=STEPS + 2))
    with pytest.raises(SpaceDriveError, match="records_fingerprint"):
        train(elsewhere, resume=True)


def test_accumulated_gradients_average_and_an_average_is_kept(records, whole, tmp_path, capsys):
    config = tiny(
        records, tmp_path / "run", steps=STEPS, grad_accum_steps=2, ema_decay=0.5, checkpoint_every=1
    )
    train(config)
    pairs = zip(losses_of(tmp_path / "run"), losses_of(whole), strict=True)
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-4)

    def average(step):
        trained = open_trained_model(tmp_path / "run" / "checkpoints" / str(step), average=True)
        return nnx.to_pure_dict(trained.trainable)

    expected = jax.tree.map(
        lambda mean, new: 0.5 * mean + 0.5 * new, average(STEPS - 1), trained_values(tmp_path / "run")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), average(STEPS), expected)
    command = ["predict", "--records", str(records), "--batch-size", "2", "--average"]
    assert main([*command, "--checkpoint", str(tmp_path / "run")]) == 0
    assert main([*command, "--checkpoint", str(whole)]) == 1
    assert "keeps no moving average" in capsys.readouterr().err


def copied(run, target):
    shutil.copytree(run, target)
    return target


def test_a_checkpoint_of_another_run_is_refused(records, whole, tmp_path):
    other = tmp_path / "other"
    train(tiny(records, other, steps=2, seed=3))
    mixed = copied(whole, tmp_path / "mixed")
    shutil.rmtree(mixed / "checkpoints")
    shutil.copytree(other / "checkpoints", mixed / "checkpoints")
    for use in (open_trained_model, open_config, open_vlm):
        with pytest.raises(CheckpointError, match=r"belongs to another run .*train.seed: 3 -> 888"):
            use(mixed)
    config = tiny(records, mixed, steps=STEPS)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        train(config, resume=True)
    named, of_other = name_checkpoint(whole), name_checkpoint(other)
    assert named["trainable_fingerprint"] != of_other["trainable_fingerprint"]


def test_a_moving_average_is_neither_begun_nor_dropped_midway(records, whole):
    averaging = tiny(records, whole, steps=STEPS, ema_decay=0.9)
    with pytest.raises(SpaceDriveError, match=r"cannot go on with train\.ema_decay: None -> 0\.9"):
        run_folder.check(whole, averaging, resume=True, accept_changes=True)


def test_a_damaged_checkpoint_is_named_with_the_last_whole_one(records, whole, tmp_path):
    run = copied(whole, tmp_path / "run")
    steps = checkpoints.steps_of(run)
    for file in (run / "checkpoints" / str(steps[-1]) / "trainable").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    problem = (
        rf"{steps[-1]} is damaged .*newest whole one before it is step {steps[-2]}: "
        rf"give {run}/checkpoints/{steps[-2]}, or --step {steps[-2]}"
    )
    with pytest.raises(CheckpointError, match=problem):
        open_trained_model(run)
    config = tiny(records, run, steps=STEPS)
    with pytest.raises(CheckpointError, match=problem):
        train(config, resume=True)
    assert train(config, resume=True, step=steps[-2]).finished
    assert (run / "set_aside" / str(steps[-1])).is_dir()
    jax.tree.map(np.testing.assert_array_equal, trained_values(run), trained_values(whole))
    with pytest.raises(CheckpointError, match="has no checkpoint of step 1"):
        train(config, resume=True, step=1)


def test_going_back_moves_nothing_before_the_first_step_is_done(records, whole, tmp_path, monkeypatch):
    run = copied(whole, tmp_path / "run")
    shutil.copytree(run / "checkpoints" / str(STEPS), run / "checkpoints" / str(STEPS + 2))
    steps = checkpoints.steps_of(run)
    assert steps == [STEPS - 2, STEPS, STEPS + 2]
    config = tiny(records, run, steps=STEPS)

    def fails(batch):
        raise SpaceDriveError("the first step fails")

    with monkeypatch.context() as patch:
        on_batch(patch, 1, fails)
        with pytest.raises(SpaceDriveError, match="the first step fails"):
            train(config, resume=True, step=steps[0])
    assert checkpoints.steps_of(run) == steps
    taken = run / "set_aside" / str(steps[-1])  # the last of those that would move
    taken.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"set_aside/{steps[-1]} exists"):
        train(config, resume=True, step=steps[0])
    with pytest.raises(CheckpointError, match=f"set_aside/{steps[-1]} exists"):
        checkpoints.go_back_to(run, steps[0])
    assert checkpoints.steps_of(run) == steps
    taken.rmdir()
    assert train(config, resume=True, step=steps[0]).start == steps[0]
    assert losses_of(run) == losses_of(whole)


def test_trainables_of_another_step_are_refused(whole, tmp_path):
    run = copied(whole, tmp_path / "run")
    older, newest = (run / "checkpoints" / str(step) / "trainable" for step in checkpoints.steps_of(run)[-2:])
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    with pytest.raises(CheckpointError, match="not those that were saved"):
        open_trained_model(run)


def test_a_whole_checkpoint_of_another_version_is_not_called_damaged(whole):
    step = checkpoints.steps_of(whole)[-1]
    other = nnx.State({"gate": nnx.Param(jnp.zeros(3))})
    said = r"holds another model .*it lacks gate.*is not known here.* and \d+ more.*run.json"
    with pytest.raises(CheckpointError, match=said) as raised:
        checkpoints.restore_trainable(whole, step, other)
    assert "damaged" not in str(raised.value)
    assert json.loads((whole / "run.json").read_text())["versions"]["spacedrive_jax"] == __version__


@pytest.mark.parametrize("lost", ["metadata", "config"])
def test_a_checkpoint_that_does_not_say_what_it_is_of_is_refused(records, whole, tmp_path, lost):
    run = copied(whole, tmp_path / "run")
    metadata = run / "checkpoints" / str(checkpoints.steps_of(run)[-1]) / "metadata"
    if lost == "metadata":
        shutil.rmtree(metadata)
    else:
        (file,) = (each for each in metadata.iterdir() if b"trainable_fingerprint" in each.read_bytes())
        kept = json.loads(file.read_text())
        del kept["config"]
        file.write_text(json.dumps(kept))
    for use in (open_trained_model, open_config, open_vlm):
        with pytest.raises(CheckpointError, match=f"is damaged.*{lost}"):
            use(run)
    with pytest.raises(CheckpointError, match=f"is damaged.*{lost}"):
        train(tiny(records, run, steps=STEPS), resume=True)


@pytest.mark.parametrize("item", ["position", "metadata"])
def test_a_changed_digit_of_what_a_checkpoint_says_is_found(records, whole, tmp_path, item):
    run = copied(whole, tmp_path / "run")
    folder = run / "checkpoints" / str(checkpoints.steps_of(run)[-1]) / item
    (file,) = (
        each for each in folder.iterdir() if re.search(rb"\d", each.read_bytes()) and "_" not in each.name
    )
    said = file.read_bytes()
    digit = re.search(rb"[0-8]", said).start()
    file.write_bytes(said[:digit] + bytes([said[digit] + 1]) + said[digit + 1 :])
    with pytest.raises(CheckpointError, match=r"is damaged .*not .*that (was|were) saved"):
        train(tiny(records, run, steps=STEPS), resume=True)


def test_checkpoints_of_before_the_fingerprint_of_metadata_are_read(whole, tmp_path):
    run = copied(whole, tmp_path / "run")
    metadata = run / "checkpoints" / str(checkpoints.steps_of(run)[-1]) / "metadata"
    (file,) = (each for each in metadata.iterdir() if b"trainable_fingerprint" in each.read_bytes())
    kept = json.loads(file.read_text())
    del kept["metadata_fingerprint"], kept["position"]
    file.write_text(json.dumps(kept))
    assert open_trained_model(run).config.name
    file.write_text(json.dumps(kept | {"metadata_fingerprinu": "0"}))
    with pytest.raises(CheckpointError, match=r"metadata .* are not those that were saved"):
        open_trained_model(run)


def test_an_optimiser_of_another_step_is_refused(records, whole, tmp_path):
    run = copied(whole, tmp_path / "run")
    older, newest = (run / "checkpoints" / str(step) / "optimizer" for step in checkpoints.steps_of(run)[-2:])
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    with pytest.raises(CheckpointError, match="its optimiser's numbers are not those that were saved"):
        train(tiny(records, run, steps=STEPS), resume=True)


def test_a_pipe_in_a_checkpoint_is_refused_not_waited_at(whole, tmp_path):
    run = copied(whole, tmp_path / "run")
    file = run / "checkpoints" / str(checkpoints.steps_of(run)[-1]) / "position/metadata"
    file.unlink()
    os.mkfifo(file)
    for use in (open_trained_model, open_config, open_vlm):
        with pytest.raises(CheckpointError, match=r"is damaged .*position/metadata is a pipe.*newest whole"):
            use(run)


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_no_checkpoint_is_refused_before_training(records, tmp_path, keep):
    with pytest.raises(SpaceDriveError, match="max_to_keep"):
        train(tiny(records, tmp_path / "run", steps=2, max_to_keep=keep))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("said", ["OUT_OF_RANGE: File too large\nmore", "RESOURCE_EXHAUSTED: " + "x" * 9000])
def test_whatever_tensorstore_says_of_a_failed_write_is_one_line(said, tmp_path):
    manager = checkpoints.open_manager(tmp_path, keep=1)
    with (
        pytest.raises(CheckpointError, match=said.partition(":")[0]) as caught,
        checkpoints.closing(manager),
        checkpoints.naming_the_newest(manager),
    ):
        raise ValueError(said)
    assert "then --resume" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_take_a_checkpoint_ends_the_run(records, tmp_path):
    """No thread may wait for a folder that was never made: the process would hold its devices for minutes."""
    config = tiny(records, tmp_path / "run", steps=4)
    manager = checkpoints.open_manager(tmp_path / "run", keep=1)
    trainable, _ = init_train_state(config, make_mesh(config.mesh))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").write_text("")
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="could not be written"), checkpoints.closing(manager):
        checkpoints.save(manager, 1, trainable, {"step": np.int32(1)}, {"samples": 0}, {})
    deadline = time.monotonic() + 20
    while threading.active_count() > before + 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    waiting = [each.name for each in threading.enumerate() if "save" in each.name.lower()]
    assert not waiting

"""A run that cannot start burns nothing; one that can is looked at first, goes on longer, validates."""

import dataclasses
import json
import os
import re
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.aot.search import what_fits
from spacedrive_jax.cli.common import advice_on_memory
from spacedrive_jax.cli.main import main
from spacedrive_jax.config import Config, change, depth_advice
from spacedrive_jax.data.records import open_records
from spacedrive_jax.errors import CheckpointError, ConfigError, SpaceDriveError
from spacedrive_jax.evaluation.validation import Validation, train
from spacedrive_jax.reporting.run_files import read_run
from spacedrive_jax.training import preflight as preflight_module
from spacedrive_jax.training import run_folder
from spacedrive_jax.training import train as loop
from spacedrive_jax.training.checkpoints import Best, locate, steps_of
from spacedrive_jax.training.preflight import describe, preflight
from spacedrive_jax.training.run_folder import check
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import init_train_state
from spacedrive_jax.training.throughput import ProfileWindow
from spacedrive_jax.training.weights import is_run
from tests.record_factory import encode_png, make_record, write_records
from tests.training.runs import TINY, make_records, tiny


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    return make_records(tmp_path_factory.mktemp("data") / "records")


@pytest.mark.usefixtures("unchecked")
def test_nothing_is_left_of_a_run_that_cannot_start(records, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    small = change(tiny(records, run_dir), "small", {"data.sequence_length": 100, "data.max_targets": 5})
    with pytest.raises(ConfigError) as refused:
        train(small)
    wanted = preflight(tiny(records, run_dir)).found
    assert f"--data.sequence-length {wanted.sequence_length} (it is 100)" in str(refused.value)
    assert f"--data.max-targets {wanted.max_targets} (it is 5)" in str(refused.value)
    exact = {"data.sequence_length": wanted.sequence_length, "data.max_targets": wanted.max_targets}
    assert preflight(change(small, "exact", exact)).problems == ()

    with pytest.raises(ConfigError, match="brings one"):
        loop.train(tiny(records, run_dir, validate_every=1))

    def fails(*_):
        raise SpaceDriveError("the first step fails")

    monkeypatch.setattr(loop, "place_rows", fails)
    with pytest.raises(SpaceDriveError, match="the first step fails"):
        train(tiny(records, run_dir))
    assert not run_dir.exists()


@pytest.mark.usefixtures("unchecked")
def test_a_dry_run_says_what_a_run_would_be(records, tmp_path, capsys):
    arguments = ["train", str(TINY), "--data.records", str(records), "--run-dir", str(tmp_path / "run")]
    assert main([*arguments, "--dry-run", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert seen["found"]["keyframes"] == 10
    assert seen["found"]["max_coordinates"] == 6
    assert main([*arguments, "--dry-run", "--data.depth.sources", "lidar"]) == 1
    said = capsys.readouterr().err
    assert "10 keyframes have a camera without depth from lidar" in said
    assert not (tmp_path / "run").exists()
    fresh = make_records(tmp_path / "fresh")
    before = sorted(path.name for path in fresh.iterdir())
    flags = ["--data.drop-without-future", "True", "--train.validate-every", "2"]
    assert main([*arguments, "--data.records", str(fresh), "--dry-run", *flags]) == 0
    assert sorted(path.name for path in fresh.iterdir()) == before
    config = tiny(records, tmp_path / "run")
    assert "sequence_length" in describe(config, preflight(config))
    # What the run would refuse only when its step is traced, and what it would refuse of its mesh.
    grid = ["--model.decoder.kind", "grid_cosine"]
    assert main([*arguments, "--dry-run", *grid]) == 1
    assert "set train.position_loss to cosine or embedding_l2" in capsys.readouterr().err


@pytest.mark.usefixtures("unchecked")
def test_a_dry_run_says_what_would_lie_whole_on_every_device(records, tmp_path, monkeypatch):
    def whole(state, mesh):
        raise ConfigError("12 of 13 parameters would lie whole on every device")

    monkeypatch.setattr(preflight_module, "check_replication", whole)
    assert preflight(tiny(records, tmp_path / "run")).problems == (
        "12 of 13 parameters would lie whole on every device",
    )


def test_depth_is_asked_for_as_the_run_sees_it(records, tmp_path):
    from spacedrive_jax.config import load_config

    published = load_config("spacedrive_qwen_7b")
    assert depth_advice(published) == "--run spacedrive_qwen_7b"
    other = change(published, published.name, {"data.image_size": (336, 448)})
    assert depth_advice(other) == "--image-size 448x336 --channel-order bgr --grid 12x16 --pooling min"
    wants = change(tiny(records, tmp_path / "run"), "wants", {"data.depth.sources": ("unidepth",)})
    with pytest.raises(
        SpaceDriveError, match=r"add-depth --records .* --image-size 56x56 --channel-order rgb"
    ):
        train(wants)


def test_a_config_called_like_a_file_runs_no_code(records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('ran', 'w').close()\n")
    theirs = change(tiny(records, tmp_path / "run"), "evil.py", {})
    assert theirs.name == "evil.py"
    assert depth_advice(theirs).startswith("--image-size 56x56")
    assert not Path("ran").exists()


def test_weights_in_a_folder_called_checkpoints_are_no_run(tmp_path):
    assert not is_run(tmp_path / "checkpoints" / "Qwen2.5-VL-3B-Instruct")
    assert is_run(tmp_path / "checkpoints" / "300")


def test_the_rest_of_a_removed_run_and_weights_in_the_folder_are_named(records, tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(SpaceDriveError, match=r"checkpoints and no config\.json"):
        train(tiny(records, run_dir, steps=1))
    own = change(tiny(records, run_dir), "own", {"model.weights": str(run_dir / "checkpoints" / "2")})
    with pytest.raises(SpaceDriveError, match=r"--overwrite would remove model\.weights"):
        check(run_dir, own, resume=False, overwrite=True)


def test_a_run_is_replaced_only_when_told_and_goes_on_longer(records, tmp_path, capsys):
    run_dir = tmp_path / "run"
    train(tiny(records, run_dir, steps=2))
    (run_dir / "notes.txt").write_text("mine")
    with pytest.raises(SpaceDriveError, match="--overwrite"):
        train(tiny(records, run_dir, steps=1))
    longer = train(tiny(records, run_dir, steps=3), resume=True)
    assert (longer.start, longer.step) == (2, 3)
    with pytest.raises(SpaceDriveError, match=r"train\.steps: 3 -> 2"):
        train(tiny(records, run_dir, steps=2), resume=True)
    arguments = ["train", str(TINY), "--data.records", str(records), "--run-dir", str(run_dir)]
    assert main([*arguments, "--train.steps", "3", "--resume"]) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert main([*arguments, "--train.steps", "1", "--overwrite"]) == 0
    assert "trained 1 steps" in capsys.readouterr().out
    assert steps_of(run_dir) == [1]
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 1
    assert (run_dir / "notes.txt").read_text() == "mine"
    assert main([*arguments, "--resume", "--overwrite"]) == 1


@pytest.mark.parametrize("name", ["provenance.json", "v1.0-mini", "weights.json", "model.safetensors"])
def test_no_run_begins_among_records_tables_or_weights(records, tmp_path, name):
    """With --overwrite it would take their config.json away."""
    (tmp_path / name).write_text("theirs")
    (tmp_path / "config.json").write_text("{}")
    for options in ({"resume": False}, {"resume": False, "overwrite": True}, {"resume": True}):
        with pytest.raises(SpaceDriveError, match=f"--run-dir .* holds {name}: records, tables or weights"):
            check(tmp_path, tiny(records, tmp_path), **options)
    with pytest.raises(SpaceDriveError, match=r"--run-dir .*config\.json is no folder"):
        check(tmp_path / "config.json", tiny(records, tmp_path), resume=False)


def test_a_validation_counts_each_keyframe_once_and_scores_plans(records, tmp_path):
    config = tiny(records, tmp_path / "run")
    mesh = make_mesh(config.mesh)
    numbers = init_train_state(config, mesh)
    filled = Validation(config, mesh)(*numbers)  # three keyframes in a batch of four
    exact = Validation(tiny(records, tmp_path / "run", batch_size=3), mesh)(*numbers)
    for name in ("loss", "loss_language", "loss_position"):
        np.testing.assert_allclose(filled[f"validation/{name}"], exact[f"validation/{name}"], rtol=1e-5)
    assert filled["validation/unparsed"] == 1.0  # nothing is learnt yet, so the plan is to stand still
    truth = np.stack([record["waypoints"] for record in open_records(records, "val")])
    error = np.linalg.norm(truth, axis=-1)
    expected = np.mean([error[:, :steps].mean() for steps in (2, 4, 6)])
    np.testing.assert_allclose(filled["validation/l2"], expected, rtol=1e-6)
    assert filled["validation/collision"] >= 0
    alone = write_records(tmp_path / "alone", {"train": [make_record(np.random.default_rng(0))]})
    with pytest.raises(ConfigError, match=r"needs keyframes of split val, which .*alone has none of"):
        Validation(tiny(alone, tmp_path / "run"), mesh)
    assert Validation.where_possible(tiny(alone, tmp_path / "run"), mesh) is None


def test_what_a_validation_would_fail_at_is_said_before_the_first_step(
    records, tmp_path, capsys, unchecked, monkeypatch
):
    # Unchecked: the checker of types looks at one item of a sequence, and here it cannot be made.
    run_dir = tmp_path / "run"
    depth = [encode_png(np.full((45, 80), 5000, np.uint16))] * 6
    rng = np.random.default_rng(0)
    half = {"train": [make_record(rng, exact_depth=depth) for _ in range(4)], "val": [make_record(rng)]}
    config = tiny(write_records(tmp_path / "half", half), run_dir, validate_every=2)
    problem = r"of split val, which is validated: 1 keyframes have a camera without depth from "
    with pytest.raises(ConfigError, match=problem):
        train(config)
    assert not run_dir.exists()
    with monkeypatch.context() as patch:  # as on a disk that is mounted to be read
        patch.setattr(os, "access", lambda *_: False)
        (said,) = preflight(config).problems
    assert "cannot be written to" in said
    assert preflight(config).problems == ()
    (said,) = preflight(config, validation=Validation).problems
    assert re.match(problem, said)
    short = change(tiny(records, run_dir), "short", {"data.sequence_length": 100})
    with pytest.raises(ConfigError, match=r"of split val, .* does not fit .*--data\.sequence-length"):
        Validation(short, make_mesh(short.mesh))
    flags = ["--data.records", config.data.records, "--run-dir", str(run_dir), "--train.validate-every", "2"]
    assert main(["train", str(TINY), *flags, "--dry-run"]) == 1
    assert re.search(problem, capsys.readouterr().err)


def test_the_best_validated_step_is_kept_beside_the_newest(records, tmp_path, monkeypatch):
    measured = iter([3.0, 1.0, 2.0, 2.5])

    class Scripted:
        digest = "these"

        def __init__(self, config: Config, mesh) -> None:
            pass

        def __call__(self, trainable: nnx.State, frozen: nnx.State) -> dict[str, float]:
            names = ("loss", "collision", "unparsed", "seconds")
            return {"validation/l2": next(measured)} | {f"validation/{name}": 0.0 for name in names}

    run_dir = tmp_path / "run"
    config = tiny(records, run_dir, steps=4, validate_every=1, max_to_keep=1, checkpoint_every=1)
    result = loop.train(config, validation=Scripted)
    assert result.best == Best(2, "l2", 1.0, "these", 4) == Best.read(run_dir)
    assert steps_of(run_dir) == [2, 4]
    assert locate(run_dir / "best") == (run_dir, 2)
    assert locate(run_dir) == (run_dir, 4)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation/l2"] for line in lines] == [3.0, 1.0, 2.0, 2.5]
    said = (run_dir / "best.json").read_text()
    (run_dir / "best.json").write_text(said.replace('"step": 2', '"step": 4'))
    with pytest.raises(SpaceDriveError, match=r"best\.json is not as it was written"):
        locate(run_dir / "best")
    with pytest.raises(CheckpointError, match=r"has no best\.json"):
        locate(tmp_path / "best")


def test_a_step_is_saved_before_it_is_validated_and_a_signal_meanwhile_stops_there(records, tmp_path):
    class Failing:
        digest = "these"

        def __init__(self, config: Config, mesh) -> None:
            pass

        def __call__(self, trainable: nnx.State, frozen: nnx.State) -> dict[str, float]:
            raise SpaceDriveError("the validation fails")

    class Signalled(Failing):
        def __call__(self, trainable: nnx.State, frozen: nnx.State) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGTERM)
            return {f"validation/{name}": 1.0 for name in ("l2", "loss", "collision", "unparsed", "seconds")}

    failed = tiny(records, tmp_path / "failed", steps=3, validate_every=2, checkpoint_every=2)
    with pytest.raises(SpaceDriveError, match="the validation fails"):
        loop.train(failed, validation=Failing)
    assert steps_of(tmp_path / "failed") == [2]
    told = tiny(records, tmp_path / "told", steps=3, validate_every=1, checkpoint_every=10)
    result = loop.train(told, validation=Signalled)
    assert (result.step, result.finished) == (1, False)
    assert steps_of(tmp_path / "told") == [1]
    assert Best.read(tmp_path / "told") == Best(1, "l2", 1.0, "these", 1)


def test_out_of_memory_comes_with_what_would_fit(records, tmp_path):
    config = change(
        dataclasses.replace(tiny(records, tmp_path / "run", batch_size=8)),
        "big",
        {"model.compute.remat": "none", "train.grad_accum_steps": 1},
    )
    assert what_fits(config, limit=10**12).startswith("--model.compute.remat full fits")
    nothing = what_fits(config, limit=1000)
    assert nothing.startswith("nothing that was tried fits")
    assert "use more devices (--mesh.data 1 --mesh.fsdp -1)" in nothing
    alone = {"model.compute.remat": "full", "train.batch_size": 1}
    assert what_fits(change(config, "alone", alone), limit=1000).startswith("there is no smaller step")
    ran_out = pytest.raises(SpaceDriveError, match=r"ran out of memory .*: do less")
    with ran_out, advice_on_memory(lambda: "do less"):
        raise MemoryError("cannot allocate")


class Measuring:
    """A validation that says what it is told to, and takes all the time there is."""

    digest = "these"
    values: ClassVar[list[float]] = []

    def __init__(self, config: Config, mesh) -> None:
        pass

    def __call__(self, trainable: nnx.State, frozen: nnx.State) -> dict[str, float]:
        if not self.values:
            raise SpaceDriveError("the validation fails")
        names = ("loss", "collision", "unparsed")
        found = {f"validation/{name}": 0.0 for name in names}
        return found | {"validation/l2": self.values.pop(0), "validation/seconds": 1e6}


def test_a_validation_that_failed_is_made_up_for_and_another_one_is_not_compared(
    records, tmp_path, monkeypatch, caplog
):
    run_dir = tmp_path / "run"
    config = tiny(records, run_dir, steps=2, validate_every=1, checkpoint_every=1, trackers=("jsonl",))
    monkeypatch.setattr(Measuring, "values", [2.0])
    with pytest.raises(SpaceDriveError, match="the validation fails"):
        loop.train(config, validation=Measuring)
    assert Best.read(run_dir) == Best(1, "l2", 2.0, "these", 1)
    Measuring.values.append(1.0)
    result = loop.train(config, resume=True, validation=Measuring)
    assert (result.start, result.best) == (2, Best(2, "l2", 1.0, "these", 2))
    assert Best.read(run_dir) == result.best
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation/l2"] for line in lines if "validation/l2" in line] == [2.0, 1.0]

    said = []
    monkeypatch.setattr(loop, "cost_line", lambda *args, **_: said.append(args[2]) or "")
    monkeypatch.setattr(Measuring, "digest", "others")
    Measuring.values += [9.0, 8.0, 7.5, 8.0, 8.0, 8.0]
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=7))
    with caplog.at_level("INFO"):
        result = loop.train(longer, resume=True, validation=Measuring)
    assert "the best step so far, 2 with l2 1, is compared with no more: other keyframes" in caplog.text
    assert result.best == Best(4, "l2", 7.5, "others", 7)
    assert steps_of(run_dir) == [4, 6, 7]
    assert said[0] < 0  # the time that validations say they took is no step's


def test_validations_of_other_keyframes_or_settings_do_not_compare(records, tmp_path):
    config = tiny(records, tmp_path / "run", validate_every=1)
    mesh = make_mesh(config.mesh)

    def digest(**fields):
        return Validation(change(config, "other", fields), mesh).digest

    same = digest(**{"data.read_threads": 1, "train.learning_rate": 1.0, "train.huber_delta": 3.0})
    assert same == digest()
    assert digest(**{"train.validate_keyframes": 2}) != same
    assert digest(**{"data.image_size": (28, 28)}) != same
    assert digest(**{"data.records": str(make_records(tmp_path / "others", seed=1))}) != same
    by_loss = digest(**{"train.best_by": "loss"})
    for other in ({"train.huber_delta": 3.0}, {"train.braking_weight": 2.0}):
        assert digest(**{"train.best_by": "loss", **other}) != by_loss


def test_a_profile_ends_with_the_run_and_goes_with_one_that_cannot_start(
    records, tmp_path, monkeypatch, caplog
):
    run_dir = tmp_path / "run"
    train(tiny(records, run_dir, steps=2), profile=ProfileWindow(1, 50))
    assert list((run_dir / "profile").rglob("*.xplane.pb"))
    assert "nothing is traced" not in caplog.text
    train(tiny(records, run_dir, steps=2), resume=True, profile=ProfileWindow(1, 50))
    assert "nothing is traced: the profile begins behind step 1" in caplog.text

    def fails(*_):
        raise SpaceDriveError("the first step fails")

    monkeypatch.setattr(loop, "place_rows", fails)
    with pytest.raises(SpaceDriveError, match="the first step fails"):
        train(tiny(records, tmp_path / "none"), profile=ProfileWindow(0, 1))
    assert not (tmp_path / "none").exists()


def test_room_is_asked_for_all_checkpoints_at_once(records, tmp_path, monkeypatch):
    config = tiny(records, tmp_path / "run", steps=100, checkpoint_every=1, max_to_keep=5)
    usage, size = namedtuple("usage", "total used free"), 1 << 30

    def missing(checkpoints, **fields):
        free = checkpoints * size + run_folder.MARGIN
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, free))
        wanted = dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))
        return run_folder.lack_of_room_at_the_start(wanted, size, overwrite=False)

    assert re.search(r"make room, or keep fewer than --train\.max-to-keep 5", missing(5))
    assert missing(6) is None
    assert missing(6, validate_every=1) is not None
    assert missing(2, max_to_keep=1) is None
    assert missing(4, checkpoint_every=40) is None  # three in all
    assert run_folder.lack_of_room(tmp_path, size) is None


def test_what_was_predicted_outlives_a_resume(tmp_path):
    run_folder.write_provenance(tmp_path, {"records": "trained"})
    run_folder.note_predictions(tmp_path, {"file": "predictions.jsonl", "records": "R", "split": "all"})
    run_folder.write_provenance(tmp_path, {"records": "trained"})
    files = read_run(tmp_path)
    assert (files.predicted["records"], files.predicted["split"]) == ("R", "all")
    assert files.predictions == Path("predictions.jsonl")
    assert files.provenance["records"] == "trained"

"""A day in a bucket: what `gs://` names is read and written as a disk's folder is, with the same figures."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from data_prep.cli import main as prepare
from spacedrive_jax import buckets, folders, io, json_files
from spacedrive_jax.cli.main import main
from spacedrive_jax.data.records import open_records
from spacedrive_jax.driving.client import PolicyClient
from spacedrive_jax.driving.protocol import act_message
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.training import checkpoints
from tests.conftest import ROOT
from tests.training.runs import TINY, losses_of, make_records, trained_values

needs_gcs = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed: requirements-gcs.txt"
)
BUCKET = "gs://drives"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """An empty bucket, and the environment for it."""
    from tests.gcs_stub import serve  # needs what comes with gcsfs

    with serve() as (service, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("SPACEDRIVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield service


def flags(records: str, run_dir: str) -> list[str]:
    return ["train", str(TINY), "--data.records", records, "--run-dir", run_dir]


def killed_while_it_saves(service, arguments: list[str], step: int) -> None:
    """Trains in a process of its own, which is killed when the first bytes of a checkpoint arrive."""
    command = [sys.executable, "-m", "spacedrive_jax", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def kill(method: str, path: str) -> None:
        if method == "POST" and f"checkpoints/{step}" in path:
            process.send_signal(signal.SIGKILL)

    service.before = kill
    try:
        said = process.communicate(timeout=300)[1]
    finally:
        service.before = lambda method, path: None
    assert process.returncode == -signal.SIGKILL, said


@needs_gcs
def test_a_day_in_a_bucket_is_one_on_a_disk(bucket, tmp_path, capsys, unchecked):
    """Trains, is killed, resumes, predicts, scores, reports and exports."""
    here = make_records(tmp_path / "records")
    for file in here.rglob("*"):
        if file.is_file():
            buckets.upload(file, io.place(f"{BUCKET}/records/{file.relative_to(here)}"))
    held = bucket.content("drives/records/")
    assert prepare(["inspect", f"{BUCKET}/records", "--check"]) == 0
    records, run, disk = f"{BUCKET}/records", f"{BUCKET}/runs/tiny", tmp_path / "tiny"

    killed_while_it_saves(bucket, flags(records, run), step=4)
    assert checkpoints.steps_of(io.place(run)) == [2]
    # What another machine has to go on from: the bucket alone.
    shutil.rmtree(buckets.twin(run))
    assert main([*flags(records, run), "--resume"]) == 0
    assert main(flags(str(here), str(disk))) == 0
    assert losses_of(io.place(run)) == losses_of(disk)
    jax.tree.map(np.testing.assert_array_equal, trained_values(io.place(run)), trained_values(disk))
    assert any("tensorboard" in name for name in bucket.content("drives/runs/tiny/"))

    for checkpoint, of in ((run, records), (str(disk), str(here))):
        flagged = ["--checkpoint", checkpoint, "--records", of, "--split", "val", "--batch-size", "2"]
        assert main(["predict", *flagged]) == 0
    answers = bucket.content("drives/runs/tiny/")["predictions.jsonl"]
    assert answers == (disk / "predictions.jsonl").read_bytes()

    # After four steps no answer holds a trajectory that could be scored: here is one.
    tokens = [json.loads(line)["token"] for line in answers.splitlines()]
    path = [[2.0 * step, 0.1] for step in range(1, 7)]
    lines = [{"token": token, "waypoints": path, "text": "", "status": "ok"} for token in tokens]
    for checkpoint in (run, str(disk)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        made = f"{checkpoint}/made.jsonl"
        io.write_text(io.place(made), text)
        flagged = ["--predictions", made, "--records", records if checkpoint == run else str(here)]
        assert main(["evaluate", *flagged, "--workers", "1"]) == 0
        assert main(["report", checkpoint, *flagged]) == 0
        assert main(["export-weights", "--to", "safetensors", checkpoint, "--out", f"{checkpoint}-out"]) == 0
    written = bucket.content("drives/runs/tiny/")
    scores, known = (
        json.loads(data)
        for data in (
            written["made.omnidrive.json"],
            (disk / "made.omnidrive.json").read_bytes(),
        )
    )
    for score in (scores, known):
        del score["predictions"], score["file"], score["records"]["directory"]
    assert scores == known
    page = written["report.html"].decode()
    assert f"{run}/made.jsonl" in page
    exported = bucket.content("drives/runs/tiny-out/")
    for name in ("trained.safetensors", "tokenizer.json"):
        assert exported[name] == Path(f"{disk}-out", name).read_bytes()

    capsys.readouterr()
    out = f"{BUCKET}/again.jsonl"
    flagged = ["--checkpoint", f"{run}-out", "--records", records, "--out", out, "--batch-size", "2"]
    assert main(["predict", *flagged]) == 0
    assert bucket.content("drives/")["again.jsonl"] == answers
    assert bucket.content("drives/records/") == held, "a reader writes nothing into a records folder"
    assert not Path("gs:").exists()


@pytest.fixture(scope="module")
def drives(tmp_path_factory):
    """Two drives, as a file for --scenarios."""
    file = tmp_path_factory.mktemp("drives") / "two.json"
    towns = {"start": "boston-seaport", "bend": "singapore-onenorth"}
    specs = [
        {"kind": kind, "town": town, "seed": number} for number, (kind, town) in enumerate(towns.items())
    ]
    file.write_text(json.dumps(specs))
    return file


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@needs_gcs
def test_drives_in_a_bucket_are_those_on_a_disk(bucket, drives, tmp_path, capsys, unchecked):
    """A drive's files are in the bucket when it is over, so that any machine goes on from them."""
    command = ["drive", "--policy", "constant_velocity", "--scenarios", str(drives), "--workers", "1"]
    disk, there = tmp_path / "looped", f"{BUCKET}/looped"
    assert main([*command, "--out", str(disk)]) == 0
    assert main([*command, "--out", there]) == 0
    assert bucket.content("drives/looped/") == files_of(disk)
    capsys.readouterr()
    assert main([*command, "--out", there]) == 1
    assert f"--out {there} holds a run" in capsys.readouterr().err
    next(io.place(f"{there}/drives").glob("0001-*/result.json")).unlink()  # killed: it is the last to come
    assert main([*command, "--out", there, "--resume"]) == 0
    assert bucket.content("drives/looped/") == files_of(disk)
    assert not Path("gs:").exists()


@pytest.mark.slow
@needs_gcs
def test_every_command_reads_a_run_in_a_bucket(bucket, drives, tmp_path, unchecked):
    here = make_records(tmp_path / "records")
    buckets.upload_folder(here, io.place(f"{BUCKET}/all/records"))
    records, run = f"{BUCKET}/all/records", f"{BUCKET}/all/run"
    assert main(flags(records, run)) == 0

    image = f"{BUCKET}/all/keyframe.png"
    assert main(["show", run, "--records", records, "--image", image]) == 0
    assert bucket.content("drives/all/")["keyframe.png"].startswith(b"\x89PNG")
    for command in (
        ["export-weights", "--to", "hf", run, "--out", f"{BUCKET}/all/hf"],
        ["import-weights", "--from", "hf", f"{BUCKET}/all/hf", "--out", f"{BUCKET}/all/imported"],
    ):
        assert main(command) == 0
    assert any(name.endswith(".safetensors") for name in bucket.content("drives/all/imported/"))

    drive = ["drive", "--checkpoint", run, "--scenarios", str(drives), "--workers", "1", "--batch-size", "1"]
    assert main([*drive, "--image-size", "64x36"]) == 0
    assert main([*drive, "--image-size", "64x36", "--out", str(tmp_path / "drives")]) == 0
    assert bucket.content("drives/all/run/drives/") == files_of(tmp_path / "drives")

    predict = ["predict", "--checkpoint", run, "--records", records, "--split", "val", "--batch-size", "2"]
    assert main([*predict, "--out", f"{BUCKET}/all/predictions.jsonl"]) == 0
    answers = bucket.content("drives/all/")["predictions.jsonl"].splitlines()
    serve = ["serve", "--checkpoint", run, "--port", "0", "--batch-size", "1", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "spacedrive_jax", *serve], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        client = PolicyClient(process.stdout.readline().split()[-1])
        assert client.connect()["model"] == "tiny"
        answer = client.act(act_message(open_records(here, "val")[0], 0, 0.0))
        assert answer["text"] == json.loads(answers[0])["text"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert not Path("gs:").exists()


@needs_gcs
def test_files_of_a_bucket(bucket, tmp_path):
    folder = io.place(f"{BUCKET}/folder")
    assert not folder.exists()
    json_files.write_json(folder / "a.json", {"a": 1})
    assert json_files.read_json(folder / "a.json") == {"a": 1}
    assert [str(each) for each in folder.glob("*.json")] == [f"{BUCKET}/folder/a.json"]
    assert folder.resolve() == folder
    assert folder.is_dir()
    assert (folder / "a.json").is_file()
    with pytest.raises(DataError, match=r"gs://drives/folder is a folder"):
        io.read_bytes(folder)
    with pytest.raises(DataError, match=r"gs://drives/folder/none: there is no such file"):
        io.read_bytes(folder / "none")
    with pytest.raises(DataError, match="more than the 3"):
        io.read_bytes(folder / "a.json", most=3)
    with pytest.raises(ZeroDivisionError), io.atomic_write(folder / "half") as file:
        file.write(b"half" + bytes(1 // 0))
    assert not (folder / "half").exists(), "what fails leaves nothing"


@needs_gcs
def test_who_may_not_look_is_told_so_and_not_that_nothing_is_there(bucket):
    from tests.gcs_stub import Refused  # needs what comes with gcsfs

    def refuse(method: str, path: str) -> None:
        if "secret" in path:
            raise Refused(403, "nobody does not have storage.objects.get access")

    bucket.before = refuse
    try:
        with pytest.raises(DataError, match=r"gs://drives/secret cannot be reached \(Forbidden.*logged in"):
            io.place(f"{BUCKET}/secret").exists()
    finally:
        bucket.before = lambda method, path: None


@needs_gcs
def test_a_copy_is_fetched_once_and_again_when_it_changed(bucket):
    folder = io.place(f"{BUCKET}/weights")
    io.write_text(folder / "config.json", "old")
    io.write_text(folder / "deep" / "gone.txt", "gone")
    copy = io.local(f"{BUCKET}/weights")
    assert (copy / "config.json").read_text() == "old"
    bucket.requests.clear()
    io.local(f"{BUCKET}/weights")
    assert not [path for _, path in bucket.requests if "alt=media" in path], "nothing is fetched twice"
    io.write_text(folder / "config.json", "new")
    (folder / "deep" / "gone.txt").unlink()
    io.local(f"{BUCKET}/weights")
    assert (copy / "config.json").read_text() == "new"
    assert not (copy / "deep" / "gone.txt").exists()


@needs_gcs
def test_a_folder_of_a_bucket_is_known_by_what_comes_last(bucket):
    with folders.atomic_folder(io.place(f"{BUCKET}/made")) as folder:
        io.write_part(folder / "config.json", "{}")
        io.write_part(folder / "numbers.safetensors", b"1")
    uploaded = [path for method, path in bucket.requests if method == "POST"][-2:]
    assert list(bucket.content("drives/made/")) == ["config.json", "numbers.safetensors"]
    generations = {name: bucket.objects["drives", f"made/{name}"].generation for name in ("config.json",)}
    assert generations["config.json"] > bucket.objects["drives", "made/numbers.safetensors"].generation
    assert uploaded
    with pytest.raises(Exception, match=r"gs://drives/made exists"), folders.atomic_folder(f"{BUCKET}/made"):
        pass


@needs_gcs
def test_going_back_moves_a_bucket_s_later_checkpoints(bucket, unchecked):
    # Unchecked: to type checkers a folder of a bucket passes for a `Path`, of which it has what is used.
    run = io.place(f"{BUCKET}/back")
    for step in (2, 4):
        io.write_text(run / "checkpoints" / str(step) / "metadata" / "x", str(step))
        io.write_text(run / "checkpoints" / str(step) / checkpoints.COMMITTED, "")
    io.write_text(run / "checkpoints" / "6" / "metadata" / "x", "half")
    checkpoints.go_back_to(run, 2)
    assert checkpoints.steps_of(run) == [2]
    assert bucket.content("drives/back/set_aside/")["4/metadata/x"] == b"4"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", str(TINY), "--run-dir", "s3://b/run"], r"s3://b/run: only gs:// .* mount"),
        (
            ["predict", "--checkpoint", "s3://b/run", "--records", "r"],
            r"--checkpoint s3://b/run: only gs:// buckets",
        ),
        (
            ["drive", "--policy", "expert", "--collect", f"{BUCKET}/d"],
            r"--collect gs://drives/d: .* disk; mount",
        ),
        (["evaluate", "--predictions", "gs://", "--records", "r"], r"--predictions gs:// names no bucket"),
    ],
)
def test_what_cannot_be_is_refused_by_name(command, said, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(buckets, "require_gcs", lambda what: None)
    monkeypatch.chdir(tmp_path)
    assert main(command) != 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(said, lines[0]), lines[0]
    assert not os.listdir(tmp_path)


def test_a_bucket_without_gcsfs_and_a_path_without_its_slash(monkeypatch):
    monkeypatch.setattr(buckets, "_is_installed", lambda name: False)
    with pytest.raises(ConfigError, match=r"gs://b/x needs gcsfs and google.cloud.storage: pip install"):
        io.place("gs://b/x")
    with pytest.raises(ConfigError, match="has lost a slash"):
        io.write_text(Path("gs://b/x"), "")
    assert not Path("gs:").exists()

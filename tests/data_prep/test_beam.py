"""The converter on Apache Beam: the same bytes; and what does not need Beam to be installed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from data_prep import beam, conversion, convert
from data_prep.beam import DASK_RUNNER, convert_and_note, do_unit_file, pipeline_arguments
from data_prep.cli import AddDepth, Convert, Synthesize
from data_prep.nuscenes.scene_records import SceneUnit
from spacedrive_jax.errors import SpaceDriveError
from tests.conftest import ROOT
from tests.data_prep.tiny_nuscenes import VERSION, TinyNuScenes
from tests.models.depth.tiny_unidepth import save_tiny

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="apache_beam is not installed: make beam"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return TinyNuScenes(3, 3).write(tmp_path_factory.mktemp("source") / "nuscenes")


@pytest.fixture(scope="module")
def converted(source) -> Path:
    convert_tiny(source, source.with_name("records"))
    return source.with_name("records")


def convert_tiny(dataroot: Path, out: Path, **options) -> dict:
    return dict(Convert(dataroot=dataroot, version=VERSION, out=out, **options).run())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_beam
@pytest.mark.parametrize("workers", [1, 2])
def test_beam_writes_the_same_bytes(source, converted, tmp_path, monkeypatch, workers):
    monkeypatch.chdir(tmp_path)  # relative paths must do
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    facts = convert_tiny(source, Path("beam"), runner="beam", workers=workers)
    assert content(tmp_path / "beam") == content(converted)
    assert facts["records"] == 9


@needs_beam
def test_clips_on_beam_have_the_same_bytes(tmp_path, monkeypatch):
    """Bench2Drive's, from folders and from a tar file."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    clips = tmp_path / "clips"
    Synthesize(out=clips, workers=1, scenes=2, keyframes=2, image_size="64x36", layout="bench2drive").run()
    (first, *_) = sorted(path for path in clips.iterdir() if path.is_dir())
    with tarfile.open(clips / f"{first.name}.tar.gz", "w:gz") as packed:
        packed.add(first, first.name)
    shutil.rmtree(first)
    options = {"source": "bench2drive", "dataroot": clips}
    here = Convert(out=tmp_path / "here", workers=1, **options).run()
    there = Convert(out=tmp_path / "there", runner="beam", workers=2, **options).run()
    assert there["fingerprint"] == here["fingerprint"]
    assert there["records"] == here["records"] > 0
    assert content(tmp_path / "there") == content(tmp_path / "here")


@needs_beam
def test_a_conversion_goes_from_one_runner_to_the_other(source, converted, tmp_path, monkeypatch):
    out, real = tmp_path / "out", convert.convert_scene

    def dies(unit: SceneUnit):
        if "scene-2002" in unit.scene.name:
            raise KeyboardInterrupt
        return real(unit)

    monkeypatch.setattr(convert, "convert_scene", dies)
    with pytest.raises(KeyboardInterrupt):
        convert_tiny(source, out)
    monkeypatch.undo()
    first = next(out.glob("*.array_record-*"))
    written = first.stat().st_mtime_ns
    convert_tiny(source, out, runner="beam", resume=True)
    assert content(out) == content(converted)
    assert first.stat().st_mtime_ns == written, "finished shards are not written again"


@needs_beam
def test_what_a_user_must_mend_comes_back_from_the_workers(source, tmp_path):
    dataroot = Path(shutil.copytree(source, tmp_path / "nuscenes"))
    broken = next((dataroot / "can_bus").glob("*pose.json"))
    broken.write_text("{")
    with pytest.raises(SpaceDriveError, match=broken.name):
        convert_tiny(dataroot, tmp_path / "out", runner="beam")
    assert not (tmp_path / "out" / "conversion" / "units").exists()
    assert len(list((tmp_path / "out" / "conversion").glob("*.array_record-*.json"))) == 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """A Dask scheduler and two worker processes on loopback: Beam's options for them, and the two workers."""
    folder = tmp_path_factory.mktemp("cluster")
    facts = folder / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:

        def start(arguments: list[str]) -> subprocess.Popen:
            log = stack.enter_context((folder / "cluster.log").open("a"))
            process = subprocess.Popen(arguments, env=environment, cwd=folder, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        start([*command, "--host", "127.0.0.1", "--scheduler-file", str(facts)])
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(facts)]
        worker += ["--no-nanny", "--no-dashboard", "--nthreads", "1", "--local-directory", str(folder)]
        workers = [start(worker) for _ in range(2)]
        from distributed import Client

        deadline = time.monotonic() + 60
        while not facts.is_file():
            assert time.monotonic() < deadline, (folder / "cluster.log").read_text()
            time.sleep(0.1)
        address = json.loads(facts.read_text())["address"]
        with Client(address) as client:
            client.wait_for_workers(2, timeout=60)
        yield f"--runner=DaskRunner --dask_client_address={address}", workers


def depth_of(records: Path) -> dict[str, object]:
    """A sidecar's files: provenance, and tensors and metadata, which safetensors writes in any order."""
    found: dict[str, object] = {}
    for file in sorted(records.glob("depth/*/*")):
        if file.suffix == ".json":
            found[file.name] = file.read_text()
            continue
        with safe_open(file, "np") as chunk:
            tensors = {name: chunk.get_tensor(name) for name in chunk.keys()}  # noqa: SIM118
            bits = {name: (each.dtype.name, each.shape, each.tobytes()) for name, each in tensors.items()}
            found[file.name] = (chunk.metadata(), bits)
    assert found
    return found


@needs_beam
@pytest.mark.parametrize("where", ["here", "cluster"])
def test_depth_on_beam_has_the_same_bits(converted, tmp_path, monkeypatch, where, request):
    monkeypatch.setattr("data_prep.add_depth.CHUNK", 4)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    save_tiny(tmp_path / "weights")
    network = tmp_path / "network.json"
    network.write_text(
        json.dumps({"weights": str(tmp_path / "weights"), "image_size": [42, 56], "grid": [2, 3]})
    )
    expected = Path(shutil.copytree(converted, tmp_path / "expected"))
    records = Path(shutil.copytree(converted, tmp_path / "records"))
    AddDepth(records=expected, model=network).run()
    options = "" if where == "here" else request.getfixturevalue("cluster")[0]
    facts = AddDepth(records=records, model=network, runner="beam", beam_options=options).run()
    assert (facts["keyframes"], facts["reused"]) == (9, 0)
    assert depth_of(records) == depth_of(expected)
    (lost,) = records.glob("depth/*/chunk-00001.safetensors")
    lost.unlink()
    assert AddDepth(records=records, model=network, runner="beam").run()["reused"] == 5
    assert depth_of(records) == depth_of(expected)


@needs_beam
@pytest.mark.parametrize("layout", ["nuscenes", "bench2drive"])
def test_a_world_made_on_a_dask_cluster_has_the_same_bytes(tmp_path, cluster, layout):
    options = {"scenes": 2, "keyframes": 1, "image_size": "64x36", "layout": layout}
    made = Synthesize(out=tmp_path / "here", workers=1, **options).run()
    there = Synthesize(out=tmp_path / "there", runner="beam", beam_options=cluster[0], **options).run()
    assert there["fingerprint"] == made["fingerprint"]
    assert content(tmp_path / "there") == content(tmp_path / "here")


@needs_beam
def test_a_dask_cluster_writes_the_same_bytes_though_a_worker_is_killed(tmp_path, cluster):
    dataroot = TinyNuScenes(8, 2).write(tmp_path / "nuscenes")
    convert_tiny(dataroot, tmp_path / "records")
    out = tmp_path / "dask"
    options, workers = cluster
    left = []

    def finished() -> int:
        return len(list(out.glob("conversion/*.array_record-*.json")))

    def kill_one() -> None:
        while finished() < 2:
            time.sleep(0.01)
        workers[0].send_signal(signal.SIGKILL)
        left.append(8 - finished())

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    facts = convert_tiny(dataroot, out, runner="beam", beam_options=options)
    killer.join()
    assert workers[0].wait(10) == -signal.SIGKILL
    assert workers[1].poll() is None
    assert left[0] > 0, "the conversion had ended before the worker was killed"
    assert facts["records"] == 16
    assert content(out) == content(tmp_path / "records")


@needs_beam
def test_a_runner_that_is_not_there_is_named_in_one_line(source, tmp_path):
    with pytest.raises(SpaceDriveError, match=r"pipeline failed \(.*NoSuchRunner.*\); --resume") as told:
        convert_tiny(source, tmp_path / "out", runner="beam", beam_options="--runner=NoSuchRunner")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out" / "provenance.json").exists()


def test_a_worker_notes_a_finished_unit_or_what_is_wrong_with_it(source, tmp_path, monkeypatch):
    dataroot = Path(shutil.copytree(source, tmp_path / "nuscenes"))
    next((dataroot / "can_bus").glob("*pose.json")).write_text("{")
    units: list[SceneUnit] = []

    def keep(_, items, workers):
        units.extend(items)
        raise KeyboardInterrupt

    monkeypatch.setattr(beam, "ordered_map", keep)
    with pytest.raises(KeyboardInterrupt):
        convert_tiny(dataroot, tmp_path / "out")
    files = [tmp_path / f"{unit.shard.name}.unit" for unit in units]
    for file, unit in zip(files, units, strict=True):
        file.write_bytes(pickle.dumps((functools.partial(convert_and_note, convert.convert_scene), unit)))
        do_unit_file(str(file))
    done = [conversion.finished_scene(tmp_path / "out", unit.shard.name) for unit in units]
    problems = [file.with_suffix(".problem") for file in files]
    assert sorted(result.shard.records for result in done if result is not None) == [3, 3]
    assert [problem.is_file() for problem in problems] == [result is None for result in done]
    assert "pose.json" in next(problem for problem in problems if problem.is_file()).read_text()


def test_the_local_runner_is_the_default_and_options_go_through():
    assert pipeline_arguments("", 3) == [
        "--runner=FnApiRunner",
        "--direct_num_workers=3",
        "--direct_running_mode=multi_processing",
    ]
    options = "--runner=FlinkRunner --flink_master=host:8081 --job_name='nuScenes records'"
    assert pipeline_arguments(options, 3) == [
        "--runner=FlinkRunner",
        "--flink_master=host:8081",
        "--job_name=nuScenes records",
    ]
    assert pipeline_arguments("--job_name=x", 1)[-1] == "--job_name=x"
    dask = "--runner=DaskRunner --dask_client_address=tcp://host:8786"
    whole = [f"--runner={DASK_RUNNER}", "--dask_client_address=tcp://host:8786"]
    assert pipeline_arguments(dask, 3) == [*whole, "--dask_partition_size=1"]
    assert pipeline_arguments(f"{dask} --dask_npartitions=4", 3) == [*whole, "--dask_npartitions=4"]
    with pytest.raises(SpaceDriveError, match="--beam-options"):
        pipeline_arguments("--job_name='x", 1)


def test_flags_that_do_not_go_together_are_refused(source, tmp_path, monkeypatch):
    with pytest.raises(SpaceDriveError, match="--beam-options only goes with --runner beam"):
        convert_tiny(source, tmp_path / "out", beam_options="--runner=FlinkRunner")
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(SpaceDriveError, match=r"requirements-beam\.txt"):
        convert_tiny(source, tmp_path / "out", runner="beam")

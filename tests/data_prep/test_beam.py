"""The converter on Apache Beam: the same bytes; and what does not need Beam to be installed."""

from __future__ import annotations

import importlib.util
import pickle
import shutil
import sys
from pathlib import Path

import pytest

from data_prep import conversion, convert
from data_prep.beam import convert_unit_file, pipeline_arguments
from data_prep.cli.convert import Convert
from data_prep.nuscenes.scene_records import SceneUnit
from spacedrive_jax.errors import SpaceDriveError
from tests.conftest import ROOT
from tests.data_prep.tiny_nuscenes import VERSION, TinyNuScenes

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

    monkeypatch.setattr(convert, "ordered_map", keep)
    with pytest.raises(KeyboardInterrupt):
        convert_tiny(dataroot, tmp_path / "out")
    files = [tmp_path / f"{unit.shard.name}.unit" for unit in units]
    for file, unit in zip(files, units, strict=True):
        file.write_bytes(pickle.dumps((convert.convert_scene, unit)))
        convert_unit_file(str(file))
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
    with pytest.raises(SpaceDriveError, match="--beam-options"):
        pipeline_arguments("--job_name='x", 1)


def test_flags_that_do_not_go_together_are_refused(source, tmp_path, monkeypatch):
    with pytest.raises(SpaceDriveError, match="--beam-options only goes with --runner beam"):
        convert_tiny(source, tmp_path / "out", beam_options="--runner=FlinkRunner")
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(SpaceDriveError, match=r"requirements-beam\.txt"):
        convert_tiny(source, tmp_path / "out", runner="beam")

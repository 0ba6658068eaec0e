from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import Synthesize
from data_prep.synthesize import folder, recorder
from data_prep.synthesize.folder import folder_fingerprint, write_folder
from data_prep.synthesize.recorder import NotRecorded, SceneJob, record_scene
from spacedrive_jax.errors import DataError, SpaceDriveError
from spacedrive_jax.world.scenario import UnplayableError
from spacedrive_jax.world.sensors import parse_image_size
from tests.world.conftest import TINY


def test_two_workers_write_the_same_bytes_as_one(
    written: tuple[Path, Mapping[str, Any]], tmp_path: Path
) -> None:
    root, facts = written
    again = Synthesize(out=tmp_path / "again", workers=2, **TINY).run()  # type: ignore[arg-type]
    assert again["fingerprint"] == facts["fingerprint"] == folder_fingerprint(root)
    assert (facts["scenes"], facts["keyframes"], facts["skipped"]) == (2, 6, 0)


def test_fingerprint_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    first = folder_fingerprint(tmp_path)
    (tmp_path / "a").write_bytes(b"2")
    second = folder_fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, folder_fingerprint(tmp_path)}) == 3


def test_refuses_a_folder_with_content(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(SpaceDriveError, match="not an empty folder"):
        Synthesize(out=tmp_path).run()
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_link_to_an_empty_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    Synthesize(out=tmp_path / "link", scenes=1, keyframes=1, image_size="32x18", workers=1).run()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "v1.0-synthetic" / "scene.json").is_file()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: Path, *_: Any) -> None:
        (root / "half").write_text("written")
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(folder, "write_folder", fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        Synthesize(out=tmp_path / "world").run()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f".world.unfinished-{socket.gethostname()}-999999999"
    left.mkdir()
    monkeypatch.setattr(folder, "write_folder", lambda root, *_: [(root / "whole").touch()][:0])
    Synthesize(out=tmp_path / "world").run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["world"]
    assert [path.name for path in (tmp_path / "world").iterdir()] == ["whole"]


@pytest.mark.parametrize("text", ["704", "axb", "704x", "1x1", "90000x90"])
def test_bad_image_size_is_explained(text: str) -> None:
    with pytest.raises(SpaceDriveError, match="--image-size"):
        parse_image_size(text)


def test_only_one_layout_can_be_perturbed(tmp_path: Path) -> None:
    with pytest.raises(SpaceDriveError, match="--perturb"):
        Synthesize(out=tmp_path / "world", perturb=True, layout="bench2drive").run()


def job(index: int, root: Path, *, perturb: bool = True) -> SceneJob:
    return SceneJob(index, 4, 1, (90, 160), False, root, perturb)


def test_a_scene_without_room_beside_its_lane_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UnplayableError("no room")

    monkeypatch.setattr(recorder, "build_scenario", lambda *_: None)
    monkeypatch.setattr(recorder, "shifted_recording", refuse)
    assert record_scene(job(1, tmp_path)) == NotRecorded("scene-0002", "no room")
    monkeypatch.setattr(recorder, "build_scenario", refuse)
    with pytest.raises(UnplayableError):
        record_scene(job(1, tmp_path, perturb=False))


def test_the_others_are_written_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: dict[str, Any] = {}
    for name in ("write_mask", "write_expansion"):
        monkeypatch.setattr(folder, name, lambda *_: None)
    monkeypatch.setattr(folder, "write_tables", lambda _, rows: tables.update(rows))

    def record(job: SceneJob) -> dict[str, Any] | NotRecorded:
        if job.index != 1:
            return NotRecorded(job.take.name, "no room")
        return {"log": [{"token": "log", "location": job.location}]}

    monkeypatch.setattr(folder, "record_scene", record)
    jobs = [job(index, tmp_path) for index in range(3)]
    assert write_folder(tmp_path, jobs, 1) == ["scene-0001", "scene-0003"]
    assert [row["log_tokens"] for row in tables["map"]] == [["log"]]
    with pytest.raises(DataError, match="another --seed"):
        write_folder(tmp_path, jobs[:1], 1)


def test_image_size_is_width_by_height() -> None:
    assert parse_image_size("704x396") == (396, 704)


@pytest.mark.parametrize("flags", [{"scenes": 0}, {"keyframes": 0}, {"seed": -1}, {"workers": -2}])
def test_flags_out_of_range_name_the_flag(tmp_path: Path, flags: dict[str, int]) -> None:
    with pytest.raises(SpaceDriveError, match=f"--{next(iter(flags))}"):
        Synthesize(out=tmp_path / "world", **flags).run()  # type: ignore[arg-type]

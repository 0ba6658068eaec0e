"""Films and recordings in 3D: written, opened again, and refused where a package or an ending is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from spacedrive_jax.constants import CAMERAS, NUM_CAMERAS
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.reporting.recordings import (
    Shown,
    check_film,
    check_rerun,
    drive_figure,
    shown_drive,
    write_film,
    write_rerun,
)
from tests.record_factory import encode_png, make_record


def keyframes(count: int) -> list[Shown]:
    """A straight drive with exact depth, a plan at every second keyframe."""
    shown = []
    for number in range(count):
        pose = np.eye(4)
        pose[0, 3] = 1000.0 + 3.0 * number
        depth = [encode_png(np.full((45, 80), 256 * 10, np.uint16))] * NUM_CAMERAS
        record = make_record(
            np.random.default_rng(7),
            ego_to_global=pose,
            exact_depth=depth,
            frame_index=number,
            timestamp_us=1_600_000_000_000_000 + 500_000 * number,
        )
        plan = np.stack([np.arange(1.0, 7.0), np.zeros(6)], axis=1)
        shown.append(Shown(record, plan if number % 2 == 0 else None))
    return shown


def test_decisions_without_a_plan_show_none() -> None:
    records = [each.record for each in keyframes(2)]
    decisions = [{"waypoints": [[1.0, 0.0]] * 6, "path": None}, {"waypoints": None, "path": None}]
    first, second = shown_drive(records, decisions)
    assert first.waypoints is not None
    assert first.waypoints.shape == (6, 2)
    assert first.path is second.waypoints is None
    with pytest.raises(ValueError, match="shorter"):
        shown_drive(records, decisions[:1])


def test_a_drive_becomes_a_film(tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    film = tmp_path / "drive.mp4"
    assert write_film(film, (drive_figure(each, "a drive") for each in keyframes(3)), "--video") == 3
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(film))
    assert (frames, seconds) == (3, pytest.approx(1.5))
    assert [file.name for file in tmp_path.iterdir()] == ["drive.mp4"]


def test_keyframes_become_a_recording_that_opens_again(tmp_path: Path) -> None:
    pytest.importorskip("rerun")
    from rerun.chunk import RrdReader

    file = tmp_path / "drive.rrd"
    assert write_rerun(file, keyframes(3), "--rerun") == 3
    assert [each.name for each in tmp_path.iterdir()] == ["drive.rrd"]
    rows: dict[str, int] = {}
    starts: list[float] = []
    for chunk in RrdReader(str(file)).stream():
        if chunk.is_static or not chunk.entity_path.startswith("/world"):
            continue
        rows[chunk.entity_path] = rows.get(chunk.entity_path, 0) + chunk.num_rows
        assert {"time", "keyframe"} <= set(chunk.timeline_names)
        if chunk.entity_path == "/world/ego":
            batch = chunk.to_record_batch()
            name = next(name for name in batch.schema.names if name.endswith("translation"))
            starts += [place[0][0] for place in batch.column(name).to_pylist()]
    parts = ["depth", "boxes", "plan", "recorded", *CAMERAS]
    assert {path: rows[path] for path in (f"/world/ego/{part}" for part in parts)} == {
        f"/world/ego/{part}": 3 for part in parts
    }
    assert starts == [0.0, 3.0, 6.0]  # in the frame of the first keyframe


@pytest.mark.parametrize(
    ("check", "good", "package", "extra"),
    [
        (check_film, "a.mp4", "imageio_ffmpeg", "video"),
        (check_rerun, "a.rrd", "rerun", "rerun"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, check, good, package, extra) -> None:
    with pytest.raises(ConfigError, match=r"--flag a\.gif: .* are written as"):
        check(Path("a.gif"), "--flag")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"--flag needs the extra `{extra}`: pip install .*\[{extra}\]"):
        check(Path(good), "--flag")


def test_a_recording_into_nowhere_is_one_error(tmp_path: Path) -> None:
    pytest.importorskip("rerun")
    with pytest.raises(SpaceDriveError, match=r"cannot write .*absent"):
        write_rerun(tmp_path / "absent" / "a.rrd", keyframes(1), "--rerun")

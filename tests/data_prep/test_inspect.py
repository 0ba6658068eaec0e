"""Looking at records."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import Convert
from data_prep.cli import main as run
from data_prep.inspect_record import find_record, list_keyframes
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.schema import record_features
from spacedrive_jax.reporting.cameras import upright_corners
from tests.conftest import ROOT
from tests.data_prep.tiny_nuscenes import VERSION
from tests.record_factory import make_record, write_records


@pytest.fixture
def records_folder(tiny, dataroot, tmp_path):
    (dataroot / tiny.image(0, 1, "CAM_FRONT")).unlink()
    Convert(dataroot=dataroot, version=VERSION, out=tmp_path / "records", missing_images="empty").run()
    return tmp_path / "records"


def test_prints_every_field(records_folder, capsys):
    assert run(["inspect", str(records_folder)]) == 0
    printed = capsys.readouterr().out
    for name in record_features():
        assert f"  {name} " in printed
    assert "24 records (train 16, val 8)" in printed


def test_draws_a_keyframe_with_a_missing_image(records_folder, tiny, tmp_path, capsys):
    token = tiny.tables["sample"][1]["token"]
    picture = tmp_path / "view.png"
    assert run(["inspect", str(records_folder), "--token", token, "--image", str(picture), "--json"]) == 0
    assert f'"token": "{token}"' in capsys.readouterr().out.splitlines()[-1]
    with Image.open(picture) as image:
        assert image.size == (1920, 630)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 1000, "photographs were drawn"


def test_unknown_token_and_unfinished_folder(records_folder, tmp_path, capsys):
    assert run(["inspect", str(records_folder), "--token", "nope"]) == 1
    assert "has no keyframe 'nope'" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path)]) == 1
    assert "is not a finished records folder" in capsys.readouterr().err


def test_damaged_pictures_are_named(tmp_path, capsys):
    rng = np.random.default_rng(4)
    record = make_record(rng)
    folder = write_records(tmp_path / "whole", {"train": [record]})
    assert run(["inspect", str(folder), "--check-images"]) == 0
    assert "7 pictures are whole" in capsys.readouterr().out
    photo = record["images"][3]
    record["images"][3] = photo[:800] + photo[840:]
    folder = write_records(tmp_path / "damaged", {"train": [record]})
    assert run(["inspect", str(folder), "--check-images"]) == 1
    said = capsys.readouterr().err
    assert "1 of 7 pictures are damaged; fetch their files again and convert again:" in said
    assert f"keyframe {record['token']}: the CAM_BACK image is damaged inside" in said


def test_corners_of_boxes():
    corners = upright_corners(np.array([[10.0, 5.0, 1.0, 4.0, 2.0, 1.5, np.pi / 2]]))[0]
    # Heading left: the front left corner is ahead in y and behind in x.
    np.testing.assert_allclose(corners[0], [9.0, 7.0, 0.25], atol=1e-12)
    np.testing.assert_allclose(corners[4], [9.0, 7.0, 1.75], atol=1e-12)
    np.testing.assert_allclose(corners.mean(axis=0), [10.0, 5.0, 1.0], atol=1e-12)


def test_default_keyframe_is_in_the_first_scene(records_folder, capsys):
    run(["inspect", str(records_folder), "--json"])
    first = open_records(records_folder)[0]["scene_name"]
    assert f"{'scene_name':<24} {'text':<22} {first}" in capsys.readouterr().out


def test_lists_keyframes_in_the_order_of_the_records(records_folder, capsys):
    assert run(["inspect", str(records_folder), "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])["keyframes"]
    for split in ("train", "val"):
        records = open_records(records_folder, split)
        of_split = [one for one in listed if one["split"] == split]
        assert [one["index"] for one in of_split] == list(range(len(records)))
        for one in of_split:
            record = records[one["index"]]
            assert (one["token"], one["scene"]) == (record["token"], record["scene_name"])


def test_lists_a_folder_without_the_notes_of_its_conversion(records_folder):
    noted = list_keyframes(records_folder)
    shutil.rmtree(records_folder / "conversion")
    assert list_keyframes(records_folder) == noted


def test_a_scene_by_name(records_folder, capsys):
    scene = open_records(records_folder, "val")[0]["scene_name"]
    assert run(["inspect", str(records_folder), "--scene", scene]) == 0
    assert f"{'scene_name':<24} {'text':<22} {scene}" in capsys.readouterr().out
    keyframes = list_keyframes(records_folder, scene)
    assert {one.scene for one in keyframes} == {scene}
    shown = find_record(records_folder, None, scene)
    assert shown["token"] == keyframes[len(keyframes) // 2].token
    assert run(["inspect", str(records_folder), "--scene", "scene-9"]) == 1
    assert "has no scene 'scene-9'; it has scene-" in capsys.readouterr().err
    assert run(["inspect", str(records_folder), "--scene", scene, "--token", "x"]) == 1
    assert "give one of them" in capsys.readouterr().err
    assert run(["inspect", str(records_folder), "--list", "--token", "x"]) == 1
    assert "--list shows no keyframe" in capsys.readouterr().err


def test_a_scene_becomes_a_film(records_folder, tmp_path, capsys):
    film = tmp_path / "scene.mp4"
    scene = list_keyframes(records_folder)[0].scene
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    assert run(["inspect", str(records_folder), "--scene", scene, "--film", str(film), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["keyframes"] == len(list_keyframes(records_folder, scene))
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(film))
    assert frames == told["keyframes"]
    assert seconds == pytest.approx(frames / 2)
    assert [file.name for file in tmp_path.rglob("*.mp4*")] == ["scene.mp4"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--film", "a.mp4"], "name it with --scene"),
        (["--film", "a.gif", "--scene", "SCENE"], "films are written as .mp4"),
        (["--film", "a.mp4", "--scene", "SCENE", "--image", "b.png"], "--film goes without"),
        (["--film", "a.mp4", "--scene", "nowhere"], "has no scene 'nowhere'"),
        (["--film", "a.mp4", "--scene", "SCENE", "--rerun", "b.rrd"], "--film goes without"),
        (["--rerun", "a.rrd"], "name it with --scene"),
        (["--rerun", "a.mp4", "--scene", "SCENE"], "recordings are written as .rrd"),
        (["--rerun", "a.rrd", "--scene", "SCENE", "--points", "b.ply"], "--rerun goes without"),
        (["--keyframes", "0:1"], "--keyframes says what --rerun shows"),
        (["--rerun", "a.rrd", "--scene", "SCENE", "--keyframes", "3:1"], "not FIRST:END"),
        (["--rerun", "a.rrd", "--scene", "SCENE", "--keyframes", "0:99"], "--keyframes 0:99: "),
        (["--film", "absent/a.mp4", "--scene", "SCENE"], "cannot write absent/a.mp4"),
    ],
)
def test_films_that_cannot_be(records_folder, tmp_path, monkeypatch, capsys, words, said):
    scene = list_keyframes(records_folder)[0].scene
    monkeypatch.chdir(tmp_path)
    if "cannot write" in said or "nowhere" in said:
        pytest.importorskip("imageio_ffmpeg")
    if "FIRST" in said or "0:99" in said:
        pytest.importorskip("rerun")
    chosen = [scene if word == "SCENE" else word for word in words]
    assert run(["inspect", str(records_folder), *chosen]) == 1
    assert said in capsys.readouterr().err


def test_keyframes_of_a_scene_become_a_recording(records_folder, tmp_path, capsys):
    pytest.importorskip("rerun")
    scene, file = list_keyframes(records_folder)[0].scene, tmp_path / "scene.rrd"
    words = ["--scene", scene, "--keyframes", "1:3", "--rerun", str(file), "--json"]
    assert run(["inspect", str(records_folder), *words]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["keyframes"] == 2
    assert file.stat().st_size > 10_000


def test_a_film_without_ffmpeg_says_what_to_install(records_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    scene = list_keyframes(records_folder)[0].scene
    assert run(["inspect", str(records_folder), "--scene", scene, "--film", str(tmp_path / "a.mp4")]) == 1
    assert "pip install imageio-ffmpeg" in capsys.readouterr().err


def test_a_folder_of_one_split_without_notes_is_listed():
    listed = list_keyframes(ROOT / "examples" / "demo" / "records")
    assert [(each.split, each.index) for each in listed] == [("val", index) for index in range(5)]

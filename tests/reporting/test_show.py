"""One keyframe looked at: planned, drawn and said in words, by the library and by the command."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import spacedrive_jax.cli.main
from data_prep.cli import main as data_prep
from spacedrive_jax import Planner, open_model, open_records, plan
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.records import keyframe_index
from spacedrive_jax.data.tokenizer import INDICATOR
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.reporting.cases import asked, explained
from spacedrive_jax.reporting.figures import check_picture
from tests.record_factory import make_record
from tests.training.runs import make_records, save_untrained, tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    records = make_records(folder / "records")
    return save_untrained(tiny(records, folder / "run")), records


def show(*words):
    return spacedrive_jax.cli.main.main(["show", *map(str, words)])


@pytest.mark.usefixtures("unchecked")
def test_a_planner_plans_what_the_model_plans_and_draws_it(made):
    run_dir, folder = made
    planner = Planner.load(run_dir)
    record = planner.records(folder)[1]
    found = planner.plan(record)
    expected = plan(open_model(run_dir), open_records(folder, "val")[1])
    assert (found.text, found.status) == (expected.text, expected.status)
    np.testing.assert_array_equal(found.waypoints, expected.waypoints)
    assert found.question.startswith("[6 images] You are driving in testtown.")
    assert (found.error is None) == (found.status != "ok")
    figure = found.figure()
    texts = " ".join(text.get_text() for part in figure.subfigs for text in part.texts)
    assert record["token"] in texts
    assert found.question[:60] in texts
    assert len(repr(found)) < 3000, "a notebook shows it without its pictures"
    as_tfds_reads = tfds.builder_from_directory(folder).as_data_source("val")[1]
    assert planner.plan(as_tfds_reads).text == found.text
    half = {name: value for name, value in record.items() if name != "images"}
    for wrong, said in ((record["token"], "not str"), ([record], "not list"), (half, "lacks images: start")):
        with pytest.raises(DataError, match=said):
            planner.plan(wrong)
    with pytest.raises(ConfigError, match="what open_model"):
        plan(run_dir, record)


def test_the_command_draws_names_the_picture_and_prints_json(made, tmp_path, capsys):
    run_dir, folder = made
    token = open_records(folder, "train")[7]["token"]
    image = tmp_path / "seen.png"
    assert show(run_dir, "--records", folder, "--token", token, "--image", image) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(image)
    assert f"keyframe {token}" in printed
    with Image.open(image) as picture:
        assert picture.size == (2000, 820)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000, "photographs were drawn"
    assert show(run_dir, "--records", folder, "--image", tmp_path / "seen.pdf", "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["token"] == open_records(folder, "val")[0]["token"]
    assert {"file", "question", "text", "status", "waypoints"} <= told.keys()
    assert (tmp_path / "seen.pdf").read_bytes().startswith(b"%PDF")


def test_it_takes_images_of_ones_own(made, tmp_path, monkeypatch, capsys):
    run_dir, folder = made
    record = open_records(folder, "val")[0]
    images = tmp_path / "mine"
    images.mkdir()
    cameras = {}
    for row, name in enumerate(CAMERAS):
        (images / f"{name}.jpg").write_bytes(record["images"][row])
        (images / f"{name}_depth.png").write_bytes(record["exact_depth"][row])
        matrices = {field: record[field][row].tolist() for field in ("camera_to_ego",)}
        cameras[name] = matrices | {
            "intrinsics": record["camera_intrinsics"][row].tolist(),
            "depth": f"{name}_depth.png",
        }
    calibration = tmp_path / "calibration.json"
    calibration.write_text(json.dumps({"cameras": cameras}))
    monkeypatch.chdir(tmp_path)
    assert show(run_dir, "--images", images, "--calibration", calibration, "--speed", 5) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "mine.png"
    for camera in cameras.values():
        del camera["depth"]
    calibration.write_text(json.dumps({"cameras": cameras}))
    assert show(run_dir, "--images", images, "--calibration", calibration, "--speed", 5) == 1
    assert "mine has no depth for CAM_FRONT from exact or lidar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --records DIR, or --images DIR"),
        (["--images", "x"], "--calibration FILE.json go together"),
        (["--records", "R", "--speed", "3"], "--speed goes with --images"),
        (["--records", "R", "--image", "a.gif"], "a.gif: pictures are written as .png, .pdf"),
        (["--records", "R", "--token", "nope", "--image", "a.png"], "has no keyframe 'nope' in split all"),
    ],
)
def test_mistakes_are_named(made, tmp_path, monkeypatch, capsys, words, said):
    run_dir, folder = made
    monkeypatch.chdir(tmp_path)
    assert show(run_dir, *[str(folder) if word == "R" else word for word in words]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_inspect_writes_what_the_ending_says_or_refuses(made, tmp_path, capsys):
    _, folder = made
    assert data_prep(["inspect", str(folder), "--image", str(tmp_path / "a.pdf")]) == 0
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    capsys.readouterr()
    assert data_prep(["inspect", str(folder), "--image", str(tmp_path / "a.mp3")]) == 1
    assert "pictures are written as" in capsys.readouterr().err
    assert check_picture(tmp_path / "B.JPG") == "jpeg"


def test_a_keyframe_is_found_with_and_without_the_conversions_notes(made, tmp_path):
    _, folder = made
    records = open_records(folder, "val")
    tokens = [record["token"] for record in records]
    assert [keyframe_index(records, token) for token in tokens] == [0, 1, 2]
    with pytest.raises(DataError, match="no keyframe 'x' in split val"):
        keyframe_index(records, "x")


def test_a_question_about_a_route_names_its_nodes_in_metres():
    record = make_record(np.random.default_rng(0))
    said = asked(record, "route", ego_in_words=False, target_points=True)
    assert f"{INDICATOR}(30.00, 0.00), {INDICATOR}(80.00, 0.00)" in said
    assert said.startswith("[6 images] ")
    assert explained(said).startswith(f"{INDICATOR} announces a coordinate")

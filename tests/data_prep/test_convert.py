"""Converting a tiny folder: contents, determinism, resuming, and what bad input says."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep import conversion, convert
from data_prep.cli import Convert
from data_prep.cli import main as run
from data_prep.conversion import check_output_folder
from data_prep.nuscenes.expansions import MaskMap, cache_mask_bits
from data_prep.nuscenes.scene_records import SceneUnit, convert_scene
from data_prep.nuscenes.scenes import PackedScene, read_scenes
from data_prep.nuscenes.sensor_files import scan_scene
from data_prep.nuscenes.tables import read_tables
from spacedrive_jax import exact
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data import records_folder
from spacedrive_jax.data.records import keyframe_index, open_records
from spacedrive_jax.data.schema import record_features
from spacedrive_jax.errors import DataError, SpaceDriveError
from tests.data_prep.tiny_nuscenes import (
    HEIGHT,
    INTRINSICS,
    VERSION,
    WIDTH,
    TinyNuScenes,
    jpeg,
    road_expansion,
)

SCENES = 3
KEYFRAMES = 4


@pytest.fixture(scope="module")
def tiny_source(tmp_path_factory) -> tuple[TinyNuScenes, Path, Path]:
    """The tiny world, its folder and its records, written once; tests work on copies."""
    world = TinyNuScenes(SCENES, KEYFRAMES)
    root = world.write(tmp_path_factory.mktemp("source") / "nuscenes")
    records = root.with_name("records")
    convert_tiny(root, records)
    return world, root, records


@pytest.fixture
def tiny(tiny_source) -> TinyNuScenes:
    return tiny_source[0]


@pytest.fixture
def dataroot(tiny_source, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_source[1], tmp_path / "nuscenes"))


@pytest.fixture
def converted(tiny_source, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_source[2], tmp_path / "converted"))


def convert_tiny(dataroot: Path, out: Path, **options) -> dict:
    # With the slash that a shell's completion leaves.
    return dict(Convert(dataroot=dataroot, version=f"{VERSION}/", out=out, **options).run())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_records_hold_every_field_with_untouched_files(dataroot, converted, tiny):
    records = open_records(converted)
    assert len(records) == SCENES * KEYFRAMES
    by_token = {record["token"]: record for record in (records[index] for index in range(len(records)))}
    assert len(by_token) == len(records)
    for row in tiny.tables["sample"]:
        assert by_token[row["token"]]["timestamp_us"] == row["timestamp"]
    first = by_token[tiny.tables["sample"][0]["token"]]
    assert first.keys() == record_features().keys()
    for index, channel in enumerate(CAMERAS):
        assert first["images"][index] == (dataroot / tiny.image(0, 0, channel)).read_bytes()
    assert first["lidar"] == (dataroot / "samples/LIDAR_TOP/scene-2001__0.pcd.bin").read_bytes()
    assert first["exact_depth"] == [b""] * 6
    assert not first["image_rendered"].any()
    np.testing.assert_array_equal(first["image_size"], [[HEIGHT, WIDTH]] * 6)
    np.testing.assert_array_equal(first["camera_intrinsics"], [INTRINSICS] * 6)
    lead = first["timestamp_us"] - first["camera_timestamp_us"]
    np.testing.assert_array_equal(lead, 10_000 * np.arange(1, 7))
    # A camera that looks along the ego x axis.
    np.testing.assert_allclose(first["camera_to_ego"][2] @ [0, 0, 1, 1], [2.5, 0.2, 1.6, 1], atol=1e-12)
    assert not np.allclose(first["camera_ego_to_global"], first["ego_to_global"], atol=1e-3)
    np.testing.assert_allclose(first["lidar_to_ego"][:3, 3], [1.5, 0.6, 1.6])
    assert first["can_bus_valid"]
    assert first["drivable_source"] == "mask"
    assert first["location"] == "tiny-town"
    assert first["log"] == "tiny-log"
    assert sum(bool(record["can_bus_valid"]) for record in by_token.values()) == KEYFRAMES


def test_arrays_keep_their_double_precision(tmp_path):
    tiny = TinyNuScenes(1, 2)
    for row in tiny.tables["ego_pose"]:
        row["translation"][0] += 1234.56789012345
    dataroot = tiny.write(tmp_path / "n")
    convert_tiny(dataroot, tmp_path / "records")
    poses = {row["token"]: row["translation"] for row in tiny.tables["ego_pose"]}
    lidar = [row for row in tiny.tables["sample_data"] if "LIDAR" in row["filename"]]
    expected = {row["sample_token"]: poses[row["ego_pose_token"]] for row in lidar}
    records = open_records(tmp_path / "records")
    for index in range(len(records)):
        record = records[index]
        assert record["ego_to_global"][:3, 3].tolist() == expected[record["token"]]


def test_the_map_is_turned_as_the_devkit_turns_it(tmp_path):
    """On a slope `yaw_pitch_roll[0]` is not the heading: here they are 2 degrees apart, 1.7 m at 50 m."""
    tiny = TinyNuScenes(1, 2)
    tilt = [np.cos(0.15), 0.14, 0.05, 0.0]
    for row in tiny.tables["ego_pose"]:
        c, _, _, s = row["rotation"]
        w, x, y, _ = tilt
        row["rotation"] = [c * w, c * x - s * y, c * y + s * x, s * w]
    convert_tiny(tiny.write(tmp_path / "n"), tmp_path / "records")
    record = open_records(tmp_path / "records")[0]
    lidar = next(row for row in tiny.tables["sample_data"] if "LIDAR" in row["filename"])
    pose = next(row for row in tiny.tables["ego_pose"] if row["token"] == lidar["ego_pose_token"])
    rotation = np.array(pose["rotation"])
    w, x, y, z = rotation / exact.norm(rotation)
    yaw = exact.arctan2(2 * (w * z - x * y), 1 - 2 * (y * y + z * z))
    cache_mask_bits(tmp_path / "n" / "maps" / "tiny.png", tmp_path / "tiny.npy")
    town = MaskMap(tmp_path / "tiny.npy")
    heading = exact.arctan2(*record["ego_to_global"][[1, 0], 0])
    # Not to the last cell: the pose's quaternion and its matrix round otherwise.
    off, off_by_heading = (
        np.mean(record["drivable"] != town.raster(np.array(pose["translation"][:2]), float(angle), 50.0, 200))
        for angle in (yaw, heading)
    )
    assert off < 0.1 * off_by_heading


def test_provenance_and_result_agree(dataroot, tmp_path):
    facts = convert_tiny(dataroot, tmp_path / "records")
    provenance = json.loads((tmp_path / "records" / "provenance.json").read_text())
    assert facts["records"] == facts["keyframes"] == provenance["records"] == SCENES * KEYFRAMES
    assert facts["skipped"] == 0
    assert facts["fingerprint"] == provenance["fingerprint"] == open_records(tmp_path / "records").fingerprint
    assert provenance["splits"] == {"train": 2 * KEYFRAMES, "val": KEYFRAMES}
    assert provenance["split_rule"] == "hashed"
    assert provenance["counts"]["images_from_files"] == 6 * SCENES * KEYFRAMES
    assert provenance["counts"]["can_bus_absent"] == 2 * KEYFRAMES
    assert "Not an official" in provenance["licence"]
    assert str(dataroot) not in json.dumps(provenance)


def test_reads_through_tfds_without_tensorflow(converted):
    script = (
        "import sys, tensorflow_datasets as tfds\n"
        "builder = tfds.builder_from_directory(sys.argv[1])\n"
        "sources = {split: builder.as_data_source(split) for split in ('train', 'val', 'all')}\n"
        "print([len(source) for source in sources.values()], sources['val'][3]['waypoints'].shape)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(converted)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[8, 4, 12] (6, 2)"


def test_scenes_of_a_split_do_not_leak(converted):
    names = {
        split: {record["scene_name"] for record in iterate(converted, split)} for split in ("train", "val")
    }
    assert len(names["train"]) == 2
    assert len(names["val"]) == 1
    assert not names["train"] & names["val"]


def iterate(folder: Path, split: str):
    records = open_records(folder, split)
    return (records[index] for index in range(len(records)))


def test_worker_count_changes_no_byte(dataroot, converted, tmp_path):
    convert_tiny(dataroot, tmp_path / "four", workers=4)
    assert content(tmp_path / "four") == content(converted)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_conversion_resumes_to_the_same_bytes(dataroot, converted, tmp_path, monkeypatch, after):
    out = tmp_path / "interrupted"
    real = convert.convert_scene
    calls = []

    def dies(unit):
        calls.append(unit.scene.name)
        if len(calls) > after:
            (out / f"{unit.shard.name}.partial").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        return real(unit)

    monkeypatch.setattr(convert, "convert_scene", dies)
    with pytest.raises(KeyboardInterrupt):
        convert_tiny(dataroot, out)
    monkeypatch.undo()
    with pytest.raises(SpaceDriveError, match="is not a finished records folder"):
        open_records(out)
    if after:  # where no shard was done, nothing is in the way of another try
        with pytest.raises(SpaceDriveError, match="not empty; add --resume"):
            convert_tiny(dataroot, out)
    else:
        check_output_folder(out, resume=False)
        assert not (out / "conversion").exists()
    before = {
        path.name: path.stat().st_mtime_ns
        for path in out.glob("*.array_record-*")
        if path.suffix != ".partial"
    }
    assert len(before) == after
    convert_tiny(dataroot, out, resume=True)
    assert content(out) == content(converted)
    assert before.items() <= written_shards(out).items(), "finished shards are not written again"


def written_shards(folder: Path) -> dict[str, int]:
    """Shard name to the time it was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.array_record-*-of-?????")}


def test_lost_shard_and_provenance_are_restored(dataroot, converted):
    before = content(converted)
    (converted / "provenance.json").unlink()
    next(converted.glob("*val*record-*")).unlink()
    convert_tiny(dataroot, converted, resume=True)
    assert content(converted) == before


def test_resuming_a_finished_folder_changes_nothing(dataroot, converted):
    before = content(converted), written_shards(converted)
    facts = convert_tiny(dataroot, converted, resume=True)
    assert facts["records"] == SCENES * KEYFRAMES
    assert before == (content(converted), written_shards(converted))


def test_resume_into_an_absent_folder_starts(dataroot, tmp_path):
    assert convert_tiny(dataroot, tmp_path / "new", resume=True)["records"] == SCENES * KEYFRAMES


def test_resume_refuses_other_options_and_sources(dataroot, converted, tiny):
    with pytest.raises(SpaceDriveError, match=r"options.seed: 0 -> 5"):
        convert_tiny(dataroot, converted, resume=True, seed=5)
    with pytest.raises(SpaceDriveError, match=r"options.missing_images: stop -> empty"):
        convert_tiny(dataroot, converted, resume=True, missing_images="empty")
    table = dataroot / VERSION / "scene.json"
    table.write_text(table.read_text().replace("parked car", "parked van"))
    with pytest.raises(SpaceDriveError, match=r"source.tables.scene: [0-9a-f]+ -> [0-9a-f]+"):
        convert_tiny(dataroot, converted, resume=True)


def test_foreign_folders_are_refused(dataroot, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(SpaceDriveError, match="is not empty; remove it or name another"):
        convert_tiny(dataroot, tmp_path / "mine")
    with pytest.raises(SpaceDriveError, match="holds no conversion"):
        convert_tiny(dataroot, tmp_path / "mine", resume=True)
    with pytest.raises(SpaceDriveError, match="is a file"):
        convert_tiny(dataroot, tmp_path / "mine" / "thesis.txt")
    assert content(tmp_path / "mine") == {"thesis.txt": b"precious"}


DAMAGES = {
    "missing": None,
    "empty file": b"",
    "truncated": jpeg(5)[:-40],
    "not a JPEG": b"\x89PNG" + bytes(100),
    "64x18 pixels where sample_data.json says 32x18": jpeg(5, width=64),
}


def damage(tiny, dataroot: Path, damaged: bytes | None) -> None:
    path = dataroot / tiny.image(1, 2, "CAM_BACK")
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)


@pytest.mark.parametrize("kind", DAMAGES)
def test_stop_lists_bad_images_before_writing(tiny, dataroot, tmp_path, kind):
    damage(tiny, dataroot, DAMAGES[kind])
    with pytest.raises(SpaceDriveError) as caught:
        convert_tiny(dataroot, tmp_path / "out")
    message = str(caught.value)
    assert "CAM_BACK: 1 of 12" in message
    assert f"{tiny.image(1, 2, 'CAM_BACK')}: {kind}" in message
    assert "--missing-images skip, empty or render" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", DAMAGES)
def test_skip_leaves_out_the_keyframe_but_not_its_poses(tiny, dataroot, converted, tmp_path, kind):
    damage(tiny, dataroot, DAMAGES[kind])
    facts = convert_tiny(dataroot, tmp_path / "out", missing_images="skip")
    assert (facts["records"], facts["skipped"]) == (SCENES * KEYFRAMES - 1, 1)
    token = tiny.tables["sample"][KEYFRAMES + 2]["token"]
    whole = {record["token"]: record for record in iterate(converted, "all")}
    kept = {record["token"]: record for record in iterate(tmp_path / "out", "all")}
    assert whole.keys() - kept.keys() == {token}
    for name in kept:
        for field in ("waypoints", "past_to_ego", "agent_future", "agent_velocity", "frame_index"):
            np.testing.assert_array_equal(kept[name][field], whole[name][field])


def test_skip_drops_scenes_without_keyframes(tiny, dataroot, tmp_path):
    for keyframe in range(KEYFRAMES):
        (dataroot / tiny.image(0, keyframe, "CAM_FRONT")).unlink()
    convert_tiny(dataroot, tmp_path / "out", missing_images="skip")
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["skipped_scenes"] == ["scene-2001"]
    assert len(open_records(tmp_path / "out")) == 2 * KEYFRAMES


def test_version_without_scenes(dataroot, tmp_path):
    (dataroot / VERSION / "scene.json").write_text("[]")
    for table in ("sample", "sample_annotation", "sample_data"):
        (dataroot / VERSION / f"{table}.json").write_text("[]")
    with pytest.raises(SpaceDriveError, match=r"scene\.json holds no scene"):
        convert_tiny(dataroot, tmp_path / "out")


def test_skip_with_nothing_left(tiny, dataroot, tmp_path):
    for path in dataroot.glob("samples/CAM_FRONT/*"):
        path.unlink()
    with pytest.raises(SpaceDriveError, match=r"no keyframe of v1\.0-tiny has all six images"):
        convert_tiny(dataroot, tmp_path / "out", missing_images="skip")


def test_empty_keeps_the_keyframe_without_pixels(tiny, dataroot, tmp_path):
    damage(tiny, dataroot, DAMAGES["truncated"])
    facts = convert_tiny(dataroot, tmp_path / "out", missing_images="empty")
    assert facts["counts"]["images_empty"] == 1
    token = tiny.tables["sample"][KEYFRAMES + 2]["token"]
    record = next(record for record in iterate(tmp_path / "out", "all") if record["token"] == token)
    assert [bool(image) for image in record["images"]] == [channel != "CAM_BACK" for channel in CAMERAS]
    np.testing.assert_array_equal(record["image_size"], [[HEIGHT, WIDTH]] * 6)


def test_absent_lidar_maps_and_can_bus_are_counted_not_fatal(dataroot, tmp_path, capsys):
    (dataroot / "samples/LIDAR_TOP/scene-2001__0.pcd.bin").unlink()
    (dataroot / "samples/LIDAR_TOP/scene-2001__1.pcd.bin").write_bytes(bytes(30))
    (dataroot / "maps/tiny.png").unlink()
    (dataroot / "can_bus/scene-2001_pose.json").unlink()
    facts = convert_tiny(dataroot, tmp_path / "out")
    printed = capsys.readouterr().out
    assert f"no map for {SCENES * KEYFRAMES} records" in printed
    assert "1 LiDAR sweeps are damaged" in printed
    assert (facts["counts"]["lidar_absent"], facts["counts"]["lidar_damaged"]) == (1, 1)
    assert facts["counts"]["drivable_none"] == SCENES * KEYFRAMES
    assert facts["counts"]["can_bus_absent"] == SCENES * KEYFRAMES
    record = open_records(tmp_path / "out")[0]
    assert not record["can_bus"].any()
    assert record["can_bus"].shape == (13,)


def test_expansion_is_preferred_to_the_mask(dataroot, tmp_path):
    (dataroot / "maps/expansion").mkdir()
    (dataroot / "maps/expansion/tiny-town.json").write_text(json.dumps(road_expansion()))
    convert_tiny(dataroot, tmp_path / "out")
    record = open_records(tmp_path / "out")[0]
    assert record["drivable_source"] == "expansion"
    assert len(record["drivable_polygons"]) == 2


def depth_png(width: int, dtype=np.uint16) -> bytes:
    return cv2.imencode(".png", np.full((HEIGHT, width), 200, dtype))[1].tobytes()


def test_exact_depth_beside_an_image_is_stored(tiny, dataroot, tmp_path):
    image = tiny.image(0, 0, "CAM_FRONT")
    path = dataroot / image.replace("samples", "samples_depth", 1).replace(".jpg", ".png")
    path.parent.mkdir(parents=True)
    path.write_bytes(depth_png(WIDTH))
    facts = convert_tiny(dataroot, tmp_path / "out")
    assert facts["counts"]["exact_depth_images"] == 1
    token = tiny.tables["sample"][0]["token"]
    record = next(record for record in iterate(tmp_path / "out", "all") if record["token"] == token)
    assert record["exact_depth"] == [depth_png(WIDTH)] + [b""] * 5
    for wrong in (depth_png(WIDTH + 1), depth_png(WIDTH, np.uint8), b"nonsense"):
        path.write_bytes(wrong)
        with pytest.raises(SpaceDriveError, match=r"samples_depth/CAM_FRONT/scene-2001__CAM_FRONT__0\.png"):
            convert_tiny(dataroot, tmp_path / f"out-{len(wrong)}")


def test_error_in_a_worker_process_reaches_the_user(dataroot, tmp_path, capsys):
    (dataroot / "can_bus/scene-2001_pose.json").write_text("[{")
    arguments = ["convert", "--dataroot", str(dataroot), "--version", VERSION, "--out", str(tmp_path / "out")]
    assert run([*arguments, "--workers", "2"]) == 1
    assert "scene-2001_pose.json is not valid JSON" in capsys.readouterr().err
    assert not (tmp_path / "out" / "provenance.json").exists()
    assert not list((tmp_path / "out").glob("*.partial"))


def test_command_line_prints_one_json_object(dataroot, tmp_path, capsys):
    arguments = ["convert", "--dataroot", str(dataroot), "--version", VERSION, "--out", str(tmp_path / "out")]
    assert run([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"records", "keyframes", "fingerprint", "skipped", "seconds"} <= facts.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "--workers -1"),
        ({"render_size": "704x396"}, "only goes with --missing-images render"),
        ({"render_size": "704", "missing_images": "render"}, "WIDTHxHEIGHT"),
    ],
)
def test_impossible_options(dataroot, tmp_path, options, message):
    with pytest.raises(SpaceDriveError, match=message):
        convert_tiny(dataroot, tmp_path / "out", **options)


def test_differences_name_the_field():
    before = {"a": {"b": 1, "c": [1, 2, 3]}, "d": 2, "size": [40, 56]}
    assert conversion.differences(before, {"a": {"b": 1, "c": [1, 2, 3]}, "d": 2, "size": [40, 56]}) == []
    assert conversion.differences(before, {"a": {"b": 3, "c": [2]}, "size": [56, 40]}) == [
        "a.b: 1 -> 3",
        "a.c: differs",
        "d: 2 -> None",
        "size: [40, 56] -> [56, 40]",
    ]


def test_every_keyframe_is_found_by_its_token_with_the_notes_or_without(converted, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(converted, bare, ignore=shutil.ignore_patterns("conversion"))
    cut, turned = (Path(shutil.copytree(converted, tmp_path / name)) for name in ("cut", "turned"))
    for notes in cut.glob("conversion/*.array_record-*"):
        notes.write_text("{")
    for notes in turned.glob("conversion/*.array_record-*"):
        noted = json.loads(notes.read_text())
        notes.write_text(json.dumps(noted | {"tokens": noted["tokens"][::-1]}))
    for folder in (converted, bare, cut, turned):
        for split in ("train", "val", "all"):
            records = open_records(folder, split)
            for index, record in enumerate(iterate(folder, split)):
                assert keyframe_index(records, record["token"]) == index
        with pytest.raises(DataError, match="has no keyframe 'nope' in split all"):
            keyframe_index(records, "nope")


def test_leftovers_of_a_run_killed_before_its_plan_are_no_obstacle(dataroot, tmp_path):
    (tmp_path / "out" / "conversion").mkdir(parents=True)
    (tmp_path / "out" / "conversion" / "plan.json.partial").write_text("{")
    assert convert_tiny(dataroot, tmp_path / "out")["records"] == SCENES * KEYFRAMES


def test_scene_units_survive_pickling(dataroot, tmp_path):
    """What a distributed runner needs: the unit goes out, the facts come back, nothing else is shared."""
    scene = next(read_scenes(read_tables(dataroot, VERSION)))
    unit = SceneUnit(
        dataroot=dataroot,
        scene=PackedScene.pack(scene),
        files=scan_scene(dataroot, scene),
        keyframes=(1, 3),
        shard=tmp_path / "shard",
        mask_folder=tmp_path,
        render_missing=False,
        render_size=None,
        image_size=None,
        seed=0,
    )
    result = convert_scene(pickle.loads(pickle.dumps(unit)))
    assert result.tokens == (scene.keyframes[1].token, scene.keyframes[3].token)
    assert result.shard.records == 2
    assert pickle.loads(pickle.dumps(result)) == result


def test_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *_):
            pass

        def write(self, record):
            raise RuntimeError("write() failed: No space left on device; writing x; at byte 1040384")

        def close(self):
            pass

    monkeypatch.setattr(records_folder, "ArrayRecordWriter", Full)
    with pytest.raises(SpaceDriveError, match=r"cannot write .*shard: the disk is full: free some space"):
        records_folder.write_shard(tmp_path / "shard", [b"record"])
    assert not list(tmp_path.iterdir())

"""Reading the tables: what is kept, and one clear error for each kind of broken table."""

import pickle

import pytest

from data_prep.nuscenes.scenes import read_scenes
from data_prep.nuscenes.tables import FIELDS, LINKS, read_tables
from spacedrive_jax.console import UserError
from tests.data_prep.tiny_nuscenes import VERSION, TinyNuScenes, token


def test_keeps_keyframe_rows_only(tiny, tmp_path):
    sweep = dict(
        tiny.tables["sample_data"][0], token="sweep", is_key_frame=False, ego_pose_token="sweep-pose"
    )
    tiny.tables["sample_data"].append(sweep)
    tiny.tables["ego_pose"].append(dict(tiny.tables["ego_pose"][0], token="sweep-pose"))
    tables = read_tables(tiny.write(tmp_path / "n"), VERSION)
    assert set(tables.rows) == set(FIELDS)
    assert "sweep" not in tables["sample_data"]
    assert "sweep-pose" not in tables["ego_pose"]


def test_missing_version_names_those_found(dataroot):
    with pytest.raises(UserError, match=f"v1.0-nope does not exist; versions found .*{VERSION}"):
        read_tables(dataroot, "v1.0-nope")


def test_missing_tables_are_named(dataroot):
    (dataroot / VERSION / "instance.json").unlink()
    (dataroot / VERSION / "map.json").unlink()
    with pytest.raises(UserError, match=r"lacks instance\.json, map\.json"):
        read_tables(dataroot, VERSION)


@pytest.mark.parametrize("content", ["[{", '{"token": "a"}', "[1]"])
def test_unreadable_table_is_named(dataroot, content):
    (dataroot / VERSION / "sample.json").write_text(content)
    with pytest.raises(UserError, match=r"sample\.json"):
        read_tables(dataroot, VERSION)


@pytest.mark.parametrize(("table", "field"), [(table, field) for table in LINKS for field in LINKS[table]])
def test_broken_link_names_table_row_and_field(tiny, tmp_path, table, field):
    row = tiny.tables[table][0]
    row[field] = "nowhere"
    with pytest.raises(UserError, match=f"broken link: {table}.json row '{row['token']}', field '{field}'"):
        read_tables(tiny.write(tmp_path / "n"), VERSION)


@pytest.mark.parametrize(
    ("table", "field", "value"),
    [
        ("sample", "timestamp", "noon"),
        ("ego_pose", "rotation", [1.0, 0.0, 0.0]),
        ("ego_pose", "translation", [float("nan"), 0.0, 0.0]),
        ("sample_annotation", "size", None),
        ("sample_data", "is_key_frame", 1),
        ("map", "log_tokens", "log"),
    ],
)
def test_wrong_value_names_table_row_and_field(tiny, tmp_path, table, field, value):
    tiny.tables[table][0][field] = value
    row = tiny.tables[table][0]["token"]
    with pytest.raises(UserError, match=f"{table}.json: row '{row}', field '{field}'"):
        read_tables(tiny.write(tmp_path / "n"), VERSION)


def test_missing_field_is_named(tiny, tmp_path):
    del tiny.tables["scene"][1]["nbr_samples"]
    with pytest.raises(UserError, match=r"scene.json: row .* has no field 'nbr_samples'"):
        read_tables(tiny.write(tmp_path / "n"), VERSION)


def test_token_occurring_twice(tiny, tmp_path):
    tiny.tables["log"] *= 2
    with pytest.raises(UserError, match=r"log.json: token .* occurs twice"):
        read_tables(tiny.write(tmp_path / "n"), VERSION)


def spoil_count(tiny: TinyNuScenes) -> None:
    tiny.tables["scene"][0]["nbr_samples"] += 1


def spoil_chain(tiny: TinyNuScenes) -> None:
    tiny.tables["sample"][3]["next"] = tiny.tables["sample"][1]["token"]


def spoil_order(tiny: TinyNuScenes) -> None:
    tiny.tables["sample"][2]["timestamp"] = tiny.tables["sample"][1]["timestamp"]


def spoil_sensor(tiny: TinyNuScenes) -> None:
    tiny.tables["sample_data"].pop(0)


def spoil_intrinsics(tiny: TinyNuScenes) -> None:
    tiny.tables["calibrated_sensor"][0]["camera_intrinsic"] = [[1.0, 0.0], [0.0, 1.0]]


def spoil_instance(tiny: TinyNuScenes) -> None:
    tiny.tables["sample_annotation"][0]["next"] = token(tiny.scene_names[1], "car", 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_count, "scene-0001 declares 9 keyframes"),
        (spoil_chain, "scene-0001 declares 8 keyframes"),
        (spoil_order, "not later in time"),
        (spoil_sensor, "has no CAM_FRONT row"),
        (spoil_intrinsics, "'camera_intrinsic' is not a 3 x 3 matrix"),
        (spoil_instance, "field 'next' leaves its scene scene-0001"),
    ],
)
def test_inconsistent_scene(tiny, tmp_path, spoil, message):
    spoil(tiny)
    tables = read_tables(tiny.write(tmp_path / "n"), VERSION)
    with pytest.raises(UserError, match=message):
        list(read_scenes(tables))


def test_digests_follow_content(tiny, tmp_path):
    before = read_tables(tiny.write(tmp_path / "a"), VERSION)
    tiny.tables["scene"][0]["description"] = "changed"
    after = read_tables(tiny.write(tmp_path / "b"), VERSION)
    assert [name for name in FIELDS if before.digests[name] != after.digests[name]] == ["scene"]


def test_scene_is_plain_and_in_order(dataroot):
    scenes = list(read_scenes(read_tables(dataroot, VERSION)))
    assert [scene.name for scene in scenes] == ["scene-0001", "scene-0002", "scene-0003"]
    scene = scenes[1]
    times = [keyframe.timestamp_us for keyframe in scene.keyframes]
    assert times == sorted(times)
    assert pickle.loads(pickle.dumps(scene)) == scene
    # Keyframe 4 sees the car only.
    assert [len(keyframe.annotations) for keyframe in scene.keyframes] == [2, 2, 2, 2, 1, 2, 2, 2]
    car = scene.annotations[scene.keyframes[0].annotations[0]]
    assert scene.annotations[car.next].keyframe == 1
    assert scene.annotations[car.next].instance_token == car.instance_token

"""Reading the tables: what is kept, and one clear error for each kind of broken table."""

import pickle

import pytest

from data_prep.nuscenes.scenes import PackedScene, read_scenes
from data_prep.nuscenes.tables import LINKS, TABLES, EgoPose, SampleAnnotation, SampleData, read_tables
from spacedrive_jax.errors import SpaceDriveError
from tests.data_prep.tiny_nuscenes import VERSION, TinyNuScenes, token


def test_keeps_keyframe_rows_only(tiny, tmp_path):
    sweep = dict(
        tiny.tables["sample_data"][0], token="sweep", is_key_frame=False, ego_pose_token="sweep-pose"
    )
    tiny.tables["sample_data"].append(sweep)
    tiny.tables["ego_pose"].append(dict(tiny.tables["ego_pose"][0], token="sweep-pose"))
    tables = read_tables(tiny.write(tmp_path / "n"), VERSION)
    assert set(tables.rows) == set(TABLES)
    assert "sweep" not in tables[SampleData]
    assert "sweep-pose" not in tables[EgoPose]


@pytest.mark.parametrize("size", [64, 700, 5000])
def test_tables_read_in_blocks_are_the_same(tiny, tmp_path, monkeypatch, size):
    tiny.tables["scene"][0]["description"] = 'looks like },{"token": the end [of a row'
    tiny.tables["category"].append({"token": "x", "name": "{},{}"})
    root = tiny.write(tmp_path / "n")
    whole = read_tables(root, VERSION)
    monkeypatch.setattr("data_prep.nuscenes.tables.BLOCK_BYTES", size)
    pieces = read_tables(root, VERSION)
    assert pieces == whole
    assert list(read_scenes(pieces)) == list(read_scenes(whole))
    tiny.tables["sample_annotation"][-1]["size"] = [1.0, -2.0, 3.0]
    name = tiny.tables["sample_annotation"][-1]["token"]
    with pytest.raises(SpaceDriveError, match=f"row '{name}', field 'size'"):
        read_tables(tiny.write(tmp_path / "wrong"), VERSION)


def test_a_token_that_many_rows_name_is_kept_once(dataroot):
    rows = read_tables(dataroot, VERSION)[SampleAnnotation]
    followed = next(row for row in rows.values() if row.next)
    assert rows[followed.next].prev is followed.token
    assert followed.next is rows[followed.next].token


def test_packed_scenes_are_the_same(dataroot):
    for scene in read_scenes(read_tables(dataroot, VERSION)):
        packed = PackedScene.pack(scene)
        assert packed.unpack() == scene
        assert packed.num_keyframes == len(scene.keyframes)


def test_missing_version_names_those_found(dataroot):
    tables = rf"is a folder of tables: give --dataroot {dataroot} --version {VERSION}"
    with pytest.raises(SpaceDriveError, match=tables):
        read_tables(dataroot / VERSION, VERSION)
    with pytest.raises(SpaceDriveError, match=f"v1.0-nope does not exist; versions found .*{VERSION}"):
        read_tables(dataroot, "v1.0-nope")


def test_missing_tables_are_named(dataroot):
    (dataroot / VERSION / "instance.json").unlink()
    (dataroot / VERSION / "map.json").unlink()
    with pytest.raises(SpaceDriveError, match=r"lacks instance\.json, map\.json"):
        read_tables(dataroot, VERSION)


@pytest.mark.parametrize("content", ["[{", '{"token": "a"}', "[1]", "[" * 5000, "", "\udcff"])
def test_unreadable_table_is_named(dataroot, content):
    (dataroot / VERSION / "sample.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(SpaceDriveError, match=r"sample\.json"):
        read_tables(dataroot, VERSION)


@pytest.mark.parametrize(("table", "field"), [(table, field) for table in LINKS for field in LINKS[table]])
def test_broken_link_names_table_row_and_field(tiny, tmp_path, table, field):
    row = tiny.tables[table][0]
    row[field] = "nowhere"
    with pytest.raises(
        SpaceDriveError, match=f"broken link: {table}.json row '{row['token']}', field '{field}'"
    ):
        read_tables(tiny.write(tmp_path / "n"), VERSION)


@pytest.mark.parametrize(
    ("table", "field", "value"),
    [
        ("sample", "timestamp", "noon"),
        ("ego_pose", "rotation", [1.0, 0.0, 0.0]),
        ("ego_pose", "translation", [float("nan"), 0.0, 0.0]),
        ("sample_annotation", "size", None),
        ("calibrated_sensor", "camera_intrinsic", [[1.0, 0.0], [0.0, 1.0]]),
        ("sample_data", "is_key_frame", 1),
        ("map", "log_tokens", "log"),
        ("calibrated_sensor", "camera_intrinsic", [[float("nan"), 0, 16], [0, 25, 9], [0, 0, 1]]),
        ("calibrated_sensor", "translation", [1e6, 0, 0]),
        ("calibrated_sensor", "rotation", [0.0, 0.0, 0.0, 0.0]),
        ("ego_pose", "translation", [1e12, 0, 0]),
        ("ego_pose", "rotation", [1.0, 1.0, 0.0, 0.0]),
        ("sample_annotation", "size", [-1, 0, 0]),
        ("sample_annotation", "size", [1, float("inf"), 1]),
        ("sample_annotation", "size", [190, 450, 160]),
        ("sample_annotation", "num_lidar_pts", -1),
        ("sample", "timestamp", 10**18),
        ("sample", "timestamp", -1),
        ("sample", "timestamp", 1.5),
        ("sample_data", "width", 10**6),
        ("scene", "name", "../../etc/passwd"),
        ("log", "location", "../town"),
        ("scene", "nbr_samples", 10**12),
    ],
)
def test_wrong_value_names_table_row_and_field(tiny, tmp_path, table, field, value):
    tiny.tables[table][0][field] = value
    row = tiny.tables[table][0]["token"]
    with pytest.raises(SpaceDriveError, match=f"{table}.json: row '{row}', field '{field}'"):
        read_tables(tiny.write(tmp_path / "n"), VERSION)


def test_missing_field_is_named(tiny, tmp_path):
    del tiny.tables["scene"][1]["nbr_samples"]
    with pytest.raises(SpaceDriveError, match=r"scene.json: row .* has no field 'nbr_samples'"):
        read_tables(tiny.write(tmp_path / "n"), VERSION)


def test_token_occurring_twice(tiny, tmp_path):
    tiny.tables["log"] *= 2
    with pytest.raises(SpaceDriveError, match=r"log.json: token .* occurs twice"):
        read_tables(tiny.write(tmp_path / "n"), VERSION)


def spoil_count(tiny: TinyNuScenes) -> None:
    tiny.tables["scene"][0]["nbr_samples"] += 1


def spoil_chain(tiny: TinyNuScenes) -> None:
    tiny.tables["sample"][3]["next"] = tiny.tables["sample"][1]["token"]


def spoil_order(tiny: TinyNuScenes) -> None:
    tiny.tables["sample"][2]["timestamp"] = tiny.tables["sample"][1]["timestamp"]


def spoil_sensor(tiny: TinyNuScenes) -> None:
    tiny.tables["sample_data"].pop(0)


def spoil_focal_length(tiny: TinyNuScenes) -> None:
    tiny.tables["calibrated_sensor"][0]["camera_intrinsic"] = [[-25.0, 0, 16], [0, 25.0, 9], [0, 0, 1]]


def spoil_with_a_circle(tiny: TinyNuScenes) -> None:
    tiny.tables["sample"][1]["next"] = tiny.tables["sample"][0]["token"]
    tiny.tables["scene"][0]["nbr_samples"] = 10**9


def spoil_back_link(tiny: TinyNuScenes) -> None:
    tiny.tables["sample"][3]["prev"] = tiny.tables["sample"][1]["token"]


def spoil_first(tiny: TinyNuScenes) -> None:
    tiny.tables["sample"][0]["prev"] = tiny.tables["sample"][1]["token"]


def spoil_ego(tiny: TinyNuScenes) -> None:
    lidar = next(row for row in tiny.tables["sample_data"][7:] if "LIDAR" in row["filename"])
    pose = next(row for row in tiny.tables["ego_pose"] if row["token"] == lidar["ego_pose_token"])
    pose["translation"] = [5000.0, 0.0, 0.0]


def spoil_agents(tiny: TinyNuScenes) -> None:
    """Two agents that go on as each other."""
    rows = tiny.tables["sample_annotation"]
    car, walker = (next(row for row in rows if row["token"] == token("scene-2001", who, 0)) for who in AGENTS)
    car["next"], walker["next"] = walker["next"], car["next"]


def spoil_agent_order(tiny: TinyNuScenes) -> None:
    row = tiny.tables["sample_annotation"][0]
    row["next"] = row["token"]


def spoil_box_place(tiny: TinyNuScenes) -> None:
    tiny.tables["sample_annotation"][0]["translation"] = [1e6, 0, 0]


def spoil_sensor_time(tiny: TinyNuScenes) -> None:
    tiny.tables["sample_data"][0]["timestamp"] += 10**8


def spoil_image_size(tiny: TinyNuScenes) -> None:
    tiny.tables["sample_data"][0]["width"] = 0


def spoil_image_name(tiny: TinyNuScenes) -> None:
    tiny.tables["sample_data"][0]["filename"] = "../../secret.jpg"


def spoil_lidar_name(tiny: TinyNuScenes) -> None:
    next(row for row in tiny.tables["sample_data"] if "LIDAR" in row["filename"])["filename"] = "/etc/passwd"


def spoil_mask_name(tiny: TinyNuScenes) -> None:
    tiny.tables["map"][0]["filename"] = "maps/../../mask.png"


def spoil_rotations(tiny: TinyNuScenes) -> None:
    """As x y z w, which other libraries write."""
    for row in tiny.tables["ego_pose"]:
        row["rotation"] = row["rotation"][1:] + row["rotation"][:1]


def spoil_mount(tiny: TinyNuScenes) -> None:
    """Half way round, as x y z w: it stands on its head."""
    _camera(tiny, "CAM_BACK")["rotation"] = [-0.5, -0.5, 0.5, 0.5]


def spoil_mounts_names(tiny: TinyNuScenes) -> None:
    """To the left, 55 degrees."""
    _camera(tiny, "CAM_FRONT_RIGHT")["rotation"] = [0.6744, -0.6744, 0.2126, -0.2126]


def spoil_principal_point(tiny: TinyNuScenes) -> None:
    _camera(tiny, "CAM_FRONT")["camera_intrinsic"] = [[1266.4, 0, 816.3], [0, 1266.4, 491.5], [0, 0, 1]]


def spoil_unit_of_time(tiny: TinyNuScenes) -> None:
    for row in tiny.tables["sample"] + tiny.tables["sample_data"]:
        row["timestamp"] //= 1000


def _camera(tiny: TinyNuScenes, channel: str) -> dict:
    sensor = next(row["token"] for row in tiny.tables["sensor"] if row["channel"] == channel)
    return next(row for row in tiny.tables["calibrated_sensor"] if row["sensor_token"] == sensor)


AGENTS = ("car", "walker")


def spoil_instance(tiny: TinyNuScenes) -> None:
    tiny.tables["sample_annotation"][0]["next"] = token(tiny.scene_names[1], "car", 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_count, "scene-2001 declares 9 keyframes"),
        (spoil_chain, "scene-2001 declares 8 keyframes"),
        (spoil_order, "not later in time"),
        (spoil_sensor, "has no CAM_FRONT row.*--missing-images is about files"),
        (spoil_focal_length, "'camera_intrinsic'.* is no camera matrix"),
        (spoil_with_a_circle, "scene-2001 declares 1000000000 keyframes"),
        (spoil_back_link, "field 'prev' names"),
        (spoil_first, "is the first of scene-2001"),
        (spoil_ego, "LIDAR_TOP pose|no vehicle does that"),
        (spoil_agents, "of another agent"),
        (spoil_agent_order, "does not name it back"),
        (spoil_box_place, "field 'translation'.*from the vehicle"),
        (spoil_sensor_time, "field 'timestamp'.* s off its keyframe"),
        (spoil_image_size, "0x18 is no image"),
        (spoil_image_name, r"field 'filename': '\.\./\.\./secret\.jpg' does not stay inside"),
        (spoil_lidar_name, "field 'filename': '/etc/passwd' does not stay inside"),
        (spoil_mask_name, "map.json: row .* does not stay inside"),
        (spoil_instance, "field 'next' leaves its scene scene-2001"),
        (spoil_rotations, "scene-2001 the vehicle moves against or across its heading in 5 of 7 steps"),
        (spoil_mount, r"\(CAM_BACK\), field 'rotation': .*, upside down: is it w x y z"),
        (spoil_mounts_names, r"\(CAM_FRONT_RIGHT\), field 'rotation': by .* along \[0.57, 0.82, -?0.00\]"),
        (spoil_principal_point, r"\(CAM_FRONT\), field 'camera_intrinsic' has the principal point at"),
        (spoil_unit_of_time, "keyframes of scene-2001 are 0.0005 s apart"),
    ],
)
def test_inconsistent_scene(tiny, tmp_path, spoil, message):
    spoil(tiny)
    tables = read_tables(tiny.write(tmp_path / "n"), VERSION)
    with pytest.raises(SpaceDriveError, match=message):
        list(read_scenes(tables))


def test_digests_follow_content(tiny, tmp_path):
    before = read_tables(tiny.write(tmp_path / "a"), VERSION)
    tiny.tables["scene"][0]["description"] = "changed"
    after = read_tables(tiny.write(tmp_path / "b"), VERSION)
    assert [name for name in TABLES if before.digests[name] != after.digests[name]] == ["scene"]


def test_scene_is_plain_and_in_order(dataroot):
    scenes = list(read_scenes(read_tables(dataroot, VERSION)))
    assert [scene.name for scene in scenes] == ["scene-2001", "scene-2002", "scene-2003"]
    scene = scenes[1]
    times = [keyframe.timestamp_us for keyframe in scene.keyframes]
    assert times == sorted(times)
    assert pickle.loads(pickle.dumps(scene)) == scene
    # Keyframe 4 sees the car only.
    assert [len(keyframe.annotations) for keyframe in scene.keyframes] == [2, 2, 2, 2, 1, 2, 2, 2]
    car = scene.annotations[scene.keyframes[0].annotations[0]]
    assert scene.annotations[car.next].keyframe == 1
    assert scene.annotations[car.next].instance_token == car.instance_token

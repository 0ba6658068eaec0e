"""Bench2Drive clips: the world, written in CARLA's axes and converted back, is the same."""

import functools
import gzip
import json
import math
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.beam import convert_and_note, do_unit_file
from data_prep.bench2drive.annotations import category_of
from data_prep.bench2drive.clip_records import ClipUnit, convert_clip
from data_prep.bench2drive.clips import VALIDATION, Clip, find_clips, split_clips
from data_prep.bench2drive.convert import ClipConversion
from data_prep.synthesize.bench2drive import (
    ClipJob,
    ego_pose,
    frame_time,
    record_clip,
    route_nodes,
    script,
)
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.records import open_records
from spacedrive_jax.driving.bench2drive_rig import camera_to_ego
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.world import can_bus, stage

KEYFRAMES = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips, in two towns, one turning left and one right."""
    root = tmp_path_factory.mktemp("bench2drive")
    for index in range(2):
        record_clip(job(index, root))
    return root


def job(index, root=None):
    return ClipJob(index, 0, KEYFRAMES, (36, 64), root)


@pytest.fixture(scope="module")
def records(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("records") / "records"
    facts = ClipConversion(dataroot=folder, out=out).run()
    everything = open_records(out, "all")
    return [everything[index] for index in range(len(everything))], facts, out


@pytest.fixture(scope="module")
def worlds():
    return {index: script(job(index)) for index in range(2)}


def clip_of(record):
    return int(record["scene_name"].split("_Route")[1].split("_")[0]) - 1


def number_of(record):
    return int(record["token"].rsplit("-", 1)[1])


def test_what_is_there_and_what_is_missing(records):
    found, facts, _ = records
    assert facts["splits"] == {"train": 9, "val": 8} or facts["splits"] == {"train": 8, "val": 9}
    assert facts["split_rule"] == "hashed"
    # Of the second clip a keyframe is missing; so are three frames of each clip that are none.
    numbers = {index: [number_of(one) for one in found if clip_of(one) == index] for index in range(2)}
    assert numbers[0] == list(range(0, 45, 5))
    assert numbers[1] == [0, 5, *range(15, 45, 5)]
    assert facts["counts"]["frames_missing"] == 7
    assert facts["counts"]["unknown_theta"] == 2
    assert facts["counts"]["unknown_speed"] == 1
    assert all(one["timestamp_us"] == number_of(one) * 100_000 for one in found)


def test_poses_waypoints_and_path_are_the_worlds(records, worlds):
    for record in records[0]:
        index, number = clip_of(record), number_of(record)
        there = set(job(index).frames)
        pose = ego_pose(worlds[index], number)
        np.testing.assert_allclose(record["ego_to_global"], pose, atol=1e-6)
        for row in range(6):
            later = number + 5 * (row + 1)
            assert record["waypoint_mask"][row] == (later in there)
            if later in there:
                wanted = np.linalg.inv(pose) @ ego_pose(worlds[index], later)
                np.testing.assert_allclose(record["waypoints"][row], wanted[:2, 3], atol=1e-6)
                yaw = math.atan2(wanted[1, 0], wanted[0, 0])
                assert record["waypoint_yaw"][row] == pytest.approx(yaw, abs=1e-6)
        for row in range(2):
            before = number - 5 * (row + 1)
            assert record["past_mask"][row] == (before in there)
            if before in there:
                wanted = np.linalg.inv(pose) @ ego_pose(worlds[index], before)
                np.testing.assert_allclose(record["past_to_ego"][row], wanted, atol=1e-6)
                assert record["past_timestamp_us"][row] == before * 100_000


def test_a_missing_frame_does_not_shift_time(records):
    """Rows of a list would take the frame behind the gap for the missing one."""
    record = next(one for one in records[0] if clip_of(one) == 1 and number_of(one) == 5)
    assert record["waypoint_mask"].tolist() == [False, True, True, True, True, True]
    assert record["waypoint_timestamp_us"].tolist() == [0, *range(1_500_000, 4_000_000, 500_000)]


def test_ego_status(records, worlds):
    for record in records[0]:
        index, number = clip_of(record), number_of(record)
        state = can_bus.ego_state(worlds[index], frame_time(number))
        half = state["yaw"] / 2
        quaternion = np.array([math.cos(half), 0, 0, math.sin(half)])
        quaternion *= 1 if quaternion[0] >= 0 else -1
        # The speedometer said nothing at the fifth frame of the first clip.
        speed = 0.0 if (index, number) == (0, 5) else state["speed"]
        lateral = state["speed"] * state["yaw_rate"]
        wanted = [*quaternion, state["acceleration"], lateral, 9.81, 0, 0, state["yaw_rate"], speed, 0, 0]
        np.testing.assert_allclose(record["can_bus"], wanted, atol=1e-6)
        assert record["can_bus_valid"]


def test_agents(records, worlds):
    alike = 0
    for record in records[0][::3]:
        index, number = clip_of(record), number_of(record)
        world, to_ego = worlds[index], np.linalg.inv(ego_pose(worlds[index], number))
        people = [
            *stage.moving_participants(world, frame_time(number)),
            *stage.standing_participants(world),
        ]
        assert record["agent_boxes"].shape[0] == len(record["agent_token"]) > 5
        yaw = math.atan2(to_ego[1, 0], to_ego[0, 0])
        for row, token in enumerate(record["agent_token"]):
            person = people[int(token.split("/")[1]) - 1]
            x, y, heading = person.pose
            centre = to_ego @ [x, y, person.size[2] / 2, 1]
            box = record["agent_boxes"][row]
            np.testing.assert_allclose(box[:3], centre[:3], atol=1e-6)
            np.testing.assert_allclose(box[3:6], person.size, atol=1e-6)
            assert math.remainder(box[6] - heading - yaw, 2 * math.pi) == pytest.approx(0, abs=1e-6)
            category = record["agent_category"][row]
            alike += category == person.category
            if category.startswith("vehicle"):
                velocity = person.speed * np.array([math.cos(box[6]), math.sin(box[6])])
                np.testing.assert_allclose(record["agent_velocity"][row], velocity, atol=1e-6)
            elif category.startswith("human") and not np.isnan(record["agent_velocity"][row]).any():
                # From positions 0.1 s apart; CARLA says 0.
                assert np.hypot(*record["agent_velocity"][row]) == pytest.approx(person.speed, abs=0.35)
            if record["agent_future_mask"][row, 0]:
                later = next(
                    one
                    for one in [
                        *stage.moving_participants(world, frame_time(number + 5)),
                        *stage.standing_participants(world),
                    ]
                    if one.key == person.key
                )
                moved = to_ego[:2, :2] @ (np.array(later.pose[:2]) - [x, y])
                np.testing.assert_allclose(record["agent_future"][row, 0], moved, atol=1e-6)
    assert alike > 20


def test_calibration_and_pictures(records):
    record = records[0][0]
    for row, name in enumerate(CAMERAS):
        np.testing.assert_allclose(record["camera_to_ego"][row], camera_to_ego(name), atol=1e-9)
    assert record["image_size"].tolist() == [[36, 64]] * 6
    assert all(image.startswith(b"\xff\xd8") for image in record["images"])
    assert len(set(record["images"])) == 6
    assert record["exact_depth"] == [b""] * 6
    assert record["drivable_source"] == "none"


def test_path_goes_on_along_the_whole_clip(records, worlds):
    for record in records[0][::4]:
        index, number = clip_of(record), number_of(record)
        frames = [one for one in job(index).frames if one >= number]
        to_ego = np.linalg.inv(ego_pose(worlds[index], number))
        driven = np.array([(to_ego @ ego_pose(worlds[index], one))[:2, 3] for one in frames])
        length = np.hypot(*np.diff(driven, axis=0).T).sum() if len(frames) > 1 else 0.0
        assert abs(int(record["path_mask"].sum()) - min(int(length), 50)) <= 1
        for point in record["path"][record["path_mask"]]:
            assert np.hypot(*(driven - point).T).min() < 1.0


def test_route(records, worlds):
    said = {0: set(), 1: set()}
    for record in records[0]:
        index, number = clip_of(record), number_of(record)
        said[index].add(int(record["command_route"]))
        nodes, _ = route_nodes(worlds[index].ego.route, float(worlds[index].ego.start))
        to_ego = np.linalg.inv(ego_pose(worlds[index], number))
        in_ego = nodes @ to_ego[:2, :2].T + to_ego[:2, 3]
        for target in record["target_points"]:
            assert np.hypot(*(in_ego - target).T).min() < 1e-6
        assert record["route_valid"]
    assert 1 in said[0]  # turns left
    assert 2 in said[1]  # turns right


def test_same_bytes_from_folders_tars_and_workers(folder, records, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    for clip in find_clips(folder):
        with tarfile.open(tars / f"{clip.name}.tar.gz", "w:gz", compresslevel=1) as archive:
            archive.add(clip.path, arcname=f"deeper/{clip.name}")
    facts = ClipConversion(dataroot=tars, out=tmp_path / "records", workers=2).run()
    assert facts["fingerprint"] == records[1]["fingerprint"]


def test_a_beam_worker_converts_a_clip(folder, records, tmp_path):
    """What a worker gets is a file with the function and the unit; its shard is the one of any other way."""
    clip = find_clips(folder)[0]
    shard = sorted(records[2].glob("*.array_record-*"))[0]
    unit = ClipUnit(clip, 0, "stop", tmp_path / "out" / shard.name).resolved()
    unit.shard.parent.mkdir()
    (unit.shard.parent / "conversion").mkdir()
    file = tmp_path / f"{shard.name}.unit"
    file.write_bytes(pickle.dumps((functools.partial(convert_and_note, convert_clip), unit)))
    do_unit_file(str(file))
    same = [one for one in records[2].glob("*.array_record-*") if one.read_bytes() == unit.shard.read_bytes()]
    assert len(same) == 1


def test_goes_on_after_an_interruption(folder, records, tmp_path):
    out = tmp_path / "records"
    shutil.copytree(records[2], out)
    (out / "provenance.json").unlink()
    shard = sorted(out.glob("*.array_record-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    facts = ClipConversion(dataroot=folder, out=out, resume=True).run()
    assert facts["fingerprint"] == records[1]["fingerprint"]
    other = ClipConversion(dataroot=folder, out=out, resume=True, offset=1)
    with pytest.raises(SpaceDriveError, match="offset: 0 -> 1"):
        other.run()


def test_damage_is_named(folder, tmp_path):
    clip = shutil.copytree(find_clips(folder)[0].path, tmp_path / "data" / "clip")
    run = ClipConversion(dataroot=tmp_path / "data", out=tmp_path / "records")

    def broken(change):
        path = clip / "anno" / "00015.json.gz"
        whole = path.read_bytes()
        anno = json.loads(gzip.decompress(whole))
        change(anno)
        path.write_bytes(gzip.compress(json.dumps(anno).encode()))
        try:
            with pytest.raises(DataError) as error:
                run.run()
        finally:
            path.write_bytes(whole)
            shutil.rmtree(tmp_path / "records", ignore_errors=True)
        assert "00015" in str(error.value)
        return str(error.value)

    assert "command_near 9 is no RoadOption" in broken(lambda anno: anno.update(command_near=9))
    assert "lacks the ego vehicle" in broken(lambda anno: anno.update(bounding_boxes=[]))
    assert "world2ego must be 4x4" in broken(lambda anno: anno["bounding_boxes"][0].pop("world2ego"))
    nowhere = [[1e308, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert "world2ego must be 4x4" in broken(lambda anno: anno["bounding_boxes"][0].update(world2ego=nowhere))
    flat = [[0] * 4] * 3 + [[0, 0, 0, 1]]
    assert "world2ego is no pose" in broken(lambda anno: anno["bounding_boxes"][0].update(world2ego=flat))
    centimetres = np.diag([100.0, 100, 100, 1]).tolist()
    camera = functools.partial(lambda anno, **fields: anno["sensors"]["CAM_BACK"].update(fields))
    assert "cam2ego is no pose" in broken(functools.partial(camera, cam2ego=centimetres))
    mirrored = np.diag([1.0, -1, 1, 1]).tolist()
    assert "cam2ego is no pose" in broken(functools.partial(camera, cam2ego=mirrored))
    assert "is no camera matrix" in broken(functools.partial(camera, intrinsic=np.zeros((3, 3)).tolist()))
    assert "[0, 64] are no picture's" in broken(functools.partial(camera, image_size_x=0, image_size_y=64))
    far = np.eye(4) + np.eye(4, k=3) * 5000
    assert "no vehicle does that" in broken(
        lambda anno: anno["bounding_boxes"][0].update(world2ego=far.tolist())
    )
    inside_out = [-1, 1, 1]
    assert "extent [-1.0, 1.0, 1.0] is below 0" in broken(
        lambda anno: anno["bounding_boxes"][1].update(extent=inside_out)
    )
    assert "sensors lacks CAM_BACK" in broken(lambda anno: anno["sensors"].pop("CAM_BACK"))
    assert "extent must be 3 finite" in broken(lambda anno: anno["bounding_boxes"][1].update(extent=[1, 2]))

    (clip / "anno" / "00020.json.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="is no gzip file"):
        run.run()


def test_missing_pictures(folder, tmp_path):
    clip = shutil.copytree(find_clips(folder)[0].path, tmp_path / "data" / "clip")
    (clip / "camera" / "rgb_back" / "00010.jpg").unlink()
    picture = clip / "camera" / "rgb_front" / "00020.jpg"
    picture.write_bytes(picture.read_bytes()[:-50])

    def run(missing):
        out = tmp_path / missing
        return ClipConversion(dataroot=tmp_path / "data", out=out, missing_images=missing).run()

    with pytest.raises(DataError, match="CAM_BACK picture of frame 00010 is missing"):
        run("stop")
    assert not list((tmp_path / "stop").glob("*.array_record-*"))
    skipped, kept = run("skip"), run("empty")
    assert (skipped["records"], skipped["skipped"]) == (kept["records"] - 2, 2)
    assert kept["counts"]["images_empty"] == 2


def test_sweeps_come_into_the_ego_frame(folder, tmp_path):
    laspy = pytest.importorskip("laspy", reason="requirements-bench2drive.txt is not installed")
    clip = shutil.copytree(find_clips(folder)[0].path, tmp_path / "data" / "clip")
    points = np.array([[10.0, 2.5, -1.8], [-4.25, -7.0, 0.5]])  # y to the right
    (clip / "lidar").mkdir()
    for number in (0, 1, 5):
        header = laspy.LasHeader(point_format=3, version="1.2")
        header.scales = np.full(3, 0.001)
        cloud = laspy.LasData(header)
        cloud.x, cloud.y, cloud.z = points.T + number
        cloud.write(str(clip / "lidar" / f"{number:05d}.laz"))
    run = ClipConversion(dataroot=tmp_path / "data", out=tmp_path / "records", lidar=True)
    assert run.run()["counts"]["lidar_present"] == 2
    found = open_records(tmp_path / "records", "all")
    sweep = np.frombuffer(found[1]["lidar"], np.float32).reshape(-1, 5)
    np.testing.assert_allclose(sweep[:, :3], (points + 5) * [1, -1, 1], atol=1e-3)
    np.testing.assert_array_equal(found[1]["lidar_to_ego"], np.eye(4))
    assert found[2]["lidar"] == b""

    (clip / "lidar" / "00005.laz").write_bytes(b"LASF" + bytes(300))
    again = ClipConversion(dataroot=tmp_path / "data", out=tmp_path / "other", lidar=True)
    with pytest.raises(DataError, match=r"lidar/00005\.laz is no whole LAZ file"):
        again.run()


def test_broken_tar_and_nothing_to_convert(folder, tmp_path):
    clip = find_clips(folder)[0]
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "clip.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(clip.path, arcname=clip.name)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="no whole tar file"):
        ClipConversion(dataroot=tmp_path / "data", out=tmp_path / "records").run()
    with tarfile.open(path, "w:gz") as archive:  # a whole set in one file
        for one in find_clips(folder):
            archive.add(one.path / "anno", arcname=f"{one.name}/anno")
    with pytest.raises(DataError, match=r"clip\.tar\.gz holds several clips \(.*_Route"):
        ClipConversion(dataroot=tmp_path / "data", out=tmp_path / "records").run()
    path.unlink()
    with pytest.raises(DataError, match="holds no clip"):
        ClipConversion(dataroot=tmp_path / "data", out=tmp_path / "other").run()
    with pytest.raises(ConfigError, match="0 to 4"):
        ClipConversion(dataroot=tmp_path, out=tmp_path / "x", offset=5).run()


def test_a_clip_that_is_given_itself_has_its_name(folder, monkeypatch):
    clip = find_clips(folder)[0]
    monkeypatch.chdir(clip.path)
    assert [one.name for one in find_clips(Path())] == [clip.name]
    monkeypatch.chdir(clip.path / "anno")
    assert [one.name for one in find_clips(Path(".."))] == [clip.name]


def test_official_split(tmp_path):
    assert len(VALIDATION) == 50
    names = [*sorted(VALIDATION)[:2], "Accident_Town03_Route101_Weather23"]
    splits, rule = split_clips([Clip(name, tmp_path) for name in names], 0)
    assert rule == "official"
    assert list(splits.values()) == ["val", "val", "train"]


@pytest.mark.parametrize(
    ("box", "category"),
    [
        ({"class": "ego_vehicle", "type_id": "vehicle.lincoln.mkz_2020"}, None),
        ({"class": "vehicle", "type_id": "vehicle.ford.ambulance"}, "vehicle.emergency.ambulance"),
        ({"class": "vehicle", "type_id": "vehicle.mercedes.sprinter", "base_type": "van"}, "vehicle.car"),
        ({"class": "vehicle", "type_id": "/Game/Carla/Static/Car/SM_Charger.SM_Charger"}, "vehicle.car"),
        ({"class": "vehicle", "type_id": "vehicle.diamondback.century"}, "vehicle.bicycle"),
        ({"class": "walker", "type_id": "walker.pedestrian.0012", "age": "child"}, "human.pedestrian.child"),
        ({"class": "traffic_sign", "type_id": "static.prop.constructioncone"}, "movable_object.trafficcone"),
        ({"class": "traffic_sign", "type_id": "static.prop.warningaccident"}, "movable_object.barrier"),
        ({"class": "traffic_sign", "type_id": "traffic.stop"}, None),
        ({"class": "traffic_light", "type_id": "traffic.traffic_light"}, None),
    ],
)  # fmt: skip
def test_categories(box, category):
    assert category_of(box) == category

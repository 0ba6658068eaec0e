"""The real nuScenes-mini pieces against values of the official devkit; skipped where they are absent."""

import json

import numpy as np
import pytest

from data_prep.cli import Convert
from spacedrive_jax.data.records import open_records


@pytest.fixture(scope="module")
def real_records(nuscenes_real, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "records"
    Convert(dataroot=nuscenes_real, version="v1.0-mini", out=out, missing_images="empty").run()
    records = open_records(out)
    return {record["token"]: record for record in (records[index] for index in range(len(records)))}


@pytest.fixture(scope="module")
def samples(nuscenes_real):
    return json.loads((nuscenes_real / "expected" / "samples.json").read_text())


def wrapped(angle):
    return (angle + np.pi) % (2 * np.pi) - np.pi


def test_every_keyframe_is_there(real_records):
    assert len(real_records) == 404
    assert len({record["scene_name"] for record in real_records.values()}) == 10


def test_ego_poses_past_and_future(real_records, samples, nuscenes_real):
    expected = np.load(nuscenes_real / "expected" / "ego.npz")
    for row, sample in enumerate(samples["samples"]):
        record = real_records[sample["token"]]
        assert record["scene_name"] == sample["scene"]
        assert record["location"] == sample["location"]
        assert record["frame_index"] == sample["frame"]
        assert record["timestamp_us"] == sample["timestamp"]
        np.testing.assert_allclose(
            record["ego_to_global"][:3, 3], expected["ego2global_translation"][row], atol=1e-9
        )
        np.testing.assert_array_equal(record["waypoint_mask"], expected["future_mask"][row].astype(bool))
        np.testing.assert_allclose(record["waypoints"], expected["future_xy"][row], atol=1e-9)
        np.testing.assert_allclose(
            wrapped(record["waypoint_yaw"] - expected["future_yaw"][row]), 0, atol=1e-9
        )
        seconds = (record["waypoint_timestamp_us"] - record["timestamp_us"]) * 1e-6
        seconds = np.where(record["waypoint_mask"], seconds, 0.0)
        np.testing.assert_allclose(seconds, expected["future_dt_s"][row], atol=1e-6)
        np.testing.assert_array_equal(record["past_mask"], expected["past_mask"][row][:2].astype(bool))
        np.testing.assert_allclose(record["past_to_ego"][:, :2, 3], expected["past_xy"][row][:2], atol=1e-9)


def test_agents(real_records, samples, nuscenes_real):
    expected = np.load(nuscenes_real / "expected" / "agents.npz")
    compared = 0
    for row, sample in enumerate(samples["samples"]):
        record = real_records[sample["token"]]
        rows = slice(expected["offsets"][row], expected["offsets"][row + 1])
        assert record["agent_token"] == [bytes(token).hex() for token in expected["instance_token"][rows]]
        assert record["agent_category"] == [samples["categories"][i] for i in expected["category"][rows]]
        boxes = expected["box_xyzlwhyaw"][rows]
        np.testing.assert_allclose(record["agent_boxes"][:, :6], boxes[:, :6], atol=2e-5)
        np.testing.assert_allclose(wrapped(record["agent_boxes"][:, 6] - boxes[:, 6]), 0, atol=1e-6)
        np.testing.assert_allclose(record["agent_velocity"], expected["velocity_xy"][rows], atol=1e-5)
        np.testing.assert_array_equal(record["agent_future_mask"], expected["future_mask"][rows].astype(bool))
        np.testing.assert_allclose(record["agent_future"], expected["future_disp_xy"][rows], atol=2e-5)
        yaw_error = wrapped(record["agent_future_yaw"] - expected["future_yaw"][rows])
        np.testing.assert_allclose(yaw_error, 0, atol=1e-6)
        np.testing.assert_array_equal(record["agent_lidar_points"], expected["num_lidar_pts"][rows])
        compared += len(boxes)
    assert compared == expected["offsets"][-1] > 5000


def test_drivable_area(real_records, nuscenes_real):
    expected = np.load(nuscenes_real / "expected" / "map_crops.npz")
    for token, mask in zip(expected["token"], expected["mask"], strict=True):
        record = real_records[str(token)]
        assert record["drivable_source"] == "mask"
        assert np.mean(record["drivable"] != mask) <= 0.005


def test_can_bus_and_files(real_records):
    with_can = {record["scene_name"] for record in real_records.values() if record["can_bus_valid"]}
    assert with_can == {"scene-0103"}
    photographed = [record for record in real_records.values() if all(record["images"])]
    assert len(photographed) == 1
    assert (photographed[0]["scene_name"], photographed[0]["frame_index"]) == ("scene-0061", 0)
    assert len(photographed[0]["lidar"]) % 20 == 0
    # CAN speed against the ego poses, for all keyframes but the first.
    for record in real_records.values():
        if record["scene_name"] == "scene-0103" and record["past_mask"][0]:
            seconds = (record["timestamp_us"] - record["past_timestamp_us"][0]) * 1e-6
            speed = np.linalg.norm(record["past_to_ego"][0, :2, 3]) / seconds
            assert abs(speed - record["can_bus"][10]) < 1.0

"""The written folder against the nuScenes schema, and its parts against each other."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
from scipy.spatial.transform import Rotation

from data_prep.synthesize.recorder import town_of
from data_prep.synthesize.tables import CATEGORIES, Row, visibility_token
from spacedrive_jax.world import can_bus, sensors
from tests.world.conftest import TINY

CHANNELS = {mount.channel for mount in sensors.CAMERA_MOUNTS} | {"LIDAR_TOP"}


def index(rows: list[Row]) -> dict[str, Row]:
    assert len({row["token"] for row in rows}) == len(rows)
    assert all(len(row["token"]) == 32 or row["token"] in "1234" for row in rows)
    return {row["token"]: row for row in rows}


def matrix(row: Row) -> np.ndarray:
    result = np.eye(4)
    w, x, y, z = row["rotation"]
    result[:3, :3] = Rotation.from_quat([x, y, z, w]).as_matrix()
    result[:3, 3] = row["translation"]
    return result


@pytest.mark.parametrize(
    ("table", "field", "target"),
    [
        ("sample", "scene_token", "scene"),
        ("scene", "log_token", "log"),
        ("scene", "first_sample_token", "sample"),
        ("scene", "last_sample_token", "sample"),
        ("sample_data", "sample_token", "sample"),
        ("sample_data", "ego_pose_token", "ego_pose"),
        ("sample_data", "calibrated_sensor_token", "calibrated_sensor"),
        ("calibrated_sensor", "sensor_token", "sensor"),
        ("sample_annotation", "sample_token", "sample"),
        ("sample_annotation", "instance_token", "instance"),
        ("sample_annotation", "visibility_token", "visibility"),
        ("instance", "category_token", "category"),
        ("instance", "first_annotation_token", "sample_annotation"),
        ("instance", "last_annotation_token", "sample_annotation"),
    ],
)
def test_every_token_leads_somewhere(
    tables: dict[str, list[Row]], table: str, field: str, target: str
) -> None:
    tokens = index(tables[target])
    assert tables[table]
    assert all(row[field] in tokens for row in tables[table])


@pytest.mark.parametrize("table", ["sample", "sample_data", "sample_annotation"])
def test_chains_run_both_ways_in_time_order(tables: dict[str, list[Row]], table: str) -> None:
    rows, samples = index(tables[table]), index(tables["sample"])
    for row in rows.values():
        if row["next"]:
            following = rows[row["next"]]
            assert following["prev"] == row["token"]
            times = [samples[r.get("sample_token", r["token"])]["timestamp"] for r in (row, following)]
            assert 400_000 < times[1] - times[0] < 600_000


def test_categories_are_the_official_ones_in_order(tables: dict[str, list[Row]]) -> None:
    assert tuple(row["name"] for row in tables["category"]) == CATEGORIES
    assert len(CATEGORIES) == 23


def test_each_keyframe_has_all_sensors_and_files(tables: dict[str, list[Row]], root: Path) -> None:
    for sample in tables["sample"]:
        rows = [row for row in tables["sample_data"] if row["sample_token"] == sample["token"]]
        assert {row["filename"].split("/")[1] for row in rows} == CHANNELS
        for row in rows:
            assert (root / row["filename"]).is_file()
            if row["fileformat"] == "jpg":
                assert -60_000 < row["timestamp"] - sample["timestamp"] < 5_000
                image = cv2.imread(str(root / row["filename"]))
                assert image.shape == (row["height"], row["width"], 3) == (90, 160, 3)
                assert image.std() > 10
            else:
                assert row["timestamp"] == sample["timestamp"]


def test_instances_count_their_annotations(tables: dict[str, list[Row]]) -> None:
    annotations = index(tables["sample_annotation"])
    for instance in tables["instance"]:
        token, count = instance["first_annotation_token"], 0
        while token:
            count, last, token = count + 1, token, annotations[token]["next"]
        assert (count, last) == (instance["nbr_annotations"], instance["last_annotation_token"])


def test_lidar_counts_follow_from_the_sweeps(tables: dict[str, list[Row]], root: Path) -> None:
    poses = index(tables["ego_pose"])
    calibration = index(tables["calibrated_sensor"])
    total = 0
    for row in tables["sample_data"]:
        if row["fileformat"] != "pcd":
            continue
        cloud = np.fromfile(root / row["filename"], dtype=np.float32).reshape(-1, 5)
        assert len(cloud) > 15_000
        assert set(np.unique(cloud[:, 4])) <= set(range(32))
        to_global = matrix(poses[row["token"]]) @ matrix(calibration[row["calibrated_sensor_token"]])
        for item in tables["sample_annotation"]:
            if item["sample_token"] != row["sample_token"]:
                continue
            width, length, height = item["size"]
            yaw = 2 * np.arctan2(item["rotation"][3], item["rotation"][0])
            centre, size = np.array([item["translation"]]), np.array([[length, width, height]])
            (count,) = sensors.count_inside(cloud, to_global, centre, size, np.array([yaw]))
            assert abs(count - item["num_lidar_pts"]) <= 1
            total += count
    assert total > 1000


def test_lidar_and_depth_images_agree(tables: dict[str, list[Row]], root: Path) -> None:
    """Most LiDAR echoes that fall into an image lie at that pixel's depth (parallax and motion aside)."""
    poses, calibration = index(tables["ego_pose"]), index(tables["calibrated_sensor"])
    row = next(r for r in tables["sample_data"] if "LIDAR_TOP" in r["filename"])
    cloud = np.fromfile(root / row["filename"], dtype=np.float32).reshape(-1, 5)[:, :3].astype(np.float64)
    to_global = matrix(poses[row["token"]]) @ matrix(calibration[row["calibrated_sensor_token"]])
    cloud = cloud @ to_global[:3, :3].T + to_global[:3, 3]
    for image in tables["sample_data"]:
        if image["sample_token"] != row["sample_token"] or image["fileformat"] == "pcd":
            continue
        channel, name = image["filename"].split("/")[1:]
        path = root / "samples_depth" / channel / f"{Path(name).stem}.png"
        depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert depth.dtype == np.uint16
        assert depth.shape == (90, 160)
        sensor = calibration[image["calibrated_sensor_token"]]
        inverse = np.linalg.inv(matrix(poses[image["token"]]) @ matrix(sensor))
        local = cloud @ inverse[:3, :3].T + inverse[:3, 3]
        local = local[local[:, 2] > 1.0]
        pixels = local @ np.array(sensor["camera_intrinsic"]).T
        columns, rows = np.round(pixels[:, :2] / pixels[:, 2:]).astype(int).T
        inside = (columns >= 0) & (columns < 160) & (rows >= 0) & (rows < 90)
        seen = depth[rows[inside], columns[inside]] / 256.0
        wanted = local[inside, 2]
        assert inside.sum() > 300
        close = np.abs(seen - wanted) < 0.06 * wanted + 0.1  # one pixel is 0.3 degrees wide here
        assert close.mean() > 0.8, channel


def test_mask_and_expansion_hold_the_same_drivable_area(tables: dict[str, list[Row]], root: Path) -> None:
    rng = np.random.default_rng(0)
    poses, logs = index(tables["ego_pose"]), index(tables["log"])
    for row in tables["map"]:
        location = logs[row["log_tokens"][0]]["location"]
        mask = cv2.imread(str(root / row["filename"]), cv2.IMREAD_GRAYSCALE)
        assert set(np.unique(mask)) == {0, 255}
        expansion = json.loads((root / "maps" / "expansion" / f"{location}.json").read_text())
        nodes = {node["token"]: (node["x"], node["y"]) for node in expansion["node"]}
        records = {polygon["token"]: polygon for polygon in expansion["polygon"]}
        area = shapely.union_all(
            [
                shapely.Polygon(
                    [nodes[t] for t in records[token]["exterior_node_tokens"]],
                    [[nodes[t] for t in hole["node_tokens"]] for hole in records[token]["holes"]],
                )
                for token in expansion["drivable_area"][0]["polygon_tokens"]
            ]
        )
        assert area.symmetric_difference(town_of(TINY["seed"], location).drivable).area < 1.0  # type: ignore[arg-type]
        points = rng.uniform(60, expansion["canvas_edge"][0] - 60, (4000, 2))
        vector = shapely.contains_xy(area, points)
        raster = (
            mask[mask.shape[0] - 1 - (points[:, 1] * 10).astype(int), (points[:, 0] * 10).astype(int)] > 0
        )
        assert (vector == raster).mean() > 0.995
        assert 0.05 < vector.mean() < 0.5
        scenes = {s["token"] for s in tables["scene"] if s["log_token"] in row["log_tokens"]}
        samples = {s["token"] for s in tables["sample"] if s["scene_token"] in scenes}
        for data in tables["sample_data"]:
            if data["sample_token"] in samples:
                assert area.contains(shapely.Point(poses[data["token"]]["translation"][:2]))


def test_lane_graph_is_whole(root: Path) -> None:
    for path in (root / "maps" / "expansion").glob("*.json"):
        expansion = json.loads(path.read_text())
        lanes = {row["token"] for row in expansion["lane"]}
        keys = lanes | {row["token"] for row in expansion["lane_connector"]}
        assert keys == set(expansion["connectivity"]) == set(expansion["arcline_path_3"])
        for token, links in expansion["connectivity"].items():
            assert links["outgoing"]
            assert links["incoming"] or token in lanes  # an outer lane may begin where a road widens
            assert all(token in expansion["connectivity"][other]["outgoing"] for other in links["incoming"])
        for pieces in expansion["arcline_path_3"].values():
            for piece, following in itertools.pairwise(pieces):
                assert np.allclose(piece["end_pose"][:2], following["start_pose"][:2])


def test_can_bus_agrees_with_the_ego_poses(tables: dict[str, list[Row]], root: Path) -> None:
    poses = index(tables["ego_pose"])
    for scene in tables["scene"]:
        messages = json.loads((root / "can_bus" / f"{scene['name']}_pose.json").read_text())
        assert list(messages[0]) == ["accel", "orientation", "pos", "rotation_rate", "utime", "vel"]
        times = np.array([message["utime"] for message in messages]) * 1e-6
        places = np.array([message["pos"][:2] for message in messages])
        assert np.median(np.diff(times)) == pytest.approx(0.02, abs=0.002)
        samples = {s["token"] for s in tables["sample"] if s["scene_token"] == scene["token"]}
        for row in tables["sample_data"]:
            if row["sample_token"] in samples:
                there = [np.interp(row["timestamp"] * 1e-6, times, places[:, axis]) for axis in range(2)]
                assert np.hypot(*(np.array(there) - poses[row["token"]]["translation"][:2])) < 0.02
        # Speed is the derivative of position, yaw rate the derivative of the heading.
        speeds = np.array([message["vel"][0] for message in messages])
        travelled = np.hypot(*np.diff(places, axis=0).T)
        assert np.abs(travelled / np.diff(times) - (speeds[1:] + speeds[:-1]) / 2).max() < 0.1
        yaw = np.unwrap([2 * np.arctan2(m["orientation"][3], m["orientation"][0]) for m in messages])
        rates = np.array([message["rotation_rate"][2] for message in messages])
        turned = np.sum((rates[1:] + rates[:-1]) / 2 * np.diff(times))
        assert turned == pytest.approx(yaw[-1] - yaw[0], abs=0.02)
        assert np.mean([message["accel"][2] for message in messages]) == pytest.approx(
            can_bus.GRAVITY, abs=0.01
        )


def test_visibility_levels() -> None:
    assert [visibility_token(visible, 100) for visible in (0, 39, 41, 61, 99)] == ["1", "1", "2", "3", "4"]
    assert visibility_token(0, 0) == "1"

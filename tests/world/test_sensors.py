from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.world.sensors import DrawnBox, GroundRaster, draw_view, prepare_ground

INTRINSICS = np.array([[200.0, 0, 160.0], [0, 200.0, 90.0], [0, 0, 1]])
SIZE = (180, 320)


@pytest.fixture
def camera_to_global() -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    pose[:3, 3] = [400.0, 900.0, 1.5]
    return pose


@pytest.fixture
def ground() -> GroundRaster:
    drivable = np.zeros((200, 200), dtype=np.uint8)
    drivable[90:110] = 1  # a road along x, 10 m wide
    return GroundRaster(drivable, (350.0, 850.0), 0.5)


def car(x: float, token: str = "a") -> DrawnBox:
    return DrawnBox(np.array([x, 900.0, 0.8]), (4.6, 1.9, 1.6), 0.0, "vehicle.car", token)


def decode(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def test_depth_of_a_box_and_of_the_road(ground: GroundRaster, camera_to_global: np.ndarray) -> None:
    view = draw_view([car(420.0)], ground, INTRINSICS, camera_to_global, SIZE)
    depth = decode(view.depth_png)
    assert depth.dtype == np.uint16
    assert depth[102, 160] / 256 == pytest.approx(17.7, abs=0.4)  # its rear, below the window
    assert depth[170, 160] / 256 == pytest.approx(1.5 * 200 / 80, abs=0.01)
    assert depth[0, 160] == 0
    assert decode(view.jpeg).shape == (*SIZE, 3)


def test_same_input_same_bytes_and_instances_keep_their_colour(
    ground: GroundRaster, camera_to_global: np.ndarray
) -> None:
    backdrop = prepare_ground(ground, 3)
    views = [
        draw_view([car(412.0, token)], place, INTRINSICS, camera_to_global, SIZE, 3)
        for token, place in (("a", ground), ("a", backdrop), ("b", backdrop))
    ]
    assert views[0] == views[1]
    assert views[1].jpeg != views[2].jpeg


def test_scenery_keeps_off_the_road(ground: GroundRaster) -> None:
    quads = prepare_ground(ground, 0).land.quads
    low = quads.vertices[quads.vertices[..., 2].min(axis=1) < 2.5]  # crowns and lamp arms may reach over
    assert len(low) > 100
    assert (np.abs(low[..., 1] - 900.0) > 5.2).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intrinsics": np.eye(4)}, "intrinsics"),
        ({"camera_to_global": np.eye(4)}, "not above the ground"),
        ({"ground_raster": GroundRaster(np.zeros((0, 4), np.uint8), (0.0, 0.0), 0.5)}, "ground raster"),
        ({"ground_raster": GroundRaster(np.zeros((9, 9), np.uint8), (0.0, 0.0), 0.0)}, "resolution"),
    ],
)
def test_bad_input_is_explained(
    ground: GroundRaster, camera_to_global: np.ndarray, change: dict, message: str
) -> None:
    arguments = {
        "boxes": [],
        "ground_raster": ground,
        "intrinsics": INTRINSICS,
        "camera_to_global": camera_to_global,
        "image_size": SIZE,
    }
    with pytest.raises(SpaceDriveError, match=message):
        draw_view(**(arguments | change))


def test_real_annotations_are_drawn_where_they_project(nuscenes_real: Path) -> None:
    """In a real keyframe, the pixel of a near car's centre has the depth of that car."""

    def table(name: str) -> list[dict]:
        return json.loads((nuscenes_real / "v1.0-mini" / f"{name}.json").read_text())

    def matrix(row: dict) -> np.ndarray:
        result = np.eye(4)
        w, x, y, z = row["rotation"]
        result[:3, :3] = Rotation.from_quat([x, y, z, w]).as_matrix()
        result[:3, 3] = row["translation"]
        return result

    sample = table("sample")[0]["token"]
    names = {row["token"]: row["name"] for row in table("category")}
    category = {row["token"]: names[row["category_token"]] for row in table("instance")}
    boxes = []
    for row in table("sample_annotation"):
        if row["sample_token"] == sample:
            width, length, height = row["size"]
            yaw = 2 * np.arctan2(row["rotation"][3], row["rotation"][0])
            centre = np.array([*row["translation"][:2], height / 2])  # on the ground, as the world is flat
            box = DrawnBox(
                centre, (length, width, height), yaw, category[row["instance_token"]], row["token"]
            )
            boxes.append(box)
    calibration = {row["token"]: row for row in table("calibrated_sensor")}
    poses = {row["token"]: row for row in table("ego_pose")}
    checked = 0
    for data in table("sample_data"):
        sensor = calibration[data["calibrated_sensor_token"]]
        if data["sample_token"] != sample or not sensor["camera_intrinsic"]:
            continue
        to_global = matrix(poses[data["ego_pose_token"]]) @ matrix(sensor)
        intrinsics = np.array(sensor["camera_intrinsic"]) * np.array([[0.2], [0.2], [1.0]])
        ground = GroundRaster(
            np.ones((200, 200), np.uint8), (to_global[0, 3] - 50, to_global[1, 3] - 50), 0.5
        )
        depth = decode(draw_view(boxes, ground, intrinsics, to_global, (180, 320)).depth_png) / 256
        inverse = np.linalg.inv(to_global)
        for box in boxes:
            local = inverse[:3, :3] @ box.centre + inverse[:3, 3]
            column, row_, _ = np.round(intrinsics @ local / local[2]).astype(int)
            if not box.category.startswith("vehicle.car") or not 3 < local[2] < 40:
                continue
            if 0 <= column < 320 and 0 <= row_ < 180:
                # The centre's pixel shows this car or something before it, never something behind.
                assert 0 < depth[row_, column] < local[2] + 0.1
                checked += depth[row_, column] > local[2] - np.hypot(*box.size[:2])
    assert checked >= 1

"""A keyframe of one's own: read from images and a calibration file, and made a record."""

import json

import numpy as np
import pytest

from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.ego_status import ego_status
from spacedrive_jax.data.frame import Frame, read_frame
from spacedrive_jax.data.route import RoadOption
from spacedrive_jax.data.schema import record_features
from spacedrive_jax.errors import DataError
from tests.record_factory import CAMERA_YAWS, camera_to_ego, encode_jpeg, encode_png

INTRINSICS = [[60.0, 0.0, 40.0], [0.0, 60.0, 22.5], [0.0, 0.0, 1.0]]


def calibration(**fields):
    cameras = {
        name: {"intrinsics": INTRINSICS, "camera_to_ego": camera_to_ego(yaw).tolist()}
        for name, yaw in zip(CAMERAS, CAMERA_YAWS, strict=True)
    }
    return {"cameras": cameras, **fields}


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "drive-7"
    images.mkdir()
    rng = np.random.default_rng(0)
    for name in CAMERAS:
        (images / f"{name}.jpg").write_bytes(encode_jpeg(rng.integers(0, 255, (45, 80, 3), dtype=np.uint8)))
    return images


def written(folder, content):
    file = folder.parent / "calibration.json"
    file.write_text(json.dumps(content))
    return file


def test_six_images_poses_and_a_speed_are_a_whole_record(folder):
    frame = read_frame(folder, written(folder, calibration()), speed=8.0)
    record = frame.record()
    assert record.keys() == record_features().keys()
    assert record["token"] == "drive-7"
    assert record["image_size"].tolist() == [[45, 80]] * 6
    np.testing.assert_array_equal(record["past_to_ego"][:, :2, 3], [[-4.0, 0.0], [-8.0, 0.0]])
    assert record["can_bus"][10] == 8.0
    assert not record["waypoint_mask"].any()
    assert record["command_route"] == RoadOption.VOID
    assert not record["route_valid"]
    assert ego_status(record, "navigation").status.shape == (74,)


def test_a_turn_gives_the_past_of_a_turn(folder):
    frame = read_frame(folder, written(folder, calibration(speed=5.0, yaw_rate=0.4, command="left")))
    record = frame.record()
    # It came from behind and, turning left, from the left: the circle's centre is 12.5 m to the left.
    for pose in record["past_to_ego"]:
        assert pose[0, 3] < 0 < pose[1, 3]
        assert np.hypot(pose[0, 3], pose[1, 3] - 12.5) == pytest.approx(12.5)
        assert np.arctan2(pose[1, 0], pose[0, 0]) < 0
    assert record["command_navigation"] in (5, 6, 7), "the past says left"
    assert record["command_route"] == RoadOption.LEFT
    assert record["target_points"][:, 0].min() > 0


def test_what_is_known_besides_is_taken(folder):
    (folder / "front.png").write_bytes(encode_png(np.zeros((45, 80, 3), np.uint8)))
    (folder / "front_depth.png").write_bytes(encode_png(np.full((45, 80), 2560, np.uint16)))
    content = calibration(speed=1.0, location="munich", target_points=[[20, 1], [60, 3]], command="straight")
    content["cameras"]["CAM_FRONT"] |= {"image": "front.png", "depth": "front_depth.png"}
    past = np.tile(np.eye(4), (2, 1, 1))
    past[:, 0, 3] = -0.6, -1.3
    record = read_frame(folder, written(folder, content | {"past_to_ego": past.tolist()}), speed=2.0).record()
    assert record["can_bus"][10] == 2.0, "--speed is nearer to hand than the file"
    assert record["location"] == "munich"
    assert record["images"][0].startswith(b"\x89PNG")
    assert record["exact_depth"][0]
    assert not any(record["exact_depth"][1:])
    np.testing.assert_array_equal(record["past_to_ego"], past)
    np.testing.assert_array_equal(record["target_points"], [[20, 1], [60, 3]])


def broken(name, change):
    content = calibration(speed=3.0)
    change(content)
    return pytest.param(content, name, id=name)


def _set(camera, field, value):
    return lambda content: content["cameras"][camera].__setitem__(field, value)


UPSIDE = (np.diag([1.0, 1.0, -1.0, 1.0])).tolist()
BACKWARDS = np.linalg.inv(camera_to_ego(0.0)).tolist()
FAR = (camera_to_ego(0.0) + np.array([[0, 0, 0, 1500.0], [0] * 4, [0] * 4, [0] * 4])).tolist()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        broken("cameras lacks CAM_BACK", lambda content: content["cameras"].pop("CAM_BACK")),
        broken(
            "unknown CAM_TOP",
            lambda content: content["cameras"].update(CAM_TOP=content["cameras"]["CAM_BACK"]),
        ),
        broken("intrinsics", _set("CAM_BACK", "intrinsics", [[60, 0, 40], [0, 0, 22], [0, 0, 1]])),
        broken("cameras[...].intrinsics", _set("CAM_BACK", "intrinsics", [[60, 0, 40]])),
        broken(
            "its picture of 80x45: are they of another size",
            _set("CAM_BACK", "intrinsics", [[600, 0, 400], [0, 600, 225], [0, 0, 1]]),
        ),
        broken("is no 16-bit grey PNG", _set("CAM_BACK", "depth", "CAM_BACK.jpg")),
        broken("a speed of 300.0 is beyond", lambda content: content.update(speed=300)),
        broken("is a mirror image", _set("CAM_BACK", "camera_to_ego", UPSIDE)),
        broken("CAM_BACK.camera_to_ego is no pose", _set("CAM_BACK", "camera_to_ego", UPSIDE)),
        broken("is it ego_to_camera", _set("CAM_FRONT", "camera_to_ego", BACKWARDS)),
        broken("is it in metres", _set("CAM_FRONT", "camera_to_ego", FAR)),
        broken("does not stay inside", _set("CAM_FRONT", "image", "../secret.jpg")),
        broken("no such file", _set("CAM_FRONT", "image", "absent.jpg")),
        broken("says no speed", lambda content: content.pop("speed")),
        broken("unknown field `sped`", lambda content: content.update(sped=3)),
        broken("$.command", lambda content: content.update(command="up")),
        broken("past_to_ego[0]", lambda content: content.update(past_to_ego=[UPSIDE, UPSIDE])),
    ],
)
def test_what_cannot_be_is_refused_by_name(folder, content, named):
    file = written(folder, content)
    with pytest.raises(DataError) as raised:
        read_frame(folder, file)
    assert named in str(raised.value)
    assert str(file) in str(raised.value) or str(folder) in str(raised.value)


def test_a_folder_without_the_pictures(folder):
    (folder / "CAM_BACK.jpg").unlink()
    with pytest.raises(DataError, match=r"holds no CAM_BACK\.jpg .*cameras\.CAM_BACK\.image"):
        read_frame(folder, written(folder, calibration(speed=1.0)))
    (folder / "CAM_BACK.jpg").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"CAM_BACK\.jpg is neither a JPEG nor a PNG"):
        read_frame(folder, written(folder, calibration(speed=1.0)))


def test_numbers_of_a_frame_made_in_python_are_checked_too(folder):
    frame = read_frame(folder, written(folder, calibration(speed=1.0)))
    fields = {"images": frame.images, "intrinsics": frame.intrinsics, "camera_to_ego": frame.camera_to_ego}
    with pytest.raises(DataError, match="speed is nan"):
        Frame(**fields, speed=float("nan")).record()
    with pytest.raises(DataError, match=r"CAM_FRONT\.intrinsics"):
        Frame(**fields | {"intrinsics": frame.intrinsics * np.nan}, speed=1.0).record()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"images": [b""] * 5}, "images holds 5, expected those of CAM_FRONT"),
        ({"images": [np.zeros((4, 4, 3))] * 6}, r"holds ndarray.*read_bytes\(\)"),
        ({"depth": None}, "depth is NoneType"),
        ({"intrinsics": INTRINSICS}, r"intrinsics is of shape \(3, 3\), expected \(6, 3, 3\)"),
        ({"camera_to_ego": "x"}, "camera_to_ego holds what are no numbers"),
        ({"past_to_ego": np.eye(4)[None]}, r"past_to_ego is of shape \(1, 4, 4\)"),
        ({"target_points": [[8.0, 0.0]]}, r"target_points is of shape \(1, 2\)"),
        ({"command": "LEFT"}, "command 'LEFT' is not one of left, right"),
        ({"speed": "5"}, "speed is 5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("unchecked")
def test_a_frame_made_in_python_takes_lists_and_names_what_does_not_fit(folder, fields, said):
    frame = read_frame(folder, written(folder, calibration(speed=1.0)))
    lists = {
        "images": list(frame.images),
        "intrinsics": frame.intrinsics.tolist(),
        "camera_to_ego": frame.camera_to_ego.tolist(),
        "speed": np.float32(1.0),
    }
    assert Frame(**lists).record()["camera_to_ego"].shape == (6, 4, 4)
    with pytest.raises(DataError, match=said):
        Frame(**lists | fields).record()

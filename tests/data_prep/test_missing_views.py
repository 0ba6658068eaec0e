"""Drawing the images a folder lacks."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import Convert
from data_prep.nuscenes.expansions import MaskMap, cache_mask_bits
from data_prep.nuscenes.sensor_files import GROUND_CELLS, ground_around, scene_seed
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.schema import DEPTH_SCALE
from tests.data_prep.tiny_nuscenes import HEIGHT, INTRINSICS, ROAD_X, VERSION, WIDTH, TinyNuScenes

DRAWN = {"CAM_FRONT", "CAM_BACK_LEFT"}


@pytest.fixture
def half_a_folder(tmp_path):
    tiny = TinyNuScenes(scenes=1, keyframes=2)
    tiny.files = {name: data for name, data in tiny.files.items() if name.split("/")[1] not in DRAWN}
    return tiny.write(tmp_path / "nuscenes")


@pytest.mark.parametrize(("render_size", "size"), [(None, (HEIGHT, WIDTH)), ("96x48", (48, 96))])
def test_only_missing_images_are_drawn(half_a_folder, tmp_path, render_size, size):
    facts = Convert(
        dataroot=half_a_folder,
        version=VERSION,
        out=tmp_path / "out",
        missing_images="render",
        render_size=render_size,
    ).run()
    assert facts["counts"]["images_rendered"] == facts["counts"]["exact_depth_images"] == 4
    record = open_records(tmp_path / "out")[0]
    for index, channel in enumerate(CAMERAS):
        drawn = channel in DRAWN
        assert record["image_rendered"][index] == drawn
        height, width = size if drawn else (HEIGHT, WIDTH)
        assert record["image_size"][index].tolist() == [height, width]
        with Image.open(io.BytesIO(record["images"][index])) as image:
            assert image.size == (width, height), "the record's size is the image's"
        scale = np.diag([width / WIDTH, height / HEIGHT, 1.0])
        np.testing.assert_allclose(record["camera_intrinsics"][index], scale @ INTRINSICS)
        assert bool(record["exact_depth"][index]) == drawn
        if not drawn:
            source = (
                half_a_folder / "samples" / channel / f"scene-2001__{channel}__{record['frame_index']}.jpg"
            )
            assert record["images"][index] == source.read_bytes()


def test_drawn_depth_shows_the_annotated_car(half_a_folder, tmp_path):
    options = {"missing_images": "render", "render_size": "160x90"}
    Convert(dataroot=half_a_folder, version=VERSION, out=tmp_path / "out", **options).run()
    record = open_records(tmp_path / "out")[0]
    front = CAMERAS.index("CAM_FRONT")
    depth = np.asarray(Image.open(io.BytesIO(record["exact_depth"][front]))) / DEPTH_SCALE
    car = record["agent_boxes"][record["agent_category"].index("vehicle.car")]
    to_camera = np.linalg.inv(record["camera_ego_to_global"][front] @ record["camera_to_ego"][front])
    centre = to_camera @ record["ego_to_global"] @ [*car[:3], 1.0]
    column, row, scale = record["camera_intrinsics"][front] @ centre[:3]
    seen = depth[int(row / scale), int(column / scale)]
    # The ray meets the car's rear, half a length before its centre; a rear window may lie a bit deeper.
    assert centre[2] - car[3] / 2 - 0.3 < seen < centre[2]


def test_rendering_is_the_same_for_any_worker_count(half_a_folder, tmp_path):
    facts = [
        Convert(
            dataroot=half_a_folder,
            version=VERSION,
            out=tmp_path / f"out{workers}",
            missing_images="render",
            workers=workers,
        ).run()
        for workers in (1, 2)
    ]
    assert facts[0]["fingerprint"] == facts[1]["fingerprint"]


def test_ground_is_in_global_axes(tmp_path):
    root = TinyNuScenes(scenes=1, keyframes=2).write(tmp_path / "n")
    cache_mask_bits(root / "maps" / "tiny.png", tmp_path / "tiny.npy")
    ground = ground_around(MaskMap(tmp_path / "tiny.npy"), np.array([113.0, 96.0]))
    x = ground.origin_xy[0] + (np.arange(GROUND_CELLS) + 0.5) * ground.resolution
    road = (x > ROAD_X[0]) & (x < ROAD_X[1])
    row = int((100.0 - ground.origin_xy[1]) / ground.resolution)
    np.testing.assert_array_equal(ground.drivable[row], road)


def test_no_map_gives_undrivable_ground():
    assert not ground_around(None, np.zeros(2)).drivable.any()


def test_scene_seed_depends_on_seed_and_scene():
    assert len({scene_seed(seed, name) for seed in (0, 1) for name in ("scene-2001", "scene-2002")}) == 4
    assert scene_seed(3, "scene-2001") == scene_seed(3, "scene-2001")

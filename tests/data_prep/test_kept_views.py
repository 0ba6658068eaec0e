"""Views resized once by the converter: the same batches as from the untouched pictures, and nothing else."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from data_prep.add_depth import add_depth
from data_prep.bench2drive.convert import ClipConversion
from data_prep.cli import Convert
from data_prep.inspect_record import check_pictures, record_figure
from data_prep.synthesize.bench2drive import ClipJob, record_clip
from spacedrive_jax.config import load_config
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.depth_sources import DepthConfig
from spacedrive_jax.data.images import picture_size
from spacedrive_jax.data.loader import training_samples
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.driving.protocol import act_message, partial_record
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.inference.depth_network import DepthNetworkConfig, keyframe_views
from spacedrive_jax.reporting.cameras import decode_image
from tests.conftest import ROOT
from tests.data_prep.tiny_nuscenes import HEIGHT, VERSION, WIDTH, TinyNuScenes
from tests.models.depth.sweeps import walls_around

DRAWN = "CAM_BACK_LEFT"
CONFIG = load_config(str(ROOT / "tests" / "tiny_config.py"))
OTHER_FAMILY = load_config("smolvlm_256m_spacedrive_plus")
"""Resizes with another filter, to another size, behind the resizing."""


def nuscenes(root, out, **options):
    options = {"missing_images": "render", "workers": 1} | options
    return dict(Convert(dataroot=root, version=VERSION, out=out, **options).run())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of which one camera is drawn, with exact depth; its records as they are, and kept at 40x56."""
    made = tmp_path_factory.mktemp("kept")
    tiny = TinyNuScenes(scenes=2, keyframes=2)
    tiny.files = {
        name: walls_around(20.0) if "LIDAR_TOP" in name else data
        for name, data in tiny.files.items()
        if name.split("/")[1] != DRAWN
    }
    root = tiny.write(made / "nuscenes")
    nuscenes(root, made / "untouched")
    nuscenes(root, made / "kept", image_size="40x56")
    return made


def builder(config, size, **data):
    depth = DepthConfig(sources=("exact", "lidar"))
    data = {"image_size": size, "depth": depth, "sequence_length": 4096} | data
    return SampleBuilder(dataclasses.replace(config.data, **data), config.model)


def pairs(folders, one="untouched", other="kept"):
    left, right = (open_records(folders / name) for name in (one, other))
    assert len(left) == len(right) > 0
    return [(left[index], right[index]) for index in range(len(left))]


@pytest.mark.parametrize(
    ("config", "data"), [(CONFIG, {"channel_order": "bgr"}), (CONFIG, {}), (OTHER_FAMILY, {})]
)
def test_samples_are_the_same_bit_for_bit(folders, config, data):
    make = builder(config, (40, 56), **data)
    for untouched, kept in pairs(folders):
        expected, found = make(untouched, 3), make(kept, 3)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert found.pixel_values.std() > 10
        assert found.patch_depth.min() < 100


def test_what_is_kept(folders):
    for untouched, kept in pairs(folders):
        for index, channel in enumerate(CAMERAS):
            assert picture_size(untouched["images"][index]) == (HEIGHT, WIDTH)
            assert picture_size(kept["images"][index]) == (40, 56)
            assert kept["images"][index].startswith(b"\x89PNG"), "without loss"
            assert kept["image_rendered"][index] == (channel == DRAWN) == bool(kept["exact_depth"][index])
        for name in untouched.keys() - {"images"}:
            np.testing.assert_array_equal(kept[name], untouched[name], err_msg=name)
    options = json.loads((folders / "kept" / "provenance.json").read_text())["options"]
    assert options["image_size"] == [40, 56]
    assert open_records(folders / "kept").view_size == (40, 56)
    assert open_records(folders / "untouched").view_size is None


def test_pictures_of_that_size_stay_as_they_are(folders):
    nuscenes(folders / "nuscenes", folders / "native", image_size=f"{HEIGHT}x{WIDTH}")
    for untouched, native in pairs(folders, other="native"):
        assert native["images"] == untouched["images"]


def test_bench2drives_too(tmp_path):
    record_clip(ClipJob(0, 0, 2, (36, 64), tmp_path / "clips"))
    for name, size in (("untouched", None), ("kept", (42, 28))):
        ClipConversion(dataroot=tmp_path / "clips", out=tmp_path / name, image_size=size, workers=1).run()
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, visual_positions="none"))
    make = builder(config, (42, 28))
    for untouched, kept in pairs(tmp_path):
        assert all(picture_size(each) == (42, 28) for each in kept["images"])
        jax.tree.map(np.testing.assert_array_equal, make(kept, 0), make(untouched, 0))


def test_another_size_is_refused_before_and_at_the_first_sample(folders, tmp_path):
    data = dataclasses.replace(builder(CONFIG, (56, 56)).data, records=str(folders / "kept"))
    with pytest.raises(ConfigError, match=r"kept: views are kept at 40x56 .* are wanted at 56x56: set data"):
        training_samples(data, CONFIG.model, 1)
    with pytest.raises(ConfigError, match=r"the CAM_FRONT image: views are kept at 40x56 .* wanted at 56x56"):
        builder(CONFIG, (56, 56))(open_records(folders / "kept")[0], 0)
    with pytest.raises(ConfigError, match=r"views are kept at 40x56 .* add-depth's --image-size"):
        add_depth(open_records(folders / "kept"), DepthNetworkConfig(weights="none", image_size=(42, 56)))
    assert not (folders / "kept" / "depth").exists()


def test_depth_networks_see_the_same(folders):
    for untouched, kept in pairs(folders):
        for order in ("rgb", "bgr"):
            seen = keyframe_views(kept, (40, 56), order)
            np.testing.assert_array_equal(seen, keyframe_views(untouched, (40, 56), order))


def test_pictures_are_shown_where_their_cameras_looked(folders):
    """Overlays are drawn in native pixels; what a server is sent names the pixels of the picture."""
    untouched, kept = pairs(folders)[0]
    assert decode_image(kept, 0).shape == (HEIGHT, WIDTH, 3)
    assert np.abs(decode_image(kept, 0).astype(int) - decode_image(untouched, 0)).mean() < 40
    assert len(record_figure(kept).axes) == 7
    check_pictures(folders / "kept")
    asked = partial_record(act_message(kept, 0, 1.0))
    np.testing.assert_array_equal(asked["image_size"], [[40, 56]] * 6)
    ray = np.array([0.3, 0.1, 1.0])
    shares = [
        (record["camera_intrinsics"] @ ray)[:, :2] / record["image_size"][:, ::-1]
        for record in (untouched, asked)
    ]
    np.testing.assert_allclose(shares[1], shares[0], atol=1e-12)
    make = builder(CONFIG, (40, 56))
    np.testing.assert_array_equal(make.images(asked), make.images(untouched))


def test_resuming_takes_the_same_size_alone(folders):
    again = nuscenes(folders / "nuscenes", folders / "kept", image_size="40x56", resume=True)
    assert again["fingerprint"] == open_records(folders / "kept").fingerprint
    for size, said in (("56x40", r"\[40, 56\] -> \[56, 40\]"), (None, r"\[40, 56\] -> None")):
        with pytest.raises(ConfigError, match=r"other options:\n  options\.image_size: " + said):
            nuscenes(folders / "nuscenes", folders / "kept", image_size=size, resume=True)


@pytest.mark.parametrize("size", ["640", "0x640", "640x640x3", "640 x 640", "-1x5", "640X640", "99999x640"])
def test_a_size_that_is_none(folders, tmp_path, size):
    with pytest.raises(ConfigError, match=r"HEIGHTxWIDTH, as data\.image_size has them"):
        nuscenes(folders / "nuscenes", tmp_path / "out", image_size=size)


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path):
    tiny = TinyNuScenes(scenes=1, keyframes=2)
    name = tiny.image(0, 1, "CAM_FRONT")
    file = io.BytesIO()
    Image.new("CMYK", (WIDTH, HEIGHT)).save(file, "JPEG")  # begins and ends as a JPEG does
    tiny.files[name] = file.getvalue()
    root = tiny.write(tmp_path / "nuscenes")
    with pytest.raises(SpaceDriveError, match=rf"{name} has pixels of another kind .*CMYK.*: fetch it again"):
        nuscenes(root, tmp_path / "out", image_size="40x56")

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from spacedrive_jax.errors import CheckpointError, ConfigError, SpaceDriveError
from spacedrive_jax.interop.unidepth import (
    UNUSED,
    config_from_json,
    is_released,
    load_unidepth,
    read_config,
    save_unidepth,
    unidepth_rules,
)
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.depth.backbone import Dinov2Config
from spacedrive_jax.models.depth.depth_anything import DepthAnythingConfig
from spacedrive_jax.models.depth.unidepth import UniDepthConfig, UniDepthV2, inference_size
from spacedrive_jax.models.partitioning import initialize
from tests.golden.verify.depth import verify_unidepth
from tests.models.depth.tiny_unidepth import TINY, make_tiny


@pytest.fixture(scope="module")
def tiny():
    return make_tiny()


def infer(model, images, intrinsics=None):
    graph, state = nnx.split(model)
    return jax.jit(lambda state, *inputs: nnx.merge(graph, state).infer(*inputs))(state, images, intrinsics)


def test_every_recorded_tensor(golden):
    checks = verify_unidepth(golden / "unidepth_tiny")
    assert len(checks) > 40
    assert [check.name for check in checks if not check.passed] == []


def test_published_padding_and_scaling(golden):
    for case in json.loads((golden / "unidepth_tiny" / "geometry_cases.json").read_text()):
        low, high = (200_000, 600_000)
        height, width = case["input_hw"]
        size = inference_size(
            (height, width),
            ratio_bounds=tuple(case["ratio_bounds"]),
            pixel_bounds=(low, high),
            multiple=14,
            resolution_level=case["resolution_level"],
        )
        if case["negative_pad_quirk"]:  # the published code loses a column here
            assert (size.padded, size.top, size.left) == ((height, width), 0, 0)
            continue
        left, _, top, _ = case["paddings_lrtb"]
        assert (size.left, size.top) == (left, top)
        assert list(size.padded) == case["padded_hw"]
        assert size.factor == case["resize_factor"]
        assert list(size.network) == case["model_hw"]


@pytest.mark.parametrize(
    ("image", "bounds", "network"),
    [
        ((1, 1), (200_000, 600_000), (448, 448)),
        ((1, 5000), (200_000, 600_000), (490, 1232)),  # padded to 2000 x 5000, scaled down
        ((5000, 1), (200_000, 600_000), (1106, 560)),
        ((10_000, 10_000), (200_000, 600_000), (784, 784)),
        ((640, 640), (200_000, 600_000), (644, 644)),
        ((900, 1600), (200_000, 600_000), (588, 1036)),
    ],
)
def test_sizes_at_the_limits(image, bounds, network):
    size = inference_size(image, ratio_bounds=(0.5, 2.5), pixel_bounds=bounds, multiple=14)
    assert size.network == network


@pytest.mark.parametrize("image", [(0, 640), (640, 0), (2, 2)])
def test_images_without_a_pixel_or_a_patch_are_refused(image):
    with pytest.raises(ConfigError, match=r"has no depth|less than two patches of 14"):
        inference_size(image, ratio_bounds=(0.5, 2.5), pixel_bounds=(1, 10), multiple=14)


def test_depth_anything_scales_the_side_that_changes_less():
    sizes = DepthAnythingConfig().network_size
    assert sizes((640, 640)) == sizes((518, 518)) == sizes((1, 1)) == (518, 518)
    assert sizes((900, 1600)) == (518, 924)
    assert sizes((1600, 900)) == (924, 518)
    assert sizes((525, 525)) == (518, 518)
    with pytest.raises(ConfigError, match="7x2000 pixels reach the network as 0x518"):
        sizes((7, 2000))


def test_each_image_has_its_own_camera(tiny):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 42, 56, 3), dtype=np.uint8)
    cameras = np.array([[[40, 0, 27.7], [0, 41, 20.9], [0, 0, 1]], [[70, 0, 25.2], [0, 65, 23], [0, 0, 1]]])
    both = infer(tiny, images, cameras.astype(np.float32))
    swapped = infer(tiny, images[::-1], cameras[::-1].astype(np.float32))
    np.testing.assert_allclose(both.depth, swapped.depth[::-1], rtol=1e-4)
    crossed = infer(tiny, images, cameras[::-1].astype(np.float32))
    assert np.abs(np.log(both.depth / crossed.depth)).max() > 1e-3
    with pytest.raises(SpaceDriveError, match="one per image"):
        tiny.infer(jnp.asarray(images), jnp.asarray(cameras[:1]))


@pytest.mark.parametrize("name", ["vits14", "vitb14", "vitl14"])
def test_table_is_the_released_state_dict(golden, name):
    released = json.loads((golden / "unidepth_tiny" / "state_dicts.json").read_text())[name]
    config = config_from_json(released["config"])
    assert config == UniDepthConfig.named(name)
    table = {source: rule.source_shape for rule in unidepth_rules(config) for source in rule.source_names()}
    assert set(released["unused"]) == set(UNUSED)
    expected = {key: tuple(shape) for key, shape in released["tensors"].items() if key not in UNUSED}
    assert table == expected
    model = nnx.eval_shape(lambda: UniDepthV2(config, rngs=nnx.Rngs(0)))
    parameters = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
    assert parameters == sum(np.prod(shape) for shape in expected.values())


OTHER = UniDepthConfig(
    encoder=Dinov2Config(
        width=32,
        depth=5,
        heads=4,
        taps=(1, 3, 4, 5),
        patch_size=7,
        position_grid=(3, 5),
        mlp_ratio=3,
        block_norm_eps=1e-4,
        final_norm_eps=1e-3,
    ),
    width=16,
    heads=2,
    expansion=2,
    units=(1, 2, 1),
    head_hidden=12,
    ratio_bounds=(0.25, 3.0),
    pixel_bounds=(1000, 3000),
    resolution_level=4,
)
"""No field has its default."""


@pytest.mark.parametrize("config", [TINY, OTHER])
def test_round_trip_keeps_every_bit_and_the_config(config, tmp_path):
    model = initialize(lambda rngs: UniDepthV2(config, rngs=rngs), seed=0)
    save_unidepth(model, tmp_path / "saved")
    loaded = load_unidepth(tmp_path / "saved")
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(loaded))


def test_the_other_config_differs_in_every_field():
    for changed, default in ((OTHER, UniDepthConfig()), (OTHER.encoder, UniDepthConfig().encoder)):
        for field in dataclasses.fields(changed):
            assert getattr(changed, field.name) != getattr(default, field.name), field.name


def test_released_checkpoints_are_told_from_our_own(tiny, golden, tmp_path):
    save_unidepth(tiny, tmp_path / "ours")
    assert not is_released(tmp_path / "ours")
    released = tmp_path / "released"
    released.mkdir()
    assert is_released(released / "model.safetensors")  # a file alone
    described = json.loads((golden / "unidepth_tiny" / "state_dicts.json").read_text())["vits14"]["config"]
    (released / "config.json").write_text(json.dumps(described))
    assert is_released(released)


def test_older_architectures_and_missing_tensors_are_named(tiny, tmp_path):
    older = {"pixel_encoder.cls_token": np.zeros((1, 1, 384), np.float32), "pixel_decoder.old": np.zeros(1)}
    save_file(older, tmp_path / "older.safetensors")
    with pytest.raises(SpaceDriveError, match="older UniDepth architecture"):
        load_unidepth(tmp_path / "older.safetensors")
    save_unidepth(tiny, tmp_path / "saved")
    with pytest.raises(SpaceDriveError, match="resolution_level 11 must be"):
        dataclasses.replace(TINY, resolution_level=11).inference_size((640, 640))
    with pytest.raises(
        SpaceDriveError, match=r"missing pixel_decoder.depth_layer.ups.0.convs.1.conv1.weight"
    ):
        load_unidepth(tmp_path / "saved", config=dataclasses.replace(TINY, units=(2, 1, 1)))


@pytest.mark.parametrize("name", ["vits14", "vitl14"])
def test_half_precision_keeps_depth_and_cameras_in_float32(name):
    compute = ComputeConfig(dtype="bfloat16", param_dtype="bfloat16")
    model = nnx.eval_shape(lambda: UniDepthV2(UniDepthConfig.named(name), compute=compute, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((6, 640, 640, 3), np.uint8)
    depth, confidence, intrinsics = jax.eval_shape(lambda s, i: nnx.merge(graph, s)(i), state, images)
    assert (depth.shape, confidence.shape, intrinsics.shape) == ((6, 640, 640), (6, 640, 640), (6, 3, 3))
    assert {depth.dtype, confidence.dtype, intrinsics.dtype} == {np.dtype("float32")}


@pytest.mark.parametrize("place", ["data", "augmentations", "top"])
def test_the_input_limits_are_read_wherever_releases_have_them(tmp_path, place):
    limits = {"ratio_bounds": [0.6, 2.0], "pixels_min": 100000, "pixels_max": 150000}
    settings = {
        "data": {"augmentations": {}},
        "model": {
            "name": "UniDepthV2",
            "num_heads": 8,
            "expansion": 4,
            "pixel_decoder": {"hidden_dim": 256, "depths": [2, 2, 2]},
            "pixel_encoder": {"name": "dinov2_vits14", "output_idx": [3, 6, 9, 12]},
        },
    }
    places = {"data": settings["data"], "augmentations": settings["data"]["augmentations"], "top": settings}
    places[place]["shape_constraints"] = limits
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = read_config(tmp_path, {})
    assert (config.ratio_bounds, config.pixel_bounds) == ((0.6, 2.0), (100000, 150000))
    other = next(each for name, each in places.items() if name != place)
    other["shape_constraints"] = limits | {"pixels_max": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="shape_constraints stand there 2 times"):
        read_config(tmp_path, {})

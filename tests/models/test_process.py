"""`process`, `logits` and `generate` on images of different sizes, without torch."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from spacedrive_jax import open_model
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.interop.hf_checkpoint import to_hf
from spacedrive_jax.interop.hf_config import read_processor_settings
from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig
from spacedrive_jax.models.families import FAMILIES
from spacedrive_jax.models.families.llava import ClipVisionConfig, Llava, LlavaConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenImageProcessor
from spacedrive_jax.models.families.smolvlm import SmolVLMConfig, SmolVLMImageProcessor
from spacedrive_jax.models.image_processor import HALVES, ProcessorSettings, resize, resize_on_device
from tests.models.conftest import random_module, tiny_config

IMAGE = 90
LIMITS = {"min_pixels": 64, "max_pixels": 1024}


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("process") / "model"
    to_hf(tiny_model, folder)
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "patch_size": 4, **LIMITS}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return open_model(folder)


def views(*sizes):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def test_patches_follow_the_checkpoints_own_settings(model):
    images = views((16, 24), (40, 70), (9, 8))
    patches, grid = model.process([images[0], Image.fromarray(images[1]), images[2]])
    # 40x70 is above 1024 pixels and shrinks to 24x40; 9x8 stays one token.
    np.testing.assert_array_equal(grid, [[1, 4, 6], [1, 6, 10], [1, 2, 2]])
    assert patches.shape == (24 + 60 + 4, 96)
    assert patches.dtype == np.float32
    # The first patch of the first image, both frames: (x / 255 - mean) / std.
    corner = images[0][:4, :4].transpose(2, 0, 1).astype(np.float64) / 255
    expected = (corner - np.array([0.4, 0.5, 0.6])[:, None, None]) / np.array([0.2, 0.3, 0.4])[:, None, None]
    np.testing.assert_allclose(patches[0].reshape(3, 2, 4, 4)[:, 1], expected, rtol=1e-5)
    grey = Image.fromarray(images[0]).convert("L")
    assert len(model.process([grey])[0]) == 24


def transparent(mode):
    """2x2 pixels: red, half red, nothing, blue; the palette's third colour is the transparent one."""
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 128]], [[0, 255, 0, 0], [0, 0, 255, 255]]], np.uint8)
    if mode == "RGBA":
        return Image.fromarray(pixels)
    if mode == "LA":
        return Image.fromarray(np.array([[[9, 255], [9, 128]], [[0, 0], [200, 255]]], np.uint8), "LA")
    image = Image.fromarray(np.array([[0, 0], [2, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
    image.info["transparency"] = 2
    return image


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("RGBA", [[[255, 0, 0], [255, 127, 127]], [[255, 255, 255], [0, 0, 255]]]),
        ("LA", [[[9] * 3, [132] * 3], [[255] * 3, [200] * 3]]),
        ("P", [[[255, 0, 0], [255, 0, 0]], [[255, 255, 255], [0, 0, 255]]]),
    ],
)
def test_what_is_transparent_is_laid_on_white(model, mode, expected):
    patches, _ = model.process([transparent(mode)])
    wanted, _ = model.process([np.array(expected, np.uint8)])
    np.testing.assert_array_equal(patches, wanted)


def test_without_a_file_the_released_settings_hold(tiny_model):
    _, grid = tiny_model.process(views((16, 24)))
    assert grid[0].prod() * 16 >= QwenImageProcessor.published.sizes["shortest_edge"]


def test_images_of_different_sizes_score_as_they_do_alone(model):
    first, second, third = views((16, 24), (24, 16), (16, 24))
    text = np.random.default_rng(1).integers(0, 80, (2, 5))
    tokens = np.zeros((2, 24), np.int32)
    tokens[0] = [*text[0], *[IMAGE] * 6, 7, *[IMAGE] * 6, *text[1], 3]
    tokens[1, :12] = [*[IMAGE] * 6, *text[1], 5]
    lengths = np.array([24, 12])
    patches, grid = model.process([first, second, third])
    together = model.logits(tokens, pixel_values=patches, image_grid_thw=grid, lengths=lengths)
    alone, one_grid = model.process([third])
    other = model.logits(tokens[1:, :12], pixel_values=alone, image_grid_thw=one_grid)
    np.testing.assert_allclose(together[1, :12], other[0], atol=2e-6)
    swapped, _ = model.process([third, second, first])
    again = model.logits(tokens, pixel_values=swapped, image_grid_thw=grid, lengths=lengths)
    assert np.abs(again[1, :12] - together[1, :12]).max() > 1e-4

    ids = model.generate(tokens, pixel_values=patches, image_grid_thw=grid, lengths=lengths, max_new_tokens=3)
    grown = np.concatenate([tokens[:1], ids[:1]], axis=1)
    both, both_grids = model.process([first, second])
    scores = model.logits(grown, pixel_values=both, image_grid_thw=both_grids)
    np.testing.assert_array_equal(np.argmax(scores[0, 23:-1], axis=-1), ids[0])


def test_leading_axes_and_one_grid_for_all_mean_the_same(model):
    tokens = np.full((1, 12), IMAGE)
    tokens = np.insert(tokens, 6, 3, axis=1)
    patches, grid = model.process(views((16, 24), (16, 24)))
    flat = model.logits(tokens, pixel_values=patches, image_grid_thw=grid)
    nested = model.logits(tokens, pixel_values=patches.reshape(1, 2, 24, 96), image_grid_thw=(1, 4, 6))
    np.testing.assert_array_equal(flat, nested)


def test_llava_cuts_the_middle_out():
    config = LlavaConfig(
        decoder=LanguageModelConfig(
            vocab_size=96,
            hidden_size=16,
            intermediate_size=24,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            mrope_section=(4,),
            qkv_bias=False,
        ),
        vision=ClipVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            depth=1,
            num_heads=2,
            image_size=8,
            patch_size=4,
            feature_layer=-1,
        ),
        image_token_id=IMAGE,
    )
    model = random_module(lambda: Llava(config, compute=ComputeConfig(), rngs=nnx.Rngs(0)))
    image = views((8, 14))[0]
    patches, grid = model.process([image])
    np.testing.assert_array_equal(grid, [[1, 2, 2]])
    middle, _ = model.process([np.ascontiguousarray(image[:, 3:11])])
    np.testing.assert_array_equal(patches, middle)
    ids = model.generate(
        np.array([[5, *[IMAGE] * 4, 7]]), pixel_values=patches, image_grid_thw=grid, max_new_tokens=2
    )
    assert ids.shape == (1, 2)
    model.processor_settings = ProcessorSettings(size=(("height", 8), ("width", 8)))
    with pytest.raises(SpaceDriveError, match="shorter side"):
        model.process([image])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("images", "problem"),
    [
        ([], "list of images"),
        ([np.zeros((4, 4, 3))], r"image 0 is a float64 array \(4, 4, 3\)"),
        ([np.zeros((4, 4), np.uint8)], r"uint8 array \(4, 4\)"),
        (["a.jpg"], "image 0 is a str"),
    ],
)
def test_what_is_no_image_is_refused(tiny_model, images, problem):
    with pytest.raises(SpaceDriveError, match=problem):
        tiny_model.process(images)


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        (None, "image_grid_thw"),
        ((1, 5, 6), "hold 24 patches"),
        ([[1, 4, 6], [1, 4, 6]], "hold 24 patches"),
        ([[4, 6]], "must be"),
        ((2, 4, 3), "must be"),
        ((1, 0, 6), "must be"),
        ((1.0, 4.0, 6.0), "must be"),
    ],
)
def test_grids_that_do_not_fit_are_refused(tiny_model, grid, problem):
    with pytest.raises(SpaceDriveError, match=problem):
        tiny_model.logits(
            np.full((1, 6), IMAGE), pixel_values=np.zeros((24, 96), np.float32), image_grid_thw=grid
        )


def test_images_without_a_place_are_refused(tiny_model):
    patches = np.zeros((48, 96), np.float32)
    with pytest.raises(SpaceDriveError, match="1 of 2 images have no image tokens"):
        tiny_model.logits(np.full((1, 6), IMAGE), pixel_values=patches, image_grid_thw=(1, 4, 6))


@pytest.mark.usefixtures("unchecked")
def test_token_ids_without_a_batch_axis_are_refused(tiny_model):
    patches = np.zeros((48, 96), np.float32)
    with pytest.raises(SpaceDriveError, match="token_ids"):
        tiny_model.logits(np.full(6, IMAGE), pixel_values=patches, image_grid_thw=(1, 4, 6))


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_token_ids_without_a_row_are_refused(tiny_model, wrong):
    with pytest.raises(SpaceDriveError, match=rf"token_ids hold {wrong}, and the table has rows 0 to \d+"):
        tiny_model.logits(np.array([[3, wrong]]))
    with pytest.raises(SpaceDriveError, match=f"token_ids hold {wrong}"):
        tiny_model.generate(np.array([[3, wrong]]), max_new_tokens=1)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"patch_size": 14}, "patch_size 14"),
        ({"resample": 1}, "resample"),
        ({"image_std": [1, 0, 1]}, "image_std"),
        ({"image_mean": [1, 2]}, "image_mean"),
        ({"size": {"shortest": 3}}, "size is"),
        ({"do_pad": True}, "do_pad"),
    ],
)
def test_settings_that_are_not_done_here_are_refused(folder, tmp_path, fields, problem):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(SpaceDriveError, match=problem):
        open_model(tmp_path)


def read_settings(folder, config, **fields):
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return read_processor_settings(folder, config)


def test_a_size_of_the_files_own_replaces_the_usual_one_whole(tmp_path):
    config, square = SmolVLMConfig(), {"height": 1000, "width": 800}
    settings = read_settings(tmp_path, config, size=square)
    assert settings.sizes == {**square, "max_longest_edge": 364}
    settings = read_settings(tmp_path, config, size=square, max_image_size={"longest_edge": 512})
    assert SmolVLMImageProcessor(config.vision, (90, 160), settings).first_size == (1000, 800)
    with pytest.raises(SpaceDriveError, match="an object of longest_edge"):
        read_settings(tmp_path, config, max_image_size=square)
    settings = read_settings(tmp_path, tiny_config(), size={"shortest_edge": 64})
    with pytest.raises(SpaceDriveError, match="must have shortest_edge and longest_edge"):
        QwenImageProcessor(tiny_config().vision, (16, 24), settings)


def test_null_is_the_default_and_one_number_is_for_all_channels(tmp_path):
    nothing = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "resample", "rescale_factor", "size"))
    settings = read_settings(tmp_path, tiny_config(), **nothing, image_mean=0.5, image_std=None)
    fallback = QwenImageProcessor.fallback
    assert settings == dataclasses.replace(fallback, mean=HALVES, size=tuple(sorted(fallback.size)))


def test_settings_saved_with_a_tokenizer_are_found(folder, tmp_path):
    for file in folder.iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": LIMITS}))
    settings = open_model(tmp_path).processor_settings
    assert settings.sizes == {"shortest_edge": 64, "longest_edge": 1024}
    assert tiny_config().vision.patch_size == 4


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
@pytest.mark.parametrize("wanted", [(44, 48), (17, 48), (40, 96), (97, 5), (40, 48)])
def test_the_device_resizes_with_pillows_bits(resample, wanted):
    images = np.stack(views((40, 48), (40, 48)))
    images[1] = np.where(images[1] > 127, 255, 0)  # overshoots, which are clipped
    made = jax.jit(lambda each: resize_on_device(each, *wanted, resample))(images)
    np.testing.assert_array_equal(made, [resize(image, *wanted, resample) for image in images])


def test_the_published_size_is_resized_with_pillows_bits():
    (image,) = views((640, 640))
    made = jax.jit(lambda each: resize_on_device(each, 644, 644, Image.Resampling.BICUBIC))(image[None])
    np.testing.assert_array_equal(made[0], resize(image, 644, 644))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_device_cuts_views_as_the_host_does(family, unchecked):
    vision = SimpleNamespace(
        patch_size=4, merge_size=2, temporal_patch_size=2, image_size=24, grid_side=6, window_tokens=2
    )
    processor = FAMILIES[family].image_processor(vision, (37, 58))
    images = views((37, 58), (37, 58))
    on_host = processor.patches(images)
    assert on_host.shape[1] == processor.patch_grid[0] * processor.patch_grid[1]
    np.testing.assert_array_equal(jax.jit(processor.view_patches)(jnp.asarray(np.stack(images))), on_host)

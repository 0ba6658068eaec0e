"""Qwen3-VL without torch: its files, positions, deepstack on every way through, images of any sizes."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax import open_model
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.interop.hf_checkpoint import from_hf, to_hf
from spacedrive_jax.interop.hf_config import read_hf_config, write_hf_config
from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig, LoraConfig
from spacedrive_jax.models.families.qwen3_vl import (
    FAMILY,
    Qwen3ImageProcessor,
    Qwen3VisionConfig,
    Qwen3VL,
    Qwen3VLConfig,
)
from spacedrive_jax.models.positions import frequency_axes
from tests.models.conftest import random_module

IMAGE = 90
CONFIG = Qwen3VLConfig(
    decoder=LanguageModelConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mrope_section=(4, 2, 2),
        mrope_interleaved=True,
        qkv_bias=False,
        qk_norm=True,
    ),
    vision=Qwen3VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        depth=4,
        num_heads=2,
        patch_size=4,
        out_hidden_size=32,
        num_position_embeddings=9,
        deepstack_blocks=(0, 2),
    ),
    image_token_id=IMAGE,
)


def build(config=CONFIG, **options):
    return random_module(lambda: Qwen3VL(config, compute=ComputeConfig(**options), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def prompt():
    """Two images of different sizes in the first sample, one in the second."""
    generator = np.random.default_rng(0)
    tokens = np.zeros((2, 22), np.int32)
    text = generator.integers(0, 80, 16)
    tokens[0] = [*text[:4], *[IMAGE] * 6, *text[4:8], *[IMAGE] * 4, *text[8:12]]
    tokens[1, :11] = [*text[:3], *[IMAGE] * 6, *text[12:14]]
    patches = generator.standard_normal((24 + 16 + 24, 96)).astype(np.float32)
    return tokens, {
        "pixel_values": patches,
        "image_grid_thw": np.array([[1, 4, 6], [1, 8, 2], [1, 6, 4]]),
        "lengths": np.array([22, 11]),
    }


def test_frequencies_take_turns():
    published = frequency_axes(64, (24, 20, 20), interleaved=True)
    assert published[:7].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert [int((published == axis).sum()) for axis in range(3)] == [24, 20, 20]
    assert published[60:].tolist() == [0, 0, 0, 0]
    assert frequency_axes(8, (2, 3, 3)).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]


def test_deepstack_reaches_the_image_tokens_and_what_follows(model, prompt):
    tokens, inputs = prompt
    whole = model.logits(tokens, **inputs)
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    path = ("vision", "deepstack", "layers", "out", "kernel")
    assert flat[path].shape == (2, 64, 32)
    flat[path] = flat[path].replace(flat[path][...].at[1].mul(2.0))
    changed = nnx.merge(graph, nnx.from_flat_state(flat)).logits(tokens, **inputs)
    np.testing.assert_array_equal(changed[:, :3], whole[:, :3])
    assert np.abs(changed - whole)[0, 10:].max() > 1e-4
    np.testing.assert_array_equal(
        model.logits(tokens[:, :3]), nnx.merge(graph, nnx.from_flat_state(flat)).logits(tokens[:, :3])
    )


def test_generation_goes_on_from_the_cache_as_without_one(model, prompt):
    tokens, inputs = prompt
    ids = model.generate(tokens, max_new_tokens=4, **inputs)
    own = ((22, slice(0, 40), slice(0, 2)), (11, slice(40, 64), slice(2, 3)))
    for row, (count, pixels, grids) in enumerate(own):
        grown = np.concatenate([tokens[row, :count], ids[row, :3]])[None]
        again = model.logits(
            grown, pixel_values=inputs["pixel_values"][pixels], image_grid_thw=inputs["image_grid_thw"][grids]
        )
        np.testing.assert_array_equal(np.argmax(again[0, count - 1 :], axis=-1), ids[row])


@pytest.mark.parametrize("options", [{"remat": "attention"}])
def test_remat_and_adapters_change_no_gradient(prompt, options):
    tokens, inputs = prompt
    gradients = []
    for compute in (ComputeConfig(), ComputeConfig(**options)):
        lora = LoraConfig(rank=2)
        model = random_module(
            lambda compute=compute, lora=lora: Qwen3VL(CONFIG, compute=compute, rngs=nnx.Rngs(0), lora=lora)
        )
        graph, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
        layout, grids = model.lay_out(
            tokens, inputs["pixel_values"], inputs["image_grid_thw"], lengths=inputs["lengths"]
        )

        @jax.jit
        def gradient(adapters, rest, graph=graph, layout=layout, grids=grids):
            def loss(adapters):
                whole = nnx.merge(graph, adapters, rest)
                embeddings, deepstack = whole.embed_prompt(
                    jnp.asarray(tokens), jnp.asarray(inputs["pixel_values"]), layout, grids
                )
                hidden, _ = whole.decoder(embeddings, jnp.asarray(layout.position_ids), deepstack=deepstack)
                return jnp.square(hidden).sum()

            return jax.grad(loss)(adapters)

        gradients.append(jax.device_get(nnx.to_pure_dict(gradient(adapters, rest))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), *gradients)


def test_learnt_positions_lie_on_the_images_corners(model):
    table = np.asarray(model.vision.position_embedding[...]).reshape(3, 3, -1)
    rows, columns = (each.reshape(-1) for each in np.indices((4, 6)))
    got = np.asarray(model.vision._positions(rows, columns, (4, 6))).reshape(4, 6, -1)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        np.testing.assert_allclose(got[row, column], table[row, column], atol=1e-6)
    # Row 1 of 4 lies at 2/3 of the way from row 0 to row 1 of 3.
    np.testing.assert_allclose(got[1, 0], table[0, 0] / 3 + table[1, 0] * 2 / 3, atol=1e-6)


def test_its_files_come_back(model, tmp_path):
    assert read_hf_config(write_hf_config(CONFIG)) == CONFIG
    to_hf(model, tmp_path / "hub", max_shard_bytes=30_000)
    again = open_model(tmp_path / "hub")
    assert again.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    quantised = from_hf(tmp_path / "hub", compute=ComputeConfig(base_quantization="int8"))
    to_hf(quantised, tmp_path / "quantised")
    kernel = np.asarray(model.vision.deepstack.layers.out.kernel[...])
    back = np.asarray(open_model(tmp_path / "quantised").vision.deepstack.layers.out.kernel[...])
    assert 0 < np.abs(back - kernel).max() < 0.02


def test_a_released_config_is_read_as_it_stands():
    text = {
        "model_type": "qwen3_vl_text",
        "head_dim": 128,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    }
    vision = {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "out_hidden_size": 2560,
    }
    fields = {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision}
    assert read_hf_config(fields) == Qwen3VLConfig.qwen3_vl_4b()
    sixteen = text | {"num_attention_heads": 16, "num_key_value_heads": None}
    assert read_hf_config(fields | {"text_config": sixteen}).decoder.num_kv_heads == 16
    del text["num_key_value_heads"]
    assert read_hf_config(fields).decoder.num_kv_heads == 32
    for part, change, problem in (
        ("text_config", {"attention_bias": True}, "attention_bias"),
        ("text_config", {"hidden_size": "2560"}, "hidden_size"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("text_config", {"use_sliding_window": True}, "sliding"),
        ("vision_config", {"hidden_act": "silu"}, "hidden_act"),
        ("vision_config", {"deepstack_visual_indexes": [17, 5]}, "deepstack_blocks"),
        ("vision_config", {"num_position_embeddings": 2300}, "square"),
        ("vision_config", {"out_hidden_size": 2048}, "out_hidden_size"),
    ):
        with pytest.raises(SpaceDriveError, match=problem):
            read_hf_config(fields | {part: fields[part] | change})
    other = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, qk_norm=False))
    with pytest.raises(SpaceDriveError, match="qk_norm"):
        write_hf_config(other)


def test_released_sizes():
    millions = {}
    for size in ("2b", "4b", "8b"):
        config = getattr(Qwen3VLConfig, f"qwen3_vl_{size}")()
        abstract = nnx.eval_shape(
            lambda config=config: Qwen3VL(config, compute=ComputeConfig(), rngs=nnx.Rngs(0))
        )
        millions[size] = round(sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract))) / 1e6)
    # 2.13, 4.44 and 8.77 billion, as the hub counts them.
    assert millions == {"2b": 2128, "4b": 4438, "8b": 8767}


def test_views_keep_their_size_where_published_images_would_grow():
    views = Qwen3ImageProcessor(Qwen3VisionConfig(), (96, 128))
    assert views.token_grid == (3, 4)
    assert views.intrinsics_size == (96, 128)
    published = Qwen3ImageProcessor(Qwen3VisionConfig(), (96, 128), Qwen3ImageProcessor.published)
    assert published.resized == (224, 320)
    assert FAMILY.image_processor.mean == (0.5, 0.5, 0.5)
    json.dumps(write_hf_config(Qwen3VLConfig()))

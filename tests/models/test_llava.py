"""LLaVA-1.5: numbers of transformers 4.52 and peft 0.14 (tests/golden/llava_plus_train), names, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.interop.hf_checkpoint import fill, from_hf, to_hf
from spacedrive_jax.interop.hf_config import read_hf_config, write_hf_config
from spacedrive_jax.interop.llava import FORMAT, llava_rules
from spacedrive_jax.interop.safetensors_folder import SafetensorsFolder
from spacedrive_jax.interop.weight_table import check_names_and_shapes, lora_rules
from spacedrive_jax.models.config import ComputeConfig, LoraConfig
from spacedrive_jax.models.families.llava import ClipVisionConfig, Llava, LlavaConfig
from spacedrive_jax.models.image_processor import flatten_patches
from tests.golden.verify.modules import hidden_states

GOLDEN = Path(__file__).parents[1] / "golden" / "llava_plus_train"
LORA = LoraConfig(rank=4, alpha=4.0, targets=("k", "v", "o"))
TOLERANCE = 2e-5
IMAGE = 509


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDEN / "arrays.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def adapted():
    model = from_hf(GOLDEN, lora=LORA)
    adapters = SafetensorsFolder(GOLDEN / "adapters.safetensors")
    rules = lora_rules(model.config.decoder, LORA)
    check_names_and_shapes(rules, adapters.shapes(), origin="adapters")
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    fill(flat, rules, adapters)
    return nnx.merge(graph, nnx.from_flat_state(flat))


@pytest.fixture(scope="module")
def model():
    return from_hf(GOLDEN)


def worst(actual, expected):
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    return np.abs(actual - expected).max()


def places_of(length, batch=1):
    return jnp.broadcast_to(jnp.arange(length), (3, batch, length))


def load_all(folder):
    return {
        name: value for file in folder.glob("model*.safetensors") for name, value in load_file(file).items()
    }


def test_the_family_is_told_by_model_type(model):
    assert isinstance(model, Llava)
    assert model.config == read_hf_config(GOLDEN)
    assert not model.config.decoder.tie_word_embeddings


def test_vision_tower_and_projector_give_the_visual_tokens(arrays, model):
    patches = jnp.asarray(flatten_patches(arrays["pixel_values"], 14))
    assert worst(model.encode_images(patches, (4, 4)), arrays["image_embeds"]) < TOLERANCE


def test_decoder_with_adapters_gives_hidden_states_and_logits(arrays, adapted):
    embeddings = jnp.asarray(arrays["inputs_embeds"])
    position_ids = places_of(embeddings.shape[1])
    hidden = hidden_states(adapted.decoder, embeddings, position_ids)[:, :, arrays["places"]]
    for layer in range(4):
        assert worst(hidden[layer], arrays[f"hidden_states_{layer}"]) < TOLERANCE
    final, _ = adapted.decoder(embeddings, position_ids)
    logits = adapted.decoder.logits(final[:, arrays["places"]])
    assert worst(logits, arrays["logits"]) < TOLERANCE


def test_golden_adapters_take_part(arrays, model):
    """Guards the test above against adapters that do nothing."""
    embeddings = jnp.asarray(arrays["inputs_embeds"])
    final, _ = model.decoder(embeddings, places_of(embeddings.shape[1]))
    logits = model.decoder.logits(final[:, arrays["places"]])
    assert worst(logits, arrays["logits"]) > 100 * TOLERANCE


def test_only_the_blocks_before_the_feature_layer_count(arrays, model):
    """The last block and norm are there for the checkpoint; the one before them does matter."""
    patches = jnp.asarray(flatten_patches(arrays["pixel_values"], 14))

    def features_without(layer):
        graph, state = nnx.split(model)
        flat = dict(nnx.to_flat_state(state))
        path = ("vision", "layers", "down", "kernel")
        flat[path] = flat[path].replace(flat[path][...].at[layer].set(0.0))
        return nnx.merge(graph, nnx.from_flat_state(flat)).encode_images(patches, (4, 4))

    assert worst(features_without(3), arrays["image_embeds"]) < TOLERANCE
    assert worst(features_without(2), arrays["image_embeds"]) > 100 * TOLERANCE


@pytest.mark.parametrize("naming", ["hub", "transformers"])
def test_export_gives_back_every_tensor_bit_for_bit(model, tmp_path, naming):
    to_hf(model, tmp_path / "exported", naming=naming, max_shard_bytes=400_000)
    expected, exported = load_all(GOLDEN), load_all(tmp_path / "exported")
    published = FORMAT.hub_name if naming == "hub" else str

    def rename(name: str) -> str:
        return published(FORMAT.canonical_name(name))

    assert exported.keys() == {rename(name) for name in expected}
    for name, tensor in expected.items():
        np.testing.assert_array_equal(exported[rename(name)], tensor)
    again = from_hf(tmp_path / "exported")
    assert again.config == model.config
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(model)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        (
            "language_model.model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
        ),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
    ],
)
def test_names_translate_both_ways(name, canonical):
    assert FORMAT.canonical_name(name) == canonical == FORMAT.canonical_name(canonical)
    assert FORMAT.hub_name(canonical) == name


@pytest.mark.parametrize(
    "name", ["vision_tower.pre_layrnorm.bias", "model.vision_tower.vision_model.pre_layrnorm.bias"]
)
def test_every_name_of_the_vision_tower_is_known(name):
    assert FORMAT.canonical_name(name) == "model.vision_tower.pre_layrnorm.bias"


def test_old_buffers_are_passed_over_and_bad_tensors_reported(tmp_path):
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    tensors = load_all(GOLDEN)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(17)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    from_hf(tmp_path)
    del tensors["model.multi_modal_projector.linear_1.weight"]
    tensors["lm_head.weight"] = np.zeros((511, 96), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SpaceDriveError) as raised:
        from_hf(tmp_path)
    assert "(2 tensors)" in str(raised.value)
    assert "missing model.multi_modal_projector.linear_1.weight (96, 32)" in str(raised.value)
    assert "shape of lm_head.weight is (511, 96)" in str(raised.value)


def test_the_preset_has_the_tensors_of_the_published_checkpoint():
    config = LlavaConfig.llava_1_5_7b()
    rules = llava_rules(config)
    names = [name for rule in rules for name in rule.source_names()]
    assert len(names) == len(set(names)) == 686
    sizes = {rule.target: len(rule.source_names()) * int(np.prod(rule.source_shape)) for rule in rules}
    assert sum(sizes.values()) == 7_063_427_072
    abstract = nnx.eval_shape(lambda: Llava(config, compute=ComputeConfig(), rngs=nnx.Rngs(0)))
    shapes = {path: int(np.prod(each.shape)) for path, each in nnx.to_flat_state(nnx.state(abstract))}
    assert shapes == sizes


def test_config_survives_writing_and_takes_the_hubs_short_form():
    config = read_hf_config(GOLDEN)
    assert read_hf_config(write_hf_config(config)) == config
    published = {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": {"model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    assert read_hf_config(published) == LlavaConfig.llava_1_5_7b()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (None, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full'"),
        (None, {"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
        (None, {"projector_hidden_act": "silu"}, "projector_hidden_act"),
        ("text_config", {"model_type": "mistral"}, "model_type 'mistral'"),
        ("text_config", {"attention_bias": True}, "attention_bias"),
        (
            "text_config",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "type 'linear'",
        ),
        ("vision_config", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_features_that_are_not_here_are_refused(part, change, message):
    fields = json.loads((GOLDEN / "config.json").read_text())
    (fields if part is None else fields[part]).update(change)
    with pytest.raises(SpaceDriveError, match=message):
        read_hf_config(fields)


def test_two_images_may_stand_side_by_side_and_padding_changes_nothing(model):
    generator = np.random.default_rng(0)
    images = flatten_patches(generator.standard_normal((2, 2, 3, 56, 56)).astype(np.float32), 14)
    text = generator.integers(0, 500, (2, 9))
    token_ids = np.zeros((2, 44), np.int32)
    token_ids[0, :41] = [*text[0, :4], *[IMAGE] * 32, *text[0, 4:]]
    token_ids[1] = [*text[1, :7], *[IMAGE] * 16, *text[1, 7:], *text[1, :3], *[IMAGE] * 16]
    lengths = np.array([41, 44])
    both = model.logits(token_ids, pixel_values=images, image_grid_thw=(1, 4, 4), lengths=lengths)
    alone = model.logits(token_ids[:1, :41], pixel_values=images[:1], image_grid_thw=(1, 4, 4))
    assert worst(both[:1, :41], np.asarray(alone)) < TOLERANCE
    swapped = model.logits(token_ids[:1, :41], pixel_values=images[:1, ::-1], image_grid_thw=(1, 4, 4))
    assert worst(swapped, np.asarray(alone)) > 100 * TOLERANCE

    continued = model.generate(
        token_ids, pixel_values=images, image_grid_thw=(1, 4, 4), lengths=lengths, max_new_tokens=4
    )
    grown = np.concatenate([token_ids[:1, :41], continued[:1, :3]], axis=1)
    again = model.logits(grown, pixel_values=images[:1], image_grid_thw=(1, 4, 4))
    np.testing.assert_array_equal(np.argmax(again[0, 40:], axis=-1), continued[0])


def test_images_that_do_not_fit_are_refused(model):
    patches = np.zeros((1, 1, 16, 588), np.float32)
    with pytest.raises(SpaceDriveError, match=r"15 image tokens .* 16 visual tokens"):
        model.logits(np.full((1, 15), IMAGE), pixel_values=patches, image_grid_thw=(1, 4, 4))
    with pytest.raises(SpaceDriveError, match="grid 2x8 must be 4x4"):
        model.logits(np.full((1, 16), IMAGE), pixel_values=patches, image_grid_thw=(1, 2, 8))
    with pytest.raises(SpaceDriveError, match="flatten_patches"):
        model.encode_images(jnp.zeros((1, 16, 3)), (4, 4))
    with pytest.raises(SpaceDriveError, match="do not divide"):
        flatten_patches(np.zeros((3, 50, 56)), 14)
    with pytest.raises(SpaceDriveError, match="feature_layer"):
        ClipVisionConfig(feature_layer=0)


def test_patches_are_cut_as_a_convolution_reads_them(arrays):
    image = arrays["pixel_values"][0]
    patches = flatten_patches(image, 14)
    np.testing.assert_array_equal(patches[6].reshape(3, 14, 14), image[:, 14:28, 28:42])

"""SmolVLM and InternVL3 without torch: pixel shuffle, positions, chats, views, refusals, imports."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from spacedrive_jax import open_model
from spacedrive_jax.cli.main import main
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.interop.hf_checkpoint import to_hf
from spacedrive_jax.interop.hf_config import read_hf_config, write_hf_config
from spacedrive_jax.interop.internvl import FORMAT
from spacedrive_jax.interop.peft import load_adapter, save_adapter
from spacedrive_jax.models.config import ComputeConfig, LoraConfig
from spacedrive_jax.models.families import family_of, internvl, smolvlm
from spacedrive_jax.models.family import IGNORE, Message
from spacedrive_jax.models.image_processor import ProcessorSettings
from spacedrive_jax.models.unprojection import patch_centres
from spacedrive_jax.models.vision_transformer import pixel_shuffle
from tests.conftest import ROOT
from tests.interop.conftest import write_tokenizer
from tests.models.conftest import random_module
from tests.training.family_runs import NAMES, SQUARE_NAMES, family_run, tiny_vlm


def test_pixel_shuffle_takes_squares_row_by_row():
    patches = jnp.arange(2 * 4 * 6.0).reshape(2, 24, 1)
    tokens = pixel_shuffle(patches, (4, 6), 2)
    assert tokens.shape == (2, 6, 4)
    np.testing.assert_array_equal(tokens[0, 0], [0, 1, 6, 7])
    np.testing.assert_array_equal(tokens[0, 4], [14, 15, 20, 21])
    np.testing.assert_array_equal(tokens[1], tokens[0] + 24)


def test_smolvlms_positions_are_those_at_a_patchs_share_of_the_image():
    for side in (4, 27, 32):  # the released sizes among them: each position once
        np.testing.assert_array_equal(smolvlm.position_buckets((side, side), side), np.arange(side**2))
    np.testing.assert_array_equal(smolvlm.position_buckets((2, 2), 4), [0, 2, 8, 10])
    np.testing.assert_array_equal(
        smolvlm.position_buckets((3, 1), 2), [0, 0, 2]
    )  # 2/3 lies in the lower half


def layout(family, messages, **options):
    tokenizer = load_tokenizer(None, family.chat)
    return tokenizer, family.chat.apply_chat_template(tokenizer, messages, 2, **options)


TALK = [
    Message("user", "<image>\n<image>\nWhere to?"),
    Message("assistant", "Left."),
    Message("user", "Sure?"),
]


@pytest.mark.parametrize(
    ("family", "expected", "supervised"),
    [
        (
            smolvlm.FAMILY,
            "<|im_start|>User:[I]\n[I]\nWhere to?<end_of_utterance>\n"
            "Assistant: Left.<end_of_utterance>\nUser: Sure?<end_of_utterance>\nAssistant:",
            " Left.<end_of_utterance>\n",
        ),
        (
            internvl.FAMILY,
            "<|im_start|>user\n[I]\n[I]\nWhere to?<|im_end|>\n<|im_start|>assistant\nLeft.<|im_end|>\n"
            "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
            "Left.<|im_end|>\n",
        ),
    ],
    ids=SQUARE_NAMES,
)
def test_conversations_are_laid_out_as_published(family, expected, supervised):
    border = "<fake_token_around_image>"
    image = {
        "smolvlm": f"{border}<global-img><image><image>{border}",
        "internvl": "<img><IMG_CONTEXT><IMG_CONTEXT></img>",
    }[family.name]
    tokenizer, chat = layout(family, TALK, add_generation_prompt=True)
    assert tokenizer.decode(chat.token_ids) == expected.replace("[I]", image)
    kept = [label for label in chat.labels if label != IGNORE]
    assert tokenizer.decode(kept) == supervised
    assert [chat.token_ids[start] for start in chat.image_starts] == [tokenizer.image] * 2
    end = family.chat.image_end(tokenizer)
    assert chat.token_ids[chat.image_starts[1] + 2] == end
    ids, slot = family.chat.ego_feature(tokenizer)
    assert ids[slot] == tokenizer.image
    spoken = layout(family, [*TALK[:1], Message("assistant", "<POS_INDICATOR><POS_EMBEDDING>")])[1]
    both = layout(
        family,
        [*TALK[:1], Message("assistant", "<POS_INDICATOR><POS_EMBEDDING>")],
        supervise_positions=True,
    )[1]
    assert tokenizer.position not in spoken.labels
    assert both.labels.count(tokenizer.position) == 1


def test_views_lose_no_border_though_the_published_processor_does():
    vision = smolvlm.SmolVLMConfig.smolvlm_2b().vision
    views = smolvlm.SmolVLMImageProcessor(vision, (900, 1600))
    assert (views.patch_grid, views.token_grid, views.intrinsics_size) == ((27, 27), (9, 9), (378, 378))
    centres = patch_centres(views.token_grid, vision.patch_size * vision.merge_size)
    np.testing.assert_array_equal(centres[0, 0], [21, 21])
    np.testing.assert_array_equal(centres[-1, -1], [378 - 21, 378 - 21])
    published = smolvlm.SmolVLMImageProcessor(vision, (900, 1600), smolvlm.SmolVLMImageProcessor.published)
    assert (published.first_size, published.side) == ((864, 1536), 384)
    image = np.zeros((900, 1600, 3), np.uint8)
    image[:, 1590:] = 255  # within the border of 6 of 384 pixels
    seen = [each.patches([image])[0].reshape(27, 27, 3, 14, 14)[:, -1] for each in (views, published)]
    assert seen[0].max() > 200
    assert seen[1].max() < 60


@pytest.mark.parametrize(
    ("size", "first"),
    [
        ((900, 1600), (1152, 2048)),
        ((1600, 900), (2048, 1152)),
        ((333, 1000), (682, 2048)),
        ((7, 7), (2048, 2048)),
    ],
)
def test_the_longer_side_comes_first(size, first):
    assert smolvlm.with_longest_edge(*size, 2048) == first


def test_settings_of_another_size_than_the_tower_knows_are_refused():
    square = internvl.InternVLConfig().vision
    with pytest.raises(ConfigError, match="tower's 448x448 pixels"):
        internvl.InternVLImageProcessor(
            square, (9, 9), ProcessorSettings(size=(("height", 384), ("width", 384)))
        )
    small = smolvlm.SmolVLMConfig().vision
    with pytest.raises(ConfigError, match="30 patches of 16 pixels a side"):
        smolvlm.SmolVLMImageProcessor(small, (9, 9), ProcessorSettings(size=(("max_longest_edge", 490),)))


SIZES = (
    smolvlm.SmolVLMConfig.smolvlm_256m(),
    smolvlm.SmolVLMConfig.smolvlm_500m(),
    smolvlm.SmolVLMConfig.smolvlm_2b(),
    dataclasses.replace(smolvlm.SmolVLMConfig(), model_type="idefics3"),
    internvl.InternVLConfig.internvl3_1b(),
    internvl.InternVLConfig.internvl3_2b(),
    internvl.InternVLConfig.internvl3_8b(),
)


@pytest.mark.parametrize("name", NAMES)
def test_towers_are_exported_for_any_number_of_images(name, unchecked):
    # Unchecked: annotated shapes are compared as numbers, which an unknown number of images has none of.
    config = tiny_vlm(name)
    model = random_module(lambda: family_of(config).model(config, compute=ComputeConfig(), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    patches = np.random.default_rng(0).normal(size=(3, 16, config.vision.patch_channels)).astype(np.float32)
    (count,) = jax.export.symbolic_shape("i")

    @jax.jit
    def encode(pixels):
        return jax.tree.leaves(nnx.merge(graph, state).encode_images(pixels, (4, 4)))

    exported = jax.export.export(encode)(jax.ShapeDtypeStruct((count, *patches.shape[1:]), np.float32))
    for whole, own in zip(exported.call(patches), encode(patches), strict=True):
        np.testing.assert_allclose(whole, own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", SIZES)
def test_a_config_comes_back_from_config_json(config):
    assert read_hf_config(json.loads(json.dumps(write_hf_config(config)))) == config


def test_heads_wider_than_their_share_come_back():
    decoder = dataclasses.replace(SIZES[4].decoder, head_dim=128, mrope_section=(64,))
    config = dataclasses.replace(SIZES[4], decoder=decoder)
    assert read_hf_config(write_hf_config(config)) == config


@pytest.mark.parametrize("config", [SIZES[0], SIZES[4]], ids=SQUARE_NAMES)
def test_the_image_token_may_be_the_first(config):
    assert read_hf_config(changed(config, "image_token_id", value=0)).image_token_id == 0
    with pytest.raises(ConfigError, match="a whole number from 0"):
        read_hf_config(changed(config, "image_token_id", value=-1))


def test_smolvlms_text_ends_at_none_of_llamas_ids():
    text = write_hf_config(SIZES[0])["text_config"]
    assert [text[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3


@pytest.mark.parametrize("prefix", ["language_model.model.", "language_model.", "model.language_model."])
def test_internvls_decoder_goes_by_several_names(prefix):
    name = FORMAT.canonical_name(f"{prefix}layers.1.mlp.up_proj.weight")
    assert name == "model.language_model.layers.1.mlp.up_proj.weight"
    assert FORMAT.hub_name(name) == "language_model.model.layers.1.mlp.up_proj.weight"
    assert FORMAT.canonical_name("language_model.lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize(
    ("config", "millions"), [(SIZES[0], 256), (SIZES[1], 507), (SIZES[2], 2247), (SIZES[4], 938)]
)
def test_the_released_sizes_have_their_parameters(config, millions):
    model = nnx.eval_shape(lambda: family_of(config).model(config, compute=ComputeConfig(), rngs=nnx.Rngs(0)))
    count = sum(leaf.size for _, leaf in nnx.to_flat_state(nnx.state(model)))
    assert round(count / 1e6) == millions


def changed(config, *path, value):
    fields = write_hf_config(config)
    inner = fields
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return fields


@pytest.mark.parametrize(
    ("config", "path", "value", "problem"),
    [
        (SIZES[4], ("vision_config", "use_qk_norm"), True, "use_qk_norm True is not supported"),
        (SIZES[4], ("vision_config", "norm_type"), "rms_norm", "norm_type 'rms_norm'"),
        (SIZES[4], ("vision_config", "image_size"), [448, 224], "two equal ones"),
        (SIZES[4], ("vision_config", "image_size"), 440, "must be a multiple of patch_size"),
        (SIZES[4], ("downsample_ratio",), 0.3, "one over a whole number"),
        (SIZES[4], ("vision_feature_layer",), -2, "vision_feature_layer -2"),
        (SIZES[4], ("text_config", "model_type"), "llama", "model_type 'llama' is not supported"),
        (SIZES[4], ("text_config", "rope_scaling"), {"rope_type": "yarn"}, "type 'yarn' is not supported"),
        (SIZES[0], ("scale_factor",), 3, "must be a multiple of merge_size"),
        (SIZES[0], ("vision_config", "hidden_act"), "gelu", "hidden_act 'gelu' is not supported"),
        (SIZES[0], ("vision_config", "model_type"), "clip_vision_model", "expected SigLIP's tower"),
        (SIZES[0], ("text_config", "attention_bias"), True, "attention_bias True"),
    ],
)
def test_what_the_model_has_not_is_refused(config, path, value, problem):
    with pytest.raises(ConfigError, match=problem):
        read_hf_config(changed(config, *path, value=value))


def test_a_scale_behind_the_trained_length_is_kept_and_longer_sequences_are_refused(tmp_path):
    fields = write_hf_config(SIZES[4])["text_config"]
    assert fields["rope_scaling"] == {"rope_type": "dynamic", "factor": 2.0}
    assert fields["max_position_embeddings"] == 32768
    other = changed(SIZES[4], "text_config", "rope_scaling", value={"rope_type": "dynamic", "factor": 3.0})
    assert read_hf_config(other).decoder.dynamic_rope_factor == 3.0
    config = tiny_vlm("internvl")
    decoder = dataclasses.replace(config.decoder, max_position_embeddings=8, dynamic_rope_factor=2.0)
    config = dataclasses.replace(config, decoder=decoder)
    model = random_module(lambda: family_of(config).model(config, compute=ComputeConfig(), rngs=nnx.Rngs(0)))
    to_hf(model, tmp_path / "folder")
    model = open_model(tmp_path / "folder")
    assert model.config == config
    ids = np.arange(20, 29)[None]
    assert model.generate(ids[:, :6], max_new_tokens=2).shape == (1, 2)
    with pytest.raises(ConfigError, match=r"prompt and answer of 9 positions: behind max_position_emb.* 8 "):
        model.generate(ids[:, :6], max_new_tokens=3)
    with pytest.raises(ConfigError, match="a sequence of 9 positions"):
        model.logits(ids)
    run = family_run("internvl", tmp_path, tmp_path / "run")
    short = dataclasses.replace(run.model, vlm=config)
    with pytest.raises(ConfigError, match=r"data\.sequence_length of 192 positions"):
        SampleBuilder(run.data, short)


@pytest.mark.parametrize("name", SQUARE_NAMES)
def test_answers_end_where_the_checkpoints_files_say_and_exports_say_it_again(name, tmp_path):
    config = tiny_vlm(name)
    model = random_module(lambda: family_of(config).model(config, compute=ComputeConfig(), rngs=nnx.Rngs(0)))
    to_hf(model, tmp_path / "plain")
    ids = np.arange(20, 28)[None]
    never = open_model(tmp_path / "plain").generate(ids, max_new_tokens=6)[0].tolist()
    assert len(set(never)) > 1
    third = next(place for place, each in enumerate(never) if each != never[0])

    def said(folder, generation, **fields):
        shutil.copytree(tmp_path / "plain", tmp_path / folder)
        file = tmp_path / folder / "config.json"
        whole = json.loads(file.read_text())
        whole["text_config"] |= fields
        file.write_text(json.dumps(whole))
        if generation is not None:
            (tmp_path / folder / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path / folder

    whole = said(
        "list", {"eos_token_id": [999, never[third]]}, eos_token_id=0, bos_token_id=1, pad_token_id=2
    )
    opened = open_model(whole)
    ended = opened.generate(ids, max_new_tokens=6)[0].tolist()
    assert ended == never[: third + 1] + [0] * (5 - third)
    assert opened.generate(ids, max_new_tokens=6, stop_ids=())[0].tolist() == never
    to_hf(opened, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())["text_config"]
    assert [written[f"{each}_token_id"] for each in ("eos", "bos", "pad")] == [0, 1, 2]
    for folder in (
        said("one", {"eos_token_id": never[third]}),
        said("config", None, eos_token_id=[never[third]]),
    ):
        assert open_model(folder).generate(ids, max_new_tokens=6)[0].tolist() == ended
    assert open_model(said("none", {}, eos_token_id=never[third])).special_ids.stop_ids == ()
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is 'two'"):
        open_model(said("bad", {"eos_token_id": "two"}))


@pytest.mark.parametrize("name", SQUARE_NAMES)
def test_adapters_on_the_mlp_go_out_and_come_back(name, tmp_path):
    lora = LoraConfig(rank=2, alpha=4.0, targets=("q", "v", "gate", "up", "down"))
    config = tiny_vlm(name)

    def build(seed):
        kind = family_of(config).model
        return random_module(lambda: kind(config, compute=ComputeConfig(), rngs=nnx.Rngs(0), lora=lora), seed)

    model, other = build(0), build(1)
    save_adapter(model, tmp_path / "adapter", base_model="tiny")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(".mlp.down_proj.lora_B" in key for key in tensors) == config.decoder.num_layers
    load_adapter(other, tmp_path / "adapter")
    for ours, theirs in zip(
        *(jax.tree.leaves(nnx.state(each, nnx.LoRAParam)) for each in (other, model)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    to_hf(model, tmp_path / "merged", merged=True)
    ids = np.arange(20, 28)[None]
    np.testing.assert_allclose(
        open_model(tmp_path / "merged").logits(ids), model.logits(ids), rtol=2e-4, atol=2e-4
    )


@pytest.mark.parametrize("name", SQUARE_NAMES)
def test_an_import_makes_room_for_the_coordinate_tokens(name, tmp_path):
    config = tiny_vlm(name)
    decoder = dataclasses.replace(config.decoder, vocab_size=520, tie_word_embeddings=True)
    config = dataclasses.replace(config, decoder=decoder)
    model = random_module(lambda: family_of(config).model(config, compute=ComputeConfig(), rngs=nnx.Rngs(0)))
    to_hf(model, tmp_path / "source")
    write_tokenizer(tmp_path / "source", 520)
    command = ["import-weights", "--from", "hf", str(tmp_path / "source"), "--out", str(tmp_path / "weights")]
    assert main(command) == 0
    imported = open_model(tmp_path / "weights")
    assert imported.config.decoder.vocab_size == 522
    table = np.asarray(imported.decoder.embedding[...])
    np.testing.assert_allclose(table[520:], np.tile(table[:520].mean(0), (2, 1)), atol=1e-6)
    names = {key for file in (tmp_path / "weights").glob("model*.safetensors") for key in load_file(file)}
    prefix = {"smolvlm": "model.text_model.", "internvl": "language_model.model."}[name]
    assert f"{prefix}embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_eight_devices_score_as_one():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "models" / "sharded_families.py")],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert list(results) == list(NAMES)
    for name, found in results.items():
        assert found["error"] < 2e-5, name
        assert found["share"] < 0.5, name

from __future__ import annotations

import json
import socket

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import spacedrive_jax.cli.main
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.inference.open_model import open_vlm
from spacedrive_jax.interop.hf_checkpoint import MergedParameters, from_hf, to_hf
from spacedrive_jax.interop.hf_config import format_of
from spacedrive_jax.interop.importing import ImportOptions, import_hf, import_peft
from spacedrive_jax.interop.peft import load_adapter, read_peft_config, save_adapter
from spacedrive_jax.interop.weights_folder import WeightsMetadata, load
from spacedrive_jax.models.config import ComputeConfig, LoraConfig, NewTokensConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVL
from tests.interop.conftest import FAMILIES
from tests.models.conftest import random_module, tiny_config

LORA = LoraConfig(rank=2, alpha=3.0, targets=("k", "v", "o"))


def run(*arguments: object) -> int:
    return spacedrive_jax.cli.main.main([str(each) for each in arguments])


def situation_of(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def tensors_of(folder):
    """Canonical name to value."""
    family = format_of(from_hf(folder).config)
    files = [load_file(file) for file in sorted(folder.glob("model*.safetensors"))]
    return {family.canonical_name(name): value for tensors in files for name, value in tensors.items()}


def adapted(folder, *, new_tokens=None, seed=0):
    """The checkpoint with adapters (and rows) that do something."""
    model = from_hf(folder, lora=LORA, new_tokens=new_tokens)
    graph, state = nnx.split(model)
    generator = np.random.default_rng(seed)
    flat = [
        (path, each.replace(jnp.asarray(generator.normal(0, 0.1, each.shape), each.dtype)))
        if path[-1] in ("a", "b", "new_embedding", "new_head")
        else (path, each)
        for path, each in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def logits_of(model, length=9):
    ids = np.random.default_rng(1).integers(0, 512, (1, length))
    ids[0, 3] = 510
    ids[ids == 509] = 0
    return np.asarray(model.logits(ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_import_keeps_every_tensor_and_adds_two_mean_rows(checkpoint, tmp_path, capsys, name):
    source = checkpoint(name)
    out = tmp_path / "weights"
    assert run("import-weights", "--from", "hf", source, "--out", out, "--json") == 0
    metadata = situation_of(capsys)
    before, after = tensors_of(source), tensors_of(out)
    assert before.keys() == after.keys()
    tables = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    for tensor in before.keys() - tables:
        np.testing.assert_array_equal(before[tensor], after[tensor])
        assert before[tensor].dtype == after[tensor].dtype
    for tensor in tables:
        np.testing.assert_array_equal(before[tensor][:510], after[tensor][:510])
        expected = before[tensor][:510].astype(np.float64).mean(0)
        np.testing.assert_allclose(after[tensor][510:512], [expected] * 2, atol=1e-6)
        np.testing.assert_array_equal(before[tensor][512:], after[tensor][512:])
    assert metadata["new_tokens"] == 510
    assert metadata["tensors"] == len(before)
    assert metadata["parameters"] == sum(each.size for each in before.values())
    assert {**metadata, "dtypes": ["float32"]} == {
        "out": str(out),
        **json.loads((out / "weights.json").read_text()),
    }


def test_the_same_weights_have_the_same_fingerprint_and_others_not(checkpoint, tmp_path):
    source = checkpoint("qwen_plus_train")
    imported = import_hf(source, tmp_path / "a", ImportOptions())
    assert import_hf(source, tmp_path / "b", ImportOptions())["fingerprint"] == imported["fingerprint"]
    again = import_hf(tmp_path / "a", tmp_path / "c", ImportOptions(max_shard_bytes=500_000))
    assert again["fingerprint"] == imported["fingerprint"]
    assert len(list((tmp_path / "c").glob("model-*.safetensors"))) > 2
    file = source / "model-00003-of-00003.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] += 1e-3
    save_file(tensors, file)
    assert import_hf(source, tmp_path / "d", ImportOptions())["fingerprint"] != imported["fingerprint"]


def test_a_table_without_spare_rows_grows(checkpoint, tmp_path, golden):
    source = checkpoint("qwen_plus_train")
    config = json.loads((source / "config.json").read_text())
    file = source / "model-00003-of-00003.safetensors"
    tensors = {name: value[:510] if value.ndim == 2 else value for name, value in load_file(file).items()}
    save_file(tensors, file)
    for part in (config, config.get("text_config", {})):
        if "vocab_size" in part:
            part["vocab_size"] = 510
    (source / "config.json").write_text(json.dumps(config))
    import_hf(source, tmp_path / "weights", ImportOptions())
    model = load(tmp_path / "weights", trainable_tokens=True)
    assert model.config.decoder.vocab_size == 512
    assert model.decoder.new_tokens == NewTokensConfig(510)
    np.testing.assert_array_equal(model.decoder.new_embedding[...], model.decoder.embedding[...][510:])


def test_half_precision_stays_half(checkpoint, tmp_path):
    source = checkpoint("llava_plus_train")
    for file in source.glob("model-*.safetensors"):
        save_file({name: value.astype(jnp.bfloat16) for name, value in load_file(file).items()}, file)
    metadata = import_hf(source, tmp_path / "weights", ImportOptions())
    assert metadata["dtypes"] == ("bfloat16",)
    model = load(tmp_path / "weights")
    assert {str(leaf.dtype) for _, leaf in nnx.to_flat_state(nnx.state(model))} == {"bfloat16"}
    assert model.decoder.compute.dtype == "float32"


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_go_in_and_out_bit_for_bit(checkpoint, tmp_path, capsys, name):
    source = checkpoint(name)
    model = adapted(source)
    save_adapter(model, tmp_path / "adapter", base_model=str(source))
    assert run("import-weights", "--from", "peft", tmp_path / "adapter", "--out", tmp_path / "weights") == 0
    assert WeightsMetadata.read(tmp_path / "weights").adapter_rank == 2
    loaded = load(tmp_path / "weights")
    assert np.abs(logits_of(loaded) - logits_of(from_hf(source))).max() > 1e-3
    capsys.readouterr()
    back = tmp_path / "back"
    assert run("export-weights", "--to", "peft", tmp_path / "weights", "--out", back, "--json") == 0
    assert situation_of(capsys)["adapter_rank"] == 2
    assert read_peft_config(back) == read_peft_config(tmp_path / "adapter")
    before, after = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("adapter", "back"))
    assert before.keys() == after.keys()
    for tensor in before:
        np.testing.assert_array_equal(before[tensor], after[tensor])
    again = from_hf(tmp_path / "weights", lora=read_peft_config(back))
    load_adapter(again, back)
    np.testing.assert_array_equal(logits_of(again), logits_of(loaded))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_merged_model_computes_the_same(checkpoint, tmp_path, capsys, name):
    source = checkpoint(name)
    save_adapter(adapted(source), tmp_path / "adapter", base_model="elsewhere")
    options = ("--base", source, "--out", tmp_path / "weights")
    assert run("import-weights", "--from", "peft", tmp_path / "adapter", *options) == 0
    capsys.readouterr()
    full = tmp_path / "full"
    assert run("export-weights", "--to", "hf", tmp_path / "weights", "--out", full, "--json") == 0
    assert situation_of(capsys)["merged_adapter_rank"] == 2
    assert (full / "tokenizer.json").is_file()
    expected = logits_of(load(tmp_path / "weights"))
    merged = from_hf(full)
    assert merged.decoder.lora is None
    assert np.abs(logits_of(merged) - expected).max() < 2e-5 * np.abs(expected).max()


def test_trained_rows_are_merged_and_untie_a_tied_head(tmp_path):
    model = random_module(
        lambda: QwenVL(
            tiny_config(tie_word_embeddings=True),
            compute=ComputeConfig(),
            rngs=nnx.Rngs(0),
            lora=LORA,
            new_tokens=NewTokensConfig(80),
        )
    )
    ids = np.array([[3, 80, 81, 5, 7]])
    expected = np.asarray(model.logits(ids))
    config = to_hf(model, tmp_path / "merged", merged=True)
    assert not config.decoder.tie_word_embeddings
    merged = from_hf(tmp_path / "merged")
    assert merged.config == config
    assert np.abs(np.asarray(merged.logits(ids)) - expected).max() < 2e-5 * np.abs(expected).max()
    to_hf(model, tmp_path / "base")
    plain = np.asarray(from_hf(tmp_path / "base").logits(ids))
    assert np.abs(plain - expected).max() > 1e-2


def test_merged_adapters_do_not_depend_on_the_order_of_their_sums():
    """Which BLAS chooses by the processor; the ranks of an adapter can be put in any order."""
    model = random_module(
        lambda: QwenVL(tiny_config(), compute=ComputeConfig(), rngs=nnx.Rngs(0), lora=LoraConfig(rank=16))
    )
    path = ("decoder", "layers", "attention", "q", "kernel")
    merged = MergedParameters(model)[path]
    adapter = model.decoder.layers.attention.q.adapter
    order = np.random.default_rng(0).permutation(16)
    adapter.a[...], adapter.b[...] = adapter.a[...][..., order], adapter.b[...][:, order]
    np.testing.assert_array_equal(MergedParameters(model)[path], merged)
    kernel = np.asarray(model.decoder.layers.attention.q.kernel[...], np.float64)
    a, b = (np.asarray(each[...], np.float64) for each in (adapter.a, adapter.b))
    np.testing.assert_allclose(merged, kernel + np.einsum("ldr,lrhc->ldhc", a, b), atol=1e-6)


def test_what_does_not_fit_is_one_line_and_leaves_nothing(checkpoint, tmp_path, capsys):
    source = checkpoint("qwen_plus_train")
    save_adapter(adapted(source), tmp_path / "adapter", base_model="nowhere")
    out = tmp_path / "out"
    cases = [
        (("import-weights", "--from", "peft", tmp_path / "adapter"), "give --base FOLDER"),
        (("import-weights", "--from", "peft", source), "adapter_config.json"),
        (("import-weights", "--from", "hf", tmp_path), "config.json"),
        (("export-weights", "--to", "hf", tmp_path), "neither a weights folder"),
        (("export-weights", "--to", "peft", source), "has no adapters"),
    ]
    for arguments, message in cases:
        assert run(*arguments, "--out", out) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    (source / "tokenizer.json").unlink()
    assert run("import-weights", "--from", "hf", source, "--out", out) == 1
    assert "--no-add-tokens" in capsys.readouterr().err
    file = source / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert run("import-weights", "--from", "hf", source, "--out", out, "--no-add-tokens") == 1
    assert "download it again" in capsys.readouterr().err
    assert not [each for each in tmp_path.iterdir() if "out" in each.name]


def test_an_existing_folder_is_not_touched(checkpoint, tmp_path):
    with pytest.raises(SpaceDriveError, match="exists"):
        import_hf(checkpoint("qwen_plus_train"), tmp_path, ImportOptions())
    source = checkpoint("llava_plus_train")
    save_adapter(adapted(source), tmp_path / "adapter", base_model=str(source))
    with pytest.raises(SpaceDriveError, match="exists"):
        import_peft(tmp_path / "adapter", tmp_path, ImportOptions())


def test_damaged_facts_are_named(checkpoint, tmp_path):
    import_hf(checkpoint("qwen_plus_train"), tmp_path / "weights", ImportOptions())
    file = tmp_path / "weights" / "weights.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 9}))
    with pytest.raises(SpaceDriveError, match="format 9"):
        open_vlm(tmp_path / "weights")
    file.write_text("{")
    with pytest.raises(SpaceDriveError, match="not readable"):
        open_vlm(tmp_path / "weights")


def save_tied(checkpoint, head):
    """A checkpoint whose config ties the head, with `head(table)` as its head."""
    source = checkpoint("qwen_plus_train")
    config = json.loads((source / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    files = sorted(source.glob("model*"))
    shards = [load_file(file) for file in files if file.suffix == ".safetensors"]
    tensors = {name: value for shard in shards for name, value in shard.items()}
    table = next(value for name, value in tensors.items() if name.endswith("embed_tokens.weight"))
    for file in files:
        file.unlink()
    save_file(tensors | {"lm_head.weight": head(table)}, source / "model.safetensors")
    return source


def test_a_head_of_its_own_is_kept_though_the_config_ties_it(checkpoint, tmp_path, capsys):
    """As transformers 5 does, with a note; trainers that untie the two leave the old config behind."""
    source = save_tied(checkpoint, lambda table: -table)
    import_hf(source, tmp_path / "w", ImportOptions())
    assert "lm_head.weight has values of its own" in capsys.readouterr().err
    after = tensors_of(tmp_path / "w")
    np.testing.assert_array_equal(
        after["lm_head.weight"][:510], -after["model.language_model.embed_tokens.weight"][:510]
    )
    model = load(tmp_path / "w")
    assert not model.decoder.config.tie_word_embeddings
    np.testing.assert_array_equal(logits_of(from_hf(tmp_path / "w")), logits_of(model))


def test_a_head_that_repeats_the_table_is_none_of_its_own(checkpoint, tmp_path, capsys):
    source = save_tied(checkpoint, lambda table: table.copy())
    import_hf(source, tmp_path / "w", ImportOptions())
    assert "of its own" not in capsys.readouterr().err
    assert "lm_head.weight" not in tensors_of(tmp_path / "w")


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(checkpoint, tmp_path, wrong):
    source = checkpoint("qwen_plus_train")
    file = sorted(source.glob("model*.safetensors"))[0]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].flat[7] = wrong
    save_file(tensors, file)
    with pytest.raises(SpaceDriveError, match=f"{name} holds nan or infinity"):
        import_hf(source, tmp_path / "w", ImportOptions())
    with pytest.raises(SpaceDriveError, match="nan or infinity"):
        from_hf(source)
    assert not [each.name for each in tmp_path.iterdir() if "w" in each.name.split(".")[:2]]


def test_what_an_aborted_import_left_is_removed_by_the_next(checkpoint, tmp_path):
    source = checkpoint("qwen_plus_train")
    before = {each.name for each in tmp_path.iterdir()}
    left = tmp_path / f".w.unfinished-{socket.gethostname()}-{2**22 + 1}"  # above the largest process number
    left.mkdir()
    import_hf(source, tmp_path / "w", ImportOptions())
    assert {each.name for each in tmp_path.iterdir()} == before | {"w"}


@pytest.mark.parametrize(
    ("vocabulary", "problem"),
    [
        ({"word0": 0, "word198": 2**31}, "has the id 2,147,483,648"),
        ({f"w{n}": n for n in range(1, 900)}, "ids up to"),
    ],
)
def test_a_tokenizer_cannot_make_the_table_grow(checkpoint, tmp_path, vocabulary, problem):
    source = checkpoint("qwen_plus_train")
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["vocab"] = {"word0": 0} | vocabulary
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SpaceDriveError, match=problem):
        import_hf(source, tmp_path / "w", ImportOptions())


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"\xff", b"[" * 5000])
def test_a_damaged_tokenizer_is_named(checkpoint, tmp_path, content):
    source = checkpoint("qwen_plus_train")
    (source / "tokenizer.json").write_bytes(content)
    with pytest.raises(SpaceDriveError, match=r"tokenizer\.json"):
        import_hf(source, tmp_path / "w", ImportOptions())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", b'{"eos_token_id": "x"}'),
        ("preprocessor_config.json", b'{"patch_size": 14, "image_mean": [NaN, 0, 0]}'),
    ],
)
def test_what_is_handed_on_must_be_readable(checkpoint, tmp_path, name, content):
    source = checkpoint("qwen_plus_train")
    (source / name).write_bytes(content)
    with pytest.raises(SpaceDriveError, match=name):
        import_hf(source, tmp_path / "w", ImportOptions())
    assert not (tmp_path / "w").exists()


def test_an_exported_adapter_names_a_base_that_can_be_loaded(checkpoint, tmp_path):
    base = checkpoint("qwen_plus_train")
    save_adapter(adapted(base), tmp_path / "a", base_model=str(base))
    import_peft(tmp_path / "a", tmp_path / "w", ImportOptions())
    assert run("export-weights", "--to", "peft", tmp_path / "w", "--out", tmp_path / "b") == 0
    named = json.loads((tmp_path / "b" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base)
    import_peft(tmp_path / "b", tmp_path / "w2", ImportOptions())
    base.rename(tmp_path / "elsewhere")
    assert open_vlm(tmp_path / "w").base_name == str(tmp_path / "w")

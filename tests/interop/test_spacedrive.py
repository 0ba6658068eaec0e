"""A published SpaceDrive checkpoint: imported, used by predict and train, exported again."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import spacedrive_jax.cli.main
from spacedrive_jax.batch import DrivingBatch, stack
from spacedrive_jax.config import load_config, to_json
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.inference.generate import generate
from spacedrive_jax.inference.open_model import open_config, open_trained_model, open_vlm
from spacedrive_jax.interop.hf_checkpoint import from_hf
from spacedrive_jax.interop.hf_config import read_hf_config
from spacedrive_jax.interop.safetensors_folder import SafetensorsFolder
from spacedrive_jax.interop.spacedrive import published_state
from spacedrive_jax.interop.torch_file import read_torch_file, write_torch_file
from spacedrive_jax.interop.unidepth import load_unidepth
from spacedrive_jax.interop.weights_folder import check_model
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.families.llava import lora as llava_lora
from spacedrive_jax.models.spacedrive import SpaceDrive
from tests.conftest import ROOT
from tests.published_case import load_case
from tests.training.runs import TINY, make_records

GOLDEN = ROOT / "tests" / "golden"
INDICATOR = 510
ARGUMENTS = json.loads((GOLDEN / "spacedrive_generate" / "config.json").read_text())["spacedrive_args"]


def run(*arguments: object) -> int:
    return spacedrive_jax.cli.main.main([str(each) for each in arguments])


def situation_of(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def half(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The frozen base in bfloat16, as the published code saves it."""
    frozen = [name for name in tensors if name.startswith("lm_head.") and "lora_" not in name]
    frozen = [name for name in frozen if "new_" not in name and "position_encoder" not in name]
    return {
        name: value.astype(ml_dtypes.bfloat16) if name in frozen else value for name, value in tensors.items()
    }


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data") / "records")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """The golden's weights as a published checkpoint with its base and arguments, and the model itself."""
    folder = tmp_path_factory.mktemp("qwen")
    case = load_case("spacedrive_generate")
    content = {"meta": {"epoch": 1, "iter": 7}, "state_dict": published_state(case.model)}
    write_torch_file(folder / "iter_7.pth", content)
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(case.settings["vlm_config"]))
    (base / "tokenizer.json").write_text((GOLDEN / "prompts" / "tokenizer.json").read_text())
    (folder / "arguments.json").write_text(json.dumps(ARGUMENTS))
    return folder, case.model


@pytest.fixture(scope="module")
def imported(qwen, tmp_path_factory):
    folder, _ = qwen
    out = tmp_path_factory.mktemp("weights") / "imported"
    assert import_qwen(folder, out, "--published-config", folder / "arguments.json") == 0
    return out


def import_qwen(folder, out, *options, source="iter_7.pth"):
    arguments = ("--from", "spacedrive", folder / source, "--base", folder / "base", "--config", TINY)
    return run("import-weights", *arguments, "--out", out, *options)


def check_answers(model, imported, records, file, limit):
    """Holds a prediction file against what the model itself answers; returns how many coordinates it has."""
    config = open_config(imported)
    builder = SampleBuilder(config.data, config.model, answer=False)
    split = open_records(records, "val")
    batch = jax.tree.map(jax.numpy.asarray, stack([builder(split[index], index) for index in range(3)]))
    graph, state = nnx.split(model)

    @jax.jit
    def answer(state: nnx.State, batch: DrivingBatch):
        return generate(nnx.merge(graph, state), batch, builder.tokenizer, limit)

    expected = jax.device_get(answer(state, batch))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for row, line in enumerate(lines):
        points = expected.coordinates[row][expected.is_coordinate[row]][:, :2]
        said = np.array([pair.split(", ") for pair in re.findall(r"\(([^)]*)\)", line["text"])], float)
        np.testing.assert_allclose(said.reshape(-1, 2), points, atol=0.0052)
        if line["status"] == "ok":
            np.testing.assert_allclose(line["waypoints"], points, atol=2e-4)
    return int(expected.is_coordinate.sum())


def test_predict_answers_with_the_imported_heads(qwen, imported, records, tmp_path, capsys):
    _, model = qwen
    out = tmp_path / "predictions.jsonl"
    command = ("predict", "--checkpoint", imported, "--records", records, "--batch-size", 3)
    assert run(*command, "--out", out, "--json") == 0
    assert situation_of(capsys)["samples"] == 3
    assert check_answers(model, imported, records, out, limit=100) >= 6
    assert run(*command) == 1
    assert "give --out FILE" in capsys.readouterr().err


def test_every_parameter_is_the_checkpoints(qwen, imported):
    _, model = qwen
    trained = open_trained_model(imported)
    ours = nnx.state(nnx.merge(trained.graph, trained.trainable, trained.frozen), nnx.Param)
    theirs = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    assert {path for path, _ in nnx.to_flat_state(ours)} == theirs.keys()
    for path, value in nnx.to_flat_state(ours):
        np.testing.assert_array_equal(value[...], theirs[path][...], err_msg=str(path))


def test_a_run_starts_from_the_imported_heads_and_goes_back(imported, records, tmp_path, capsys):
    folder = tmp_path / "run"
    command = [
        "train",
        imported / "spacedrive.json",
        "--run-dir",
        folder,
        "--data.records",
        records,
        "--json",
    ]
    steps = ["--train.steps", 1, "--train.batch-size", 2, "--train.learning-rate", 1e-30]
    assert run(*command, *steps) == 0
    assert situation_of(capsys)["step"] == 1
    # So small a learning rate changes no bit: what was trained is what was imported, and the published
    # layout has it again.
    assert run("export-weights", "--to", "spacedrive", folder, "--out", tmp_path / "again.pth") == 0
    before, after = (
        read_torch_file(file)["state_dict"] for file in (tmp_path / "again.pth", source_of(imported))
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)

    other = [*command[:2], "--run-dir", tmp_path / "other", *command[4:-1], *steps]
    assert run(*other, "--model.encoder.base", 10000, "--model.position-input", True) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "model.encoder.base: 20000.0 -> 10000.0; model.position_input: False -> True" in error
    assert run(*other, "--model.lora.rank", 8) == 1
    assert "model.lora.rank: 4 -> 8" in capsys.readouterr().err
    assert run(*other, "--model.use-lora", False) == 1
    assert "model.use_lora False" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def source_of(imported):
    return json.loads((imported / "weights.json").read_text())["source"]


def test_what_does_not_change_the_tensors_meaning_may_differ(imported):
    model = open_config(imported).model
    alike = {
        "path_points": 20,
        "compute": ComputeConfig(dtype="bfloat16"),
        "position_input_training": "zeros",
    }
    check_model(imported, dataclasses.replace(model, **alike))
    with pytest.raises(SpaceDriveError, match=r"model\.ego_status: both -> feature"):
        check_model(imported, dataclasses.replace(model, ego_status="feature"))


def test_import_and_export_are_bit_exact(qwen, tmp_path):
    folder, model = qwen
    unidepth = SafetensorsFolder(GOLDEN / "unidepth_tiny")
    depth = {name: unidepth.read(name) for name in unidepth.places}
    state = half(published_state(model)) | {f"depth_model.{name}": value for name, value in depth.items()}
    content = {"meta": {"epoch": 3, "config": f"model = dict({_keywords(ARGUMENTS)})"}, "state_dict": state}
    write_torch_file(folder / "iter_9.pth", content)
    assert import_qwen(folder, tmp_path / "weights", source="iter_9.pth") == 0
    assert (
        run("export-weights", "--to", "spacedrive", tmp_path / "weights", "--out", tmp_path / "back.pth") == 0
    )
    # `add-depth --model` takes the depth network; a released one needs no config.json.
    shutil.copy(GOLDEN / "unidepth_tiny" / "config.json", tmp_path / "weights" / "depth")
    network = load_unidepth(tmp_path / "weights" / "depth")
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network))) <= sum(map(np.size, depth.values()))

    before, after = read_torch_file(folder / "iter_9.pth"), read_torch_file(tmp_path / "back.pth")
    assert before["meta"] == after["meta"]
    assert list(before["state_dict"]) == list(after["state_dict"])
    for name, value in before["state_dict"].items():
        other = after["state_dict"][name]
        assert (value.dtype, value.shape, value.tobytes()) == (other.dtype, other.shape, other.tobytes()), (
            name
        )


def _keywords(arguments):
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def test_exported_for_transformers_it_keeps_the_trained_rows(qwen, imported, tmp_path, capsys):
    _, model = qwen
    assert run("export-weights", "--to", "hf", imported, "--out", tmp_path / "full", "--json") == 0
    assert situation_of(capsys)["left_out"] == ["decoder", "ego_encoder", "encoder"]
    ids = np.array([[20, 21, INDICATOR, INDICATOR + 1, 30]])
    expected = np.asarray(model.vlm.logits(ids))
    np.testing.assert_allclose(
        from_hf(tmp_path / "full").logits(ids), expected, atol=2e-5 * np.abs(expected).max()
    )
    np.testing.assert_allclose(open_vlm(imported).model.logits(ids), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ego_status": ""}, "unknown ego_status_mlp.*model.ego_status .here none"),
        ({"pe_decode_method": "l2_coords_mlp"}, "mlp_output_coords.*model.decoder.kind .here linear"),
        ({"pe_freq_coeff": 10000}, "model.encoder.kind sincos, base 10000"),
        ({"learnable_pe_scaling": False}, "model.encoder.learnable_alpha .here False"),
        ({"lm_head": "ckpts/Qwen2.5-VL"}, "model.new_token_rows .here False"),
        ({"llm_lora_rank": 16}, "llm_lora_rank 16"),
        ({"io_3d_pos": False}, "io_3d_pos False"),
    ],
)
def test_arguments_that_the_tensors_contradict(qwen, tmp_path, capsys, changes, message):
    folder, _ = qwen
    (tmp_path / "arguments.json").write_text(json.dumps(ARGUMENTS | changes))
    out = tmp_path / "weights"
    assert import_qwen(folder, out, "--published-config", tmp_path / "arguments.json") == 1
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert not out.exists()


def test_what_is_not_known_is_said(qwen, tmp_path, capsys):
    folder, _ = qwen
    assert import_qwen(folder, tmp_path / "weights", "--json") == 0
    assert "model.position_input False" in situation_of(capsys)["notes"][0]


def test_a_file_that_would_be_run_is_refused(qwen, tmp_path, capsys):
    folder, _ = qwen

    class Command:
        def __reduce__(self):
            return print, ("this must not be printed",)

    with zipfile.ZipFile(folder / "evil.pth", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"state_dict": Command()}, protocol=2))
    assert import_qwen(folder, tmp_path / "weights", source="evil.pth") == 1
    printed = capsys.readouterr()
    assert "only tensors and plain containers" in printed.err
    assert "this must not" not in printed.out
    assert not (tmp_path / "weights").exists()


def test_llava(records, tmp_path):
    """The other family: its new rows are rows of its tables, trained in float32 amid a bfloat16 base."""
    config = load_config(str(TINY))
    vlm = read_hf_config(GOLDEN / "llava_plus_train")
    lora = llava_lora(4)
    model = dataclasses.replace(config.model, vlm=vlm, lora=lora, use_lora=True, compute=ComputeConfig())
    made = nnx.jit(lambda: SpaceDrive(model, indicator_id=INDICATOR, rngs=nnx.Rngs(5)))()
    generator = np.random.default_rng(0)

    def draw(variable):
        """Values that bfloat16 holds, so that the base loses nothing in the file."""
        drawn = generator.normal(0, 0.1, variable.shape).astype(ml_dtypes.bfloat16)
        return variable.replace(jax.numpy.asarray(drawn, variable.dtype))

    state = {path: draw(value) for path, value in nnx.to_flat_state(nnx.state(made, nnx.Param))}
    # What every hidden state is answered with: an indicator, or word 7, by the side it lies on.
    # (This draw has hidden states on both: of an answer of indicators alone no coordinate counts.)
    chosen = np.random.default_rng(3).normal(0, 1, (1, 96))
    side = np.asarray(chosen.astype(ml_dtypes.bfloat16), np.float32)
    head, rows = ("vlm", "decoder", "head"), ("vlm", "decoder", "new_head")
    state[head] = state[head].replace(jax.numpy.zeros((512, 96)).at[7].set(-side[0]))
    state[rows] = state[rows].replace(jax.numpy.asarray(np.concatenate([side + 1e-5, 0 * side])))
    nnx.update(made, nnx.from_flat_state(state.items()))
    tensors = half(published_state(made))
    tables = ("lm_head.base_model.model.lm_head.weight", "embed_tokens.weight")
    tensors |= {name: value for name, value in published_state(made).items() if name.endswith(tables)}
    write_torch_file(tmp_path / "iter_3.pth", {"state_dict": tensors})
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((GOLDEN / "llava_plus_train" / "config.json").read_text())
    words = {f"w{number}": number for number in range(INDICATOR)} | {}
    for number, token in enumerate(("<s>", "</s>", "<unk>", "<image>")):
        del words[f"w{number}"]
        words[token] = number
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>", "<image>"])
    tokenizer.save(str(base / "tokenizer.json"))
    preset = tmp_path / "llava.json"
    preset.write_text(
        to_json(
            dataclasses.replace(
                config, model=dataclasses.replace(model, compute=ComputeConfig(param_dtype="bfloat16"))
            )
        )
    )
    out = tmp_path / "weights"
    source = ("--from", "spacedrive", tmp_path / "iter_3.pth", "--base", base, "--config", preset)
    assert run("import-weights", *source, "--out", out) == 0
    trained = open_trained_model(out)
    for path, value in nnx.to_flat_state(trained.trainable):
        np.testing.assert_array_equal(value[...], state[path][...], err_msg=str(path))
    assert ("vlm", "decoder", "new_embedding") in dict(nnx.to_flat_state(trained.trainable))
    predictions = tmp_path / "predictions.jsonl"
    command = ("predict", "--checkpoint", out, "--records", records, "--batch-size", 3, "--out", predictions)
    assert run(*command, "--max-new-tokens", 12, "--decoding", "token-by-token") == 0
    assert check_answers(made, out, records, predictions, limit=12) > 0

    assert run("export-weights", "--to", "spacedrive", out, "--out", tmp_path / "back.pth") == 0
    after = read_torch_file(tmp_path / "back.pth")["state_dict"]
    assert all(value.tobytes() == after[name].tobytes() for name, value in tensors.items())
    assert load_file(out / "spacedrive.safetensors")["heads/pe_scaling"] == tensors["pe_scaling"]

"""Folders people bring by mistake are named for what they are."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from spacedrive_jax.errors import CheckpointError, SpaceDriveError
from spacedrive_jax.interop.safetensors_folder import SafetensorsFolder, check_folder, check_tensors
from spacedrive_jax.interop.spacedrive import check_published_source


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("pytorch_model.bin", "torch's pickled weights .*save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "torch's pickled weights"),
        ("qwen2.5-vl-q4_k_m.gguf", "GGUF"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
        ("consolidated.00.pth", "consolidated"),
        ("zero_to_fp32.py", "DeepSpeed"),
        ("__0_0.distcp", "distributed checkpoint"),
        ("model-00001-of-00002.safetensors", "without their index: add model.safetensors.index.json"),
        ("adapter_config.json", "PEFT adapter, not a whole model: import-weights --from peft"),
        ("model.safetensors.incomplete", "unfinished download"),
    ],
)
def test_a_folder_is_named_by_what_lies_in_it(tmp_path, file, what):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=what):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised with awq to 4 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised with fp8"),
        ({"quantization_config": "gptq"}, "quantised with an unnamed method"),
        ({"mm_projector_type": "mlp2x_gelu"}, "original LLaVA layout .*llava-hf"),
    ],
)
def test_a_config_tells_too(tmp_path, fields, what):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=what):
        check_folder(tmp_path)


def test_a_whole_checkpoint_passes(tmp_path):
    save_file({"a.weight": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    check_folder(tmp_path)
    SafetensorsFolder(tmp_path).check_flavour()


@pytest.mark.parametrize(
    ("name", "kind", "what"),
    [
        ("layers.0.q_proj.qweight", "I32", "GPTQ or AWQ"),
        ("layers.0.q_proj.weight.absmax", "F32", "bitsandbytes"),
        ("layers.0.q_proj.SCB", "F32", "bitsandbytes"),
        ("layers.0.q_proj.weight", "I8", "numbers of type I8"),
        ("layers.0.q_proj.bias", "U8", "numbers of type U8"),
        ("layers.0.q_proj.bias", "C64", "numbers of type C64"),
        ("layers.0.q_proj.weight", "F8_E4M3", "FP8"),
        ("layers.0.q_proj.weight_scale_inv", "F32", "FP8"),
        ("model.mm_projector.0.weight", "F16", "original LLaVA"),
        ("layers.0.q_proj.lora_A.default.weight", "F32", "merge_and_unload"),
        ("module.layers.0.q_proj.weight", "F32", "wrapped"),
    ],
)
def test_tensors_tell_too(tmp_path, name, kind, what):
    with pytest.raises(CheckpointError, match=what):
        check_tensors(tmp_path, {"norm.weight": "F32", name: kind})


def test_a_pipe_among_the_shards_is_refused_not_waited_at(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    os.mkfifo(tmp_path / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is a pipe"):
        SafetensorsFolder(tmp_path)


def test_names_that_are_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="hf download"):
        check_folder(tmp_path / "Qwen" / "Qwen2.5-VL-7B-Instruct")
    (tmp_path / "iter_9.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="torch's pickled weights, not a folder"):
        check_folder(tmp_path / "iter_9.pth")
    with pytest.raises(CheckpointError, match=r"give one of its checkpoints, .*iter_9\.pth"):
        check_published_source(tmp_path)


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ("[]", "no weight_map"),
        ("{", "is not JSON"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "does not stay inside"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "does not stay inside"),
    ],
)
def test_an_index_names_files_of_its_own_folder(tmp_path, index, problem):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SpaceDriveError, match=problem):
        SafetensorsFolder(tmp_path)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        SafetensorsFolder(tmp_path)

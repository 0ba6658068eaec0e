"""Weights that are not a transformers checkpoint of floats: named for what they are, with the way out.

People bring what they have: quantised weights, pickled weights, adapters, weights of another framework, half
a download. Listing the hundreds of tensors that do not fit would help nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from spacedrive_jax.errors import CheckpointError
from spacedrive_jax.io import MEBIBYTE
from spacedrive_jax.json_files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"

_CONVERT = (
    'convert it where torch is installed: AutoModelForImageTextToText.from_pretrained("{path}")'
    ".save_pretrained(NEW, safe_serialization=True)"
)
_ORIGINAL = "take the model's release in safetensors of bfloat16, float16 or float32"
_DEQUANTISE = (
    f"{_ORIGINAL}, or undo it with transformers: "
    'AutoModelForImageTextToText.from_pretrained("{path}").dequantize().save_pretrained(NEW)'
)
_FILES: tuple[tuple[str, str, str], ...] = (
    ("model-*-of-*.safetensors", "the shards of a checkpoint without their index", f"add {INDEX_FILE}"),
    ("pytorch_model*.bin", "torch's pickled weights (pytorch_model.bin)", _CONVERT),
    ("*.gguf", "GGUF weights of llama.cpp", _ORIGINAL),
    ("tf_model.h5", "TensorFlow's weights (tf_model.h5)", _ORIGINAL),
    ("flax_model*.msgpack", "Flax's weights of transformers 4 (flax_model.msgpack)", _ORIGINAL),
    ("*.onnx", "an ONNX graph", _ORIGINAL),
    ("onnx", "an ONNX export", _ORIGINAL),
    ("consolidated*", "Meta's or Mistral's consolidated weights", _ORIGINAL),
    (
        "*.distcp",
        "torch's distributed checkpoint",
        "gather it: python -m torch.distributed.checkpoint."
        "format_utils dcp_to_torch {path} NEW.pth, then save that as safetensors",
    ),
    (
        "zero_to_fp32.py",
        "DeepSpeed's ZeRO checkpoint",
        "gather it: python {path}/zero_to_fp32.py {path} NEW --safe_serialization",
    ),
    ("mp_rank_*", "a Megatron or DeepSpeed checkpoint in model-parallel parts", "merge it with its trainer"),
    ("_CHECKPOINT_METADATA", "an orbax checkpoint", "give the run folder above it"),
    (
        "*.pth",
        "torch's pickled weights (.pth)",
        "a published SpaceDrive is given as a file: --from spacedrive",
    ),
    ("*.ckpt", "a Lightning or Stable-Diffusion checkpoint (.ckpt)", _ORIGINAL),
    ("*.incomplete", "an unfinished download", "download it again"),
    (
        "*.safetensors",
        f"tensors in files of other names than {SINGLE_FILE}",
        "rename the file, if it is the model",
    ),
)
"""What is in a folder without transformers' safetensors, what that is, and the way out."""

_SUFFIXES = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_scale_inv": "FP8",
    "weight_scale": "FP8 or compressed-tensors",
    "weight_packed": "compressed-tensors",
}
"""Last part of a tensor's name, to the method that makes such tensors."""
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.")


def check_folder(path: Path) -> None:
    """Refuses a folder that is not a transformers checkpoint in safetensors; reads no tensors.

    Args:
        path: what the user named.

    Raises:
        CheckpointError: saying what it is instead.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; a name on the hub is not enough: hf download NAME --local-dir DIR"
        )
    if path.is_file():
        kind = "torch's pickled weights" if path.suffix in (".pth", ".pt", ".bin", ".ckpt") else "one file"
        kind = "GGUF weights of llama.cpp" if path.suffix == ".gguf" else kind
        raise CheckpointError(
            f"{path} is {kind}, not a folder with config.json and {SINGLE_FILE}: {_ORIGINAL} (a published "
            "SpaceDrive's iter_N.pth: --from spacedrive)"
        )
    whole = (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file()
    if not whole and (path / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{path} holds a PEFT adapter, not a whole model: import-weights --from peft (with --base)"
        )
    if whole and (path / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{path} holds two answers, a whole model and a PEFT adapter ({ADAPTER_FILE}): move one of them "
            "into a folder of its own"
        )
    if not whole:
        for pattern, what, way_out in _FILES:
            if any(path.glob(pattern)):
                raise CheckpointError(f"{path} holds {what}: {way_out.format(path=path)}")
    if (path / "config.json").is_file():
        _check_config(path)


def _check_config(path: Path) -> None:
    fields = read_json(path / "config.json", most=16 * MEBIBYTE)
    if not isinstance(fields, dict):
        return
    quantised = fields.get("quantization_config")
    if quantised:
        known = quantised if isinstance(quantised, dict) else {}
        method, bits = known.get("quant_method", "an unnamed method"), known.get("bits")
        raise CheckpointError(
            f"{path} is quantised with {method}{f' to {bits} bits' if bits else ''}: "
            + _DEQUANTISE.format(path=path)
        )
    if "mm_projector_type" in fields or "mm_vision_tower" in fields:
        raise CheckpointError(_original_llava(path))


def _original_llava(path: Path) -> str:
    return (
        f"{path} is in the original LLaVA layout (model.mm_projector), which transformers does not read: "
        "take the converted release, llava-hf/llava-1.5-7b-hf"
    )


FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the types that weights come in."""


def check_tensors(path: Path, types: Mapping[str, str]) -> None:
    """Refuses tensors that are no plain floats of a plain model.

    Args:
        path: where they are.
        types: name to safetensors' name of the type.

    Raises:
        CheckpointError: saying what they are instead.
    """
    for name, kind in types.items():
        last = name.rpartition(".")[2]
        method = _SUFFIXES.get(last) or ("FP8" if kind.startswith("F8") else None)
        if method is None and kind not in FLOATS and last != "position_ids":
            method = f"numbers of type {kind}"
        if method is not None:
            raise CheckpointError(
                f"{path} is quantised ({name} is of {method}): " + _DEQUANTISE.format(path=path)
            )
        if ".mm_projector." in name:
            raise CheckpointError(_original_llava(path))
        if ".lora_A." in name and "base_layer" not in name and not name.startswith("base_model."):
            raise CheckpointError(
                f"{path} holds a model with adapters that were not folded in ({name}): save it after "
                "merge_and_unload()"
            )
        if name.startswith(_WRAPPERS):
            raise CheckpointError(
                f"{path} was saved from a wrapped model ({name}): save model.module or the unwrapped model"
            )


def check_published_source(path: Path) -> None:
    """Refuses what is no published training checkpoint.

    Raises:
        CheckpointError: saying what it is instead.
    """
    if path.is_dir():
        found = sorted(file.name for file in path.glob("iter_*.pth"))
        if found:
            raise CheckpointError(f"{path} is a folder: give one of its checkpoints, {path / found[-1]}")
        kind = "a transformers checkpoint (--from hf)" if (path / SINGLE_FILE).is_file() else "a folder"
        kind = "a PEFT adapter (--from peft)" if (path / ADAPTER_FILE).is_file() else kind
        raise CheckpointError(f"{path} is {kind}, not a published iter_N.pth")

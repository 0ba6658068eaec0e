"""Sharded safetensors folders as transformers has them: read by tensor, written whole or not at all.

People bring other things too: quantised weights, pickled weights, adapters, weights of another framework,
half a download. These are named for what they are, with the way out; listing the hundreds of tensors that do
not fit would help nobody.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spacedrive_jax.errors import CheckpointError, DataError, SpaceDriveError
from spacedrive_jax.folders import atomic_folder, remove_stale
from spacedrive_jax.io import MEBIBYTE, inside, place, require_regular
from spacedrive_jax.json_files import read_json, write_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"

FLOAT_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The types that weights come in, by safetensors' names of them."""
PIECE = 1 << 24
"""Numbers that are looked at together, so that the answers take little memory."""

Complete = Callable[[Path], None]
"""Puts further files into a folder that is about to be finished."""


class TensorPlace(NamedTuple):
    """Where a tensor lies, its shape, and its type as safetensors names it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size of the values of a float tensor."""
        return math.prod(self.shape) * jnp.dtype(FLOAT_TYPES[self.dtype]).itemsize


class SafetensorsFolder:
    """The tensors of a checkpoint, read one at a time through memory maps."""

    def __init__(self, path: str | Path, rename: Callable[[str], str] = str) -> None:
        """Opens a checkpoint and reads the shapes, not the values.

        Args:
            path: a folder with model.safetensors or model.safetensors.index.json, or a .safetensors file.
            rename: maps the names in the files to the names used here.

        Raises:
            CheckpointError: files are missing, damaged, or disagree with the index.
        """
        self.path = Path(path)
        self._finite: set[str] = set()
        self._handles: dict[Path, Any] = {}
        self.places: dict[str, TensorPlace] = {}
        for file in self._files():
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
                renamed = rename(name)
                if renamed in self.places:
                    raise CheckpointError(
                        f"{file}: tensor {name} comes twice (as {self.places[renamed].name} too)"
                    )
                stored = handle.get_slice(name)
                self.places[renamed] = TensorPlace(file, name, tuple(stored.get_shape()), stored.get_dtype())
        self._check_index(rename)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor by its renamed name; bfloat16 comes as ml_dtypes' type.

        Raises:
            CheckpointError: it holds nan or infinity.
        """
        place = self.places[name]
        tensor = self._open(place.file).get_tensor(place.name)
        if name not in self._finite:
            require_finite(tensor, f"{place.file}: {place.name}")
            self._finite.add(name)
        return tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Renamed name to shape of every tensor."""
        return {name: place.shape for name, place in self.places.items()}

    def check_flavour(self) -> None:
        """Refuses quantised, wrapped or otherwise foreign tensors.

        Raises:
            CheckpointError: saying what they are.
        """
        check_tensors(self.path, {place.name: place.dtype for place in self.places.values()})

    def float_type(self) -> str:
        """The narrowest type that holds every float tensor exactly; float32 where there is none."""
        found = {FLOAT_TYPES[place.dtype] for place in self.places.values() if place.dtype in FLOAT_TYPES}
        return str(jnp.result_type(*(jnp.dtype(name) for name in found))) if found else "float32"

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if (self.path / INDEX_FILE).is_file():
            if (self.path / SINGLE_FILE).is_file() and SINGLE_FILE not in self._weight_map().values():
                raise CheckpointError(
                    f"{self.path} holds two answers, {SINGLE_FILE} and the shards of {INDEX_FILE}: remove "
                    "the one that is not meant"
                )
            index = str(self.path / INDEX_FILE)
            return [inside(self.path, file, index) for file in sorted(set(self._weight_map().values()))]
        if (self.path / SINGLE_FILE).is_file():
            return [self.path / SINGLE_FILE]
        raise CheckpointError(
            f"{self.path}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; give a checkpoint folder"
        )

    def _weight_map(self) -> Mapping[str, str]:
        index = self.path / INDEX_FILE
        content = read_json(index, most=64 * MEBIBYTE)
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise CheckpointError(
                f"{index} is not a safetensors index: it has no weight_map; download it again"
            )
        return names

    def _check_index(self, rename: Callable[[str], str]) -> None:
        if self.path.is_file() or not (self.path / INDEX_FILE).is_file():
            return
        lost = sorted(name for name in self._weight_map() if rename(name) not in self.places)
        if lost:
            raise CheckpointError(
                f"{self.path}: the index names {len(lost)} tensors no file holds, first {lost[0]}"
            )

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                require_regular(file)
                self._handles[file] = safe_open(file, framework="np")
            except (OSError, DataError, SafetensorError) as error:
                raise CheckpointError(
                    f"cannot read {file}: {error}; download it again{_lfs(file)}"
                ) from error
        return self._handles[file]


def _lfs(file: Path) -> str:
    """A hint where the file is a pointer to the real one."""
    try:
        require_regular(file)
        with file.open("rb") as beginning:
            pointer = beginning.read(32).startswith(b"version https://git-lfs")
    except (OSError, DataError):
        return ""
    return " (it is a Git LFS pointer, not the file itself: git lfs pull)" if pointer else ""


def require_finite(tensor: np.ndarray, what: str) -> None:
    """Refuses weights with nan or infinity, which would make everything computed with them nan.

    Args:
        tensor: of any type.
        what: what to call it.

    Raises:
        CheckpointError: it holds such numbers.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    step = max(1, PIECE * len(rows) // max(1, rows.size))
    if not all(np.isfinite(rows[start : start + step]).all() for start in range(0, len(rows), step)):
        raise CheckpointError(f"{what} holds nan or infinity: whatever wrote it had diverged")


class PlannedTensor(NamedTuple):
    """A tensor that is to be written: its name and size are known before its value."""

    name: str
    nbytes: int


def plan_shards(tensors: Iterable[PlannedTensor], max_shard_bytes: int) -> list[list[str]]:
    """Divides tensors, in order, into files of at most `max_shard_bytes` (a larger tensor stands alone)."""
    shards: list[list[str]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor.name)
        size += tensor.nbytes
    return shards


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into that takes its name only when all went well, and else vanishes.

    Args:
        path: folder to create.

    Raises:
        CheckpointError: `path` exists.
    """
    remove_stale(path)
    with atomic_folder(path) as folder:
        yield folder


def save_tensors(tensors: Mapping[str, np.ndarray], file: Path) -> None:
    """Writes one safetensors file into a folder that is being made.

    Raises:
        SpaceDriveError: it cannot be written.
    """
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:  # the library's name for a full disk, too
        raise SpaceDriveError(f"cannot write {file}: {error}; free some space and run it again") from error
    # safetensors makes files that only their owner may read; follow the umask, as the folder does.
    file.chmod(file.parent.stat().st_mode & 0o666)


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shards: list[list[str]], *, stem: str = "model"
) -> None:
    """Writes tensor files, and their index where there are several, into a folder.

    Args:
        folder: an existing folder.
        tensors: names and values in the order of `shards`; held one shard at a time.
        shards: names per file.
        stem: what the names of the files start with.
    """
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = folder / f"{stem}{part}.safetensors"
        shard = dict(next(stream) for _ in names)
        if list(shard) != names:
            raise ValueError(f"tensors came in another order than planned for {file.name}")
        total += sum(tensor.nbytes for tensor in shard.values())
        save_tensors(shard, file)
        del shard
        weight_map.update(dict.fromkeys(names, file.name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index, indent=2)


def write_folder(
    path: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    shards: list[list[str]],
    *,
    config: Mapping[str, Any],
    stem: str = "model",
    config_file: str = "config.json",
    complete: Complete | None = None,
) -> None:
    """Writes a checkpoint folder; it appears under its name only when it is complete.

    Of several hosts that call it together the first one writes.

    Args:
        path: folder to create.
        tensors: names and values in the order of `shards`; held one shard at a time.
        shards: names per file.
        config: written as `config_file`.
        stem: what the names of the tensor files start with.
        config_file: name of the configuration.
        complete: adds what else belongs there before the folder takes its name.

    Raises:
        CheckpointError: `path` exists.
    """
    if jax.process_index() > 0:  # the first host writes; the others bring their parts of every tensor
        if place(path).exists():
            raise CheckpointError(f"{path} exists")
        collections.deque(tensors, maxlen=0)
        return
    with new_folder(path) as folder:
        write_json(folder / config_file, dict(config), indent=2)
        write_tensors(folder, tensors, shards, stem=stem)
        if complete is not None:
            complete(folder)


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


def what_it_is(path: Path) -> str:
    """What a place that is no trained SpaceDrive is instead, for an error (`it is …; `); empty where that is
    not known.
    """
    if not path.exists():
        return "nothing has this name; "
    if path.name == "checkpoints" and (path.parent / "config.json").is_file():
        return f"it holds those of {path.parent}; "
    alone = "which holds a vision-language model alone"
    known = {
        ADAPTER_FILE: "a PEFT adapter",
        "weights.json": f"a folder of import-weights, {alone}",
        "provenance.json": "a records folder",
        "model*.safetensors": f"a transformers checkpoint, {alone}",
    }
    return next((f"it is {what}; " for name, what in known.items() if any(path.glob(name))), "")


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
        if method is None and kind not in FLOAT_TYPES and last != "position_ids":
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

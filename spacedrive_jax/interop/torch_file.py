"""Tensors of a released checkpoint by name: safetensors, or PyTorch's own format, read without running it."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from spacedrive_jax.console import progress
from spacedrive_jax.errors import CheckpointError, DataError, SpaceDriveError
from spacedrive_jax.interop.safetensors_folder import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsFolder,
    require_finite,
)
from spacedrive_jax.io import MEBIBYTE, atomic_write, place, require_regular
from spacedrive_jax.restricted_pickle import MOST_BYTES, Allowed, Refused, RestrictedUnpickler, numpy_allowed

# Reads and writes torch's zip files of tensors without torch, and without running anything they pickle.
#
# A torch file is a zip archive: `data.pkl` describes containers and tensors, `data/<key>` holds the
# numbers. A pickle is a program; this reader's machine knows tensors, storages and plain containers and
# nothing else, so that a file which asks for anything more is refused before it gets it.


STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
"""torch's storage classes; all little-endian."""
VIEWS = 8
"""How often, on average, the tensors of a file may show the same numbers (tied weights do twice)."""
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
"""What stands before a zip member: its last two numbers are the lengths of name and extra field."""


def read_torch_file(path: str | Path) -> Any:
    """The containers of a torch file with numpy arrays for tensors, mapped into memory.

    The checksums that the zip format carries are compared first, so that a flipped bit is not taken for a
    weight.

    Raises:
        DataError: the file is damaged, of another format, or holds anything but tensors, plain containers,
            text and numbers.
    """
    path = Path(path)
    size = require_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) < len(archive.infolist()):
                raise DataError(f"{path} is damaged: it holds a file twice")
            root = _root(members, path)
            program = _program(archive, members[f"{root}data.pkl"], path)
            order = members.get(f"{root}byteorder")
            if order is not None and archive.read(order)[:3] == b"big":
                raise DataError(f"{path} was written by a big-endian machine: save it again on another")
            _check_checksums(archive, members, path)
        reader = _Storages(path, root, members, size)
        return RestrictedUnpickler(program, _allowed(reader), reader.storage).load()
    except SpaceDriveError:
        raise
    except Refused as error:
        raise DataError(
            f"{path}: {error}, but only tensors and plain containers are read, nothing that would have to be "
            f"run. {_SAVE_AGAIN}"
        ) from error
    except Exception as error:  # a damaged zip or pickle fails in any way
        told = isinstance(error, zipfile.BadZipFile) or type(error) is ValueError
        reason = str(error) if told else "what it says of its tensors makes no sense"
        raise DataError(
            f"{path} is not a whole zip file that torch.save wrote ({reason}): {_what_else(path)}"
        ) from error


_SAVE_AGAIN = (
    "If you trust it, save the tensors alone where torch is installed: content = torch.load(OLD, "
    'weights_only=False); torch.save({"state_dict": content["state_dict"]}, NEW)'
)
_BEGINNINGS = (
    (b"\x80\x02\x8a\nl\xfc\x9cF", "it is in torch's format of before 1.6: torch.save(torch.load(OLD), NEW)"),
    (b"\x80", "it is a pickle, no torch file: save it again with torch.save"),
    (b"GGUF", "it is a GGUF file of llama.cpp: take the original checkpoint"),
    (b"\x89HDF", "it is an HDF5 file (Keras): take the original checkpoint"),
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself: git lfs pull"),
    (b"<", "it is a web page, not the file itself: download it again"),
)


def _what_else(path: Path) -> str:
    """What a file is that is no torch file, as far as its first bytes tell."""
    with path.open("rb") as file:
        beginning = file.read(64)
    for known, what in _BEGINNINGS:
        if beginning.startswith(known):
            return what
    if beginning[8:9] == b"{":
        return "it is a safetensors file: name it .safetensors"
    return "download or save it again"


def _root(members: Mapping[str, zipfile.ZipInfo], path: Path) -> str:
    """What the names in the archive start with."""
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise DataError(f"{path} is a zip file, but not one that torch.save wrote: it holds no data.pkl")
    if f"{roots[0]}constants.pkl" in members:
        raise DataError(f"{path} is a TorchScript program, not tensors: save its state_dict() instead")
    return roots[0]


def _program(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> bytes:
    """The pickle; torch does not compress it, so it cannot be larger than it looks."""
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > MOST_BYTES:
        raise DataError(
            f"{path} holds a data.pkl that is compressed or larger than {MOST_BYTES:,} bytes; torch.save "
            "writes neither"
        )
    return archive.read(member)


def _check_checksums(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], path: Path) -> None:
    """Reads all numbers once, in pieces, and compares them with the archive's CRC-32."""
    for name, member in progress(members.items(), desc=f"check {path.name}", unit="file"):
        if member.compress_type != zipfile.ZIP_STORED:
            raise DataError(f"{path}: {name} is compressed, which torch.save does not do")
        try:
            with archive.open(member) as content:
                while content.read(8 * MEBIBYTE):
                    pass
        except zipfile.BadZipFile as error:
            raise DataError(
                f"{path} is damaged: the checksum of {name} is another. Download it again (or, where it was "
                "saved after torch.serialization.set_crc32_options(False), save it again without)"
            ) from error


def _allowed(reader: _Storages) -> Allowed:
    """Storages, the functions that make tensors and parameters of them, numpy's numbers, and a container."""
    return {
        **numpy_allowed(),
        ("torch._utils", "_rebuild_tensor_v2"): reader.tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch", "Size"): tuple,
        **{("torch", name): dtype for name, dtype in STORAGES.items()},
    }


def _parameter(tensor: Any, *_: Any) -> np.ndarray:
    """The tensor that an nn.Parameter wraps."""
    if not isinstance(tensor, np.ndarray):
        raise Refused(f"it makes a parameter of a {type(tensor).__name__}")
    return tensor


class _Storages:
    """The numbers of a torch file, mapped into memory, and the tensors that are views of them."""

    def __init__(self, path: Path, root: str, members: Mapping[str, zipfile.ZipInfo], size: int) -> None:
        self._path, self._root, self._members = path, root, members
        self._left = VIEWS * size

    def storage(self, identity: Any) -> np.ndarray:
        """The numbers that a pickle's reference names."""
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, np.dtype) or type(count) is not int:
            raise DataError(f"{self._path} refers to {str(kind)[:40]!r}, which is no storage of tensors")
        member = self._members.get(f"{self._root}data/{key}")
        if member is None or member.file_size != count * dtype.itemsize:
            raise DataError(f"{self._path}: data/{key} does not hold {count} numbers of type {dtype}")
        if count == 0:
            return np.zeros(0, dtype)
        with self._path.open("rb") as file:
            file.seek(member.header_offset)
            *_, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        offset = member.header_offset + LOCAL_HEADER.size + name_length + extra_length
        return np.memmap(self._path, dtype, "r", offset, (count,))

    def tensor(
        self, storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any = False, *_: Any
    ) -> np.ndarray:
        """A tensor as a read-only view of its storage."""
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, np.ndarray) or storage.ndim != 1:
            raise ValueError("a tensor without a storage")
        if any(type(number) is not int or number < 0 for number in numbers) or len(shape) != len(stride):
            raise ValueError(f"shape {shape} with strides {stride}")
        count = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if count and (last >= storage.size or count > storage.size):
            raise ValueError(f"a tensor of shape {shape} leaves its storage of {storage.size} numbers")
        self._left -= count * storage.itemsize
        if self._left < 0:
            raise ValueError(f"its tensors show the same numbers more than {VIEWS} times")
        if not count:
            return np.zeros(shape, storage.dtype)
        steps = tuple(step * storage.itemsize for step in stride)
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


def write_torch_file(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays, text and numbers as `torch.load` reads them.

    Args:
        path: file to create; it appears under its name when it is whole.
        content: str keys; values are dicts, lists, tuples, arrays, str, int, float, bool or None.

    Raises:
        DataError: the file exists, or a value or dtype cannot be written.
    """
    path = place(path)
    if path.exists():
        raise DataError(f"{path} exists: choose another name")
    storages: list[np.ndarray] = []
    program = b"\x80\x02" + _pickled(content, storages) + b"."
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", program)
        archive.writestr(f"{path.stem}/byteorder", b"little")
        for key, array in enumerate(storages):
            numbers = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            with archive.open(f"{path.stem}/data/{key}", "w", force_zip64=True) as member:
                member.write(numbers.data)
        archive.writestr(f"{path.stem}/version", b"3\n")


def _pickled(value: Any, storages: list[np.ndarray]) -> bytes:
    """The opcodes that push a value (pickle protocol 2); arrays are put aside in `storages`."""
    if isinstance(value, Mapping):
        items = b"".join(_text(key) + _pickled(each, storages) for key, each in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, np.ndarray):
        return _pickled_tensor(value, storages)
    if isinstance(value, list):
        return b"](" + b"".join(_pickled(each, storages) for each in value) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(_pickled(each, storages) for each in value) + b"t"
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        long = value.to_bytes(9, "little", signed=True)
        return b"\x8a" + bytes([len(long)]) + long
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    raise DataError(f"a torch file of tensors cannot hold {type(value).__name__}")


def _pickled_tensor(array: np.ndarray, storages: list[np.ndarray]) -> bytes:
    names = [name for name, dtype in STORAGES.items() if dtype == array.dtype]
    if not names:
        raise DataError(f"torch has no storage for {array.dtype}")
    key = str(len(storages))
    storages.append(array)
    steps = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]  # contiguous
    storage = b"(" + _text("storage") + f"ctorch\n{names[0]}\n".encode() + _text(key) + _text("cpu")
    storage += _pickled(array.size, []) + b"tQ"
    arguments = b"(" + storage + _pickled(0, []) + _numbers(array.shape)
    arguments += _numbers(steps) + b"\x89" + b"ccollections\nOrderedDict\n)R" + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def _numbers(values: Any) -> bytes:
    return b"(" + b"".join(_pickled(int(value), []) for value in values) + b"t"


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


TORCH_SUFFIXES = (".pth", ".pt", ".bin")
TORCH_FILE = "pytorch_model.bin"


@runtime_checkable
class TensorFile(Protocol):
    """Tensors by name."""

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor."""
        ...


def weight_file(path: str | Path) -> Path:
    """The file or folder that holds the tensors of a checkpoint named by its folder or by a file.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if path.is_dir() and not (path / SINGLE_FILE).is_file() and not (path / INDEX_FILE).is_file():
        if (path / TORCH_FILE).is_file():
            return path / TORCH_FILE
        raise CheckpointError(f"{path} holds none of {SINGLE_FILE}, {INDEX_FILE}, {TORCH_FILE}")
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a checkpoint's folder or file (a name on the hub is not enough: hf "
            "download NAME --local-dir DIR)"
        )
    return path


def open_tensors(path: str | Path, rename: Callable[[str], str] = str) -> TensorFile:
    """Opens a checkpoint.

    Args:
        path: its folder, or the file of weights.
        rename: maps the names in the file to the names used here.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but tensors.
    """
    file = weight_file(path)
    if file.suffix in TORCH_SUFFIXES:
        return _TorchFile(file, rename)
    return SafetensorsFolder(file, rename)


class _TorchFile:
    """A pickled state dict, read without PyTorch and without running anything it names."""

    def __init__(self, file: Path, rename: Callable[[str], str]) -> None:
        content = read_torch_file(file)
        state = content.get("model", content) if isinstance(content, Mapping) else None
        if not isinstance(state, Mapping) or not all(isinstance(each, np.ndarray) for each in state.values()):
            raise CheckpointError(f"{file} does not hold tensors by name, alone or under `model`")
        if not all(isinstance(name, str) for name in state):
            raise CheckpointError(f"{file} names a tensor with something that is no text")
        self._file = file
        self._tensors = {rename(name): tensor for name, tensor in state.items()}
        if len(self._tensors) < len(state):
            raise CheckpointError(
                f"{file} holds a tensor twice, with and without the wrapper's name before it"
            )

    def read(self, name: str) -> np.ndarray:
        require_finite(self._tensors[name], f"{self._file}: {name}")
        return np.asarray(self._tensors[name], np.float32)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

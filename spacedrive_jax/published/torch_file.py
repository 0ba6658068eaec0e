"""Reads and writes torch's zip files of tensors without torch, and without running anything they pickle.

A torch file is a zip archive: `data.pkl` describes containers and tensors, `data/<key>` holds the numbers.
A pickle is a program; this reader's machine knows tensors, storages and plain containers and nothing else, so
that a file which asks for anything more is refused before it gets it.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from spacedrive_jax.console import UserError
from spacedrive_jax.restricted_pickle import Allowed, Refused, RestrictedUnpickler

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
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
"""What stands before a zip member: its last two numbers are the lengths of name and extra field."""


def read_torch_file(path: str | Path) -> Any:
    """The containers of a torch file with numpy arrays for tensors, mapped into memory.

    Raises:
        UserError: the file is damaged, of torch's older format, or holds anything but tensors, plain
            containers, text and numbers.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name[: -len("data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl"))
            members = {info.filename: info for info in archive.infolist()}
            program = archive.read(f"{root}data.pkl")
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        raise UserError(f"{path} is not a zip file that torch.save wrote ({error})") from error
    try:
        storage = functools.partial(_storage, path, root, members)
        return RestrictedUnpickler(program, _allowed(), storage).load()
    except UserError:
        raise
    except Refused as error:
        raise UserError(
            f"{path}: {error}, but only tensors and plain containers are read, nothing that would have to be "
            "run"
        ) from error
    except Exception as error:  # a damaged pickle fails in any way
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _allowed() -> Allowed:
    """Storages, the function that makes tensors of them, and a container."""
    return {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        **{("torch", name): dtype for name, dtype in STORAGES.items()},
    }


def _storage(path: Path, root: str, members: Mapping[str, zipfile.ZipInfo], identity: Any) -> np.ndarray:
    """The numbers that a pickle's reference names, mapped into memory."""
    kind, dtype, key, _, count = identity
    if kind != "storage" or not isinstance(dtype, np.dtype):
        raise UserError(f"{path} refers to {kind!r}, which is no storage of tensors")
    member = members[f"{root}data/{key}"]
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != count * dtype.itemsize:
        raise UserError(f"{path}: {member.filename} does not hold {count} numbers of type {dtype}")
    if count == 0:
        return np.zeros(0, dtype)
    with path.open("rb") as file:
        file.seek(member.header_offset)
        *_, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    offset = member.header_offset + LOCAL_HEADER.size + name_length + extra_length
    return np.memmap(path, dtype, "r", offset, (count,))


def _tensor(
    storage: np.ndarray, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> np.ndarray:
    """A tensor as a read-only view of its storage."""
    if any(number < 0 for number in (offset, *shape, *stride)) or len(shape) != len(stride):
        raise ValueError(f"shape {shape} with strides {stride}")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and last >= storage.size:
        raise ValueError(f"a tensor of shape {shape} leaves its storage of {storage.size} numbers")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


def write_torch_file(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays, text and numbers as `torch.load` reads them.

    Args:
        path: file to create; it appears under its name when it is whole.
        content: str keys; values are dicts, arrays, str, int, float, bool or None.

    Raises:
        UserError: the file exists, or a value or dtype cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists: choose another name")
    storages: list[np.ndarray] = []
    program = b"\x80\x02" + _pickled(content, storages) + b"."
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.writestr(f"{path.stem}/data.pkl", program)
            archive.writestr(f"{path.stem}/byteorder", b"little")
            for key, array in enumerate(storages):
                numbers = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                with archive.open(f"{path.stem}/data/{key}", "w", force_zip64=True) as member:
                    member.write(numbers.data)
            archive.writestr(f"{path.stem}/version", b"3\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _pickled(value: Any, storages: list[np.ndarray]) -> bytes:
    """The opcodes that push a value (pickle protocol 2); arrays are put aside in `storages`."""
    if isinstance(value, Mapping):
        items = b"".join(_text(key) + _pickled(each, storages) for key, each in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, np.ndarray):
        return _pickled_tensor(value, storages)
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
    raise UserError(f"a torch file of tensors cannot hold {type(value).__name__}")


def _pickled_tensor(array: np.ndarray, storages: list[np.ndarray]) -> bytes:
    names = [name for name, dtype in STORAGES.items() if dtype == array.dtype]
    if not names:
        raise UserError(f"torch has no storage for {array.dtype}")
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

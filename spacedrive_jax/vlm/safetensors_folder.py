"""Sharded safetensors folders as transformers has them: read by tensor, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spacedrive_jax.console import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


_FLOAT_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""By safetensors' name of the type."""


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
        return math.prod(self.shape) * jnp.dtype(_FLOAT_TYPES[self.dtype]).itemsize


class SafetensorsFolder:
    """The tensors of a checkpoint, read one at a time through memory maps."""

    def __init__(self, path: str | Path, rename: Callable[[str], str] = str) -> None:
        """Opens a checkpoint and reads the shapes, not the values.

        Args:
            path: A folder with model.safetensors or model.safetensors.index.json, or a .safetensors file.
            rename: Maps the names in the files to the names used here.

        Raises:
            UserError: If files are missing, damaged, or disagree with the index.
        """
        self.path = Path(path)
        self._handles: dict[Path, Any] = {}
        self.places: dict[str, TensorPlace] = {}
        for file in self._files():
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
                renamed = rename(name)
                if renamed in self.places:
                    raise UserError(f"{file}: tensor {name} comes twice (as {self.places[renamed].name} too)")
                stored = handle.get_slice(name)
                self.places[renamed] = TensorPlace(file, name, tuple(stored.get_shape()), stored.get_dtype())
        self._check_index(rename)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor by its renamed name; bfloat16 comes as ml_dtypes' type."""
        place = self.places[name]
        return self._open(place.file).get_tensor(place.name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Renamed name to shape of every tensor."""
        return {name: place.shape for name, place in self.places.items()}

    def float_type(self) -> str:
        """The narrowest type that holds every float tensor exactly; float32 where there is none."""
        found = {_FLOAT_TYPES[place.dtype] for place in self.places.values() if place.dtype in _FLOAT_TYPES}
        return str(jnp.result_type(*(jnp.dtype(name) for name in found))) if found else "float32"

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if (self.path / INDEX_FILE).is_file():
            return [self.path / file for file in sorted(set(self._weight_map().values()))]
        if (self.path / SINGLE_FILE).is_file():
            return [self.path / SINGLE_FILE]
        raise UserError(
            f"{self.path}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; give a checkpoint folder"
        )

    def _weight_map(self) -> Mapping[str, str]:
        index = self.path / INDEX_FILE
        try:
            return json.loads(index.read_text())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is not a safetensors index ({error}); download it again") from error

    def _check_index(self, rename: Callable[[str], str]) -> None:
        if self.path.is_file() or not (self.path / INDEX_FILE).is_file():
            return
        lost = sorted(name for name in self._weight_map() if rename(name) not in self.places)
        if lost:
            raise UserError(
                f"{self.path}: the index names {len(lost)} tensors no file holds, first {lost[0]}"
            )

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="np")
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read {file}: {error}; download it again") from error
        return self._handles[file]


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
        path: Folder to create.

    Raises:
        UserError: If `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists; choose a new folder or remove it")
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shards: list[list[str]], *, stem: str = "model"
) -> None:
    """Writes tensor files, and their index where there are several, into a folder.

    Args:
        folder: An existing folder.
        tensors: Names and values in the order of `shards`; held one shard at a time.
        shards: Names per file.
        stem: What the names of the files start with.
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
        save_file(shard, file, metadata={"format": "pt"})
        del shard
        # safetensors makes files that only their owner may read; follow the umask, as the folder does.
        file.chmod(folder.stat().st_mode & 0o666)
        weight_map.update(dict.fromkeys(names, file.name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


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

    Args:
        path: Folder to create.
        tensors: Names and values in the order of `shards`; held one shard at a time.
        shards: Names per file.
        config: Written as `config_file`.
        stem: What the names of the tensor files start with.
        config_file: Name of the configuration.
        complete: Adds what else belongs there before the folder takes its name.

    Raises:
        UserError: If `path` exists.
    """
    with new_folder(path) as folder:
        (folder / config_file).write_text(json.dumps(dict(config), indent=2))
        write_tensors(folder, tensors, shards, stem=stem)
        if complete is not None:
            complete(folder)

"""Sharded safetensors folders as transformers has them: read by tensor, written whole or not at all."""

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
from spacedrive_jax.interop.flavours import INDEX_FILE, SINGLE_FILE, check_tensors
from spacedrive_jax.io import MEBIBYTE, inside, place, require_regular
from spacedrive_jax.json_files import read_json, write_json

_FLOAT_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""By safetensors' name of the type."""


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
        return math.prod(self.shape) * jnp.dtype(_FLOAT_TYPES[self.dtype]).itemsize


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
        found = {_FLOAT_TYPES[place.dtype] for place in self.places.values() if place.dtype in _FLOAT_TYPES}
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

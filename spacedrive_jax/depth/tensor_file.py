"""Tensors of a released checkpoint by name: safetensors, or PyTorch's own format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from spacedrive_jax.errors import CheckpointError
from spacedrive_jax.published.torch_file import read_torch_file
from spacedrive_jax.vlm.safetensors_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder, require_finite

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
TORCH_FILE = "pytorch_model.bin"


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
        raise CheckpointError(f"{path} does not exist; give a checkpoint's folder or file")
    return path


def open_tensors(path: str | Path, rename: Callable[[str], str] = str) -> TensorFile:
    """Opens a checkpoint.

    Args:
        path: Its folder, or the file of weights.
        rename: Maps the names in the file to the names used here.

    Raises:
        CheckpointError: The file is missing, damaged, or holds anything but tensors.
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

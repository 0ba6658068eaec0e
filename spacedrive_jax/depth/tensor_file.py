"""Tensors of a released checkpoint by name: safetensors, or PyTorch's own format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from spacedrive_jax.console import UserError
from spacedrive_jax.published.torch_file import read_torch_file
from spacedrive_jax.vlm.safetensors_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder

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
        UserError: there is none.
    """
    path = Path(path)
    if path.is_dir() and not (path / SINGLE_FILE).is_file() and not (path / INDEX_FILE).is_file():
        if (path / TORCH_FILE).is_file():
            return path / TORCH_FILE
        raise UserError(f"{path} holds none of {SINGLE_FILE}, {INDEX_FILE}, {TORCH_FILE}")
    if not path.exists():
        raise UserError(f"{path} does not exist; give a checkpoint's folder or file")
    return path


def open_tensors(path: str | Path, rename: Callable[[str], str] = str) -> TensorFile:
    """Opens a checkpoint.

    Args:
        path: Its folder, or the file of weights.
        rename: Maps the names in the file to the names used here.

    Raises:
        UserError: The file is missing, damaged, or holds anything but tensors.
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
            raise UserError(f"{file} does not hold tensors by name, alone or under `model`")
        self._tensors = {rename(name): tensor for name, tensor in state.items()}

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self._tensors[name], np.float32)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

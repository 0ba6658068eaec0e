"""Pickles of plain values, read without executing code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from spacedrive_jax.console import UserError


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, texts and plain containers need no class; whatever names one is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain values are read")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to objects outside the file")


def read_plain_pickle(path: Path) -> Any:
    """Reads a pickle of numbers, texts, lists, tuples, sets and dicts.

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path} is not a pickle of plain values: {error}") from error

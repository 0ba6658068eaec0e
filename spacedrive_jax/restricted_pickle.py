"""Pickles read without executing what they name.

A pickle is a program: it may call anything importable. Here it gets only the classes and functions on a list
that the caller gives; whatever else it asks for is refused before it gets it.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spacedrive_jax.console import UserError

Allowed = Mapping[tuple[str, str], Any]
"""(module, name) as a pickle spells it, to the object that it gets."""

PLAIN: Allowed = MappingProxyType({})
"""Numbers, texts, lists, tuples, sets and dicts need no class."""


class Refused(pickle.UnpicklingError):
    """A pickle asked for something that is not on the list."""


class RestrictedUnpickler(pickle.Unpickler):
    """A pickle machine that knows plain containers and what its caller allows."""

    def __init__(
        self, program: bytes, allowed: Allowed, load_persistent: Callable[[Any], Any] | None = None
    ) -> None:
        """Args: the pickle, what it may name, and what resolves its references to objects outside of it."""
        super().__init__(io.BytesIO(program), encoding="utf-8")
        self._allowed = allowed
        self._load_persistent = load_persistent

    def find_class(self, module: str, name: str) -> Any:
        """Gives what is allowed under this name.

        Raises:
            Refused: nothing is.
        """
        if (module, name) not in self._allowed:
            raise Refused(f"it asks for {module}.{name}")
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Resolves a reference to an object outside the pickle.

        Raises:
            Refused: the caller resolves none.
        """
        if self._load_persistent is None:
            raise Refused("it refers to objects outside the file")
        return self._load_persistent(pid)


def read_pickle(path: Path, allowed: Allowed = PLAIN, *, contents: str = "plain values") -> Any:
    """Reads a pickle of plain containers and of what is allowed beside them.

    Args:
        path: the file.
        allowed: what it may name.
        contents: what may be in it, for the message.

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    try:
        return RestrictedUnpickler(path.read_bytes(), allowed).load()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Refused as error:
        raise UserError(
            f"{path} is not a pickle of {contents}: {error}, and only {contents} are read"
        ) from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path} is not a pickle of {contents}: {error}") from error


def numpy_allowed() -> Allowed:
    """What pickles of numpy arrays name, under numpy 1's and numpy 2's module names."""
    import codecs

    import numpy as np
    from numpy._core import multiarray, numeric

    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): codecs.encode,  # bytes in protocol 2 and below
    }
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.multiarray", "_reconstruct"] = multiarray._reconstruct
        allowed[f"{core}.multiarray", "scalar"] = multiarray.scalar
        allowed[f"{core}.numeric", "_frombuffer"] = numeric._frombuffer  # type: ignore[attr-defined]
    return MappingProxyType(allowed)

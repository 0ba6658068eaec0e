"""What pickles of numpy arrays and numbers get in place of numpy.

numpy itself trusts a pickle: of type `object` it takes the file's bytes for addresses in memory, and a
structured type may place a field outside its array. So a pickle describes the array to a stand-in, which
makes it of the file's own bytes once type, shape and number of bytes agree.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import numpy as np

from spacedrive_jax.restricted_pickle import Allowed, Refused, StandIn

_NUMBERS = re.compile(r"[<>=|]?(?:\?|b1|[iu][1248]|f[248])")
"""Spellings of the types that are read: booleans, integers and floats of up to 8 bytes."""


class PickledType(StandIn):
    """A numeric type."""

    def __init__(self, name: Any, align: Any = False, copy: Any = True) -> None:
        """Args: as numpy's pickles call `numpy.dtype`.

        Raises:
            Refused: it is no type of numbers.
        """
        if isinstance(name, bytes):
            name = name.decode("ascii", "replace")
        if not isinstance(name, str) or not _NUMBERS.fullmatch(name):
            raise Refused(f"it holds an array of type {str(name)[:40]!r}")
        self._type = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        """Takes the byte order; fields, parts and sizes must be those of a plain type."""
        order = state[1] if isinstance(state, tuple) and len(state) >= 5 else None
        if isinstance(order, bytes):
            order = order.decode("ascii", "replace")
        if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise Refused("it describes a type that is not of plain numbers")
        self._type = self._type.newbyteorder(order)  # type: ignore[arg-type]

    def value(self) -> np.dtype:
        """The type."""
        return self._type


class PickledArray(StandIn):
    """An array: made empty, then told what it is."""

    def __init__(self, kind: Any = None, shape: Any = (0,), *_: Any) -> None:
        """Args: as numpy's pickles call `_reconstruct`.

        Raises:
            Refused: it is not to be an ndarray.
        """
        if kind is not PickledArray or shape != (0,):
            raise Refused("it makes an array out of something other than its own bytes")
        self._array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        """Takes version, shape, type, order and bytes."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused("it describes an array that numpy would not write")
        _, shape, kind, fortran, data = state
        self._array = _filled(data, kind, shape, "F" if fortran else "C")

    def value(self) -> np.ndarray:
        """The array."""
        if self._array is None:
            raise Refused("it holds an array without values")
        return self._array


def _filled(data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    """An array of a pickle's own bytes.

    Raises:
        Refused: type, shape and number of bytes do not agree.
    """
    if not isinstance(kind, PickledType):
        raise Refused("it holds an array without a type")
    sizes = (shape,) if isinstance(shape, int) else shape
    whole = isinstance(sizes, tuple) and all(type(size) is int and size >= 0 for size in sizes)
    if isinstance(data, str):  # Python 2 wrote bytes as text
        data = data.encode("latin-1", "replace")
    dtype = kind.value()
    if not whole or order not in ("C", "F") or not isinstance(data, bytes | bytearray):
        raise Refused(f"it holds an array of shape {str(shape)[:40]} that its bytes do not make")
    if len(sizes) > 32 or math.prod(sizes) * dtype.itemsize != len(data):
        raise Refused(
            f"it holds an array of shape {str(shape)[:40]} and type {dtype} that its {len(data)} bytes do "
            "not make"
        )
    return np.frombuffer(bytes(data), dtype).reshape(sizes, order=order)


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    """As numpy 2 pickles arrays from protocol 5 on."""
    return _filled(data, kind, shape, order)


def _scalar(kind: Any, data: Any) -> Any:
    """A number of numpy's."""
    return _filled(data, kind, (), "C")[()]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes, as protocol 2 and below spells them."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("it encodes text")
    return text.encode("latin-1")


def numpy_allowed() -> Allowed:
    """What pickles of numpy's arrays and numbers name, under numpy 1's and numpy 2's module names."""
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): PickledArray,
        ("numpy", "dtype"): PickledType,
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode,
    }
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.multiarray", "_reconstruct"] = PickledArray
        allowed[f"{core}.multiarray", "scalar"] = _scalar
        allowed[f"{core}.numeric", "_frombuffer"] = _from_buffer
    return MappingProxyType(allowed)

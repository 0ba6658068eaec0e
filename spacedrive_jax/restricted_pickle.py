"""Pickles read without executing what they name, and within the memory that their size warrants.

A pickle is a program: it may call anything importable, and a few bytes of it may ask for gigabytes. Here it
runs on Python's own machine (the one in C lets a file choose the size of its memo), gets only the classes
and functions on a list that the caller gives, may change only what was made for it, and has a budget of
objects.

numpy itself trusts a pickle: of type `object` it takes the file's bytes for addresses in memory, and a
structured type may place a field outside its array. So a pickle describes the array to a stand-in, which
makes it of the file's own bytes once type, shape and number of bytes agree.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from spacedrive_jax.errors import DataError
from spacedrive_jax.io import MEBIBYTE, read_bytes

Allowed = Mapping[tuple[str, str], Any]
"""(module, name) as a pickle spells it, to the object that it gets."""

PLAIN: Allowed = MappingProxyType({})
"""Numbers, texts, lists, tuples, sets and dicts need no class."""

MOST_BYTES = 64 * MEBIBYTE
"""Largest pickle that is read."""
MOST_OBJECTS = 4_000_000
"""Containers, marks and memo entries that a pickle may make; an empty set of one byte takes 216."""
MOST_NODES = 20_000_000
"""Values that it may come to where parts are shared; a few bytes can repeat a list within itself for ever."""
MOST_DEPTH = 100
"""Containers within each other."""


class Refused(pickle.UnpicklingError):
    """A pickle asked for something that is not on the list, or for more than it may have."""


class StandIn:
    """What a pickle gets in place of an object whose making has to be checked.

    A pickle that makes the object in two steps hands the second to `__setstate__`; `value` checks the whole.
    """

    def __setstate__(self, state: Any) -> None:
        """Takes what the pickle says of the object.

        Raises:
            Refused: it cannot be.
        """
        raise Refused(f"it changes a {type(self).__name__}")

    def value(self) -> Any:
        """The object.

        Raises:
            Refused: it cannot be made of what the pickle said.
        """
        raise NotImplementedError


_Machine = Callable[["RestrictedUnpickler"], None]


class RestrictedUnpickler(pickle._Unpickler):
    """A pickle machine that knows plain containers and what its caller allows."""

    # What Python's machine sets while it runs.
    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def __init__(
        self, program: bytes, allowed: Allowed, load_persistent: Callable[[Any], Any] | None = None
    ) -> None:
        """Args: the pickle, what it may name, and what resolves its references to objects outside of it."""
        super().__init__(io.BytesIO(program), encoding="utf-8")
        self._size = len(program)
        self._allowed = allowed
        self._load_persistent = load_persistent
        self._objects = 0

    def load(self) -> Any:
        """Runs the pickle.

        Raises:
            Refused: it asks for what it may not have.
        """
        return _Resolver().resolve(super().load())

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

    def _build(self) -> None:
        """Only what was made for this pickle may be changed by it, never a function or a class."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], StandIn):
            self.stack[-1].__setstate__(state)
        elif not isinstance(self.stack[-1], OrderedDict):  # torch notes versions on its state dicts
            raise Refused(f"it changes a {type(self.stack[-1]).__name__}")

    def _bytearray(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        if size > self._size:
            raise Refused(f"it asks for {size} bytes and has {self._size}")
        self.append(bytearray(self.read(size)))

    def _count(self) -> None:
        self._objects += 1
        if self._objects > MOST_OBJECTS:
            raise Refused(f"it makes more than {MOST_OBJECTS:,} objects")


def _counted(run: _Machine) -> _Machine:
    def counted(machine: RestrictedUnpickler) -> None:
        machine._count()
        run(machine)

    return counted


def _refused(name: str) -> _Machine:
    def refuse(_: RestrictedUnpickler) -> None:
        raise Refused(f"it makes an object in a way that plain values have no use for ({name})")

    return refuse


_MAKING = (
    *("MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("DICT", "LIST", "FROZENSET", "REDUCE", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
)
_NEVER = (
    *("EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "NEXT_BUFFER", "READONLY_BUFFER"),
    "PERSID",
)


def _opcode(name: str) -> int:
    return int(getattr(pickle, name)[0])


_KNOWN: dict[int, Any] = dict(pickle._Unpickler.dispatch)
_DISPATCH: dict[int, Any] = {
    **_KNOWN,
    **{_opcode(name): _counted(_KNOWN[_opcode(name)]) for name in _MAKING},
    **{_opcode(name): _refused(name) for name in _NEVER},
    _opcode("BUILD"): RestrictedUnpickler._build,
    _opcode("BYTEARRAY8"): RestrictedUnpickler._bytearray,
}
RestrictedUnpickler.dispatch = _DISPATCH


class _Resolver:
    """Puts objects in the place of their stand-ins, and counts what a pickle comes to."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[Any, int, Any]] = {}
        """By identity: the value, how many values it holds, and what it was made of (kept alive)."""

    def resolve(self, value: Any) -> Any:
        resolved, nodes = self._resolve(value, 0)
        if nodes > MOST_NODES:
            raise Refused(f"its parts repeat each other to {nodes:,} values")
        return resolved

    def _resolve(self, value: Any, depth: int) -> tuple[Any, int]:
        if not isinstance(value, dict | list | tuple | set | frozenset | StandIn):
            return value, 1
        if id(value) in self._done:
            resolved, nodes, _ = self._done[id(value)]
            if nodes < 0:
                raise Refused("a container in it holds itself")
            return resolved, nodes
        if depth > MOST_DEPTH:
            raise Refused(f"its containers stand more than {MOST_DEPTH} deep in each other")
        self._done[id(value)] = (None, -1, value)
        resolved, nodes = self._whole(value, depth + 1)
        self._done[id(value)] = (resolved, nodes, value)
        return resolved, nodes

    def _whole(self, value: Any, depth: int) -> tuple[Any, int]:
        if isinstance(value, StandIn):
            return value.value(), 1
        if isinstance(value, dict):
            pairs = [(*self._resolve(key, depth), *self._resolve(each, depth)) for key, each in value.items()]
            nodes = 1 + sum(inner + below for _, inner, _, below in pairs)
            return type(value)((key, each) for key, _, each, _ in pairs), nodes
        parts = [self._resolve(each, depth) for each in value]
        return type(value)(each for each, _ in parts), 1 + sum(nodes for _, nodes in parts)


def read_pickle(path: Path, allowed: Allowed = PLAIN, *, contents: str = "plain values") -> Any:
    """Reads a pickle of plain containers and of what is allowed beside them.

    Args:
        path: the file.
        allowed: what it may name.
        contents: what may be in it, for the message.

    Raises:
        DataError: the file is missing, damaged, too large, or holds anything else.
    """
    program = read_bytes(path, most=MOST_BYTES)
    try:
        return RestrictedUnpickler(program, allowed).load()
    except Refused as error:
        raise DataError(
            f"{path} is not a pickle of {contents}: {error}, and only {contents} are read"
        ) from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(f"{path} is damaged, or is not a pickle of {contents}") from error


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

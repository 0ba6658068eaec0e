"""Pickles read without executing what they name, and within the memory that their size warrants.

A pickle is a program: it may call anything importable, and a few bytes of it may ask for gigabytes. Here it
runs on Python's own machine (the one in C lets a file choose the size of its memo), gets only the classes and
functions on a list that the caller gives, may change only what was made for it, and has a budget of objects.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

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

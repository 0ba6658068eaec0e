"""The numbers that a flag or a field of a config may take, declared beside it and checked as one.

A dataclass names the bounds of its numeric fields in `BOUNDS`; configs check them where they are made
(`__post_init__`), commands before they run. What is out of bounds is refused by the field's dotted name or
the flag, before anything is loaded. A test holds that no numeric field is without a bound.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from spacedrive_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Bound:
    """An interval of finite numbers."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    """`least` itself is left out."""
    below: bool = False
    """`most` itself is left out."""
    also: tuple[float, ...] = ()
    """Single values outside that mean something of their own."""

    def holds(self, value: float) -> bool:
        """Whether the value may be taken."""
        if value in self.also:
            return True
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return math.isfinite(value) and low and high

    def __str__(self) -> str:
        """What a value must be, in words."""
        parts = []
        if self.least > -math.inf:
            parts.append(f"above {self.least:g}" if self.above else f"{self.least:g} or more")
        if self.most < math.inf:
            parts.append(f"below {self.most:g}" if self.below else f"at most {self.most:g}")
        words = " and ".join(parts) or "a finite number"
        return f"{words}, or {', '.join(f'{value:g}' for value in self.also)}" if self.also else words


LARGEST = 1e38
"""About where float32 ends, in which almost all is computed."""
ANY = Bound()
COUNT = Bound(1)
FROM_ZERO = Bound(0)
POSITIVE = Bound(0, above=True)
SHARE = Bound(0, 1)
SHARE_BELOW_ONE = Bound(0, 1, below=True)
SEED = Bound(0, 2**32 - 1)
WORKERS = Bound(0, 1024)
"""Processes of a command; 0 takes all cores."""
SIDE = Bound(1, 65536)
"""Pixels of one side of an image."""
Bounds = Mapping[str, Bound]


def check_bounds(owner: Any, bounds: Bounds, place: str = "") -> None:
    """Holds the numbers of a config or command against their bounds, and the fields of a config against their
    types: Python itself holds a dataclass to neither.

    What means the same is taken: numpy's and jax's numbers, a list for a tuple, a `pathlib.Path` for a text.

    Args:
        owner: the dataclass; a frozen one where it is a config.
        bounds: by field; every number of a tuple must keep to it. None, where a field takes it, is let pass.
        place: what stands before a field's name in messages: `train` for `train.steps`; `--` for flags.

    Raises:
        ConfigError: a value is no number, no whole one where the field's type is int, out of bounds, or of
            another type than its field.
    """
    hints = _hints(owner.__class__)
    whole = _whole_fields(owner.__class__)
    if place != "--":
        for field, (_, kinds) in hints.items():
            value = getattr(owner, field)
            plain = _plain(value, kinds)
            if plain is not value:
                object.__setattr__(owner, field, plain)  # frozen
    for field, bound in bounds.items():
        value = getattr(owner, field)
        for number in value if isinstance(value, tuple | list) else (value,):
            if number is None:
                continue
            name = f"--{field.replace('_', '-')}" if place == "--" else f"{place}.{field}".lstrip(".")
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ConfigError(f"{name} {value!r} must be a number, {bound}")
            if LARGEST <= abs(number) < math.inf:
                raise ConfigError(f"{name} {str(value)[:40]} is larger than what numbers are computed with")
            if not bound.holds(number):
                raise ConfigError(f"{name} {value!r} must be {bound}")
            if field in whole and not isinstance(number, int):
                raise ConfigError(f"{name} {value!r} must be a whole number")

    if place != "--":
        for field, (hint, _) in hints.items():
            value = getattr(owner, field)
            if not _is_of(value, hint):
                name = f"{place}.{field}".lstrip(".")
                raise ConfigError(f"{name} {str(value)[:80]!r} must be {_words(hint)}")


def require_kind(value: object, kind: type, takes: str) -> None:
    """Refuses a value of another kind than a public function takes: what would fail deep inside otherwise.

    Args:
        value: what was given.
        kind: what it must be an instance of.
        takes: who takes what, and where one comes from, for the message.

    Raises:
        ConfigError: it is something else, which the message names.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{takes}, not {type(value).__name__}")


@functools.cache
def _hints(owner: type) -> Mapping[str, tuple[Any, set[Any]]]:
    """Annotation of every field, and the types in it."""
    hints = get_type_hints(owner)
    return {each.name: (hints[each.name], _kinds(hints[each.name])) for each in dataclasses.fields(owner)}


@functools.cache
def _whole_fields(owner: type) -> frozenset[str]:
    """Fields whose type has int and no float."""
    found = _hints(owner).items()
    return frozenset(name for name, (_, kinds) in found if int in kinds and float not in kinds)


def _plain(value: Any, kinds: set[Any]) -> Any:
    """A value as JSON would give it back, where that is what it means."""
    if isinstance(value, os.PathLike) and str in kinds:
        return os.fspath(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    if tuple in kinds and (isinstance(value, list | tuple) or getattr(value, "ndim", None) == 1):
        items = tuple(_plain(item, kinds) for item in value)
        same = isinstance(value, tuple) and all(a is b for a, b in zip(items, value, strict=True))
        return value if same else items
    return value


def _is_of(value: Any, hint: Any) -> bool:
    if dataclasses.is_dataclass(hint):
        return isinstance(value, hint)  # type: ignore[arg-type]
    try:
        msgspec.convert(value, hint)
    except (msgspec.ValidationError, UnicodeEncodeError, OverflowError):
        return False
    return True


def _words(hint: Any) -> str:
    """What a value must be, by its annotation."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return f"of type {getattr(hint, '__name__', hint) if not get_args(hint) else hint}"


def _kinds(hint: Any) -> set[Any]:
    """All types in an annotation."""
    return {get_origin(hint) or hint}.union(*map(_kinds, get_args(hint)))

"""The numbers that a flag or a field of a config may take, declared beside it and checked as one.

A dataclass names the bounds of its numeric fields in `BOUNDS`; configs check them where they are made
(`__post_init__`), commands before they run. What is out of bounds is refused by the field's dotted name or
the flag, before anything is loaded. A test holds that no numeric field is without a bound.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

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
    """Holds the numbers of a config or command against their bounds.

    Args:
        owner: the dataclass.
        bounds: by field; every number of a tuple must keep to it. None, where a field takes it, is let pass.
        place: what stands before a field's name in messages: `train` for `train.steps`; `--` for flags.

    Raises:
        ConfigError: a value is no number, no whole one where the field's type is int, or out of bounds.
    """
    whole = _whole_fields(owner.__class__)
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


@functools.cache
def _whole_fields(owner: type) -> frozenset[str]:
    """Fields whose type has int and no float; Python itself does not hold a dataclass to its types."""
    kinds = {name: _kinds(hint) for name, hint in get_type_hints(owner).items()}
    return frozenset(name for name, found in kinds.items() if int in found and float not in found)


def _kinds(hint: Any) -> set[Any]:
    """All types in an annotation."""
    return {get_origin(hint) or hint}.union(*map(_kinds, get_args(hint)))

"""Coordinates in text: found, replaced by indicator and position token, and written out (paper, 3.2)."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from spacedrive_jax.data.tokenizer import COORDINATE

# Decimals may be signed and may lack the digits before the point; integers may not be signed: `(3, -4)`
# stays text (published, reference_behaviour 13).
_NUMBER = r"([-+]?\d*\.\d+|\d+)"
_TUPLE = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
_ALL = re.compile(_TUPLE)
# A velocity takes the text up to the next closing bracket with it, whatever stands inside.
_ALL_BUT_VELOCITIES = re.compile(rf"velocity(?::| of)\s*\([^)]+\)|{_TUPLE}")


class ReplacedText(NamedTuple):
    """A text whose coordinates became tokens."""

    text: str
    coordinates: Float[np.ndarray, "C 2"]
    """x, y in metres, ego frame, float32; as the published code counts them: see `replace_coordinates`."""


def replace_coordinates(text: str, *, keep_velocities: bool) -> ReplacedText:
    """Puts an indicator and a position token in the place of every `(x, y)`, as published.

    The published code finds tuples with a lenient pattern and then replaces the first occurrence of the
    same two numbers written `(x, y)`. So `(1.0,2.0)` is counted as a coordinate but stays text, and a
    coordinate that repeats an earlier velocity replaces the velocity. Both are kept: published weights were
    trained on such texts.

    Args:
        text: any turn of a conversation.
        keep_velocities: the training rule, which leaves tuples behind `velocity:` and `velocity of` alone;
            the test rule replaces them too.
    """
    pattern = _ALL_BUT_VELOCITIES if keep_velocities else _ALL
    found = [(match[1], match[2]) for match in pattern.finditer(text) if match[1] is not None]
    for x, y in found:
        text = text.replace(f"({x}, {y})", COORDINATE, 1)
    return ReplacedText(text, np.array(found, np.float32).reshape(-1, 2))


def format_number(number: float, decimals: int = 1) -> str:
    """A signed number as the published texts write it: `+4.10`, `-0.05`, and `0.0` where it rounds to no
    more than 0.01.
    """
    return "0.0" if abs(round(number, decimals)) <= 1e-2 else f"{number:+.{decimals}f}"


def format_coordinates(points: Float[np.ndarray, "C 2"]) -> str:
    """Points as `(+4.10, 0.0), (+8.22, -0.05)`, two decimals."""
    return ", ".join(f"({format_number(float(x), 2)}, {format_number(float(y), 2)})" for x, y in points)


def parse_coordinates(text: str) -> Float[np.ndarray, "C 2"]:
    """Every `(x, y)` of a text, metres; for answers that write coordinates as digits."""
    return np.array([(float(match[1]), float(match[2])) for match in _ALL.finditer(text)]).reshape(-1, 2)

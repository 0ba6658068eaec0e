"""One comparison of an array with its recorded value."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Check:
    """How far one tensor is from its recorded value."""

    name: str
    absolute: float
    """Largest absolute difference; inf where shapes or non-finite entries differ."""
    relative: float
    """The same over the largest magnitude of the recorded tensor."""
    tolerance: str
    """The bound, in words."""
    passed: bool


def compare(name: str, actual: Any, expected: Any, *, atol: float = 0.0, rtol: float = 1e-4) -> Check:
    """Compares a tensor with its recorded value.

    Args:
        name: how the output calls it.
        actual: ours.
        expected: recorded.
        atol: absolute bound.
        rtol: bound relative to the recorded tensor's largest magnitude (gradients and hidden states have
            entries near zero for which an entry-wise ratio says nothing). The larger bound holds; 0 and 0
            means equal.
    """
    ours, theirs = np.asarray(actual), np.asarray(expected)
    words = "equal" if atol == rtol == 0 else f"abs {atol:g} or rel {rtol:g}"
    if ours.shape != theirs.shape:
        return Check(f"{name} {ours.shape} != {theirs.shape}", np.inf, np.inf, words, False)
    if ours.size == 0:
        return Check(name, 0.0, 0.0, words, True)
    if not np.issubdtype(theirs.dtype, np.number):
        differing = float(np.sum(ours != theirs))
        return Check(name, differing, differing / theirs.size, words, differing == 0)
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    finite = np.isfinite(theirs)
    same_rest = np.array_equal(ours[~finite], theirs[~finite], equal_nan=True)
    absolute = float(np.max(np.abs(ours[finite] - theirs[finite]), initial=0.0)) if same_rest else np.inf
    absolute = absolute if np.isfinite(absolute) else np.inf
    scale = float(np.max(np.abs(theirs[finite]), initial=0.0))
    relative = absolute / scale if scale > 0 else (0.0 if absolute == 0 else np.inf)
    return Check(name, absolute, relative, words, absolute <= max(atol, rtol * scale))

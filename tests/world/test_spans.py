"""Scan lines against what testing every position says."""

from __future__ import annotations

import numpy as np

from spacedrive_jax.world import paths


def test_interval_is_where_no_edge_is_negative() -> None:
    rng = np.random.default_rng(0)
    offsets, slopes = rng.integers(-5, 6, (2, 3, 400)).astype(float)
    low, high = paths.intervals(offsets, slopes)
    position = np.linspace(-12, 12, 97)[:, None]
    inside = (offsets[:, None] + slopes[:, None] * position >= -1e-9).all(axis=0)
    assert np.array_equal(inside, (position >= low - 1e-9) & (position <= high + 1e-9))
    assert inside.any()
    assert not inside.all()


def test_a_parallel_edge_hides_all_or_nothing() -> None:
    low, high = paths.intervals(np.array([[-1.0, 0.0, 1.0]]), np.zeros((1, 3)))
    assert (low > high).tolist() == [True, False, False]


def test_expand_lists_every_range() -> None:
    owners, numbers = paths.expand(np.array([3, 7, -1, 5]), np.array([6, 2, 1, 6]))
    assert owners.tolist() == [0, 0, 0, 2, 2, 3]
    assert numbers.tolist() == [3, 4, 5, -1, 0, 5]
    assert len(paths.expand(np.zeros(0, dtype=int), np.zeros(0, dtype=int))[0]) == 0

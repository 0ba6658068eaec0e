"""Predictions sorted into what can be scored and what cannot: nothing is dropped in silence."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from spacedrive_jax.data.records import NUM_WAYPOINTS


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions of one file, sorted into what can be scored and what cannot.

    Attributes:
        path: the file, or the folder of one file per keyframe.
        waypoints: token to the trajectory to score, metres, ego frame.
        text: token to the model's answer ("" where the file has none).
        unparsed: tokens whose answer held no trajectory.
        short: tokens with fewer than six waypoints.
        long: tokens with more than six waypoints; the first six are scored, as published.
        non_finite: tokens with a waypoint that is not finite.
        duplicates: tokens that occur more than once; the first line counts.
    """

    path: Path
    waypoints: Mapping[str, Float[np.ndarray, "T 2"]]
    text: Mapping[str, str]
    unparsed: tuple[str, ...]
    short: tuple[str, ...]
    long: tuple[str, ...]
    non_finite: tuple[str, ...]
    duplicates: tuple[str, ...]

    @property
    def tokens(self) -> frozenset[str]:
        """All tokens in the file, usable or not."""
        return frozenset(self.text)

    @functools.cached_property
    def unusable(self) -> frozenset[str]:
        """Tokens with an answer that cannot be scored as a trajectory."""
        return frozenset((*self.unparsed, *self.short, *self.non_finite))


def discretize(predictions: Predictions, pitch: float) -> Predictions:
    """The predictions with coordinates floored to multiples of `pitch` metres, a published option."""
    waypoints = {token: np.floor(points / pitch) * pitch for token, points in predictions.waypoints.items()}
    return dataclasses.replace(predictions, waypoints=waypoints)


def sort_predictions(
    path: Path, entries: Iterable[tuple[str, str, Float[np.ndarray, "n 2"] | None]]
) -> Predictions:
    """Sorts predictions by whether they can be scored.

    Args:
        path: where they were read.
        entries: (token, text, trajectory) in file order; None where the text holds no trajectory.
    """
    waypoints: dict[str, np.ndarray] = {}
    text: dict[str, str] = {}
    listed: dict[str, list[str]] = {
        name: [] for name in ("unparsed", "short", "long", "non_finite", "duplicates")
    }
    for token, answer, trajectory in entries:
        if token in text:
            if token not in listed["duplicates"]:
                listed["duplicates"].append(token)
            continue
        text[token] = answer
        if trajectory is None:
            listed["unparsed"].append(token)
        elif len(trajectory) < NUM_WAYPOINTS:
            listed["short"].append(token)
        elif not np.isfinite(trajectory[:NUM_WAYPOINTS]).all():
            listed["non_finite"].append(token)
        else:
            waypoints[token] = trajectory[:NUM_WAYPOINTS]
            if len(trajectory) > NUM_WAYPOINTS:
                listed["long"].append(token)
    return Predictions(path, waypoints, text, **{name: tuple(tokens) for name, tokens in listed.items()})

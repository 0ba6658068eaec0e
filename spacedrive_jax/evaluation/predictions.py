"""What is scored side by side on a keyframe: predictions, planners without a model, the recording.

Predictions come sorted by whether they can be scored; `Coverage` says which keyframes a score counted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from spacedrive_jax.constants import FARTHEST, NUM_WAYPOINTS, WAYPOINT_STEP
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import DataError, SpaceDriveError


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions of one file, sorted into what can be scored and what cannot."""

    path: Path
    """The file, or the folder of one file per keyframe."""
    waypoints: Mapping[str, Float[np.ndarray, "_ 2"]]
    """By token, those to score, metres, ego frame."""
    text: Mapping[str, str]
    """Token to the model's answer ("" where the file has none)."""
    unparsed: tuple[str, ...]
    """Tokens whose answer held none."""
    short: tuple[str, ...]
    """Tokens with fewer than six waypoints."""
    long: tuple[str, ...]
    """Tokens with more than six waypoints; the first six are scored, as published."""
    non_finite: tuple[str, ...]
    """Tokens with a waypoint that is not finite."""
    duplicates: tuple[str, ...]
    """Tokens that occur more than once; the first line counts."""

    @property
    def tokens(self) -> frozenset[str]:
        """All tokens in the file, usable or not."""
        return frozenset(self.text)

    @functools.cached_property
    def unusable(self) -> frozenset[str]:
        """Tokens with an answer that cannot be scored."""
        return frozenset((*self.unparsed, *self.short, *self.non_finite))


def is_unicode(text: str) -> bool:
    """Whether a text can be written to a file: it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def discretize(predictions: Predictions, pitch: float) -> Predictions:
    """The predictions with coordinates floored to multiples of `pitch` metres, a published option."""
    waypoints = {token: np.floor(each / pitch) * pitch for token, each in predictions.waypoints.items()}
    return dataclasses.replace(predictions, waypoints=waypoints)


def sort_predictions(
    path: Path, entries: Iterable[tuple[str, str, Float[np.ndarray, "_ 2"] | None]]
) -> Predictions:
    """Sorts predictions by whether they can be scored.

    Args:
        path: where they were read.
        entries: (token, text, waypoints) in file order; None where the text holds none.

    Raises:
        DataError: a waypoint lies so far away that it cannot be one.
    """
    usable: dict[str, np.ndarray] = {}
    text: dict[str, str] = {}
    listed: dict[str, list[str]] = {
        name: [] for name in ("unparsed", "short", "long", "non_finite", "duplicates")
    }
    for token, answer, waypoints in entries:
        if token in text:
            if token not in listed["duplicates"]:
                listed["duplicates"].append(token)
            continue
        # A lone surrogate is legal in JSON's escapes and in no file that is written.
        text[token] = answer if is_unicode(answer) else answer.encode("utf-8", "replace").decode()
        if waypoints is None:
            listed["unparsed"].append(token)
        elif len(waypoints) < NUM_WAYPOINTS:
            listed["short"].append(token)
        elif not np.isfinite(waypoints[:NUM_WAYPOINTS]).all():
            listed["non_finite"].append(token)
        elif (away := np.abs(waypoints[:NUM_WAYPOINTS]).max()) > FARTHEST:
            raise DataError(
                f"{path}, token {token}: a waypoint lies {away:.3g} m away; waypoints are metres in the ego "
                "frame, of the next three seconds"
            )
        else:
            usable[token] = waypoints[:NUM_WAYPOINTS]
            if len(waypoints) > NUM_WAYPOINTS:
                listed["long"].append(token)
    return Predictions(path, usable, text, **{name: tuple(tokens) for name, tokens in listed.items()})


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Which keyframes were scored, and why others were not.

    A keyframe is eligible when all six future waypoints exist (quirk Q10: the last six of each scene drop
    out); a planner's score is the mean over the eligible keyframes it has a usable prediction for.
    """

    records: int
    """Keyframes in the split."""
    eligible: int
    """Keyframes with a whole future."""
    counted: int
    """Eligible keyframes the score is a mean over: those with a usable prediction, and those with an unusable
    one under a protocol that counts them as failures."""
    with_map: int
    """Counted keyframes with a drivable area, the denominator of the intersection."""
    missing: tuple[str, ...]
    """Eligible keyframes the file does not mention."""
    unparsed: tuple[str, ...]
    short: tuple[str, ...]
    long: tuple[str, ...]
    """Eligible keyframes of which only the first six waypoints were used."""
    non_finite: tuple[str, ...]
    """`unparsed`, `short`, `non_finite`: eligible keyframes whose prediction is unusable."""
    duplicates: tuple[str, ...]
    """Tokens given more than once (the first line counts)."""
    wrong_split: tuple[str, ...]
    """Predicted tokens that are keyframes of another split."""
    unknown: tuple[str, ...]
    """Predicted tokens that are no keyframe of the folder."""

    def to_json(self) -> dict[str, Any]:
        """Counts as numbers, lists as `{"count", "tokens"}`; `share` is counted over eligible."""
        coverage: dict[str, Any] = {"share": self.counted / self.eligible if self.eligible else 0.0}
        for name, value in dataclasses.asdict(self).items():
            coverage[name] = (
                {"count": len(value), "tokens": list(value)} if isinstance(value, tuple) else value
            )
        return coverage


def read_splits(records: Records) -> set[str]:
    """The splits of the folder that hold keyframes (without `all`)."""
    return set(records.splits)


def cover(
    records: Records,
    predictions: Predictions,
    seen: set[str],
    eligible: set[str],
    counted: int,
    with_map: int,
) -> Coverage:
    """Sorts every eligible keyframe and every predicted token.

    Args:
        records: the split that was scored.
        predictions: the prediction file.
        seen: tokens of the split.
        eligible: those with a whole future.
        counted: how many of them were scored.
        with_map: how many of these have a drivable area.
    """
    strangers = sorted(predictions.tokens - seen)
    elsewhere = _tokens_of_other_splits(records) if strangers else frozenset()

    def here(tokens: Sequence[str]) -> tuple[str, ...]:
        return tuple(token for token in tokens if token in eligible)

    return Coverage(
        records=len(records),
        eligible=len(eligible),
        counted=counted,
        with_map=with_map,
        missing=tuple(sorted(eligible - predictions.tokens)),
        unparsed=here(predictions.unparsed),
        short=here(predictions.short),
        long=here(predictions.long),
        non_finite=here(predictions.non_finite),
        duplicates=predictions.duplicates,
        wrong_split=tuple(token for token in strangers if token in elsewhere),
        unknown=tuple(token for token in strangers if token not in elsewhere),
    )


def _tokens_of_other_splits(records: Records) -> frozenset[str]:
    if records.split == "all":
        return frozenset()
    others = [
        open_records(records.directory, split) for split in sorted(read_splits(records) - {records.split})
    ]
    return frozenset(other.source.token(index) for other in others for index in range(len(other)))


# Planners without a model. A number that does not beat these says little (open-loop scores flatter them).


def standing_still() -> Float[np.ndarray, "T 2"]:
    """The ego vehicle stays where it is."""
    return np.zeros((NUM_WAYPOINTS, 2))


def constant_velocity(record: Record) -> Float[np.ndarray, "T 2"]:
    """The last displacement goes on: same speed, same direction, waypoints at the nominal 0.5 s.

    Velocity is the displacement from the previous keyframe's ego position to the present one over the
    true time between them, so the direction is that of the displacement, not the vehicle's heading. At the
    start of a scene, where no previous keyframe exists, the vehicle stands still.

    Args:
        record: a keyframe; only its past is read.

    Returns:
        Waypoints in metres, ego frame.

    Raises:
        DataError: the previous keyframe is not earlier than this one.
    """
    if not record["past_mask"][0]:
        return standing_still()
    seconds = (int(record["timestamp_us"]) - int(record["past_timestamp_us"][0])) * 1e-6
    if seconds <= 0:
        raise DataError(f"record {record['token']}: past_timestamp_us is not before timestamp_us")
    velocity = -record["past_to_ego"][0, :2, 3] / seconds
    return velocity * (WAYPOINT_STEP * np.arange(1, NUM_WAYPOINTS + 1))[:, None]


def mean_trajectory(records: Iterable[Record]) -> Float[np.ndarray, "T 2"]:
    """The mean of the valid waypoints, step by step.

    Args:
        records: the training split (never the one that is scored).

    Raises:
        DataError: some step has no valid waypoint in any record.
    """
    total = np.zeros((NUM_WAYPOINTS, 2))
    count = np.zeros((NUM_WAYPOINTS, 1), np.int64)
    for record in records:
        mask = np.asarray(record["waypoint_mask"], bool)[:, None]
        total += np.where(mask, record["waypoints"], 0.0)
        count += mask
    if not count.all():
        raise DataError("a waypoint step is valid in none of the training records")
    return total / count


PREDICTION = "prediction"
COMPARED = "compared"
GROUND_TRUTH = "ground_truth"

MEAN_KEYFRAMES = 3000
"""At most so many train keyframes make the mean trajectory: reading all 28,130 of nuScenes takes minutes."""


class Plan(NamedTuple):
    """One planner's answer for one keyframe."""

    waypoints: Float[np.ndarray, "T 2"]
    """Metres, ego frame; those of standing still where the answer is unusable."""
    failed: bool
    """The planner answered, but not with six finite waypoints."""


@dataclasses.dataclass(frozen=True)
class Planners:
    """All planners of one evaluation; plain data, so that processes can share it."""

    files: Mapping[str, Predictions]
    """Name to prediction file."""
    mean: Float[np.ndarray, "T 2"] | None
    """The mean trajectory of the train split, None where there is none."""
    notes: tuple[str, ...] = ()
    """What a reader must know about the baselines, in sentences."""

    @property
    def names(self) -> tuple[str, ...]:
        """The planners in the order of a table."""
        mean = () if self.mean is None else ("mean_trajectory",)
        return (*self.files, "standing_still", "constant_velocity", *mean, GROUND_TRUTH)

    def plans(self, record: Record) -> dict[str, Plan]:
        """Every planner's answer for a keyframe with a whole future; files may have none."""
        answers: dict[str, Plan] = {}
        for name, file in self.files.items():
            if record["token"] in file.waypoints:
                answers[name] = Plan(file.waypoints[record["token"]], failed=False)
            elif record["token"] in file.unusable:
                answers[name] = Plan(standing_still(), failed=True)
        answers["standing_still"] = Plan(standing_still(), failed=False)
        answers["constant_velocity"] = Plan(constant_velocity(record), failed=False)
        if self.mean is not None:
            answers["mean_trajectory"] = Plan(self.mean, failed=False)
        answers[GROUND_TRUTH] = Plan(record["waypoints"], failed=False)
        return answers


def gather_planners(records: Records, files: Mapping[str, Predictions]) -> Planners:
    """The prediction files and the baselines the records folder allows."""
    if "train" not in read_splits(records):
        return Planners(files, None, ("No mean trajectory baseline: the records folder has no train split.",))
    train = open_records(records.directory, "train")
    chosen = range(0, len(train), math.ceil(len(train) / MEAN_KEYFRAMES))
    try:
        mean = mean_trajectory(train[index] for index in chosen)
    except SpaceDriveError as error:
        return Planners(files, None, (f"No mean trajectory baseline: {error}.",))
    part = f"{len(chosen)} evenly spaced of the " if len(chosen) < len(train) else "the "
    notes = [f"The mean trajectory is that of {part}{len(train)} keyframes of the train split."]
    if records.split != "val":
        notes.append("The mean trajectory was made from keyframes that are also scored here.")
    return Planners(files, mean, tuple(notes))

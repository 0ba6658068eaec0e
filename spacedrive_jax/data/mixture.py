"""Several records folders as one source of samples.

`data.records` names them with weights, `A:0.7,B:0.3`: of any stretch of the run seven samples in ten are A's,
in an order that the seed alone decides. Each folder is shuffled and repeated by itself, so that a small one
comes round more often than a large one.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import grain

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.io import is_bucket


def records_sources(text: str) -> list[tuple[str, float]]:
    """The folders that `data.records` names, and their weights, which add up to 1.

    Args:
        text: one folder, or several as `FOLDER:WEIGHT,FOLDER:WEIGHT`.

    Raises:
        ConfigError: a weight is missing or not positive, or a folder is named twice.
    """
    if "," not in text or (not is_bucket(text) and Path(text).is_dir()):
        return [(text, 1.0)]
    folders, weights = [], []
    for part in text.split(","):
        folder, _, weight = part.strip().rpartition(":")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not folder or not (math.isfinite(value) and value > 0):
            raise ConfigError(
                f"data.records {part.strip()!r} has no positive weight: several folders are named "
                "FOLDER:WEIGHT,FOLDER:WEIGHT"
            )
        folders.append(folder)
        weights.append(value)
    if len({folder if is_bucket(folder) else os.path.realpath(folder) for folder in folders}) < len(folders):
        raise ConfigError(f"data.records {text!r} names a folder twice")
    total = math.fsum(weights)
    return [(folder, weight / total) for folder, weight in zip(folders, weights, strict=True)]


def mixed_fingerprint(fingerprints: Sequence[str]) -> str:
    """Names what several records folders hold together; a single one's own fingerprint."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()


Item = TypeVar("Item")


class Concatenation(Sequence[Item]):
    """Several sequences as one, one behind the other."""

    def __init__(self, parts: Sequence[Sequence[Item]]) -> None:
        """Args: the sequences, in order."""
        self.parts = list(parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


class MixedRecords(Concatenation[Record]):
    """The records of several folders."""

    def __init__(self, parts: Sequence[Any]) -> None:
        """Args: the folders' records, in the order of their samples' indices."""
        super().__init__(parts)
        self.fingerprint = mixed_fingerprint([part.fingerprint for part in parts])
        """Of all of them, in their order."""


def mixed_order(
    parts: Sequence[Sequence[DrivingBatch]], weights: Sequence[float], seed: int
) -> grain.MapDataset:
    """The endless sample order of several sources; any place of it can be looked up.

    Args:
        parts: samples of each source.
        weights: their shares.
        seed: of every source's shuffle.
    """
    # Each with a seed of its own: equal lengths would be shuffled alike.
    shuffled = [
        grain.MapDataset.source(part).seed(seed + number).shuffle().repeat()
        for number, part in enumerate(parts)
    ]
    return shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, weights)

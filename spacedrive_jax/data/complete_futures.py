"""Which keyframes of a split have all their future poses, found once and kept beside the records."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool

from spacedrive_jax.console import progress
from spacedrive_jax.data.records import Records, record_features
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.io import MEBIBYTE, read_json, write_json

log = logging.getLogger(__name__)

_FEATURE = "waypoint_mask"
MOST_BYTES = 256 * MEBIBYTE
"""One byte a keyframe."""


def complete_futures(records: Records) -> Bool[np.ndarray, " keyframes"]:
    """Tells for every keyframe whether all its waypoints are valid.

    The first call on a split reads its records (one feature of each) and leaves the answer in the records
    folder, where that can be written to; later calls take it from there.

    Args:
        records: a split of records.
    """
    file = records.directory / f"complete_futures-{records.split}.json"
    kept = _read(file, records)
    if kept is not None:
        return kept
    # Decoding that feature alone leaves the images where they are.
    features = tfds.features.FeaturesDict({_FEATURE: record_features()[_FEATURE]})
    indices = progress(range(len(records)), desc="look for complete futures", unit="keyframe")
    found = np.array([records.source.decode(index, features)[_FEATURE].all() for index in indices], bool)
    _write(file, records, found)
    return found


def _read(file: Path, records: Records) -> Bool[np.ndarray, " keyframes"] | None:
    """The kept answer; None where there is none, or one of other records."""
    try:
        kept = read_json(file, most=MOST_BYTES)
        complete = np.array([letter == "1" for letter in kept["complete"]], bool)
        same = kept["fingerprint"] == records.fingerprint and len(complete) == len(records)
    except (ValueError, KeyError, TypeError):  # a DataError is a ValueError
        return None
    return complete if same else None


def _write(file: Path, records: Records, complete: Bool[np.ndarray, " keyframes"]) -> None:
    letters = "".join("1" if each else "0" for each in complete)
    try:
        write_json(file, {"fingerprint": records.fingerprint, "complete": letters})
    except SpaceDriveError as error:
        log.info("the complete futures of %s are not kept: %s", records.directory, error)

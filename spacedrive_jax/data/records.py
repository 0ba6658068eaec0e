"""The record: one self-contained keyframe, as array records in the tensorflow-datasets layout.

A records folder is read with `open_records`, or with
`tfds.builder_from_directory(DIR).as_data_source(split)` where the folder is one's own. Both give the same;
`open_records` adds clear errors, holds the folder against its provenance, and lets it name no code (see
`records_folder`). A record holds all that its keyframe needs, its two past ego states too, so samples can
come in any order.

Frames and units: the ego frame (x forward, y left, z up, metres) at the keyframe's LIDAR_TOP time unless
a name says otherwise; `a_to_b` matrices take points in frame a to frame b; angles in radians; times in
microseconds.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import logging
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Bool

from spacedrive_jax.buckets import cache_folder
from spacedrive_jax.console import progress
from spacedrive_jax.data.records_folder import REPAIR, Provenance, check_folder, split_of
from spacedrive_jax.data.schema import TEXT_LIST_FEATURES, Record, impossible, record_features
from spacedrive_jax.errors import DataError, SpaceDriveError
from spacedrive_jax.io import MEBIBYTE, place
from spacedrive_jax.json_files import read_json, read_typed, write_json

SPLITS = ("train", "val", "all")
_FUTURE_FEATURE = "waypoint_mask"
MOST_FUTURES_BYTES = 256 * MEBIBYTE
"""One byte a keyframe."""

log = logging.getLogger(__name__)


class RecordSource(Sequence[Record]):
    """The records of some shards, in order: read, decoded and checked one at a time."""

    def __init__(self, directory: Path, shards: Sequence[tuple[str, int]]) -> None:
        """Args: the records folder; names of shards and how many records each holds."""
        self.directory, self.shards = directory, tuple(shards)
        self._shards = [directory / name for name, _ in shards]
        self._ends = list(itertools.accumulate(count for _, count in shards))
        paths = [f"{directory / name}[0:{count}]" for name, count in shards]
        self._bytes = ArrayRecordDataSource(paths)
        self._features = record_features()
        self._identity = tfds.features.FeaturesDict({"token": self._features["token"]})

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordSource, (self.directory, self.shards)  # a worker process opens the shards anew

    def __len__(self) -> int:
        return self._ends[-1]

    def raw(self, index: int) -> bytes:
        """The serialized record.

        Raises:
            IndexError: there is no such record.
            DataError: its shard is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return self._bytes[index]
        except Exception as error:  # array_record raises what riegeli says, as errors of several kinds
            raise self._damaged(index, error) from error

    def decode(self, index: int, features: Any) -> Record:
        """Some features of a record.

        Args:
            index: of the record.
            features: a tfds `FeaturesDict` of those that are wanted.

        Raises:
            IndexError: there is no such record.
            DataError: its shard is damaged.
        """
        data = self.raw(index)
        try:
            return dict(features.deserialize_example_np(data))
        except Exception as error:  # protobuf and numpy raise many kinds on bytes that are no record
            raise self._damaged(index, error) from error

    def token(self, index: int) -> str:
        """The token of a record, without the rest of it."""
        return self.decode(index, self._identity)["token"].decode(errors="replace")

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        record = self.decode(index, self._features)
        try:
            for name in TEXT_FEATURES:
                record[name] = record[name].decode()
            for name in TEXT_LIST_FEATURES:
                record[name] = [item.decode() for item in record[name]]
        except UnicodeDecodeError as error:
            raise self._damaged(index, error) from error
        wrong = impossible(record)
        if wrong:
            raise DataError(f"{self._shard(index)}: keyframe {record['token']}, {wrong}; {REPAIR}")
        return record

    def _shard(self, index: int) -> Path:
        return self._shards[bisect.bisect_right(self._ends, index)]

    def _damaged(self, index: int, error: Exception) -> DataError:
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return DataError(
            f"{self._shard(index)} is damaged ({said}): {REPAIR}; `python -m data_prep inspect "
            f"{self._shard(index).parent} --check` looks at every shard"
        )


TEXT_FEATURES = ("token", "scene_name", "scene_description", "location", "log", "drivable_source")


@dataclasses.dataclass(frozen=True)
class Records(Sequence[Record]):
    """One split of a records folder: random access by index; texts come as `str`."""

    directory: Path
    split: str
    source: RecordSource
    fingerprint: str
    """Content fingerprint of the whole folder, as written by the converter."""
    splits: frozenset[str] = frozenset()
    """The splits of the folder that hold keyframes, without `all`."""
    view_size: tuple[int, int] | None = None
    """Height and width that all views were resized to by the conversion; None for untouched pictures."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int | slice) -> Any:
        """A record, or those of a slice as a list; from the end where the number is negative.

        Raises:
            IndexError: there is no such record.
            DataError: the index is neither a number nor a slice, or the shard is damaged.
        """
        if isinstance(index, slice):
            return [self.source[row] for row in range(*index.indices(len(self)))]
        try:
            row = operator.index(index)
        except TypeError:
            raise DataError(
                f"records are taken by number or slice, not by {str(index)[:60]!r}; "
                "spacedrive_jax.data.records.keyframe_index(records, TOKEN) tells the number of a token"
            ) from None
        if not -len(self) <= row < len(self):
            raise IndexError(f"no keyframe {row}: split {self.split} of {self.directory} has {len(self)}")
        return self.source[row % len(self)]


def open_records(directory: Path | str, split: str = "all") -> Records:
    """Opens one split of a records folder for random access.

    Args:
        directory: a folder written by `python -m data_prep convert`.
        split: `train`, `val` or `all`.

    Raises:
        DataError: the folder or the split does not exist, holds no keyframe, or is damaged.
    """
    directory = place(directory)
    if split not in SPLITS:
        raise DataError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    provenance = check_folder(directory)
    splits = frozenset(split_of(name) for name in provenance.shards)
    if split != "all" and split not in splits:
        raise DataError(f"{directory} has no keyframe in split {split!r}; it has {', '.join(sorted(splits))}")
    return Records(
        directory,
        split,
        _source(directory, split, provenance),
        provenance.fingerprint,
        splits,
        provenance.options.image_size,
    )


class _Noted(msgspec.Struct):
    """What the conversion noted of a shard, as far as it matters here."""

    tokens: tuple[str, ...]


def keyframe_index(records: Records, token: str) -> int:
    """Where a keyframe stands in a split.

    What the conversion noted beside the shards is asked first; where it is not there, damaged or wrong, the
    records themselves are read.

    Args:
        records: the split.
        token: of the keyframe.

    Raises:
        DataError: there is no such keyframe, or the folder is damaged.
    """
    before = 0
    for shard, count in records.source.shards:
        tokens = _noted_tokens(records.directory / "conversion" / f"{shard}.json")
        if token in tokens[:count] and records.source.token(before + tokens.index(token)) == token:
            return before + tokens.index(token)
        if token in tokens or len(tokens) != count:
            for index in progress(range(before, before + count), desc=f"search {shard}", unit="record"):
                if records.source.token(index) == token:
                    return index
        before += count
    raise DataError(
        f"{records.directory} has no keyframe {token!r} in split {records.split}; `python -m data_prep "
        f"inspect {records.directory} --list` names them"
    )


def _noted_tokens(notes: Path) -> tuple[str, ...]:
    try:
        return read_typed(notes, _Noted).tokens if notes.is_file() else ()
    except DataError:
        return ()


def _source(directory: Path, split: str, provenance: Provenance) -> RecordSource:
    return RecordSource(
        directory,
        [
            (name, provenance.shards[name].keyframes)
            for name in sorted(provenance.shards)
            if split in ("all", split_of(name))
        ],
    )


def complete_futures(records: Records, *, keep: bool = True) -> Bool[np.ndarray, " keyframes"]:
    """Tells for every keyframe whether all its waypoints are valid.

    The first call on a split reads its records (one feature of each) and leaves the answer in the user's
    cache, under the records' fingerprint; later calls take it from there.

    Args:
        records: a split of records.
        keep: leave the answer there.
    """
    file = cache_folder() / "complete_futures" / f"{records.fingerprint}-{records.split}.json"
    kept = _kept_futures(file, records)
    if kept is not None:
        return kept
    # Decoding that feature alone leaves the images where they are.
    features = tfds.features.FeaturesDict({_FUTURE_FEATURE: record_features()[_FUTURE_FEATURE]})
    indices = progress(range(len(records)), desc="look for complete futures", unit="keyframe")
    found = np.array(
        [records.source.decode(index, features)[_FUTURE_FEATURE].all() for index in indices], bool
    )
    if keep:
        _keep_futures(file, records, found)
    return found


def _kept_futures(file: Path, records: Records) -> Bool[np.ndarray, " keyframes"] | None:
    """The kept answer; None where there is none, or one of other records."""
    try:
        kept = read_json(file, most=MOST_FUTURES_BYTES)
        complete = np.array([letter == "1" for letter in kept["complete"]], bool)
        same = kept["fingerprint"] == records.fingerprint and len(complete) == len(records)
    except (ValueError, KeyError, TypeError):  # a DataError is a ValueError
        return None
    return complete if same else None


def _keep_futures(file: Path, records: Records, complete: Bool[np.ndarray, " keyframes"]) -> None:
    letters = "".join("1" if each else "0" for each in complete)
    try:
        write_json(file, {"fingerprint": records.fingerprint, "complete": letters})
    except SpaceDriveError as error:
        log.info("the complete futures of %s are not kept: %s", records.directory, error)

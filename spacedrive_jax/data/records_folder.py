"""A records folder: what it says of itself, whether it is that, and how its shards are written.

A folder may come from anybody. `features.json` can name a Python class that tensorflow-datasets would import,
so it is held against our own schema and never handed over; shards are held against the sizes and digests in
`provenance.json`, so that a damaged shard, or one of another folder, is named before it is taken for data.

Shards are array records in the tensorflow-datasets layout, written without TensorFlow and byte for byte the
same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf import json_format  # type: ignore[import-untyped]
from tensorflow_datasets.core import dataset_info, example_serializer, file_adapters, naming

from spacedrive_jax import buckets
from spacedrive_jax.data.schema import DATASET_NAME, DATASET_VERSION, Record, record_features
from spacedrive_jax.errors import DataError, SpaceDriveError
from spacedrive_jax.io import (
    MEBIBYTE,
    file_sha256,
    is_bucket,
    place,
    put_in_place,
    require_regular,
    said_by,
    say,
)
from spacedrive_jax.json_files import convert, read_json

PROVENANCE = "provenance.json"
DATASET_INFO = "dataset_info.json"
FEATURES = "features.json"
MOST_JSON = 64 * MEBIBYTE
"""Bytes; provenance of the 850 scenes of nuScenes has a third of a megabyte."""
END_BYTES = 4096
"""At either end of a shard: its headers, which hold the digest of the first record, and its footer."""
REPAIR = "write it again with `python -m data_prep convert ... --resume`"

_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_SHARD = re.compile(rf"{DATASET_NAME}-(train|val)\.array_record-(\d{{5}})-of-(\d{{5}})")


class ShardEntry(msgspec.Struct, frozen=True):
    """What provenance says of one shard."""

    keyframes: _Count
    bytes: _Count
    sha256: _Digest
    ends_sha256: _Digest
    """Of its first and last `END_BYTES`: what can be checked on every open."""


class Options(msgspec.Struct, frozen=True):
    """The part of a conversion's options that readers rely on."""

    image_size: tuple[_Count, _Count] | None = None
    """Height and width that views are kept at; None for untouched pictures."""


class Provenance(msgspec.Struct, frozen=True):
    """The part of `provenance.json` that readers rely on."""

    fingerprint: str
    records: _Count
    splits: dict[Literal["train", "val"], int]
    """Keyframes of each."""
    shards: dict[str, ShardEntry]
    options: Options = Options()


class _SplitInfo(msgspec.Struct, rename="camel"):
    name: str
    shard_lengths: list[str] = []


class _DatasetInfo(msgspec.Struct, rename="camel"):
    name: Literal["nuscenes_keyframes"]
    version: str
    file_format: Literal["array_record"]
    splits: list[_SplitInfo]


def read_provenance(directory: Path | str) -> dict[str, Any]:
    """Reads `provenance.json` of a records folder: fingerprint, source, counts, options, shards.

    Raises:
        DataError: the folder is not a finished records folder, or the file is damaged.
    """
    return _provenance(place(directory))[0]


def _provenance(directory: Path) -> tuple[dict[str, Any], Provenance]:
    path = directory / PROVENANCE
    if not path.exists():
        raise DataError(f"{directory} is not a finished records folder: {_what_it_is(directory)}")
    content = read_json(path, most=MOST_JSON)
    return content, convert(content, Provenance, path, f"is it of an older version? {REPAIR}")


def _what_it_is(directory: Path) -> str:
    """What a place without provenance seems to be, and the way out."""
    write = "write one with `python -m data_prep convert`"
    if is_bucket(directory):
        return f"it has no {PROVENANCE}; {write}"
    if not directory.exists():
        return f"{'it is a link to nothing' if directory.is_symlink() else 'nothing has this name'}; {write}"
    if not directory.is_dir():
        return "it is a file; give the folder that `python -m data_prep convert` wrote"
    if (directory / "conversion" / "plan.json").is_file():
        return "its conversion was interrupted; the same command with --resume finishes it"
    near = [*(path.parent for path in sorted(directory.glob(f"*/{PROVENANCE}"))), directory.parent]
    for folder in near:
        if (folder / PROVENANCE).is_file():
            return f"{folder} is one"
    for tables in sorted(directory.glob("*/scene.json")):
        return (
            f"it is a nuScenes folder; `python -m data_prep convert --dataroot {directory} --version "
            f"{tables.parent.name} --out RECORDS` makes one of it"
        )
    if (directory / "config.json").is_file():
        return "it is a folder of a run or of weights; give the records"
    return f"it has no {PROVENANCE}; {write}"


def check_folder(directory: Path) -> Provenance:
    """Holds a records folder against its provenance and our schema, reading 8 KiB of every shard at most.

    Raises:
        DataError: something is missing, damaged, or not what this project writes; the message names the file.
    """
    _, provenance = _provenance(directory)
    _check_features(directory)
    lengths = _shard_lengths(directory, provenance)
    shards = provenance.shards
    if content_fingerprint((name, entry.sha256) for name, entry in shards.items()) != provenance.fingerprint:
        raise DataError(
            f"{directory / PROVENANCE}: the fingerprint is not that of its shards; {REPAIR}, or fetch the "
            "folder again"
        )
    counts = {split: sum(each) for split, each in lengths.items()}
    if {split: count for split, count in provenance.splits.items() if count} != counts:
        raise DataError(f"{directory / PROVENANCE}: splits and shards disagree; {REPAIR}")
    _check_dataset_info(directory, lengths)
    for name, entry in provenance.shards.items():
        size = require_regular(directory / name)
        if size != entry.bytes:
            raise DataError(
                f"{directory / name} has {size:,} bytes, {PROVENANCE} says {entry.bytes:,}: it is damaged or "
                f"of another folder; {REPAIR}"
            )
        if ends_sha256(directory / name) != entry.ends_sha256:
            raise DataError(
                f"{directory / name} is not the shard that {PROVENANCE} names: it is damaged or was put in "
                f"another's place; {REPAIR}"
            )
    return provenance


def is_whole(directory: Path) -> bool:
    """Whether a folder is finished and passes `check_folder`."""
    try:
        check_folder(directory)
    except DataError:
        return False
    return True


def check_contents(directory: Path, report: Callable[[str], None] = lambda name: None) -> int:
    """Reads every shard whole and compares its digest.

    Args:
        directory: the records folder.
        report: told the name of each shard when it is done.

    Returns:
        How many shards there are, all of them whole.

    Raises:
        DataError: some are damaged; the message lists them.
    """
    provenance = check_folder(directory)
    damaged = []
    for name, entry in provenance.shards.items():
        if file_sha256(directory / name) != entry.sha256:
            damaged.append(name)
        report(name)
    if damaged:
        more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        raise DataError(
            f"{directory}: {len(damaged)} of {len(provenance.shards)} shards are damaged "
            f"({', '.join(damaged[:5])}{more}); write them again with "
            "`python -m data_prep convert ... --resume`"
        )
    return len(provenance.shards)


def content_fingerprint(shards: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over the names and contents (by their SHA-256) of all shards, in order of the names."""
    digest = hashlib.sha256()
    for name, sha256 in sorted(shards):
        digest.update(f"{name} {sha256}\n".encode())
    return digest.hexdigest()


def ends_sha256(path: Path) -> str:
    """SHA-256 of the first and last `END_BYTES` of a file.

    Raises:
        DataError: it cannot be read.
    """
    size = require_regular(path)
    if is_bucket(path):
        first, last = (0, min(END_BYTES, size)), (max(0, size - END_BYTES), size)
        return hashlib.sha256(buckets.read(path, *first) + buckets.read(path, *last)).hexdigest()
    try:
        with path.open("rb") as stream:
            digest = hashlib.sha256(stream.read(END_BYTES))
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - END_BYTES))
            digest.update(stream.read(END_BYTES))
    except OSError as error:
        raise DataError(f"{path}: {say(error)}") from error
    return digest.hexdigest()


def split_of(shard: str) -> str:
    """The split a shard file belongs to."""
    return shard.removeprefix(f"{DATASET_NAME}-").split(".")[0]


@functools.cache
def _schema() -> Mapping[str, Any]:
    return json_format.MessageToDict(record_features().to_proto())


def _check_features(directory: Path) -> None:
    path = directory / FEATURES
    found = read_json(path, most=MOST_JSON)
    if found != _schema():
        raise DataError(f"{path}: {_first_difference(found)}; {REPAIR}")


def _first_difference(found: Any) -> str:
    try:
        theirs, ours = found["featuresDict"]["features"], _schema()["featuresDict"]["features"]
        name = min(each for each in theirs.keys() | ours.keys() if theirs.get(each) != ours.get(each))
        word = "lacks" if name not in theirs else "has another type for" if name in ours else "also has"
        return f"it {word} the feature {name!r}, and is not read as records of {DATASET_VERSION}"
    except (TypeError, KeyError, AttributeError, ValueError):
        return "it does not describe the features of a record"


def _shard_lengths(directory: Path, provenance: Provenance) -> dict[str, list[int]]:
    """Keyframes of each split's shards, in order."""
    lengths: dict[str, list[int]] = {}
    totals: dict[str, int] = {}
    for name in sorted(provenance.shards):
        match = _SHARD.fullmatch(name)
        split, total = (match[1], int(match[3])) if match else ("", 0)
        place = len(lengths.get(split, ()))
        if match is None or int(match[2]) != place or totals.setdefault(split, total) != total:
            raise DataError(f"{directory / PROVENANCE}: {name!r} is not the name of shard {place}")
        lengths.setdefault(split, []).append(provenance.shards[name].keyframes)
    short = [split for split, total in totals.items() if total != len(lengths[split])]
    if short or not lengths:
        missing = " and ".join(short) or "train or val"
        raise DataError(f"{directory / PROVENANCE}: it does not name all shards of {missing}")
    return lengths


def _check_dataset_info(directory: Path, lengths: Mapping[str, list[int]]) -> None:
    path = directory / DATASET_INFO
    info = convert(read_json(path, most=MOST_JSON), _DatasetInfo, path, REPAIR)
    found = {split.name: split.shard_lengths for split in info.splits}
    wanted = {split: [str(length) for length in each] for split, each in lengths.items()}
    if info.version != DATASET_VERSION or found != wanted:
        raise DataError(f"{path} does not describe the shards that {PROVENANCE} names; {REPAIR}")


WRITER_OPTIONS = "group_size:1,uncompressed"
"""One record per chunk, so that random access reads nothing else. Uncompressed, because most bytes are
JPEG images already, and because the files then depend on no compressor's version."""


@dataclasses.dataclass(frozen=True)
class ShardMetadata:
    """What a finished shard holds."""

    file: str
    records: int
    bytes: int
    sha256: str
    ends_sha256: str
    """Of its first and last bytes, see `END_BYTES`."""


class RecordSerializer:
    """Encodes records as `tf.train.Example` bytes that are the same in every process.

    `FeaturesDict.serialize_example` leaves the order of features to the protobuf runtime, which changes
    it from process to process; readers do not mind, but a content fingerprint would.
    """

    def __init__(self) -> None:
        self._features = record_features()
        self._serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())

    def __call__(self, record: Record) -> bytes:
        """Encodes one record; its fields must match `record_features` exactly."""
        if record.keys() != self._features.keys():
            raise ValueError(f"record fields differ from the schema: {record.keys() ^ self._features.keys()}")
        example = self._serializer.get_tf_example(self._features.encode_example(record))
        return example.SerializeToString(deterministic=True)


def shard_file(split: str, index: int, count: int) -> str:
    """File name of a shard in the tensorflow-datasets layout."""
    return f"{DATASET_NAME}-{split}.array_record-{index:05d}-of-{count:05d}"


def write_shard(path: Path, records: Iterable[bytes]) -> ShardMetadata:
    """Writes one shard; the file appears under its name only when whole."""
    # A name of its own: a cluster may have two workers at the same shard.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    count = 0
    try:
        with _naming(path):
            writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        for record in records:
            with _naming(path):
                writer.write(record)
            count += 1
        with _naming(path):
            writer.close()
        size = partial.stat().st_size
        written = ShardMetadata(path.name, count, size, file_sha256(partial), ends_sha256(partial))
        put_in_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return written


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Says what array_record's errors mean; it puts the operating system's into a RuntimeError's text."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise SpaceDriveError(f"cannot write {path}: {said_by(error, path)}") from error


def write_dataset_info(folder: Path, shards: Mapping[str, Sequence[ShardMetadata]], description: str) -> None:
    """Writes `dataset_info.json` and `features.json` beside the shards.

    Args:
        folder: the records folder.
        shards: split to what is known of its shards, in shard order; a split without shards is left out.
        description: one line on what the data is.
    """
    identity = dataset_info.DatasetIdentity(
        name=DATASET_NAME,
        version=tfds.core.Version(DATASET_VERSION),
        data_dir=str(folder),
        module_name="data_prep.shards",
    )
    info = tfds.core.DatasetInfo(builder=identity, description=description, features=record_features())
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.records for shard in of_split],
            num_bytes=sum(shard.bytes for shard in of_split),
            filename_template=naming.ShardedFileTemplate(
                dataset_name=DATASET_NAME,
                data_dir=str(folder),
                split=split,
                filetype_suffix="array_record",
                template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            ),
        )
        for split, of_split in shards.items()
        if of_split
    ]
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(str(folder))

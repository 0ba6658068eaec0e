"""Writing array records in the tensorflow-datasets layout, without TensorFlow and byte for byte the same."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import dataset_info, example_serializer, file_adapters, naming

from spacedrive_jax.data.records_folder import ends_sha256, file_sha256
from spacedrive_jax.data.schema import DATASET_NAME, DATASET_VERSION, Record, record_features
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.io import put_in_place, said_by

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
    """Of its first and last bytes, see `records_folder.END_BYTES`."""


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

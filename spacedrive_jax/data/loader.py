"""Records to batches with grain: sources -> shuffle -> repeat -> mix -> host slice -> batch -> prefetch.

`data.records` may name several folders with weights, `A:0.7,B:0.3`: of any stretch of the run seven samples
in ten are A's, in an order that the seed alone decides. Each folder is shuffled and repeated by itself, so
that a small one comes round more often than a large one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from jaxtyping import Int

from spacedrive_jax.batch import DrivingBatch, stack
from spacedrive_jax.console import note
from spacedrive_jax.data.conversation import ConversationConfig
from spacedrive_jax.data.depth_cache import DepthCache
from spacedrive_jax.data.language_data import KINDS, LanguageData
from spacedrive_jax.data.records import Records, complete_futures, open_records
from spacedrive_jax.data.schema import Record, record_features
from spacedrive_jax.data.transforms import DataConfig, SampleBuilder
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.io import is_bucket, local
from spacedrive_jax.models.spacedrive_config import ModelConfig
from spacedrive_jax.parallel import end_with_parent


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


LOOKED_AT = 256
"""Keyframes whose tokens are held against the language data."""


class SampleClock:
    """How long read threads took to make samples; those of worker processes are not counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds, self._count = 0.0, 0

    def add(self, seconds: float) -> None:
        """Counts one sample."""
        with self._lock:
            self._seconds, self._count = self._seconds + seconds, self._count + 1

    def take(self) -> tuple[float, int]:
        """Seconds, summed over threads, and samples since the last call."""
        with self._lock:
            taken = self._seconds, self._count
            self._seconds, self._count = 0.0, 0
        return taken

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleClock, ()


@dataclasses.dataclass
class Samples(Sequence[DrivingBatch]):
    """Prepared samples by index; optionally kept in memory once made."""

    records: Records
    builder: SampleBuilder
    indices: list[int]
    """Which records, in order."""
    depth: DepthCache | None = None
    """A network's depth of the keyframes, where `data.depth` asks for it."""
    keep: bool = False
    offset: int = 0
    """Added to a record's row to make its sample's `index`, where several folders are mixed."""

    def __post_init__(self) -> None:
        self._kept: dict[int, DrivingBatch] = {}
        self.clock = SampleClock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}  # a worker process keeps its own

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> DrivingBatch:  # type: ignore[override]
        index = self.indices[position]
        if index in self._kept:
            return self._kept[index]
        started = time.monotonic()
        record = self.records[index]
        cached = self.depth.read(record["token"]) if self.depth is not None else None
        sample = self.builder(record, self.offset + index, cached)
        self.clock.add(time.monotonic() - started)
        if self.keep:
            self._kept[index] = sample
        return sample


class MixedSamples(Concatenation[DrivingBatch]):
    """The samples of several records folders, one behind the other, and their shares of a run."""

    parts: list[Samples]  # type: ignore[assignment]

    def __init__(self, parts: Sequence[Samples], weights: Sequence[float]) -> None:
        """Args: each folder's samples, and its share of what a run sees."""
        super().__init__(parts)
        self.weights = list(weights)
        self.records = MixedRecords([part.records for part in parts])
        self.clock = SampleClock()
        for part in self.parts:
            part.clock = self.clock


def training_samples(
    data: DataConfig,
    model: ModelConfig,
    batch_size: int,
    split: str = "train",
    *,
    advice: str = "",
    keep: bool = True,
) -> Samples | MixedSamples:
    """The samples a run trains on: of one records folder, or of several.

    Args:
        data: what to read and how.
        model: what the samples are for.
        batch_size: samples a step takes, over all devices: fewer keyframes than these are an error.
        split: of the records.
        advice: flags of the `add-depth` that the run needs, for an error.
        keep: leave beside the records which keyframes have a whole future (`complete_futures`).

    Raises:
        ConfigError: the records are missing, or nothing is left to train on.
    """
    sources = records_sources(data.records)
    builder = SampleBuilder(data, model)
    parts, offset = [], 0
    for folder, _ in sources:
        parts.append(_folder_samples(folder, data, builder, batch_size, split, offset, advice, keep))
        offset += len(parts[-1].records)
    asks = data.conversation.tasks not in ("planning", "think_before_planning")
    if asks and model.coordinate_tokens and not model.position_input:
        note(
            "note: coordinates in questions are position tokens that all look alike, as published: set "
            "model.position_input True where an answer depends on them"
        )
    return parts[0] if len(parts) == 1 else MixedSamples(parts, [weight for _, weight in sources])


def _folder_samples(
    folder: str,
    data: DataConfig,
    builder: SampleBuilder,
    batch_size: int,
    split: str,
    offset: int,
    advice: str,
    keep: bool,
) -> Samples:
    records = open_records(folder, split)
    depth = builder.open_depth(records, advice=advice)
    indices = list(range(len(records)))
    if data.drop_without_future:
        indices = np.flatnonzero(complete_futures(records, keep=keep)).tolist()
    if len(indices) < batch_size:
        left_out = len(records) - len(indices)
        without = f" (data.drop_without_future leaves out {left_out} without a whole future)"
        raise ConfigError(
            f"{folder} has {len(indices)} {split} keyframes, fewer than train.batch_size {batch_size}"
            + (without if left_out else "")
        )
    _check_questions(records, indices, data.conversation)
    return Samples(records, builder, indices, depth, data.cache_in_memory, offset)


def _check_questions(records: Records, indices: Sequence[int], config: ConversationConfig) -> None:
    """Says how many keyframes have questions, where a run asks for them, and refuses none.

    Looks at up to `LOOKED_AT` keyframes, evenly spaced: reading all would take as long as an epoch.
    """
    if config.tasks in ("planning", "think_before_planning"):
        return  # reasons come from the record where nobody has written them
    if config.language_data is None:
        if config.scene_texts and config.tasks != "counterfactual":
            return
        if config.tasks == "counterfactual" or not config.pseudo_coordinates:
            raise ConfigError(
                f"data.conversation.tasks {config.tasks} needs OmniDrive's language data: set "
                "data.conversation.language_data to its folder"
                + ("" if config.tasks == "counterfactual" else ", or data.conversation.scene_texts True")
            )
        return
    kinds = ("vqa",) if config.tasks == "counterfactual" else KINDS
    there = LanguageData(local(config.language_data)).tokens(kinds)
    looked_at = evenly_spaced(len(indices), LOOKED_AT)
    token = tfds.features.FeaturesDict({"token": record_features()["token"]})
    tokens = [records.source.decode(indices[index], token)["token"].decode() for index in looked_at]
    asked = sum(each in there for each in tokens)
    if not asked and len(tokens) == len(indices):
        raise DataError(
            f"the language data folder {config.language_data} has questions about {len(there)} keyframes, "
            f"but none about the {len(indices)} of {records.directory}: is it of another data set?"
        )
    looked = "" if len(tokens) == len(indices) else " that were looked at"
    note(f"note: language data: {asked} of {len(tokens)} keyframes{looked} have questions")


def evenly_spaced(count: int, most: int) -> Int[np.ndarray, " K"]:
    """Up to `most` of `count` indices, first and last among them, in order."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


class HostShare(grain.MapDataset):
    """One host's rows of every global batch.

    Which samples a global batch holds, and their order, do not depend on the number of hosts, so that a run
    can go on with another.
    """

    def __init__(self, samples: grain.MapDataset, batch_size: int, rows: Sequence[int]) -> None:
        """Args: the endless sample order, global batch size, this host's rows of it."""
        super().__init__(samples)
        self._batch_size, self._rows = batch_size, list(rows)

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> DrivingBatch:
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]


def read_ahead(dataset: grain.MapDataset, data: DataConfig, ahead: int) -> grain.DatasetIterator:
    """Goes through a dataset in order while its next elements are being made; close it when done.

    Args:
        dataset: picklable, where there are worker processes.
        data: how many threads or processes make elements.
        ahead: elements made ahead.
    """
    workers = data.worker_processes
    ahead = max(-(-ahead // max(workers, 1)), 1)
    options = grain.ReadOptions(
        num_threads=data.read_threads, prefetch_buffer_size=max(ahead, data.read_threads)
    )
    elements = dataset.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain asks for flags of its own, which only absl's app parses
            flags.FLAGS.mark_as_parsed()
        elements = elements.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead), _begin_worker
        )
    return iter(elements)


def _begin_worker(number: int, count: int) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerators are the parent's
    end_with_parent()


class TrainingBatches(Iterator[DrivingBatch]):
    """An endless iterator over batches that can be set to any of them."""

    def __init__(self, batches: grain.MapDataset, data: DataConfig) -> None:
        """Args: all batches, by number; how they are read ahead."""
        self._batches, self._data = batches, data
        self._running: grain.DatasetIterator | None = None
        self.done = 0
        """Batches that were handed out."""

    def __next__(self) -> DrivingBatch:
        if self._running is None:
            self._running = read_ahead(self._batches[self.done :], self._data, self._data.prefetch_batches)
        batch = next(self._running)
        self.done += 1
        return batch

    def go_to(self, done: int) -> None:
        """Makes the batch with this number the next one."""
        self.close()
        self.done = done

    def close(self) -> None:
        """Ends threads and processes; they begin anew with the next batch that is asked for."""
        if self._running is not None:
            self._running.close()
        self._running = None


def training_iterator(
    samples: Samples | MixedSamples,
    data: DataConfig,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> TrainingBatches:
    """An endless, checkpointable iterator of this host's share of every global batch.

    The order depends on the seed alone, not on the number of hosts; every epoch is shuffled anew. See
    `position` and `seek` for its state.

    Args:
        samples: what to go through.
        data: how to read ahead.
        batch_size: of the global batch.
        seed: of the shuffle.
        rows: of every batch, this host's; None for all.
    """
    if isinstance(samples, MixedSamples):
        endless = mixed_order(samples.parts, samples.weights, seed)
    else:
        endless = mixed_order([samples], [1.0], seed)
    rows = range(batch_size) if rows is None else rows
    return TrainingBatches(HostShare(endless, batch_size, rows).batch(len(rows), batch_fn=stack), data)


def evaluation_batches(
    samples: Sequence[DrivingBatch],
    batch_size: int,
    rows: Sequence[int] | None = None,
    *,
    data: DataConfig | None = None,
) -> Iterator[tuple[DrivingBatch, int]]:
    """All samples once, in order; the last batch is filled up by repeating its last sample.

    Args:
        samples: what to go through.
        batch_size: of a whole batch.
        rows: of every batch, this host's; None for all.
        data: how many threads or processes make samples ahead, a batch at least; None for none.

    Yields:
        Those rows of a batch, and how many samples of the whole batch count.
    """
    wanted = range(batch_size) if rows is None else rows
    counts = [min(batch_size, len(samples) - start) for start in range(0, len(samples), batch_size)]
    batches = [
        [number * batch_size + min(row, count - 1) for row in wanted] for number, count in enumerate(counts)
    ]
    order = [index for batch in batches for index in sorted(set(batch))]
    if not order:
        return
    if data is None:
        made: Iterator[DrivingBatch] = (samples[index] for index in order)
        yield from _filled(made, batches, counts)
        return
    ordered = grain.MapDataset.source(_InOrder(samples, order))
    with contextlib.closing(read_ahead(ordered, data, len(wanted))) as made:
        yield from _filled(made, batches, counts)


def _filled(
    made: Iterator[DrivingBatch], batches: Sequence[Sequence[int]], counts: Sequence[int]
) -> Iterator[tuple[DrivingBatch, int]]:
    """Batches of sample indices, out of samples that come once each, in ascending order."""
    for indices, count in zip(batches, counts, strict=True):
        found = {index: next(made) for index in sorted(set(indices))}
        yield stack([found[index] for index in indices]), count


@dataclasses.dataclass(frozen=True)
class _InOrder(Sequence[DrivingBatch]):
    """Samples in an order of one's own."""

    samples: Sequence[DrivingBatch]
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> DrivingBatch:  # type: ignore[override]
        return self.samples[self.order[index]]


def position(iterator: TrainingBatches, batch_size: int) -> dict[str, int]:
    """Where a training iterator stands, as counted over all hosts: what a checkpoint keeps of it."""
    return {"samples": iterator.done * batch_size}


def seek(iterator: TrainingBatches, where: dict[str, int], batch_size: int) -> None:
    """Sets a training iterator to a `position`, whatever the host count or batch size it was saved under."""
    iterator.go_to(where["samples"] // batch_size)

"""A depth network's depth for every keyframe, written beside the records chunk by chunk (the sidecar)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_prep.beam import run_on_beam
from spacedrive_jax.console import progress
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.depth_cache import (
    FOLDER,
    PROVENANCE,
    chunk_metadata,
    encode_depth,
    write_chunk,
    write_provenance,
)
from spacedrive_jax.data.images import check_kept_size
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.inference.depth_network import (
    DepthNetworkConfig,
    KeyframeDepth,
    camera_alignments,
    provenance,
)
from spacedrive_jax.io import remove_partials

CHUNK = 32
"""Keyframes per file: what a killed run loses at most."""


@dataclasses.dataclass(frozen=True)
class AddedDepth:
    """What was written."""

    folder: str
    fingerprint: str
    keyframes: int
    reused: int
    """Keyframes that an earlier, stopped run had done."""
    cameras: int
    """Camera images, keyframes times six."""
    aligned: int
    """Of those, aligned to LiDAR."""


def add_depth(
    records: Records,
    network: DepthNetworkConfig,
    *,
    full: bool = False,
    keyframes_per_step: int | None = None,
    beam_options: str | None = None,
    workers: int = 1,
) -> AddedDepth:
    """Writes the sidecar of one depth network; each process of a multi-host run does its share of the chunks.

    Args:
        records: all keyframes of a folder.
        network: weights and settings.
        full: keep the depth of every pixel too.
        keyframes_per_step: keyframes that go through the network together; None takes as few as give every
            device of this process the same number of images.
        beam_options: have the chunks written by an Apache Beam pipeline with these options; None here.
        workers: its processes, where the options name no other runner.

    Raises:
        ConfigError: the weights cannot be read, the views are kept at another size than the network's, or
            the folder holds a sidecar of other records.
    """
    if keyframes_per_step is not None and keyframes_per_step < 1:
        raise ConfigError(f"--keyframes-per-step {keyframes_per_step} must be 1 or more")
    if records.view_size is not None:
        check_kept_size(records.view_size, network.image_size, str(records.directory))
    step_size = keyframes_per_step or math.lcm(len(CAMERAS), jax.local_device_count()) // len(CAMERAS)
    metadata = dict(provenance(network, records.fingerprint)) | {"full": full}
    name = f"{metadata['kind']}-{metadata['fingerprint'][:12]}" + ("-full" if full else "")
    folder = records.directory / FOLDER / name
    _check_pictures(records)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROVENANCE).unlink(missing_ok=True)
    chunks = [range(start, min(start + CHUNK, len(records))) for start in range(0, len(records), CHUNK)]
    files = [folder / f"chunk-{number:05d}.safetensors" for number in range(len(chunks))]
    mine = range(jax.process_index(), len(chunks), jax.process_count())
    missing = [number for number in mine if not _is_done(files[number], metadata)]
    reused = sum(len(chunks[number]) for number in mine) - sum(len(chunks[number]) for number in missing)
    if missing:
        units = [
            ChunkUnit(records.directory, network, chunks[number], step_size, full, metadata, files[number])
            for number in missing
        ]
        with progress(total=sum(len(chunks[number]) for number in missing), unit="keyframe") as bar:
            if beam_options is not None:
                _on_beam(units, beam_options, workers, bar.update)
            else:
                try:
                    runner = KeyframeDepth(network)
                except BaseException:  # weights that cannot be read: nothing was begun
                    with contextlib.suppress(OSError):
                        folder.rmdir()
                    raise
                for unit in units:
                    _write(unit, records, runner, bar.update)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("add-depth")
    aligned = 0
    for file in files:
        aligned += int(chunk_metadata(file)["aligned"])
    if jax.process_index() == 0:
        write_provenance(folder, metadata | {"chunks": [file.name for file in files], "aligned": aligned})
    return AddedDepth(
        str(folder), metadata["fingerprint"], len(records), reused, len(records) * len(CAMERAS), aligned
    )


@dataclasses.dataclass(frozen=True)
class ChunkUnit:
    """All that `write_unit` needs: what becomes one file of a sidecar."""

    records: Path
    network: DepthNetworkConfig
    indices: range
    """Of its keyframes among all of the folder."""
    step_size: int
    full: bool
    metadata: Mapping[str, Any]
    shard: Path
    """The file to write."""

    def resolved(self) -> ChunkUnit:
        """The same with absolute paths."""
        network = dataclasses.replace(self.network, weights=str(Path(self.network.weights).resolve()))
        return dataclasses.replace(
            self, records=self.records.resolve(), shard=self.shard.resolve(), network=network
        )


def write_unit(unit: ChunkUnit) -> None:
    """Writes a chunk in a worker of a cluster, which keeps network and records open for the next one."""
    records = _opened(unit.records, unit.metadata["records_fingerprint"])
    _write(unit, records, _loaded(unit.network, unit.metadata["fingerprint"]))


@functools.lru_cache(maxsize=1)
def _opened(folder: Path, fingerprint: str) -> Records:
    records = open_records(folder)
    if records.fingerprint != fingerprint:
        raise DataError(f"{folder} holds other records here than where add-depth was started")
    return records


@functools.lru_cache(maxsize=1)
def _loaded(network: DepthNetworkConfig, fingerprint: str) -> KeyframeDepth:
    """The network; one of other weights at the same place has another fingerprint."""
    return KeyframeDepth(network)


def _write(
    unit: ChunkUnit, records: Records, runner: KeyframeDepth, advance: Callable[[], object] = lambda: None
) -> None:
    tensors: dict[str, list[Any]] = {}
    for step in _steps(records, unit.indices, unit.step_size):
        for row, keyframe in zip(sidecar_rows(runner, step, full=unit.full), step, strict=True):
            for key, value in row.items():
                tensors.setdefault(key, []).append(value)
            tensors.setdefault("token", []).append(keyframe["token"])
            advance()
    write_chunk(unit.shard, tensors, unit.metadata)


def _on_beam(
    units: Sequence[ChunkUnit], options: str, workers: int, advance: Callable[[int], object]
) -> None:
    folder, keyframes = units[0].shard.parent, {unit.shard.name: len(unit.indices) for unit in units}

    def keyframes_of(name: str) -> int | None:
        return keyframes[name] if _is_done(folder / name, units[0].metadata) else None

    waiting = folder.parent / f".{folder.name}-units"
    shutil.rmtree(waiting, ignore_errors=True)
    run_on_beam(
        units,
        write_unit,
        folder,
        waiting,
        workers=workers,
        options=options,
        done=keyframes_of,
        advance=advance,
    )
    remove_partials(folder)  # of workers that died


def _check_pictures(records: Records) -> None:
    """Refuses records without a picture: their depth would be that of black images.

    Raises:
        DataError: the first, the middle and the last keyframe have none.
    """
    indices = {0, len(records) // 2, len(records) - 1}
    if not any(any(records[index]["images"]) for index in indices):
        raise DataError(
            f"{records.directory} has no pictures (converted with --missing-images empty?): convert again "
            "with `render`, or train with --data.depth.sources lidar"
        )


def sidecar_rows(runner: KeyframeDepth, records: Sequence[Record], *, full: bool) -> Iterator[dict[str, Any]]:
    """Sidecar rows of some keyframes."""
    depth, patch_depth = runner(list(records))
    for record, views, patches in zip(records, depth, patch_depth, strict=True):
        alignments = camera_alignments(record, views)
        row: dict[str, Any] = {
            "patch_depth": patches,
            "alignment": np.asarray([tuple(each) for each in alignments], np.float64),
        }
        if full:
            row["full"] = [encode_depth(view) for view in views]
        yield row


def _steps(records: Records, chunk: range, size: int) -> Iterator[list[Record]]:
    for start in range(chunk.start, chunk.stop, size):
        yield [records[index] for index in range(start, min(start + size, chunk.stop))]


def _is_done(file: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether an earlier run finished the chunk.

    Raises:
        DataError: the chunk belongs to other records.
    """
    if not file.is_file():
        return False
    metadata = chunk_metadata(file)
    if metadata.get("records_fingerprint") != wanted["records_fingerprint"]:
        raise DataError(
            f"{file.parent} was begun for other records (these were converted again since): remove it first"
        )
    return metadata.get("fingerprint") == wanted["fingerprint"]

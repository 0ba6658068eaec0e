"""The converter's units of work on Apache Beam: on this machine, or spread over a cluster by other options.

Workers read the nuScenes folder and write shards and their facts into the records folder themselves, so both
must be there under the same path on every machine (a shared disk). What is in a shard depends on neither
runner nor worker nor attempt, and a shard gets its name only when whole: a worker that dies, or that is run
twice, does no harm.
"""

from __future__ import annotations

import pickle
import shlex
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self, TypeVar

from data_prep import conversion
from data_prep.nuscenes.scene_records import SceneResult
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.io import write_bytes, write_text

POLL_SECONDS = 1.0


class Unit(Protocol):
    """What becomes one shard; picklable."""

    @property
    def shard(self) -> Path:
        """The file to write."""

    def resolved(self) -> Self:
        """The same with absolute paths: a worker's working directory may be another."""


U = TypeVar("U", bound=Unit)


def convert_on_beam(
    units: Iterable[U],
    convert: Callable[[U], SceneResult],
    out: Path,
    *,
    workers: int,
    options: str,
    advance: Callable[[int], object],
) -> list[SceneResult]:
    """Converts units as one Beam pipeline and waits for its end.

    Args:
        units: what to convert.
        convert: converts one; importable by name.
        out: the records folder.
        workers: processes, where the options name no other runner.
        options: Beam's own command-line options, such as `--runner=FlinkRunner --flink_master=host:8081`.
        advance: told how many more records are there, now and then, from another thread.

    Returns:
        What became of each unit, in no particular order.

    Raises:
        SpaceDriveError: Beam is not installed, does not know an option, or a unit cannot be converted.
    """
    try:
        import apache_beam as beam
    except ImportError:
        raise SpaceDriveError(
            "--runner beam needs Apache Beam: make an environment of its own and pip install -r "
            "requirements.txt, then -r requirements-beam.txt"
        ) from None
    arguments = pipeline_arguments(options, workers)
    waiting = out / conversion.FOLDER / conversion.WAITING
    files = _write_units(units, convert, waiting)
    try:
        with _watched(out, [file.stem for file in files], advance):
            pipeline = beam.Pipeline(argv=arguments)
            _ = (
                pipeline
                | "units" >> beam.Create([str(file) for file in files])
                | "spread over workers" >> beam.Reshuffle()
                | "convert" >> beam.Map(convert_unit_file)
            )
            pipeline.run().wait_until_finish()
        return _collect(out, files)
    except SpaceDriveError:
        raise
    except (RuntimeError, ValueError) as error:
        # A worker's error comes with its traceback, the message last.
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise SpaceDriveError(
            f"the Beam pipeline failed ({reason}); --resume goes on where it stopped"
        ) from error
    finally:
        shutil.rmtree(waiting)


def pipeline_arguments(options: str, workers: int) -> list[str]:
    """Beam's options: those given, and the local runner with its processes where they name no runner.

    Raises:
        ConfigError: the options are not text that a shell would split.
    """
    try:
        arguments = shlex.split(options)
    except ValueError as error:
        raise ConfigError(f"--beam-options {options!r}: {error}") from None
    if any(argument.split("=")[0] == "--runner" for argument in arguments):
        return arguments
    # Not `DirectRunner`, which first looks for a runner to download.
    mode = "in_memory" if workers == 1 else "multi_processing"
    local = ["--runner=FnApiRunner", f"--direct_num_workers={workers}", f"--direct_running_mode={mode}"]
    return [*local, *arguments]


def convert_unit_file(path: str) -> None:
    """What a worker does: converts the unit in a file and writes down what became of it.

    What a user has to mend is written down too instead of raised, since a runner would only try again.
    """
    file = Path(path)
    # Written by this conversion a moment ago, into its own folder.
    convert, unit = pickle.loads(file.read_bytes())
    try:
        result = convert(unit)
    except SpaceDriveError as error:
        write_text(file.with_suffix(".problem"), str(error))
        return
    conversion.save_finished_scene(unit.shard.parent, result)


def _write_units(units: Iterable[U], convert: Callable[[U], SceneResult], folder: Path) -> list[Path]:
    """Writes units into files: a scene with its annotations is too much for a pipeline's description."""
    folder.mkdir(parents=True)
    files = []
    for unit in units:
        absolute = unit.resolved()
        files.append(folder.resolve() / f"{unit.shard.name}.unit")
        write_bytes(files[-1], pickle.dumps((convert, absolute)))
    return files


def _collect(out: Path, files: Sequence[Path]) -> list[SceneResult]:
    problems = [file.with_suffix(".problem") for file in files]
    told = [problem.read_text() for problem in problems if problem.is_file()]
    if told:
        rest = f"\nand {len(told) - 5} more" if len(told) > 5 else ""
        raise DataError("\n".join(told[:5]) + rest)
    results = {file.stem: conversion.finished_scene(out, file.stem) for file in files}
    lost = [shard for shard, result in results.items() if result is None]
    if lost:
        raise SpaceDriveError(
            f"the Beam pipeline ended without {len(lost)} of {len(files)} shards ({lost[0]}, ...): do its "
            f"workers see {out}? --resume goes on"
        )
    return [result for result in results.values() if result is not None]


@contextmanager
def _watched(out: Path, shards: Sequence[str], advance: Callable[[int], object]) -> Iterator[None]:
    """Tells `advance` about shards as they are finished, which Beam itself tells only its own tools."""
    ended = threading.Event()

    def watch() -> None:
        open_shards = set(shards)
        last_look = False
        while not last_look:
            last_look = ended.wait(POLL_SECONDS)
            for shard in sorted(open_shards):
                result = conversion.finished_scene(out, shard)
                if result is not None:
                    open_shards.remove(shard)
                    advance(result.shard.records)

    watcher = threading.Thread(target=watch, name="conversion progress")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()

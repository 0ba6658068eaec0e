"""Units of work, in processes here or on Apache Beam: scenes to convert, chunks of depth.

Beam runs on this machine or spread over a cluster. Its workers read the source and write shards and their
metadata into the records folder themselves, so both must be there under the same path on every machine (a
shared disk). What is in a shard depends on neither runner nor worker nor attempt, and a shard gets its name
only when whole: a worker that dies, or that is run twice, does no harm.
"""

from __future__ import annotations

import functools
import pickle
import shlex
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

from data_prep import conversion
from data_prep.nuscenes.scene_records import SceneResult
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.io import read_text, write_bytes, write_text
from spacedrive_jax.parallel import ordered_map

POLL_SECONDS = 1.0
DASK_RUNNER = "apache_beam.runners.dask.dask_runner.DaskRunner"


class Unit(Protocol):
    """What becomes one file, a shard or a chunk; picklable."""

    @property
    def shard(self) -> Path:
        """The file to write."""

    def resolved(self) -> Self:
        """The same with absolute paths: a worker's working directory may be another."""


U = TypeVar("U", bound=Unit)
Runner = Literal["local", "beam"]
"""Processes of this machine, or an Apache Beam pipeline."""


def convert_units(
    units: Iterable[U],
    convert: Callable[[U], SceneResult],
    out: Path,
    *,
    runner: Runner,
    workers: int,
    beam_options: str,
    advance: Callable[[int], object],
) -> Mapping[str, SceneResult]:
    """Converts units, and writes down beside each shard what became of it.

    Args:
        units: what to convert.
        convert: converts one; importable by name.
        out: the records folder.
        runner: who does it.
        workers: processes; on Beam where its options name no other runner.
        beam_options: Beam's own command-line options, such as `--runner=FlinkRunner
            --flink_master=host:8081`.
        advance: told how many more records are there; on Beam now and then, from another thread.

    Returns:
        What became of each unit, by the name of its shard.

    Raises:
        SpaceDriveError: a unit cannot be converted; see `run_on_beam`.
    """
    if runner == "beam":
        return _convert_on_beam(units, convert, out, workers, beam_options, advance)
    results = {}
    for result in ordered_map(convert, units, workers):
        conversion.save_finished_scene(out, result)
        results[result.shard.file] = result
        advance(result.shard.records)
    return results


def _convert_on_beam(
    units: Iterable[U],
    convert: Callable[[U], SceneResult],
    out: Path,
    workers: int,
    options: str,
    advance: Callable[[int], object],
) -> Mapping[str, SceneResult]:

    def records_of(shard: str) -> int | None:
        result = conversion.finished_scene(out, shard)
        return None if result is None else result.shard.records

    names = run_on_beam(
        units,
        functools.partial(convert_and_note, convert),
        out,
        out / conversion.FOLDER / conversion.WAITING,
        workers=workers,
        options=options,
        done=records_of,
        advance=advance,
    )
    conversion.remove_left_overs(out)  # of workers that died
    results = {name: conversion.finished_scene(out, name) for name in names}
    return {name: result for name, result in results.items() if result is not None}


def convert_and_note(convert: Callable[[U], SceneResult], unit: U) -> None:
    """Converts a unit and writes down beside its shard what became of it."""
    conversion.save_finished_scene(unit.shard.parent, convert(unit))


def run_on_beam(
    units: Iterable[U],
    work: Callable[[U], None],
    out: Path,
    waiting: Path,
    *,
    workers: int,
    options: str,
    done: Callable[[str], int | None],
    advance: Callable[[int], object],
) -> list[str]:
    """Has every unit's file written by one Beam pipeline and waits for its end.

    Args:
        units: what to do.
        work: does one; importable by name.
        out: the folder of the files.
        waiting: a folder to make for what waits for a worker; it is removed at the end.
        workers: processes, where the options name no other runner.
        options: Beam's own command-line options, such as `--runner=FlinkRunner --flink_master=host:8081`.
        done: how many records the file of this name holds, None where it is not whole.
        advance: told how many more records are there, now and then, from another thread.

    Returns:
        Names of the files, all of them whole.

    Raises:
        SpaceDriveError: Beam is not installed, does not know an option, or a unit cannot be done.
    """
    try:
        import apache_beam as beam
    except ImportError:
        raise SpaceDriveError(
            "--runner beam needs Apache Beam: make an environment of its own and pip install -r "
            "requirements.txt, then -r requirements-beam.txt"
        ) from None
    arguments = pipeline_arguments(options, workers)
    files = _write_units(units, work, waiting)
    names = [file.stem for file in files]
    try:
        with _watched(names, done, advance):
            pipeline = beam.Pipeline(argv=arguments)
            _ = (
                pipeline
                | "units" >> beam.Create([str(file) for file in files])
                | "spread over workers" >> beam.Reshuffle()
                | "work" >> beam.Map(do_unit_file)
            )
            _run(pipeline)
        _check_done(out, files, done)
        return names
    except SpaceDriveError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        # A worker's error comes with its traceback, the message last.
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise SpaceDriveError(
            f"the Beam pipeline failed ({reason}); --resume goes on where it stopped"
        ) from error
    finally:
        shutil.rmtree(waiting)


def _run(pipeline: Any) -> None:
    """Runs a pipeline to its end, and leaves a cluster that it was run on."""
    running = pipeline.run()
    try:
        running.wait_until_finish()
    finally:
        # DaskRunner opens one and leaves it open.
        client = getattr(running, "client", None)
        if client is not None:
            client.close()


def pipeline_arguments(options: str, workers: int) -> list[str]:
    """Beam's options: those given, and the local runner with its processes where they name no runner.

    On Dask every unit is a task of its own, unless the options say otherwise.

    Raises:
        ConfigError: the options are not text that a shell would split.
    """
    try:
        arguments = shlex.split(options)
    except ValueError as error:
        raise ConfigError(f"--beam-options {options!r}: {error}") from None
    named = [argument.partition("=")[::2] for argument in arguments]
    runners = [value for name, value in named if name == "--runner"]
    if runners:
        is_dask = runners[-1].rpartition(".")[2].lower() in ("daskrunner", "dask")
        if is_dask:  # Beam knows it by its whole name alone
            arguments = [each for each in arguments if not each.startswith("--runner=")]
            arguments = [f"--runner={DASK_RUNNER}", *arguments]
        if is_dask and not {"--dask_npartitions", "--dask_partition_size"} & {name for name, _ in named}:
            # One unit a task: by itself Dask puts a hundredth of them, whole drives, into one, and a worker
            # that dies takes all of those with it.
            return [*arguments, "--dask_partition_size=1"]
        return arguments
    # Not `DirectRunner`, which first looks for a runner to download.
    mode = "in_memory" if workers == 1 else "multi_processing"
    local = ["--runner=FnApiRunner", f"--direct_num_workers={workers}", f"--direct_running_mode={mode}"]
    return [*local, *arguments]


def do_unit_file(path: str) -> None:
    """What a worker does: the unit in a file.

    What a user has to mend is written down instead of raised, since a runner would only try again.
    """
    file = Path(path)
    # Written by this command a moment ago, into its own folder.
    work, unit = pickle.loads(file.read_bytes())
    try:
        work(unit)
    except SpaceDriveError as error:
        write_text(file.with_suffix(".problem"), str(error))


def _write_units(units: Iterable[U], work: Callable[[U], None], folder: Path) -> list[Path]:
    """Writes units into files: a scene with its annotations is too much for a pipeline's description."""
    folder.mkdir(parents=True)
    files = []
    for unit in units:
        absolute = unit.resolved()
        files.append(folder.resolve() / f"{unit.shard.name}.unit")
        write_bytes(files[-1], pickle.dumps((work, absolute)))
    return files


def _check_done(out: Path, files: Sequence[Path], done: Callable[[str], int | None]) -> None:
    problems = [file.with_suffix(".problem") for file in files]
    told = [read_text(problem) for problem in problems if problem.is_file()]
    if told:
        rest = f"\nand {len(told) - 5} more" if len(told) > 5 else ""
        raise DataError("\n".join(told[:5]) + rest)
    lost = [file.stem for file in files if done(file.stem) is None]
    if lost:
        raise SpaceDriveError(
            f"the Beam pipeline ended without {len(lost)} of {len(files)} shards ({lost[0]}, ...): do its "
            f"workers see {out}? --resume goes on"
        )


@contextmanager
def _watched(
    names: Sequence[str], done: Callable[[str], int | None], advance: Callable[[int], object]
) -> Iterator[None]:
    """Tells `advance` about files as they are finished, which Beam itself tells only its own tools."""
    ended = threading.Event()

    def watch() -> None:
        left = set(names)
        last_look = False
        while not last_look:
            last_look = ended.wait(POLL_SECONDS)
            for name in sorted(left):
                count = done(name)
                if count is not None:
                    left.remove(name)
                    advance(count)

    watcher = threading.Thread(target=watch, name="progress")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()

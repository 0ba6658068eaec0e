"""The synthetic world as a nuScenes v1.0 folder: scenes in processes of their own, maps, tables last."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pickle
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from data_prep.beam import run_on_beam
from data_prep.synthesize.bench2drive import ClipJob, record_clip
from data_prep.synthesize.recorder import NotRecorded, SceneJob, record_scene, town_of
from data_prep.synthesize.tables import fixed_tables, write_expansion, write_mask, write_tables
from spacedrive_jax.console import note, progress
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.folders import atomic_folder, remove_stale
from spacedrive_jax.io import remove_partials, write_bytes
from spacedrive_jax.parallel import ordered_map
from spacedrive_jax.world.scenario import make_token
from spacedrive_jax.world.sensors import parse_image_size

Layout = Literal["nuscenes", "bench2drive"]


@dataclasses.dataclass(frozen=True)
class Synthesis:
    """A procedural driving world, written as a nuScenes folder of version `v1.0-synthetic`.

    The same seed writes the same bytes, whatever the number of workers.
    """

    out: Path
    """Folder to write; must not exist or be empty."""
    scenes: int = 10
    keyframes: int = 20
    """Per scene, two a second."""
    seed: int = 0
    """Of the towns, the traffic and the light."""
    image_size: str = "704x396"
    """Width x height of the camera images in pixels."""
    depth: bool = True
    """Keep the exact depth of every image under samples_depth/."""
    workers: int = 0
    """Processes; 0 takes one per core."""
    layout: Layout = "nuscenes"
    """Whose layout: nuScenes', or Bench2Drive's clips of ten frames a second in CARLA's axes."""
    perturb: bool = False
    """Every scene begins with the ego vehicle beside its lane and turned; the expert drives it back."""
    beam_options: str | None = None
    """Have the scenes written by an Apache Beam pipeline with these options; None for processes here."""

    def run(self) -> dict[str, Any]:
        """Writes the folder; partial output never stands under its final name.

        Raises:
            ConfigError: an option is out of its range, or the folder holds something.
        """
        started = time.monotonic()
        image_size = parse_image_size(self.image_size)
        for name, value, low, high in (
            ("--scenes", self.scenes, 1, 9000),
            ("--keyframes", self.keyframes, 1, 200),
            ("--seed", self.seed, 0, 2**31 - 1),
            ("--workers", self.workers, 0, 1024),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} {value} is outside {low} to {high}")
        if self.perturb and self.layout != "nuscenes":
            raise ConfigError("--perturb records nuScenes' layout alone: leave --layout out")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ConfigError(
                f"--out {self.out} exists and is not an empty folder: choose another or remove it"
            )
        out = self.out.resolve()  # an empty folder is replaced, and a link to one cannot be
        remove_stale(out)
        if out.exists():
            out.rmdir()
        with atomic_folder(out) as unfinished:
            jobs = [
                SceneJob(index, self.seed, self.keyframes, image_size, self.depth, unfinished, self.perturb)
                for index in range(self.scenes)
            ]
            workers = min(self.workers or os.cpu_count() or 1, len(jobs))
            if self.layout == "bench2drive":
                write_clips(unfinished, jobs, workers, self.beam_options)
                skipped: list[str] = []
            else:
                skipped = write_folder(unfinished, jobs, workers, self.beam_options)
            fingerprint = folder_fingerprint(unfinished)
        scenes = self.scenes - len(skipped)
        return {
            "keyframes": scenes * self.keyframes,
            "scenes": scenes,
            "fingerprint": fingerprint,
            "skipped": len(skipped),
            "skipped_scenes": skipped,
            "seconds": round(time.monotonic() - started, 3),
        }


Job = TypeVar("Job", SceneJob, ClipJob)


@dataclasses.dataclass(frozen=True)
class JobUnit(Generic[Job]):
    """A job for a worker of a cluster."""

    job: Job
    shard: Path
    """Where to put what `record` returns."""

    def resolved(self) -> JobUnit[Job]:
        """The same with absolute paths."""
        job = dataclasses.replace(self.job, root=self.job.root.resolve())
        return JobUnit(job, self.shard.resolve())


def do_job(record: Callable[[Job], Any], unit: JobUnit[Job]) -> None:
    """Records a scene in a worker of a cluster; what it returned is the last file to appear."""
    write_bytes(unit.shard, pickle.dumps(record(unit.job)))


def _recorded(
    record: Callable[[Job], Any], jobs: Sequence[Job], workers: int, beam_options: str | None
) -> Generator[Any, None, None]:
    """What `record` returns of every job, in their order."""
    if beam_options is None:
        yield from ordered_map(record, jobs, workers)
        return
    root = jobs[0].root
    waiting, returned = root / ".units", root / ".returned"
    units = [JobUnit(job, returned / f"{number:05d}") for number, job in enumerate(jobs)]
    with progress(total=len(units), desc="record", unit="scene") as bar:
        run_on_beam(
            units,
            functools.partial(do_job, record),
            root,
            waiting,
            workers=workers,
            options=beam_options,
            done=lambda name: 1 if (returned / name).is_file() else None,
            advance=bar.update,
        )
    for unit in units:
        # Written by this command's own workers a moment ago, into its own folder.
        yield pickle.loads(unit.shard.read_bytes())
    shutil.rmtree(returned)
    remove_partials(root)  # of workers that died


def write_clips(root: Path, jobs: list[SceneJob], workers: int, beam_options: str | None = None) -> None:
    """Writes all scenes as Bench2Drive clips."""
    clips = [ClipJob(job.index, job.seed, job.keyframes, job.image_size, root) for job in jobs]
    recorded = _recorded(record_clip, clips, workers, beam_options)
    with contextlib.closing(recorded):
        for _ in progress(recorded, total=len(clips), desc="clips", unit="clip"):
            pass


def write_folder(
    root: Path, jobs: list[SceneJob], workers: int, beam_options: str | None = None
) -> list[str]:
    """Records all scenes, then writes the maps and, last of all, the tables.

    Returns:
        Names of the scenes that are left out: there is no room beside their lane to begin in.

    Raises:
        DataError: no scene is left.
    """
    tables = fixed_tables(jobs[0].seed, jobs[0].image_size)
    locations: list[str] = []
    skipped: list[str] = []
    # Closed before the folder is removed: an error must find nobody writing there any more.
    with contextlib.closing(_recorded(record_scene, jobs, workers, beam_options)) as recorded:
        bar = progress(recorded, total=len(jobs), desc="scenes", unit="scene")
        for job, rows in zip(jobs, bar, strict=True):
            if isinstance(rows, NotRecorded):
                note(f"{rows.name} is left out: {rows.reason}")
                skipped.append(rows.name)
                continue
            locations.append(job.location)
            for name, part in rows.items():
                tables.setdefault(name, []).extend(part)
    if not locations:
        raise DataError("--perturb: no scene has room beside its lane to begin in; try another --seed")
    tables["map"] = []
    for location in dict.fromkeys(locations):
        town = town_of(jobs[0].seed, location)
        token = make_token(jobs[0].seed, "map", location)
        write_mask(town, root / "maps" / f"{token}.png")
        write_expansion(town, jobs[0].seed, root / "maps" / "expansion" / f"{location}.json")
        tables["map"].append(
            {
                "category": "semantic_prior",
                "token": token,
                "filename": f"maps/{token}.png",
                "log_tokens": [row["token"] for row in tables["log"] if row["location"] == location],
            }
        )
    write_tables(root, tables)
    return skipped


def folder_fingerprint(root: Path) -> str:
    """sha256 over the sorted relative paths and contents of all files below `root`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix().encode()
        data = path.read_bytes()
        digest.update(len(name).to_bytes(8, "little") + name + len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()

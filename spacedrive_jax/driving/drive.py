"""A set of drives: driven, resumed, written down and scored."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from spacedrive_jax.console import note, progress
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.schema import Record
from spacedrive_jax.driving.batch_policies import BatchPolicy
from spacedrive_jax.driving.bench import Event, Finished, Fleet, NoPlace, PlanRequest, WorldPolicy
from spacedrive_jax.driving.episode import DriveOptions
from spacedrive_jax.driving.pdm import PdmScore
from spacedrive_jax.driving.results import read_drive, result_file
from spacedrive_jax.driving.scenarios import DriveSpec
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.evaluation.bench2drive import read_results, score_routes
from spacedrive_jax.evaluation.metrics import LEVEL, RESAMPLES
from spacedrive_jax.folders import remove_folder
from spacedrive_jax.inference.answers import without_place
from spacedrive_jax.io import remove_partials, write_bytes
from spacedrive_jax.json_files import convert, read_json, write_json
from spacedrive_jax.training.hosts import ALONE, Hosts

RESULTS = "results.json"
VIEWS = "views"
"""Folder, in a drive's, of the six images of the decision at which it went wrong."""
SUMMARY = "summary.json"
METADATA = "run.json"


@dataclasses.dataclass(frozen=True)
class DriveRun:
    """What a run of drives came to."""

    folder: Path
    summary: Mapping[str, Any]
    """As in summary.json."""
    driven: int
    """Drives of this call; a resumed one counts what was left."""
    seconds: float


@dataclasses.dataclass(frozen=True)
class Show:
    """One drive to show, as a film or a recording."""

    number: int
    """Of the drive in its set; it is driven with cameras, whether the policy looks or not."""
    write: Callable[[Finished], None]


def drive_all(
    specs: Sequence[DriveSpec],
    folder: Path,
    options: DriveOptions,
    *,
    metadata: Mapping[str, Any],
    policy: BatchPolicy | None = None,
    world_policy: WorldPolicy | None = None,
    workers: int = 1,
    at_a_time: int = 8,
    resume: bool = False,
    collect: Callable[[str, Sequence[Record]], None] | None = None,
    show: Show | None = None,
    hosts: Hosts | None = None,
) -> DriveRun:
    """Drives a set and writes its results; `output_lock` keeps other jobs from the folder meanwhile.

    On several hosts each drives its share of the drives, and the first one then has the files of all: through
    the folder itself where it is on a shared disk, else from the others.

    Args:
        specs: the drives.
        folder: where to write; each drive's files appear when it is over, so that an interrupted run goes on.
        options: how to drive.
        metadata: what tells this run from others; a resumed run must have the same.
        policy: plans from records alone,
        world_policy: or the one that knows the world.
        workers: processes that move the world and draw.
        at_a_time: drives under way together.
        resume: go on with an interrupted run.
        collect: is given every drive's name and records, with the expert's plan from each state.
        show: one drive to show.
        hosts: of the run; None for this one alone.

    Raises:
        ConfigError: the folder holds another run, or one and `resume` is not given; there is no such drive to
            show, or it is done.
        SpaceDriveError: a process died.
    """
    started = time.monotonic()
    if show is not None and show.number not in {spec.number for spec in specs}:
        raise ConfigError(f"--show {show.number}: the set has drives 0 to {len(specs) - 1}")
    hosts = hosts or ALONE
    # The first host says whether the folder may be written to; where it does, the others go on in theirs.
    done = hosts.in_turn(lambda: open_folder(folder, metadata, resume=resume or not hosts.is_first))
    shown = None if show is None else show.number
    if any(spec.number == shown and spec.name in done for spec in specs):
        raise ConfigError(
            f"--show {shown}: that drive of {folder} is done, choose one that is not, or another folder"
        )
    mine = specs[hosts.index :: hosts.count]
    todo = [spec for spec in mine if spec.name not in done]
    _drive(mine, todo, folder, options, policy, world_policy, workers, at_a_time, collect, show)
    _bring_together(specs, folder, hosts)
    summary = finish(specs, folder) if hosts.is_first else {}
    summary = json.loads(hosts.exchange(json.dumps(summary).encode())[0])
    return DriveRun(folder, summary, len(todo), time.monotonic() - started)


def _drive(
    mine: Sequence[DriveSpec],
    todo: Sequence[DriveSpec],
    folder: Path,
    options: DriveOptions,
    policy: BatchPolicy | None,
    world_policy: WorldPolicy | None,
    workers: int,
    at_a_time: int,
    collect: Callable[[str, Sequence[Record]], None] | None,
    show: Show | None,
) -> None:
    """Drives what is left of this host's share."""
    by_number = {spec.number: spec for spec in mine}
    shown = None if show is None else show.number
    with (
        Fleet(
            min(workers, max(len(todo), 1)), options, world_policy, collect=collect is not None, shown=shown
        ) as fleet,
        progress(total=len(mine), initial=len(mine) - len(todo), desc="drive", unit="drive") as bar,
    ):
        waiting = list(todo)
        while waiting or fleet.under_way:
            while waiting and fleet.under_way < at_a_time:
                fleet.start(waiting.pop(0))
            # With a model all drives under way are asked together; without one each ends by itself.
            requests: list[PlanRequest] = []
            for event in fleet.events(fleet.under_way if policy is not None else 1):
                if isinstance(event, PlanRequest):
                    requests.append(event)
                    continue
                spec = by_number[event.number]
                if collect is not None and isinstance(event, Finished):
                    collect(spec.name, event.records)
                if show is not None and show.number == event.number and isinstance(event, Finished):
                    show.write(event)
                write_drive(folder, spec, event)
                bar.update()
            if policy is not None and requests:
                fleet.answer(policy.plans(sorted(requests, key=lambda event: event.number)))


def _bring_together(specs: Sequence[DriveSpec], folder: Path, hosts: Hosts) -> None:
    """Writes on the first host the drives of the others that are not in its folder anyway."""
    if hosts.count == 1:
        return
    lacking = [spec.name for spec in specs if not (folder / "drives" / spec.name / "result.json").is_file()]
    wanted = set(json.loads(hosts.exchange(json.dumps(lacking).encode())[0]))
    sent: list[dict[str, bytes]] = []
    for spec in specs[hosts.index :: hosts.count]:
        if spec.name in wanted and not hosts.is_first:
            own = folder / "drives" / spec.name
            files = [path for path in sorted(own.rglob("*")) if path.is_file() and path.name != "result.json"]
            record = read_drive(own / "result.json")
            if "save_name" in record:
                files.append(_metric_info(folder, record["save_name"]))
            files.append(own / "result.json")  # last: it says that the others are whole
            sent.append({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})
    for data in hosts.exchange(msgspec.msgpack.encode(sent)):
        for files_of_drive in msgspec.msgpack.decode(data, type=list[dict[str, bytes]]):
            for name, content in files_of_drive.items():
                if hosts.is_first:
                    write_bytes(folder / name, content)


def _metric_info(folder: Path, save_name: str) -> Path:
    return folder / "metric_info" / save_name / "metric_info.json"


def open_folder(folder: Path, metadata: Mapping[str, Any], *, resume: bool) -> set[str]:
    """Claims a folder for a run of drives.

    Args:
        folder: of the run; is made.
        metadata: what the drives depend on (JSON values).
        resume: go on with those that were driven under the same metadata.

    Returns:
        Names of the drives that are done.

    Raises:
        SpaceDriveError: the folder holds something else, or drives that are not to be gone on with.
    """
    path = folder / METADATA
    # A run that was scored by other parts is not gone on with: their means would be of some of its drives.
    metadata = {**metadata, "pdm_parts": [each.name for each in dataclasses.fields(PdmScore)]}
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"--out {folder} exists and is not a run of drives: choose another folder")
        write_json(path, metadata, indent=1, sort_keys=True)
        return set()
    done = {each.parent.name for each in folder.glob("drives/*/result.json")}
    begun = {METADATA, "drives", "metric_info"}
    others = [each for each in folder.iterdir() if each.name not in begun and not each.name.startswith(".")]
    if not done and not others:  # what stopped before its first drive was done burns no folder
        remove_partials(folder)
        for half in ("drives", "metric_info"):
            remove_folder(folder / half)
        write_json(path, metadata, indent=1, sort_keys=True)
        return set()
    if not resume:
        raise ConfigError(
            f"--out {folder} holds a run: go on with it with --resume, or choose another folder"
        )
    known = read_json(path)
    metadata = json.loads(json.dumps(metadata))  # as they were written: lists for tuples
    if not isinstance(known, dict):
        raise DataError(
            f"{path} holds no JSON object: it does not say what was driven, choose another folder"
        )
    # Of the scenarios `drives` says all; a file of one's own may have moved.
    known, metadata = without_place(known), without_place(metadata)
    different: list[str] = []
    for name in sorted({*known, *metadata} - {"scenarios"}):
        then, now = known.get(name), metadata.get(name)
        if isinstance(then, dict) and isinstance(now, dict):
            changed = (each for each in sorted({*then, *now}) if then.get(each) != now.get(each))
            different += [f"{name}.{each}" for each in changed]
        elif then != now:
            different.append(name)
    if different:
        raise ConfigError(
            f"--resume: {folder} was begun with another {', '.join(different)}: choose another folder"
        )
    remove_partials(folder)
    return done


def is_collecting(folder: Path, records: Path) -> bool:
    """Whether a folder holds a run of drives whose states are collected in that records folder.

    Raises:
        DataError: what the run says of itself is damaged.
    """
    path = folder / METADATA
    known = read_json(path) if path.is_file() else None
    return isinstance(known, dict) and known.get("collect") == str(records.resolve())


def write_drive(folder: Path, spec: DriveSpec, event: Event) -> None:
    """Writes a finished drive's files; result.json comes last and says that the others are whole."""
    own = folder / "drives" / spec.name
    if isinstance(event, NoPlace):
        write_json(own / "result.json", {"no_place": event.reason})
        return
    assert isinstance(event, Finished)
    write_json(_metric_info(folder, event.record["save_name"]), event.metric_info)
    write_json(own / "trace.json", event.trace)
    for channel, image in zip(CAMERAS if event.views else (), event.views, strict=True):
        write_bytes(own / VIEWS / f"{channel}.jpg", image)
    write_json(own / "result.json", event.record, indent=1)


def finish(specs: Sequence[DriveSpec], folder: Path) -> dict[str, Any]:
    """Writes the result file and the summary of all drives that are done."""
    records: list[dict[str, Any]] = []
    kinds: dict[str, DriveSpec] = {}
    no_place: list[str] = []
    for spec in specs:
        path = folder / "drives" / spec.name / "result.json"
        if not path.is_file():
            continue
        value = read_drive(path)
        if "no_place" in value:
            no_place.append(spec.name)
            continue
        records.append(value)
        kinds[value["route_id"]] = spec
    write_json(folder / RESULTS, result_file(records, len(records)), indent=1)
    write_json(folder / "routes.json", [record["route_id"].split("_")[1] for record in records])
    summary: dict[str, Any] = summarise(records, kinds, folder / RESULTS) if records else {"drives": 0}
    summary["without_place"] = no_place
    write_json(folder / SUMMARY, summary, indent=1)
    if no_place:
        note(f"no place for {len(no_place)} drives: {', '.join(no_place[:5])}")
    return summary


def summarise(
    records: Sequence[Mapping[str, Any]], specs: Mapping[str, DriveSpec], results: Path
) -> dict[str, Any]:
    """All scores of a run, with bootstrap intervals over drives, and a row per kind and per town."""
    scores = score_routes(read_results([results]), [record["route_id"].split("_")[1] for record in records])
    driving = np.array([record["scores"]["score_composed"] for record in records])
    pdm = np.array([record["pdm"]["pdms"] for record in records]) * 100
    parts: dict[str, float | None] = {}
    for name in records[0]["pdm"]:
        known = [record["pdm"][name] for record in records if record["pdm"][name] is not None]
        parts[name] = float(np.mean(known)) if known else None
    open_loop = [record["open_loop"] for record in records if record.get("open_loop")]
    counted = sum(each["decisions"] for each in open_loop)
    metres = sum(each["l2"] * each["decisions"] for each in open_loop)
    failures: Counter[str] = Counter()
    for record in records:
        failures.update(record["failures"])

    def rows(names: Sequence[str]) -> dict[str, Any]:
        found = {}
        for name in dict.fromkeys(names):
            chosen = np.array([each == name for each in names])
            found[name] = {
                "drives": int(chosen.sum()),
                "driving_score": float(driving[chosen].mean()),
                "driving_score_interval": interval(driving[chosen]),
                "pdm_score": float(pdm[chosen].mean()),
            }
        return found

    return {
        "drives": len(records),
        "driving_score": scores.driving_score,
        "driving_score_interval": interval(driving),
        "success_rate": scores.success_rate,
        "efficiency": scores.efficiency,
        "pdm_score": float(pdm.mean()),
        "pdm_score_interval": interval(pdm),
        "pdm_parts": parts,
        "open_loop_l2": metres / counted if counted else None,
        "open_loop_decisions": counted,
        "neuro_ncap": float(np.mean([record["neuro_ncap"] for record in records])),
        "failures": dict(sorted(failures.items())),
        "statuses": dict(scores.statuses),
        "kinds": rows([specs[record["route_id"]].kind for record in records]),
        "towns": rows([specs[record["route_id"]].town for record in records]),
    }


def interval(values: np.ndarray, seed: int = 0) -> list[float] | None:
    """95 % bootstrap interval of a mean over drives; None of a single one."""
    if len(values) < 2:
        return None
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values[draws].mean(axis=1), [tail, 100 - tail])
    return [float(low), float(high)]


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        DataError: the folder holds none.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise DataError(f"{folder} is no finished run of drives ({SUMMARY} is missing)")
    summary = read_json(path)
    driven = not isinstance(summary, dict) or summary.get("drives")
    convert(summary, _Summary if driven else _Nothing, path, "drive --resume writes it again")
    return summary


class _Interval(msgspec.Struct, array_like=True):
    low: float
    high: float


class _KindScores(msgspec.Struct):
    drives: int
    driving_score: float
    pdm_score: float


class _Nothing(msgspec.Struct):
    """What is read back of a run in which nothing was driven."""

    drives: int


class _Summary(msgspec.Struct):
    """What is read back of `summarise`."""

    drives: Annotated[int, Meta(ge=1)]
    driving_score: float
    driving_score_interval: _Interval | None
    success_rate: float
    pdm_score: float
    pdm_score_interval: _Interval | None
    pdm_parts: dict[str, float | None]
    open_loop_l2: float | None
    failures: dict[str, int]
    kinds: dict[str, _KindScores]

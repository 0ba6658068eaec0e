"""What a run left behind: the files of a run directory, read once, with what is missing put in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Float

from spacedrive_jax.data.depth_cache import DepthCache
from spacedrive_jax.data.depth_sources import (
    DepthConfig,
    DepthSource,
    open_depth_cache,
    record_patch_depth,
)
from spacedrive_jax.data.records import Records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import DataError, SpaceDriveError
from spacedrive_jax.evaluation.protocols import PROTOCOLS
from spacedrive_jax.io import place, read_text, reason
from spacedrive_jax.json_files import MOST_JSON, convert, parse_json, read_json

SeenDepth = tuple[Float[np.ndarray, "N h w"], list[DepthSource]]
"""Depth of the visual tokens, metres, and which source each camera's came from."""


@dataclasses.dataclass(frozen=True)
class RunDepth:
    """The depth that a run saw, from its sidecar."""

    cache: DepthCache
    config: DepthConfig

    def __call__(self, record: Record) -> SeenDepth:
        """Depth on the run's grid of visual tokens, metres, and each camera's source."""
        cached = self.cache.read(record["token"])
        rows, columns = cached.patch_depth.shape[1:]
        return record_patch_depth(record, (rows, columns), self.config, cached)


def open_run_depth(records: Records, config: Mapping[str, Any] | None, notices: list[str]) -> RunDepth | None:
    """The depth of the run's sidecar; None where the run needed none.

    Args:
        records: the records to show.
        config: the run's `config.json`, if there is one.
        notices: gets a sentence where there should be a sidecar and it cannot be read.
    """
    settings = (config or {}).get("data", {}).get("depth", {})
    depth = convert(settings, DepthConfig, "data.depth of the run's config.json")
    try:
        cache = open_depth_cache(records, depth)
    except SpaceDriveError as error:
        notices.append(f"The depth that the run saw is not shown: {error}.")
        return None
    return None if cache is None else RunDepth(cache, depth)


TABLE_KEYS = ("protocol", "l2", "collision", "intersection", "coverage", "baselines", "records")
"""What an evaluation file must hold to be shown."""


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The readable parts of a run directory."""

    directory: Path
    """The run directory."""
    provenance: Mapping[str, Any]
    """`run.json`: versions, records, checkpoint; empty when absent."""
    config: Mapping[str, Any] | None
    """`config.json`, the resolved configuration; None when absent."""
    steps: tuple[Mapping[str, float], ...]
    """Lines of `metrics.jsonl`, numeric values only, in step order."""
    evaluations: tuple[Mapping[str, Any], ...]
    """Evaluation files by protocol and records split."""
    missing: tuple[str, ...]
    """What is absent, one sentence each."""

    @property
    def predicted(self) -> Mapping[str, Any]:
        """What `predict` said of the newest predictions; of run.json's own fields where it said nothing."""
        found = self.provenance.get("predicted")
        if isinstance(found, Mapping):
            return found
        names = {"file": "predictions", "records": "records", "split": "split"}
        return {name: self.provenance[old] for name, old in names.items() if old in self.provenance}

    @property
    def predictions(self) -> Path:
        """The newest predictions, which need not be there."""
        return self.resolve(str(self.predicted.get("file", "predictions.jsonl")))

    def resolve(self, value: str) -> Path:
        """A path from `run.json`: absolute, inside the run directory, or relative to where we are."""
        path = place(value)
        if path.is_absolute():
            return path
        inside = self.directory / path
        return inside if inside.exists() else path


def read_run(directory: Path, predictions: Path | None = None) -> RunFiles:
    """Reads `run.json`, `config.json`, `metrics.jsonl` and the evaluation files of a run directory.

    Args:
        directory: the run directory.
        predictions: predictions from elsewhere: their scores, beside them, are shown instead.

    Raises:
        DataError: there is no such directory, it holds none of these files, or one of them is damaged.
    """
    if not directory.is_dir():
        raise DataError(f"no run directory {directory}; give the folder that `train` wrote")
    missing: list[str] = []
    provenance = _read_object(directory / "run.json", missing, "the page cannot say where the run came from")
    config = _read_object(directory / "config.json", missing, "the configuration is not shown")
    steps = _read_steps(directory / "metrics.jsonl", missing)
    evaluations = _read_evaluations(directory, provenance or {}, predictions, missing)
    if provenance is None and config is None and not steps and not evaluations:
        raise DataError(
            f"{directory} does not look like a run: it has no run.json, config.json, metrics.jsonl or "
            f"evaluation file"
        )
    if not evaluations:
        place = directory if predictions is None else predictions.parent
        what = directory if predictions is None else f"--predictions {predictions} --records DIR"
        missing.append(
            f"No evaluation file in {place}: scores are not shown. Write one with "
            f"`python -m spacedrive_jax evaluate {what}`."
        )
    return RunFiles(directory, provenance or {}, config, steps, evaluations, tuple(missing))


def _read_object(path: Path, missing: list[str], consequence: str) -> dict[str, Any] | None:
    if not path.is_file():
        missing.append(f"{path.name} is absent: {consequence}.")
        return None
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_steps(path: Path, missing: list[str]) -> tuple[Mapping[str, float], ...]:
    """The logged steps; a step logged again after a resume replaces the earlier one."""
    if not path.is_file():
        missing.append(f"{path.name} is absent: training curves are not shown.")
        return ()
    steps: dict[float, dict[str, float]] = {}
    lines = read_text(path, most=MOST_JSON).splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line, f"{path}, line {number}:", nan=True)
        except DataError:
            if number == len(lines):
                missing.append(f"The last line of {path.name} is cut off and left out.")
                continue
            raise
        if not isinstance(entry, dict) or not _is_number(entry.get("step")):
            raise DataError(f'{path}, line {number}: expected an object with a numeric "step"')
        numbers = {name: float(value) for name, value in entry.items() if _is_number(value)}
        steps.setdefault(entry["step"], {}).update(numbers)  # a validation may have been made up for
    if not steps:
        missing.append(f"{path.name} holds no logged step: training curves are not shown.")
    return tuple(steps[step] for step in sorted(steps))


def _read_evaluations(
    directory: Path, provenance: Mapping[str, Any], predictions: Path | None, missing: list[str]
) -> tuple[Mapping[str, Any], ...]:
    """What `evaluate` wrote in the run directory and what `run.json` names, or of `predictions` alone."""
    if predictions is not None:
        candidates = sorted(predictions.parent.glob(f"{predictions.stem}.*.json"))
        provenance = {}
    else:
        candidates = sorted(directory.glob("*.json"))
    named = provenance.get("evaluation")
    if isinstance(named, str) and (directory / named).is_file():
        candidates.append(directory / named)
    found: dict[str, Mapping[str, Any]] = {}
    for path in candidates:
        if path.name in ("run.json", "config.json") or path.name.startswith("."):  # a file manager's ._NAME
            continue
        try:
            value = read_json(path)
        except DataError as error:
            if path.suffixes[-2:-1] in [[f".{protocol}"] for protocol in PROTOCOLS] or path.name == named:
                raise
            missing.append(f"{path.name} is not read: {reason(error, path)}.")
            continue
        if isinstance(value, dict) and all(key in value for key in TABLE_KEYS):
            _check_evaluation(value, path)
            found[str(path.resolve())] = value
    return tuple(found.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


class _Metric(msgspec.Struct):
    """Values at the horizons; None where there is no map."""

    one: float | None = msgspec.field(name="1s")
    two: float | None = msgspec.field(name="2s")
    three: float | None = msgspec.field(name="3s")
    average: float | None = msgspec.field(name="avg")


class _Scores(msgspec.Struct):
    samples: int
    l2: _Metric
    collision: _Metric
    intersection: _Metric


class _Coverage(msgspec.Struct):
    counted: int
    eligible: int
    records: int
    share: float


class _Source(msgspec.Struct):
    split: str | None = None
    fingerprint: str | None = None


class _Confidence(msgspec.Struct):
    level: float
    scenes: int
    l2: dict[str, tuple[float, float] | None]
    collision: dict[str, tuple[float, float] | None]
    intersection: dict[str, tuple[float, float] | None]


class _Evaluation(_Scores):
    """What the page shows of an evaluation file."""

    protocol: str
    coverage: _Coverage
    baselines: dict[str, _Scores]
    records: _Source
    notes: list[str] = []
    confidence: _Confidence | None = None


def _check_evaluation(value: Mapping[str, Any], path: Path) -> None:
    """Refuses an evaluation file whose fields are not of the types that `evaluate` writes.

    Raises:
        DataError: naming the field.
    """
    try:
        msgspec.convert(value, _Evaluation)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise DataError(f"{path} is not what evaluate wrote ({error}): write it again") from None

"""The training run, from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from spacedrive_jax.config import Config, check_config, depth_advice, to_json
from spacedrive_jax.console import progress
from spacedrive_jax.data.loader import position, records_sources, seek, training_iterator, training_samples
from spacedrive_jax.data.survey import check_lengths
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.io import place
from spacedrive_jax.training import checkpoints, run_folder
from spacedrive_jax.training.fingerprints import base_fingerprint, check_trained_on
from spacedrive_jax.training.hosts import PreemptionWatch, hosts_of_run, is_first_host
from spacedrive_jax.training.sharding import (
    check_batch_size,
    check_replication,
    local_rows,
    make_mesh,
    place_everywhere,
    place_rows,
    total_bytes,
)
from spacedrive_jax.training.state import check_start, count, frozen_state, init_train_state
from spacedrive_jax.training.step import NonfiniteGuard, make_train_step
from spacedrive_jax.training.throughput import (
    Profiler,
    ProfileWindow,
    Throughput,
    cost_line,
    interval_line,
    opening_line,
    other_validation_line,
    validation_line,
)
from spacedrive_jax.training.trackers import PROFILE, Trackers, check_trackers, on_disk
from spacedrive_jax.training.weights import pinned, resumable

log = logging.getLogger(__name__)


class Validate(Protocol):
    """Trainables and frozen weights to metrics: `validation/loss`, `validation/l2` and others like them."""

    digest: str
    """Of what is validated and how: numbers of another one do not compare."""

    def __call__(self, trainable: nnx.State, frozen: nnx.State) -> dict[str, float]:
        """Validates numbers."""


MakeValidation = Callable[[Config, Mesh], Validate | None]
"""Made above this room, where answers are generated and scored: `evaluation.validation`."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Where a run stands when `train` returns."""

    run_dir: Path
    step: int
    start: int
    """Steps that were done before."""
    loss: float
    """The last one logged; nan where no step was taken."""
    seconds: float
    finished: bool
    """False where SIGTERM, SIGHUP or Ctrl-C stopped the run early; `--resume` goes on."""
    skipped: int
    """Steps left out because loss or gradient was not finite."""
    best: checkpoints.Best | None
    """The best validated step."""


STEPS_TIMED = 3
"""Steps behind the first, which compiles, after which the run says what one costs."""


def train(
    config: Config,
    *,
    resume: bool = False,
    step: int | None = None,
    accept_changes: bool = False,
    overwrite: bool = False,
    skip_nonfinite: int = 0,
    profile: ProfileWindow | None = None,
    validation: MakeValidation | None = None,
) -> TrainResult:
    """Trains to `config.train.steps`, writing checkpoints, metrics and provenance to the run folder.

    Nothing is written there before the first step is done, so that a run that cannot start leaves nothing to
    be removed. SIGTERM, SIGHUP and Ctrl-C save a checkpoint and return early.

    Args:
        config: the whole run.
        resume: go on from the newest checkpoint of the run folder.
        step: go on from this checkpoint instead; later ones are set aside (`RUN/set_aside`),
            once the first step is done.
        accept_changes: resume although the config or the records differ from the run's.
        overwrite: replace the run that the folder holds, once the new one has done its first step.
        skip_nonfinite: how many steps whose loss or gradient is not finite to leave out before giving up.
        profile: steps to trace; None for none.
        validation: makes what `train.validate_every` asks for.

    Raises:
        SpaceDriveError: the run folder is taken or cannot be written, the config of a resumed run differs,
            the disk is full, or the data is not there or does not fit the config's shapes.
        FloatingPointError: the loss or gradient became nan or infinite too often.
    """
    check_config(config, "train")
    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite replaces it: give one of them")
    if step is not None and not resume:
        raise ConfigError("step says where to go on: give resume with it")
    if config.train.validate_every and validation is None:
        raise ConfigError(
            f"train.validate_every {config.train.validate_every}: no validation was given; "
            "`spacedrive_jax.train` brings one"
        )
    with run_folder.lock(config.directory):
        return _train(
            config,
            resume=resume,
            step=step,
            accept_changes=accept_changes,
            overwrite=overwrite,
            skip_nonfinite=skip_nonfinite,
            profile=profile,
            validation=validation,
        )


def _train(
    config: Config,
    *,
    resume: bool,
    step: int | None,
    accept_changes: bool,
    overwrite: bool,
    skip_nonfinite: int,
    profile: ProfileWindow | None,
    validation: MakeValidation | None,
) -> TrainResult:
    started = time.monotonic()
    config = pinned(config, resume=resume)
    settings, run_dir = config.train, config.directory
    mesh = make_mesh(config.mesh)
    check_batch_size(settings.batch_size, mesh, pieces=settings.grad_accum_steps)
    changes = run_folder.check(
        run_dir, config, resume=resume, accept_changes=accept_changes, overwrite=overwrite
    )
    if resume:
        changes = list(dict.fromkeys([*run_folder.accepted_changes(run_dir), *changes]))
    if step is not None:
        checkpoints.later_than(run_dir, step)  # they move when the run has shown that it goes on
    check_trackers(config)
    start = 0 if overwrite else max(checkpoints.steps_of(run_dir), default=0)
    if step is not None:
        start = step
    base = resumable(config) if start else config
    check_start(base)
    samples = training_samples(config.data, config.model, settings.batch_size, advice=depth_advice(config))
    check_lengths(samples)
    flags = {"resume": resume, "step": step, "overwrite": overwrite, "skip_nonfinite": skip_nonfinite}
    hosts = hosts_of_run()
    hosts.agree(run_folder.shared_metadata(config, start, samples.records.fingerprint, flags))
    if hosts.count > 1:
        run_folder.require_shared(run_dir, hosts)
    rows = local_rows(settings.batch_size, mesh)
    iterator = training_iterator(
        samples, config.data, batch_size=settings.batch_size, seed=settings.seed, rows=rows
    )

    train_step = make_train_step(config, mesh)
    check_replication(nnx.merge_state(train_step.trainable, train_step.frozen), mesh)
    checkpoint_bytes = total_bytes((train_step.trainable, train_step.optimizer_state))
    if is_first_host():  # one disk, which hosts that look at other moments may find otherwise
        missing = run_folder.lack_of_room_at_the_start(config, checkpoint_bytes, overwrite=overwrite)
        if missing:
            raise SpaceDriveError(missing)
    if start:  # nothing is drawn only to be replaced: there may be no room for both
        trainable, frozen = train_step.trainable, frozen_state(base, mesh)
        optimizer_state = train_step.optimizer_state
    else:
        trainable, frozen = init_train_state(base, mesh)
        optimizer_state = train_step.initialize_optimizer(trainable)
    validate = validation(config, mesh) if validation is not None and settings.validate_every else None

    metadata = {
        "config": to_json(config),
        "records": _resolved(config.data.records),
        "records_fingerprint": samples.records.fingerprint,
        "weights": config.model.weights,
        "base_fingerprint": base_fingerprint(config, frozen, mesh),
        "trainable_parameters": count(trainable),
        "frozen_parameters": count(frozen),
    }
    if start:
        if not accept_changes:
            saved = checkpoints.read_metadata(run_dir, start)
            check_trained_on(saved, metadata)
            run_folder.check_config(saved, config, run_dir / "checkpoints" / str(start), changes)
        trainable, optimizer_state, where, _ = checkpoints.restore(run_dir, start, trainable, optimizer_state)
        seek(iterator, where, settings.batch_size)
    opening = opening_line(
        name=config.name,
        trainable=count(trainable),
        frozen=count(frozen),
        keyframes=len(samples),
        batch_size=settings.batch_size,
        start=start,
        steps=settings.steps,
    )
    if is_first_host() and start < settings.steps:
        log.info("%s", opening)
    throughput = Throughput(config, started, samples.clock, len(rows))

    def advance(done: int, trainable: nnx.State, optimizer_state: Any) -> tuple[Any, ...]:
        waiting = time.monotonic()
        host_batch = next(iterator)
        throughput.waited(time.monotonic() - waiting)
        batch = place_rows(host_batch, rows, settings.batch_size, mesh)
        number = place_everywhere(np.int32(done), mesh)
        with jax.transfer_guard("disallow"):
            return (*train_step.run(trainable, optimizer_state, frozen, batch, number), host_batch)

    best = checkpoints.Best.read(run_dir) if start else None
    best = None if best is None else best.until(start)
    if best is not None and validate is not None and not best.compares(settings.best_by, validate.digest):
        if is_first_host():
            log.info("%s", other_validation_line(best, settings.best_by))
        best = None
    # A validation that failed, or that the run was killed in, is made up for.
    made_up: dict[str, float] = {}
    missed = start > 0 and (best is None or best.last < start)
    at_end = start == settings.steps
    if validate is not None and missed and (at_end or start % settings.validate_every == 0):
        made_up = validate(trainable, frozen)

    if profile is not None and not start <= profile.start < settings.steps and is_first_host():
        log.warning(
            "nothing is traced: the profile begins behind step %d, and this run goes from step %d to %d",
            *(profile.start, start, settings.steps),
        )
    # The first step shows that data, weights, program and memory are there. Only then is anything written.
    first = None
    profiler = Profiler(profile, on_disk(run_dir) / PROFILE)
    if start < settings.steps:
        with profiler.given_up_on_failure():
            profiler.before(start)
            first = jax.block_until_ready(advance(start, trainable, optimizer_state))
    if step is not None:
        if is_first_host():
            checkpoints.go_back_to(run_dir, step)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("later checkpoints are set aside")
    run_folder.claim(run_dir, config, overwrite=overwrite)
    manager = checkpoints.open_manager(run_dir, keep=settings.max_to_keep)
    if is_first_host():
        shown = {name: value for name, value in metadata.items() if name != "config"}
        run_folder.write_provenance(run_dir, shown | {"accepted_changes": changes})
    tracker = Trackers(run_dir, config, start)

    done, loss, stopped, short_of_room = start, float("nan"), False, None
    guard = NonfiniteGuard(run_dir, samples, skip_nonfinite)

    def save(done: int, trainable: nnx.State, optimizer_state: Any) -> None:
        guard.settle()
        where = position(iterator, settings.batch_size)
        tracker.keep()
        checkpoints.save(manager, done, trainable, optimizer_state, where, metadata)

    def judge(done: int, found: dict[str, float]) -> bool:
        """Says what a validation found; whether it is the best."""
        nonlocal best
        assert validate is not None
        value = found.get(f"validation/{settings.best_by}", float("nan"))
        better = value < (float("inf") if best is None else best.value)
        if better:
            best = checkpoints.Best(done, settings.best_by, value, validate.digest, done)
        elif best is not None:
            best = dataclasses.replace(best, last=done)
        if is_first_host():
            log.info("%s", validation_line(done, found, better))
        return better

    clock, validated = time.monotonic(), 0.0
    with (
        PreemptionWatch() as watch,
        checkpoints.closing(manager),
        contextlib.closing(tracker),
        contextlib.closing(profiler),
        contextlib.closing(iterator),
        progress(total=settings.steps, initial=start, unit="step", logged=False) as bar,
    ):
        if made_up:
            judge(start, made_up)
            tracker.write(start, made_up)
            if best is not None and is_first_host():
                best.write(run_dir)
        while done < settings.steps and not stopped:
            if first is None:
                profiler.before(done)
            taken = advance(done, trainable, optimizer_state) if first is None else first
            trainable, optimizer_state, metrics, host_batch = taken
            first = None
            done += 1
            throughput.stepped()
            bar.update()
            guard.watch(done, host_batch, metrics)
            stopped = watch.stop_at(done, manager)
            finished = done == settings.steps
            if done == start + 1 + STEPS_TIMED and not finished and is_first_host():
                guard.settle()
                each = (time.monotonic() - clock - validated) / STEPS_TIMED
                validates = validate is not None
                log.info("%s", cost_line(done, settings.steps, each, validates=validates))
            values: dict[str, float] = {}
            if done % settings.log_every == 0 or finished:
                guard.settle()
                measured = {name: float(value) for name, value in jax.device_get(metrics).items()}
                measured |= throughput.window()
                if measured.pop("finite"):
                    loss, values = measured["loss"], measured
                    if is_first_host():
                        log.info("%s", interval_line(done, settings.steps, measured))
                if is_first_host() and not (finished or short_of_room):
                    short_of_room = run_folder.lack_of_room(run_dir, checkpoint_bytes)
                    if short_of_room:  # saved while there still is room for it
                        stopped = watch.ask() or stopped
            profiler.behind(done, metrics)
            due = done % settings.checkpoint_every == 0 or finished or stopped
            if due:
                # What has been done is saved before a validation, which takes long and may fail.
                save(done, trainable, optimizer_state)
            found: dict[str, float] = {}
            better = False
            if validate is not None and (done % settings.validate_every == 0 or finished) and not stopped:
                guard.settle()
                found = validate(trainable, frozen)
                throughput.paused(found["validation/seconds"])
                validated += found["validation/seconds"]
                values |= found
                better = judge(done, found)
                # A signal that came meanwhile stops here; several hosts agree behind their next step.
                stopped = jax.process_count() == 1 and watch.stop_at(done, manager)
            if values:
                tracker.write(done, values)
            if (better or stopped) and not due:
                save(done, trainable, optimizer_state)
            if better:
                # Named only when it is whole: until then the best one before it stays.
                with checkpoints.naming_the_newest(manager):
                    manager.wait_until_finished()
            if found and best is not None and is_first_host():
                best.write(run_dir)
        if short_of_room and done < settings.steps:
            raise SpaceDriveError(f"stopped and saved at step {done}: {short_of_room}")
    seconds = time.monotonic() - started
    return TrainResult(run_dir, done, start, loss, seconds, done == settings.steps, guard.skipped, best)


def _resolved(records: str) -> str:
    """The records folders with absolute paths, written as the config has them."""
    sources = records_sources(records)
    if len(sources) == 1:
        return str(place(records).resolve())
    return ",".join(f"{place(folder).resolve()}:{weight}" for folder, weight in sources)

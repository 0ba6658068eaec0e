"""The training run, from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from spacedrive_jax.config import Config, to_json
from spacedrive_jax.console import progress
from spacedrive_jax.data.loader import position, seek, training_iterator, training_samples
from spacedrive_jax.data.records import records_sources
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.training import checkpoints, run_folder
from spacedrive_jax.training.checkpoints import base_fingerprint
from spacedrive_jax.training.fault_tolerance import NonfiniteGuard, PreemptionWatch
from spacedrive_jax.training.sharding import (
    check_batch_size,
    check_replication,
    make_mesh,
    place_batch,
    replicated,
)
from spacedrive_jax.training.state import check_start, count, init_train_state
from spacedrive_jax.training.step import make_train_step
from spacedrive_jax.training.throughput import Throughput, interval_line, opening_line
from spacedrive_jax.training.trackers import Trackers

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Where a run stands when `train` returns."""

    run_dir: Path
    step: int
    loss: float
    """The last one logged."""
    seconds: float
    finished: bool
    """False where SIGTERM stopped the run early; `--resume` goes on."""
    skipped: int
    """Steps left out because loss or gradient was not finite."""


@dataclasses.dataclass(frozen=True)
class ProfileWindow:
    """Steps to trace with the profiler, into RUN/profile."""

    start: int
    steps: int


def train(
    config: Config,
    *,
    resume: bool = False,
    step: int | None = None,
    accept_changes: bool = False,
    skip_nonfinite: int = 0,
    profile: ProfileWindow | None = None,
) -> TrainResult:
    """Trains to `config.train.steps`, writing checkpoints, metrics and provenance to the run folder.

    SIGTERM saves a checkpoint and returns early.

    Args:
        config: the whole run.
        resume: go on from the newest checkpoint of the run folder.
        step: go on from this checkpoint instead; later ones are set aside (`RUN/set_aside`).
        accept_changes: resume although the config or the records differ from the run's.
        skip_nonfinite: how many steps whose loss or gradient is not finite to leave out before giving up.
        profile: steps to trace; None for none.

    Raises:
        SpaceDriveError: the run folder is taken or cannot be written, the config of a resumed run differs,
            the disk is full, or the data is not there.
        FloatingPointError: the loss or gradient became nan or infinite too often.
    """
    with run_folder.lock(config.directory):
        return _train(
            config,
            resume=resume,
            step=step,
            accept_changes=accept_changes,
            skip_nonfinite=skip_nonfinite,
            profile=profile,
        )


def _train(
    config: Config,
    *,
    resume: bool,
    step: int | None,
    accept_changes: bool,
    skip_nonfinite: int,
    profile: ProfileWindow | None,
) -> TrainResult:
    started = time.monotonic()
    settings = config.train
    if settings.max_to_keep < 1:
        raise ConfigError(
            f"train.max_to_keep is {settings.max_to_keep}: at least the newest must stay, give 1 "
            "or more (--train.max-to-keep)"
        )
    mesh = make_mesh(config.mesh)
    check_batch_size(settings.batch_size, mesh, pieces=settings.grad_accum_steps)
    check_start(config)
    samples = training_samples(config.data, config.model, config.train.batch_size)
    iterator = training_iterator(
        samples, config.data, batch_size=config.train.batch_size, seed=config.train.seed
    )
    run_dir = config.directory
    changes = run_folder.claim(run_dir, config, resume=resume, accept_changes=accept_changes)

    train_step = make_train_step(config, mesh)
    check_replication(nnx.merge_state(train_step.trainable, train_step.frozen), mesh)
    checkpoint_bytes = _bytes((train_step.trainable, train_step.optimizer_state))
    missing = run_folder.lack_of_room(run_dir, checkpoint_bytes)
    if missing:
        raise SpaceDriveError(missing)
    trainable, frozen = init_train_state(config, mesh)
    optimizer_state = train_step.initialize_optimizer(trainable)

    metadata = {
        "config": to_json(config),
        "records": _resolved(config.data.records),
        "records_fingerprint": samples.records.fingerprint,
        "weights": config.model.weights,
        "base_fingerprint": base_fingerprint(config, frozen, mesh),
        "trainable_parameters": count(trainable),
        "frozen_parameters": count(frozen),
    }
    if step is not None and run_folder.is_main_host():
        checkpoints.go_back_to(run_dir, step)
    manager = checkpoints.open_manager(run_dir, keep=settings.max_to_keep)
    start = manager.latest_step() or 0
    if start:
        if not accept_changes:
            saved = checkpoints.read_metadata(run_dir, start)
            checkpoints.check_metadata(saved, metadata)
            run_folder.check_config(saved, config, run_dir / "checkpoints" / str(start))
        trainable, optimizer_state, where, _ = checkpoints.restore(manager, start, trainable, optimizer_state)
        seek(iterator, where, config.train.batch_size)
    if run_folder.is_main_host():
        shown = {name: value for name, value in metadata.items() if name != "config"}
        run_folder.write_provenance(run_dir, shown | {"accepted_changes": changes})
        opening = opening_line(
            name=config.name,
            trainable=count(trainable),
            frozen=count(frozen),
            keyframes=len(samples),
            batch_size=settings.batch_size,
            start=start,
            steps=settings.steps,
        )
        log.info("%s", opening)
    tracker = Trackers(run_dir, config, start)

    done, loss, stopped = start, float("nan"), False
    guard = NonfiniteGuard(run_dir, samples, skip_nonfinite)
    throughput = Throughput(config, started, samples.clock)
    with (
        PreemptionWatch() as watch,
        checkpoints.closing(manager),
        contextlib.closing(tracker),
        progress(total=settings.steps, initial=start, unit="step", logged=False) as bar,
    ):
        while done < settings.steps and not stopped:
            if profile is not None and done == profile.start:
                jax.profiler.start_trace(str(run_dir / "profile"))
            waiting = time.monotonic()
            host_batch = next(iterator)
            throughput.waited(time.monotonic() - waiting)
            batch = place_batch(host_batch, mesh)
            step_number = jax.device_put(np.int32(done), replicated(mesh))
            with jax.transfer_guard("disallow"):
                trainable, optimizer_state, metrics = train_step.run(
                    trainable, optimizer_state, frozen, batch, step_number
                )
            done += 1
            throughput.stepped()
            bar.update()
            guard.watch(done, host_batch, metrics)
            stopped = watch.stop_at(done, manager)
            finished = done == settings.steps
            short_of_room = None
            if done % settings.log_every == 0 or finished:
                guard.settle()
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                values |= throughput.window()
                if values.pop("finite"):
                    loss = values["loss"]
                    tracker.write(done, values)
                    if run_folder.is_main_host():
                        log.info("%s", interval_line(done, settings.steps, values))
                short_of_room = run_folder.lack_of_room(run_dir, checkpoint_bytes)
            if profile is not None and done == profile.start + profile.steps:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
            if done % settings.checkpoint_every == 0 or finished or stopped or short_of_room:
                # What has been done is saved while there still is room for it.
                guard.settle()
                where = position(iterator, config.train.batch_size)
                checkpoints.save(manager, done, trainable, optimizer_state, where, metadata)
            if short_of_room and not finished:
                raise SpaceDriveError(f"stopped and saved at step {done}: {short_of_room}")
    seconds = time.monotonic() - started
    return TrainResult(run_dir, done, loss, seconds, done == settings.steps, guard.skipped)


def _resolved(records: str) -> str:
    """The records folders with absolute paths, written as the config has them."""
    sources = records_sources(records)
    if len(sources) == 1:
        return str(Path(records).resolve())
    return ",".join(f"{Path(folder).resolve()}:{weight}" for folder, weight in sources)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

"""The training run, from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tensorboardX import SummaryWriter

from spacedrive_jax.config import Config, to_json
from spacedrive_jax.console import UserError, progress
from spacedrive_jax.data.pipeline import training_iterator, training_samples
from spacedrive_jax.training import checkpoints
from spacedrive_jax.training.sharding import (
    check_batch_size,
    check_replication,
    make_mesh,
    place_batch,
    replicated,
)
from spacedrive_jax.training.state import count, start_state
from spacedrive_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Where a finished run stands."""

    run_dir: Path
    step: int
    loss: float
    seconds: float


def train(config: Config, *, resume: bool = False) -> TrainResult:
    """Trains to `config.train.steps`, writing checkpoints, metrics and provenance to the run folder.

    Args:
        config: the whole run.
        resume: go on from the newest checkpoint of the run folder.

    Raises:
        UserError: the run folder is taken, the config of a resumed run differs, or the data is not there.
        FloatingPointError: the loss became nan or infinite.
    """
    started = time.monotonic()
    settings = config.train
    mesh = make_mesh(config.mesh)
    check_batch_size(settings.batch_size, mesh)
    samples = training_samples(config)
    iterator = training_iterator(samples, config)
    run_dir = config.directory
    _claim(run_dir, config, resume=resume)

    train_step = make_train_step(config, mesh)
    check_replication(nnx.merge_state(train_step.trainable, train_step.frozen), mesh)
    trainable, frozen = start_state(config, mesh)
    optimizer_state = train_step.initialize_optimizer(trainable)

    manager = checkpoints.open_manager(run_dir, keep=settings.keep_checkpoints)
    start = manager.latest_step() or 0
    if start:
        trainable, optimizer_state = checkpoints.restore(manager, start, trainable, optimizer_state, iterator)
    _write_provenance(run_dir, config, samples.records.fingerprint, trainable, frozen)
    is_host = jax.process_index() == 0
    metrics_file = _open_metrics(run_dir / "metrics.jsonl", start) if is_host else None
    board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start) if is_host else None

    loss_value = float("nan")
    window_start, window_steps = time.monotonic(), 0
    bar = progress(range(start, settings.steps), initial=start, total=settings.steps, unit="step")
    for step in bar:
        batch = place_batch(next(iterator), mesh)
        step_array = jax.device_put(np.int32(step), replicated(mesh))
        with jax.transfer_guard("disallow"):
            trainable, optimizer_state, metrics = train_step.run(
                trainable, optimizer_state, frozen, batch, step_array
            )
        window_steps += 1
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            loss_value = values["loss"]
            if not np.isfinite(loss_value):
                manager.wait_until_finished()
                raise FloatingPointError(
                    f"the loss is {loss_value} at step {done}; the newest checkpoint is step "
                    f"{manager.latest_step()}. Lower train.learning_rate or look at the data"
                )
            seconds = (time.monotonic() - window_start) / window_steps
            values |= {"step_seconds": seconds, "samples_per_second": settings.batch_size / seconds}
            bar.set_postfix(loss=f"{loss_value:.3f}", metres=f"{values['displacement_m']:.2f}")
            if metrics_file is not None and board is not None:
                metrics_file.write(json.dumps({"step": done, **values}) + "\n")
                metrics_file.flush()
                for name, value in values.items():
                    board.add_scalar(name, value, done)
            window_start, window_steps = time.monotonic(), 0
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            checkpoints.save(manager, done, trainable, optimizer_state, iterator)
    manager.wait_until_finished()
    manager.close()
    if metrics_file is not None and board is not None:
        metrics_file.close()
        board.close()
    return TrainResult(run_dir, settings.steps, loss_value, time.monotonic() - started)


def _claim(run_dir: Path, config: Config, *, resume: bool) -> None:
    """Writes the config into a new run folder, or checks it against the one being resumed."""
    file = run_dir / "config.json"
    if file.exists() and not resume:
        raise UserError(f"{run_dir} holds a run already: --resume continues it, --run-dir starts elsewhere")
    if file.exists():
        changes = config_changes(json.loads(file.read_text()), json.loads(to_json(config)))
        if changes:
            raise UserError(
                f"{run_dir} was started with another config: {'; '.join(changes)}. Resume with the same "
                "one, or start elsewhere with --run-dir"
            )
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(to_json(config))


def config_changes(old: Any, new: Any, place: str = "") -> list[str]:
    """Lists the fields in which two configs (as JSON values) differ, as `field: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        parts = (config_changes(old.get(name), new.get(name), f"{place}.{name}") for name in names)
        return [change for part in parts for change in part]
    return [] if old == new else [f"{place.lstrip('.')}: {old} -> {new}"]


def _write_provenance(
    run_dir: Path, config: Config, fingerprint: str, trainable: nnx.State, frozen: nnx.State
) -> None:
    if jax.process_index():
        return
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
    facts = {
        "records": str(Path(config.data.records).resolve()),
        "records_fingerprint": fingerprint,
        "trainable_parameters": count(trainable),
        "frozen_parameters": count(frozen),
        "devices": [device.device_kind for device in jax.devices()],
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in packages},
    }
    (run_dir / "run.json").write_text(json.dumps(facts, indent=2) + "\n")


def _open_metrics(path: Path, start: int) -> Any:
    """Opens the metrics log behind step `start`: lines of steps that will be run again are dropped."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line)
        except json.JSONDecodeError:  # the line that was being written when the process died
            break
    path.write_text("".join(line + "\n" for line in kept))
    return path.open("a")

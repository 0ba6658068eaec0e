"""What a run would be: `train --dry-run` looks at all that it would stand on, and writes nothing."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable

from flax import nnx
from jax.sharding import Mesh

from spacedrive_jax.config import Config, depth_advice
from spacedrive_jax.data.loader import MixedSamples, training_samples
from spacedrive_jax.data.survey import Survey, problems_of, survey
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.io import is_bucket
from spacedrive_jax.models.families import family_of
from spacedrive_jax.training import checkpoints, run_folder
from spacedrive_jax.training.sharding import (
    bytes_per_device,
    check_batch_size,
    check_replication,
    make_mesh,
    total_bytes,
)
from spacedrive_jax.training.state import check_start, count
from spacedrive_jax.training.step import make_train_step
from spacedrive_jax.training.trackers import check_trackers
from spacedrive_jax.training.weights import resumable


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What a run would be."""

    found: Survey
    problems: tuple[str, ...]
    """What would stop it, with the way out; empty where nothing would."""
    trainable: int
    frozen: int
    state_bytes: int
    """Weights, optimiser state and gradients of one device."""
    checkpoint_bytes: int
    free_bytes: int | None
    """On the disk of the run folder; None where it is in a bucket."""
    epochs: float


def preflight(
    config: Config,
    *,
    resume: bool = False,
    step: int | None = None,
    accept_changes: bool = False,
    overwrite: bool = False,
    validation: Callable[[Config, Mesh], object] | None = None,
) -> Preflight:
    """Looks at every keyframe, at the weights' shapes, the disk and the run folder; writes nothing.

    Args:
        config: the whole run.
        resume: it goes on with the run that the folder holds.
        step: it goes on from this checkpoint.
        accept_changes: it goes on although the config differs from the run's.
        overwrite: it replaces the run that the folder holds.
        validation: makes what `train.validate_every` asks for; None leaves it unlooked at.

    Raises:
        SpaceDriveError: there are no records, weights, tokenizer or depth, or mesh and batch do not go
            together: nothing further can be looked at.
    """
    settings, start = config.train, config
    mesh = make_mesh(config.mesh)
    check_batch_size(settings.batch_size, mesh, pieces=settings.grad_accum_steps)
    run_folder.check(
        config.directory, config, resume=resume, accept_changes=accept_changes, overwrite=overwrite
    )
    if step is not None:
        checkpoints.later_than(config.directory, step)
    if resume and checkpoints.steps_of(config.directory):
        start = resumable(config)
    check_start(start)
    samples = training_samples(
        config.data, config.model, settings.batch_size, advice=depth_advice(config), keep=False
    )
    found = survey(samples)
    built = make_train_step(config, mesh)
    saved = total_bytes((built.trainable, built.optimizer_state))
    # What trains has a gradient of its own size.
    state = bytes_per_device((built.trainable, built.optimizer_state, built.frozen, built.trainable))
    there = None if is_bucket(config.directory) else run_folder.nearest_folder(config.directory)
    builder = (samples.parts[0] if isinstance(samples, MixedSamples) else samples).builder
    problems = problems_of(builder, found)
    try:
        check_replication(nnx.merge_state(built.trainable, built.frozen), mesh)
        check_trackers(config, log_in=False)
        if validation is not None and settings.validate_every:
            validation(config, mesh)
    except SpaceDriveError as error:
        problems.append(str(error))
    if there is not None and not os.access(there, os.W_OK | os.X_OK):
        problems.append(f"{there} cannot be written to: mend its mode or owner, or give another --run-dir")
    missing = run_folder.lack_of_room_at_the_start(config, saved, overwrite=overwrite)
    if missing:
        problems.append(missing)
    return Preflight(
        found=found,
        problems=tuple(problems),
        trainable=count(built.trainable),
        frozen=count(built.frozen),
        state_bytes=state,
        checkpoint_bytes=saved,
        free_bytes=None if there is None else shutil.disk_usage(there).free,
        epochs=settings.steps * settings.batch_size / max(len(samples), 1),
    )


def describe(config: Config, seen: Preflight) -> str:
    """The plan in a few lines."""
    data, train, found = config.data, config.train, seen.found
    decoder = config.model.vlm.decoder
    base = config.model.weights or "random numbers"
    lines = [
        f"{config.name}: {family_of(config.model.vlm).name}, {decoder.num_layers} layers of width "
        f"{decoder.hidden_size}, from {base}",
        f"  {seen.trainable:,} parameters train, {seen.frozen:,} are frozen",
        f"  {found.keyframes:,} keyframes of {data.records}, {train.batch_size} a step, {train.steps:,} "
        f"steps: {seen.epochs:.1f} epochs",
        f"  needed: sequence_length {found.sequence_length} of {data.sequence_length}, max_targets "
        f"{found.max_targets} of {data.max_targets}, max_coordinates {found.max_coordinates} of "
        f"{data.max_coordinates}",
        f"  memory: {seen.state_bytes / 1e9:.2f} GB a device for weights, optimiser and gradients, "
        "activations on top",
        f"  disk: checkpoints of {seen.checkpoint_bytes / 1e9:.2f} GB in {config.directory}"
        + ("" if seen.free_bytes is None else f", {seen.free_bytes / 1e9:.0f} GB free"),
    ]
    return "\n".join(lines)

"""Planners over trained models: one keyframe at a time, many at once, or as a program to hand on.

What a planner does with samples is `inference.planner`'s business; here it gets its model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.config import to_json
from spacedrive_jax.data.schema import Record, own_record
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.inference.answers import Generation
from spacedrive_jax.inference.generate import planning_step
from spacedrive_jax.inference.open_model import TrainedModel, check_trained, open_config, open_trained_model
from spacedrive_jax.inference.planner import (
    BatchPlanner,
    Plan,
    doubled_sizes,
    export_example,
    longest_prompt,
    write_export,
)
from spacedrive_jax.models.partitioning import BATCH_AXES
from spacedrive_jax.training.sharding import mesh_here, place_batch


def plan(model: TrainedModel, record: Record) -> Plan:
    """What a model plans at one keyframe; `planner_of` keeps a planner for many and several at a time.

    Args:
        model: from `open_model`.
        record: the keyframe, of a records folder.

    Raises:
        SpaceDriveError: the record is not of the record's shapes and types, or lacks something that the
            model needs.
    """
    check_trained(model, "plan")
    if not isinstance(record, Mapping):
        raise DataError(f"plan takes a record (open_records(FOLDER)[0]), not {type(record).__name__}")
    record = own_record(record)
    planner = planner_of(model, record, most=math.prod(model.mesh.shape[axis] for axis in BATCH_AXES))
    return planner.plan([planner.sample(record)])[0]


def open_planner(
    checkpoint: Path, longest: Record, *, average: bool = False, most: int = 8, mesh: Mesh | None = None
) -> BatchPlanner:
    """Loads a checkpoint for planning.

    Args:
        checkpoint: see `open_trained_model`.
        longest: a record whose prompt is as long as any will be, but for the command.
        average: take the moving average of the weights.
        most: largest batch.
        mesh: devices of this host to plan on; None for the run's where it fits them, else all of them.

    Raises:
        SpaceDriveError: it cannot be opened, or `most` does not suit its mesh.
    """
    if mesh is None:
        mesh = mesh_here(open_config(checkpoint).mesh, jax.local_devices())
    return planner_of(open_trained_model(checkpoint, average=average, mesh=mesh), longest, most=most)


def planner_of(trained: TrainedModel, longest: Record, *, most: int = 8) -> BatchPlanner:
    """A planner over a model that is open already; arguments and errors as in `open_planner`."""
    config = trained.config
    builder = SampleBuilder(config.data, config.model, answer=False)
    program = planning_step(trained.graph, trained.mesh, config, builder.tokenizer)

    def answer(batch: DrivingBatch) -> Generation:
        placed = place_batch(batch, trained.mesh)
        return jax.device_get(program(trained.trainable, trained.frozen, placed))

    sizes = batch_sizes(trained.mesh, most)
    return BatchPlanner(config, builder, answer, sizes, longest_prompt(builder, longest))


def batch_sizes(mesh: Mesh, most: int) -> list[int]:
    """Batch sizes up to `most`, each twice the one before, from as few as the mesh divides a batch over.

    Raises:
        ConfigError: `most` is less than that.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if most < ways:
        raise ConfigError(f"the largest batch {most} is less than the {ways} devices that share a batch")
    return doubled_sizes(ways, most)


def export_planner(
    checkpoint: Path, folder: Path, example: Record, *, average: bool = False, most: int = 8
) -> dict[str, Any]:
    """Writes a checkpoint's planning step as StableHLO (see `spacedrive_jax.inference.planner`).

    Args:
        checkpoint: see `open_trained_model`.
        folder: to write; must not exist.
        example: a record with everything a sample needs, its prompt as long as any will be.
        average: export the moving average of the weights.
        most: largest batch, where sizes must be fixed.

    Raises:
        SpaceDriveError: the checkpoint cannot be opened, or lies on several devices; the folder exists.
    """
    trained = open_trained_model(checkpoint, average=average)
    if trained.mesh.size > 1:
        raise ConfigError(
            f"an export runs on one device, the model lies on {trained.mesh.size}: export where there is one "
            "(JAX_PLATFORMS=cpu, CUDA_VISIBLE_DEVICES=0)"
        )
    config = trained.config
    builder = SampleBuilder(config.data, config.model, answer=False)
    program = planning_step(trained.graph, trained.mesh, config, builder.tokenizer)
    leaves, tree = jax.tree.flatten((trained.trainable, trained.frozen))
    names = [f"{number:05d}" for number in range(len(leaves))]

    def step(weights: dict[str, jax.Array], batch: DrivingBatch) -> Generation:
        trainable, frozen = jax.tree.unflatten(tree, [weights[name] for name in names])
        return program(trainable, frozen, batch)

    return write_export(
        folder,
        to_json(config),
        dict(zip(names, leaves, strict=True)),
        step,
        export_example(builder, example),
        most=most,
    )

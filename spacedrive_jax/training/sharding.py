"""Where arrays live: logical axis names resolved to mesh axes by one table."""

from __future__ import annotations

import logging
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.config import MeshConfig
from spacedrive_jax.console import UserError

log = logging.getLogger(__name__)

BATCH_AXES = ("data", "fsdp")
"""Samples are spread over both; parameters over `fsdp` and `tensor`."""

RULES: tuple[tuple[str, str], ...] = (
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("embed", "fsdp"),
    ("vision_mlp", "tensor"),
    ("vision_heads", "tensor"),
    ("vision_embed", "fsdp"),
)
"""Logical axis to mesh axis; a name that is not here is never sharded."""


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh over all devices with axes data, fsdp, tensor.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    count = jax.device_count()
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0:
        sizes[sizes.index(-1)] = count // known
    if -1 in sizes or math.prod(sizes) != count:
        raise UserError(
            f"mesh data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} does not fit {count} "
            "devices: the axes must multiply to that (one may be -1)"
        )
    return jax.make_mesh(tuple(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def parameter_sharding(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where one parameter lives.

    Args:
        names: logical axis names; fewer than axes leave the rest whole.
        shape: an axis that does not divide over its mesh axis stays whole, and the log says so.
        mesh: from `make_mesh`.
    """
    rules = dict(RULES)
    axes: list[str | None] = []
    for name, size in zip(names, shape, strict=False):
        axis = None if name is None else rules.get(name)
        if axis is not None and (size % mesh.shape[axis] or axis in axes):
            log.info("axis %s of %s %s stays whole on mesh %s", name, names, shape, dict(mesh.shape))
            axis = None
        axes.append(axis)
    return NamedSharding(mesh, PartitionSpec(*axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place_batch(batch: DrivingBatch, mesh: Mesh) -> DrivingBatch:
    """Puts this host's samples on its devices as part of the global batch."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch
    )


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Refuses a batch that does not divide over the devices.

    Raises:
        UserError: naming both numbers.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % ways:
        raise UserError(
            f"batch size {batch_size} does not divide over {ways} devices (mesh axes data x fsdp)"
        )

"""Where arrays live: meshes, and the placement of parameters and batches on them.

Machines may come in parts, TPU slices or GPU nodes, that only the data-centre network (DCN) joins. Inside a
part chips have fast links of their own (ICI, NVLink). jaxlib numbers the parts by `slice_index`, GPU nodes
too. A mesh goes over them with its axes that send least: `data` first, then `fsdp`; `tensor`, which sends
activations in every block, stays inside.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.config import MeshConfig
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.models.partitioning import BATCH_AXES, RULES, AxisNames, logical_to_mesh_axes

FIND = -1
"""As many slices as the devices say."""


@runtime_checkable
class Device(Protocol):
    """What a layout over slices asks of a device: jax's own, or one that is not there."""

    @property
    def platform(self) -> str:
        """`tpu`, `gpu` or `cpu`."""

    @property
    def process_index(self) -> int:
        """The host that it belongs to."""


def slice_of(device: Device) -> int:
    """The number of a device's slice or node; 0 where its platform has none."""
    return int(getattr(device, "slice_index", 0) or 0)


def split_over_slices(sizes: Sequence[int], slices: int) -> tuple[int, int, int]:
    """How often each axis is repeated over slices.

    Args:
        sizes: data, fsdp, tensor over all devices.
        slices: how many slices.

    Returns:
        The DCN part of each axis; their product is `slices`.

    Raises:
        ConfigError: data x fsdp does not divide over the slices.
    """
    data, fsdp, tensor = sizes
    over_data = math.gcd(data, slices)
    over_fsdp = math.gcd(fsdp, slices // over_data)
    if over_data * over_fsdp != slices:
        raise ConfigError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not lie over {slices} slices (TPU slices "
            "or GPU nodes): data, or data x fsdp, must be a multiple of them, and tensor stay inside one"
        )
    return over_data, over_fsdp, 1


def slice_devices(sizes: Sequence[int], devices: Sequence[Device], slices: int = FIND) -> np.ndarray | None:
    """The devices of a mesh that goes over slices.

    Args:
        sizes: data, fsdp, tensor; their product is the number of devices.
        devices: of the whole run.
        slices: how many parts the machine has; `FIND` takes the devices' word. A number that the devices do
            not say themselves means processes: hosts of a platform that knows no slices.

    Returns:
        Devices, one axis for each size; None where there is but one slice.

    Raises:
        ConfigError: the devices do not lie on so many slices, on some are more than on others, or the mesh
            does not divide over them.
    """
    numbers = [slice_of(device) for device in devices]
    by_process = slices not in (FIND, 1) and len(set(numbers)) == 1
    if by_process:
        numbers = [device.process_index for device in devices]
    found = Counter(numbers)
    if slices != FIND and len(found) != slices and not (slices == 1 and len(found) == 1):
        part = "processes" if by_process else "slices (TPU slices or GPU nodes)"
        raise ConfigError(f"mesh.slices {slices}, but the devices lie on {len(found)} {part}: set it to -1")
    if len(found) == 1:
        return None
    if len(set(found.values())) > 1:
        raise ConfigError(f"a mesh needs as many devices on every slice, found {dict(sorted(found.items()))}")
    dcn = split_over_slices(sizes, len(found))
    inside = [size // repeats for size, repeats in zip(sizes, dcn, strict=True)]
    options: dict[str, Any] = {"process_is_granule": by_process, "allow_split_physical_axes": True}
    return mesh_utils.create_hybrid_device_mesh(inside, dcn, devices, **options)


def devices_along_links(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of one slice (or of no TPU at all) in the order of its links.

    Mesh axes share one of the machine's where each cannot have its own: 16 x 2 x 2 on 8x8 chips.
    `jax.make_mesh` lets them on v5e alone.

    Raises:
        NotImplementedError: not even so do they follow the links.
    """
    try:
        return jax.make_mesh(tuple(sizes), ("data", "fsdp", "tensor"), devices=devices).devices
    except NotImplementedError:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


log = logging.getLogger(__name__)

REPLICATED_LIMIT = 0.05
"""Largest share of the parameters that may lie whole on every device of a sharded mesh."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp, tensor; over several TPU slices or GPU nodes `data` first, then `fsdp`.

    Args:
        config: how many devices along each axis, and slices.
        devices: all devices of the run when None; a described topology's when compiling ahead of time.

    Raises:
        ConfigError: the axes do not multiply to the number of devices, or do not follow their links.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    count = jax.device_count() if devices is None else len(devices)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0:
        sizes[sizes.index(-1)] = count // known
    if -1 in sizes or math.prod(sizes) != count:
        raise ConfigError(
            f"mesh data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} does not fit {count} "
            "devices: the axes must multiply to that (one may be -1)"
        )
    devices = jax.devices() if devices is None else devices
    try:
        placed = slice_devices(sizes, devices, config.slices)
        if placed is None:
            placed = devices_along_links(sizes, devices)
        return Mesh(placed, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    except NotImplementedError as error:
        raise ConfigError(
            f"mesh data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]} does not lie along the machine's "
            f"links: {error}"
        ) from error


def mesh_here(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A run's mesh where it fits the devices there are, else all of them along `fsdp`: for a model that was
    trained elsewhere.

    Args:
        config: the run's.
        devices: those to use; None for all of the run's hosts.
    """
    try:
        return make_mesh(config, devices)
    except SpaceDriveError as error:
        count = jax.device_count() if devices is None else len(devices)
        log.info("%s; all %d devices along fsdp instead", error, count)
        return make_mesh(MeshConfig(data=1, fsdp=-1), devices)


def parameter_sharding(names: AxisNames, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Where one parameter lives.

    Args:
        names: logical axis names; fewer than axes leave the rest whole.
        shape: an axis that does not divide over its mesh axis stays whole, and the log says so.
        mesh: from `make_mesh`, or the axes of such a one.
    """
    spec = logical_to_mesh_axes(names, shape, mesh)
    for name, axis in zip(names, spec, strict=False):
        if axis is None and any(mesh.shape[wanted] > 1 for wanted in dict(RULES).get(name or "", ())):
            log.info("axis %s of %s %s stays whole on mesh %s", name, names, shape, dict(mesh.shape))
    return NamedSharding(mesh, spec)


def check_replication(
    state: nnx.State, mesh: Mesh | AbstractMesh, *, limit: float = REPLICATED_LIMIT
) -> None:
    """Refuses a model too much of which would lie whole on every device.

    Only where the mesh is meant to split the model (fsdp or tensor above 1).

    Args:
        state: abstract or real parameters with shardings.
        mesh: from `make_mesh`, or the axes of such a one.
        limit: largest share of the numbers that may be whole everywhere.

    Raises:
        ConfigError: naming the largest such tensors.
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    leaves = [(".".join(map(str, path)), variable.get_value()) for path, variable in nnx.to_flat_state(state)]
    whole = [(leaf.size, name) for name, leaf in leaves if leaf.sharding.is_fully_replicated]
    total, kept = sum(leaf.size for _, leaf in leaves), sum(size for size, _ in whole)
    if kept > limit * total:
        largest = ", ".join(f"{name} ({size:,})" for size, name in sorted(whole, reverse=True)[:8])
        raise ConfigError(
            f"{kept:,} of {total:,} parameters ({kept / total:.1%}, limit {limit:.1%}) would lie whole on "
            f"every device of mesh {dict(mesh.shape)}: {largest}. Choose mesh axes that divide the model's "
            "widths, or name their axes in RULES of spacedrive_jax/models/partitioning.py"
        )


def total_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree, abstract or real, over all devices; what is replicated counts once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_per_device(tree: Any) -> int:
    """Bytes of one device's shards of all arrays in a tree, abstract (with shardings) or real."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place_everywhere(value: np.ndarray | np.generic, mesh: Mesh) -> jax.Array:
    """Puts what every host has on all devices.

    `jax.device_put` would do it too, but has the hosts compare their values in a collective of its own: in
    the loop of steps each host would wait there for all work under way.
    """
    return jax.make_array_from_callback(value.shape, replicated(mesh), lambda _: np.asarray(value))


def place_batch(batch: DrivingBatch, mesh: Mesh) -> DrivingBatch:
    """Puts a whole batch on the devices of a mesh, all of this host."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch
    )


def local_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """The samples of a global batch that this host's devices hold, in order.

    They need not stand together: on TPUs a mesh follows the links, not the hosts. Hosts have some in common
    where `tensor` lies over them.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for place in places for row in range(*place[0].indices(batch_size))})  # type: ignore[index]


def place_rows(batch: DrivingBatch, rows: Sequence[int], batch_size: int, mesh: Mesh) -> DrivingBatch:
    """Puts this host's samples on its devices as part of a global batch, wherever the mesh wants them.

    Args:
        batch: the samples of `rows`.
        rows: from `local_rows`.
        batch_size: of the global batch.
        mesh: from `make_mesh`.
    """
    sharding, places = batch_sharding(mesh), {row: place for place, row in enumerate(rows)}

    def place(leaf: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first, behind, _ = index[0].indices(batch_size)  # neighbours in the batch, so here: no copy
            return leaf[places[first] : places[first] + behind - first]

        return jax.make_array_from_callback((batch_size, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(lambda leaf: place(np.asarray(leaf)), batch)


def check_batch_size(batch_size: int, mesh: Mesh, *, pieces: int = 1) -> None:
    """Refuses a batch that does not divide over the devices, in every piece of it.

    Raises:
        ConfigError: naming the numbers.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % (ways * pieces):
        accumulated = f" in {pieces} pieces (train.grad_accum_steps)" if pieces > 1 else ""
        raise ConfigError(
            f"batch size {batch_size} does not divide over {ways} devices (mesh axes data x fsdp)"
            f"{accumulated}"
        )

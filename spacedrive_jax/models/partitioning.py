"""How parameters and activations lie on a mesh: axis names, the one ordered table that maps them, drawing.

Parameters carry names as metadata (`layers.parameter`) and are drawn under jit, sharded from the start;
activations are pinned with `constrain`. Which devices there are is known only to the step that is traced: it
opens `activations_on(mesh)` around the model. Outside of it `constrain` does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")
"""Mesh axes that samples are spread over."""

RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # Parameters: width over fsdp (gathered layer by layer), the inner axis of a product over tensor.
    ("vocab", ("tensor",)),
    ("mlp", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("embed", ("fsdp",)),
    ("vision_mlp", ("tensor",)),
    ("vision_heads", ("tensor",)),
    ("vision_embed", ("fsdp",)),
    # Activations: the residual stream is cut along the sequence too (sequence parallelism, Korthikanti et
    # al. 2022); the cameras of the vision tower are spread over every device there is.
    ("batch", BATCH_AXES),
    ("lookup", ("data",)),  # samples while rows of a table are looked up whose width lies over fsdp
    ("sequence", ("tensor",)),
    ("images", ("data", "fsdp", "tensor")),
)
"""Logical axis to mesh axes, in order of precedence within one array; a name not here is never sharded."""

AxisNames = tuple[str | None, ...]


def without_fsdp(names: AxisNames) -> AxisNames:
    """The names of a parameter once it is gathered for its product: axes that lie over fsdp become whole."""
    return tuple(None if dict(RULES).get(name or "") == ("fsdp",) else name for name in names)


FROM_WIDTH: Mapping[str, Any] = MappingProxyType({"out_sharding": ("embed", None), "eager_sharding": False})
"""`kernel_metadata` of an `nnx.Linear` whose inputs have the model's width."""


def logical_to_mesh_axes(
    names: AxisNames, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Mesh axes of one array.

    Args:
        names: logical axis names; fewer than axes leave the rest whole.
        shape: an axis takes the longest run of its mesh axes that divides it.
        mesh: with the axes data, fsdp, tensor.

    Returns:
        The partition; a mesh axis is used once, by the first rule of the table that wants it.
    """
    order = [name for name, _ in RULES]
    places = [place for place, name in enumerate(names[: len(shape)]) if name in order]
    used: set[str] = set()
    axes: list[tuple[str, ...] | None] = [None] * len(shape)
    for place in sorted(places, key=lambda place: order.index(str(names[place]))):
        wanted = [axis for axis in dict(RULES)[str(names[place])] if axis not in used]
        while wanted and shape[place] % math.prod(mesh.shape[axis] for axis in wanted):
            wanted.pop()
        used.update(wanted)
        axes[place] = tuple(wanted) or None
    return PartitionSpec(*(axis[0] if axis is not None and len(axis) == 1 else axis for axis in axes))


def activations_on(mesh: Mesh) -> jax.sharding.use_abstract_mesh:
    """Context in which `constrain` pins activations to a mesh; open it around the traced model."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current_mesh() -> AbstractMesh | None:
    """The mesh that the traced step opened; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names) else mesh


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on this host. Where several hosts hold it, all of them have to ask for it."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(jax.device_get(array))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation's sharding by the logical names of its axes; the identity without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, logical_to_mesh_axes(names, x.shape, mesh))
    )


Module = TypeVar("Module", bound=nnx.Module)

ShardingOf = Callable[[AxisNames, tuple[int, ...]], jax.sharding.Sharding]
"""From a parameter's logical axis names and shape to where it lives."""


def axis_names(variable: nnx.Variable) -> AxisNames:
    """Logical axis names that `layers.parameter` left on a variable; none known means never sharded."""
    return variable.get_metadata().get("out_sharding") or (None,) * len(variable.shape)


def initialize(
    build: Callable[[nnx.Rngs], Module], *, seed: int, shardings: ShardingOf | None = None
) -> Module:
    """Builds a module with freshly drawn parameters, each on its own devices.

    Args:
        build: constructor from random streams, for example `lambda rngs: QwenVL(config, ..., rngs=rngs)`.
        seed: seed of the streams.
        shardings: placement of each parameter; None puts them on the default device.

    Returns:
        The module.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(seed))))
    return nnx.merge(graph, draw_parameters(build, seed=seed, shardings=shardings))


def draw_parameters(
    build: Callable[[nnx.Rngs], nnx.Module],
    *,
    seed: int,
    wanted: Any = ...,
    shardings: ShardingOf | None = None,
) -> nnx.State:
    """Draws the parameters of a module that a filter selects; the compiler drops the drawing of the rest.

    Args:
        build: constructor from random streams.
        seed: seed of the streams.
        wanted: nnx filter; the default takes everything.
        shardings: placement of each parameter; None puts them on the default device.

    Returns:
        Their state, the same values whatever the filter.
    """

    def draw(key: jax.Array) -> nnx.State:
        return nnx.state(build(nnx.Rngs(key)), wanted)

    key = jax.random.key(seed)
    placement = None
    if shardings is not None:
        abstract = nnx.to_flat_state(jax.eval_shape(draw, key))
        placement = nnx.from_flat_state(
            [
                (path, variable.replace(shardings(axis_names(variable), variable.shape)))
                for path, variable in abstract
            ]
        )
    # Drawing runs once, so on CPU a quick compile beats quick code (some 4 s against 14 s for a tiny model).
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(draw, out_shardings=placement, compiler_options=options)(key)

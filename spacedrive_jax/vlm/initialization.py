"""Draws parameters under jit: sharded from the start, and only those that are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from spacedrive_jax.vlm.layers import AxisNames

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
        build: Constructor from random streams, for example `lambda rngs: QwenVL(config, ..., rngs=rngs)`.
        seed: Seed of the streams.
        shardings: Placement of each parameter; None puts them on the default device.

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
        build: Constructor from random streams.
        seed: Seed of the streams.
        wanted: nnx filter; the default takes everything.
        shardings: Placement of each parameter; None puts them on the default device.

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

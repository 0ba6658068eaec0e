"""Layers stacked into one: parameters with a leading layer axis, applied by `jax.lax.scan`.

Tracing and compiling one block serves all of them, so compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from spacedrive_jax.vlm.config import ComputeConfig

Layer = TypeVar("Layer", bound=nnx.Module)
Carry = TypeVar("Carry")


def stack_layers(build: Callable[[nnx.Rngs], Layer], count: int, rngs: nnx.Rngs) -> Layer:
    """Builds `count` independent layers as one module.

    Args:
        build: Constructor of one layer from its random streams.
        count: Number of layers.
        rngs: Random streams; each layer draws from its own split.

    Returns:
        A module like one layer, whose every parameter has a leading axis named `layers`. It is not callable
        as it stands: `scan_layers` applies it.
    """
    vmapped = nnx.vmap(
        build, in_axes=0, out_axes=0, axis_size=count, transform_metadata={nnx.PARTITION_NAME: "layers"}
    )
    return nnx.split_rngs(splits=count)(vmapped)(rngs)


def scan_layers(
    stacked: Layer,
    apply: Callable[[Layer, Carry, Any], tuple[Carry, Any]],
    carry: Carry,
    per_layer: Any,
    compute: ComputeConfig,
    *,
    unroll: bool = False,
) -> tuple[Carry, Any]:
    """Applies stacked layers one after the other.

    Args:
        stacked: The module that `stack_layers` returned.
        apply: One layer's step: (layer, carry, this layer's inputs) to (carry, output).
        carry: What flows from layer to layer.
        per_layer: Pytree of arrays with a leading layer axis, sliced for each step.
        compute: Names the rematerialisation policy.
        unroll: Writes the layers out instead of looping: for few small ones. XLA's CPU backend runs
            convolutions inside a loop's backward pass some ten times slower than outside.

    Returns:
        The last carry and the outputs, stacked over layers.
    """
    graph, state = nnx.split(stacked)

    def step(carry: Carry, inputs: tuple[Any, Any]) -> tuple[Carry, Any]:
        layer_state, layer_inputs = inputs
        return apply(nnx.merge(graph, layer_state), carry, layer_inputs)

    if compute.remat != "none":
        # Inside a scan nothing can be merged across the checkpoint's boundary, so CSE need not be barred.
        step = jax.checkpoint(step, policy=compute.remat_policy(), prevent_cse=False)
    if not unroll:
        return jax.lax.scan(step, carry, (state, per_layer))
    # `jax.lax.scan(unroll=True)` would keep a loop of one turn.
    outputs = []
    for layer in range(jax.tree.leaves(state)[0].shape[0]):
        carry, output = step(carry, jax.tree.map(lambda array: array[layer], (state, per_layer)))  # noqa: B023
        outputs.append(output)
    return carry, jax.tree.map(lambda *layers: jnp.stack(layers), *outputs)

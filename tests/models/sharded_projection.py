"""Run by test_quantization in a process with two CPU devices: what a projection over fsdp gathers; JSON."""

import json
import re

import jax
import jax.numpy as jnp
from flax import nnx

from spacedrive_jax.config import MeshConfig
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.layers import Projection
from spacedrive_jax.models.partitioning import activations_on, axis_names
from spacedrive_jax.training.sharding import batch_sharding, make_mesh, parameter_sharding

mesh = make_mesh(MeshConfig(data=1, fsdp=2))
results = {}
for kind in ("none", "int8", "int4"):
    compute = ComputeConfig(param_dtype="bfloat16", dtype="bfloat16", base_quantization=kind)
    projection = Projection(
        (128,), (96,), ("embed",), ("mlp",), bias=False, compute=compute, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(projection)
    placed = jax.tree.map(lambda each: each, state)
    for path, each in nnx.to_flat_state(state):
        sharding = parameter_sharding(axis_names(each), each.shape, mesh)
        placed[path[0]] = each.replace(jax.device_put(each[...], sharding))
    x = jax.device_put(jax.random.normal(jax.random.key(1), (8, 128), jnp.bfloat16), batch_sharding(mesh))

    def apply(state, x, graph=graph):
        with activations_on(mesh):
            return nnx.merge(graph, state)(x)

    compiled = jax.jit(apply, out_shardings=batch_sharding(mesh)).lower(placed, x).compile()
    gathered = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather", compiled.as_text())
    alone = projection(jax.device_get(x))
    difference = jnp.max(jnp.abs(compiled(placed, x).astype(jnp.float32) - alone.astype(jnp.float32)))
    results[kind] = {"gathered": sorted(gathered), "difference": float(difference)}
print(json.dumps(results))

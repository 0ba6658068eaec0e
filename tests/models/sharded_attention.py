"""Run by test_attention.py in a process of its own with four fake devices: prints errors as JSON, and what
devices send each other (`sharded_decoder`)."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import sharded_decoder  # beside this script

from spacedrive_jax.config import MeshConfig
from spacedrive_jax.models import attention
from spacedrive_jax.models.partitioning import activations_on
from spacedrive_jax.training.sharding import make_mesh, replicated

MESHES = {"rows": (2, 2, 1), "rows and heads": (1, 2, 2), "fewer key heads than devices": (1, 1, 4)}
"""Devices along data, fsdp, tensor; there are four heads of queries and two of keys."""


def main() -> None:
    sent = sharded_decoder.main()
    # The TPU's choice and the kernel's own program, run without one.
    attention.target_platform = lambda: "tpu"
    kernel, given = attention.splash_attention, []

    def interpreted(q, k, v, lengths, *, causal):
        given.append((q.shape[0], q.shape[2], k.shape[2]))
        return kernel(q, k, v, lengths, causal=causal, interpret=True)

    attention.splash_attention = interpreted
    generator = np.random.default_rng(0)
    q, k, v = (jnp.asarray(generator.normal(size=(4, 260, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    results = {}
    for name, sizes in MESHES.items():
        mesh = make_mesh(MeshConfig(*sizes), jax.devices())

        @functools.partial(jax.jit, static_argnames="choice")
        def run(q, k, v, choice, mesh=mesh):
            def total(q, k, v):
                with activations_on(mesh):
                    out = attention.attend(q, k, v, choice=choice, causal=True)
                return jnp.sum(jnp.sin(out)), out

            gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
            return out, *gradients

        placed = jax.device_put((q, k, v), replicated(mesh))
        pairs = zip(run(*placed, "auto"), run(*placed, "xla"), strict=True)
        results[name] = {
            "error": max(float(jnp.abs(ours - theirs).max()) for ours, theirs in pairs),
            "per device": given[-1],
        }
    print(json.dumps({"attention": results, "sent": sent}))


if __name__ == "__main__":
    main()

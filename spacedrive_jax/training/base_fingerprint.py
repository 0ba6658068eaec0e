"""The fingerprint of a frozen base, taken on its devices: checkpoints name the base by it.

It says the same whatever folder the weights were read from and however they are spread over devices.
"""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, UInt32

from spacedrive_jax.config import Config
from spacedrive_jax.training.sharding import replicated


def base_fingerprint(config: Config, frozen: nnx.State, mesh: Mesh) -> str | None:
    """Names the loaded base of a run; None where it follows from the config's seed, or trains itself.

    Args:
        config: the run.
        frozen: the base.
        mesh: where it lives.
    """
    if config.model.weights is None or not config.model.use_lora:
        return None
    return state_fingerprint(frozen, mesh)


def state_fingerprint(state: nnx.State, mesh: Mesh) -> str:
    """SHA-256 over the names, types, shapes and checksums of a state's arrays.

    Args:
        state: numbers on their devices; they stay there.
        mesh: where they live.
    """
    leaves = {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}
    checksums = jax.jit(
        lambda arrays: {name: _checksum(array) for name, array in arrays.items()},
        out_shardings=replicated(mesh),
    )(leaves)
    digest = hashlib.sha256()
    for name, value in sorted(jax.device_get(checksums).items()):
        leaf = leaves[name]
        digest.update(f"{name} {leaf.dtype} {leaf.shape} {int(value)}\n".encode())
    return digest.hexdigest()


def _checksum(array: Array) -> UInt32[Array, ""]:
    """Sum of all bits as integers, each times an odd number that tells its place, modulo 2^32.

    Integer sums do not depend on their order, so neither does it on the devices.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    # The multiplier mixes neighbouring places (Knuth's multiplicative hashing).
    return jnp.sum(bits * (place * jnp.uint32(2654435761) | 1), dtype=jnp.uint32)

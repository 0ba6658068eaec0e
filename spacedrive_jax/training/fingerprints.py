"""Fingerprints: what a checkpoint's numbers, its metadata and the frozen base beneath it are known by.

They are taken where the arrays are, and say the same whatever folder the numbers were read from and however
they are spread over devices.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from spacedrive_jax.config import Config
from spacedrive_jax.errors import CheckpointError
from spacedrive_jax.json_files import json_digest
from spacedrive_jax.training.sharding import replicated

TRAINABLE, OPTIMIZER = "trainable_fingerprint", "optimizer_fingerprint"
"""Metadata that names the numbers saved beside it."""
FINGERPRINT, POSITION = "metadata_fingerprint", "position"
"""The fingerprint of all other metadata, and the place in the data as one of them."""
_BEFORE_FINGERPRINT = frozenset(
    {
        *("config", "records", "records_fingerprint", "weights", "base_fingerprint"),
        *("trainable_parameters", "frozen_parameters", TRAINABLE, OPTIMIZER),
    }
)
"""All that older checkpoints know, which have no such fingerprint."""


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
    return arrays_fingerprint(leaves, mesh)


def _everywhere(leaves: Mapping[str, Any]) -> NamedSharding | None:
    """On every device of the arrays' mesh; None where they have none."""
    placed = (getattr(leaf, "sharding", None) for leaf in leaves.values())
    return next(
        (NamedSharding(each.mesh, PartitionSpec()) for each in placed if isinstance(each, NamedSharding)),
        None,
    )


@functools.lru_cache(maxsize=8)
def _checksums(everywhere: NamedSharding | None) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """The compiled checksums, kept: a run asks for them at every checkpoint."""
    return jax.jit(
        lambda arrays: {name: _checksum(array) for name, array in arrays.items()}, out_shardings=everywhere
    )


def arrays_fingerprint(leaves: Mapping[str, Any], mesh: Mesh | None = None) -> str:
    """SHA-256 over the names, types, shapes and checksums of arrays on their devices.

    Args:
        leaves: the arrays by name.
        mesh: where they live; None takes theirs.
    """
    checksums = _checksums(_everywhere(leaves) if mesh is None else replicated(mesh))(dict(leaves))
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


def signed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with the fingerprint of all the rest of it."""
    return dict(metadata) | {FINGERPRINT: _of_metadata(metadata)}


def check_signed(metadata: Mapping[str, Any]) -> None:
    """Compares metadata with the fingerprint that was taken of it when it was saved.

    Raises:
        ValueError: it is not what was saved.
    """
    known = metadata.get(FINGERPRINT)
    older = known is None and metadata.keys() <= _BEFORE_FINGERPRINT
    if known != _of_metadata(metadata) and not older:
        raise ValueError("its metadata (config and fingerprints) are not those that were saved")


def _of_metadata(metadata: Mapping[str, Any]) -> str:
    return json_digest({name: value for name, value in metadata.items() if name != FINGERPRINT})


def check_saved(values: Any, metadata: Mapping[str, Any], name: str) -> None:
    """Compares restored numbers with the fingerprint that was taken when they were saved.

    Args:
        values: trainables, or the optimiser's state.
        metadata: of the checkpoint.
        name: the fact that is their fingerprint.

    Raises:
        ValueError: they are not the ones that were saved.
    """
    if metadata.get(name) != arrays_fingerprint(named_arrays(values)):
        what = "trainables" if name == TRAINABLE else "optimiser's numbers"
        raise ValueError(f"its {what} are not those that were saved: it is mixed up or damaged")


def check_trained_on(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to use a checkpoint's trainables on other records or on another base.

    Args:
        saved: a checkpoint's metadata.
        now: `records_fingerprint` and `base_fingerprint`, or those of the two that matter.

    Raises:
        CheckpointError: naming what differs.
    """
    changed = [
        f"{name}: {saved.get(name)} -> {now[name]}"
        for name in ("records_fingerprint", "base_fingerprint")
        if name in now and saved.get(name) != now[name]
    ]
    if changed:
        raise CheckpointError(
            f"the checkpoint was trained on something else: {'; '.join(changed)}. Give the same records "
            "(data.records) and weights (model.weights), or, to train on, say --accept-changes"
        )


def named_arrays(tree: Any) -> dict[str, Any]:
    """Every array of a tree under its path, however deep: `a/b/0`."""

    def name(path: Any) -> str:  # the same for a list, and for the dict that orbax may give for one
        return "/".join(str(getattr(each, "key", getattr(each, "idx", each))) for each in path)

    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

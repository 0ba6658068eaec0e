"""Checkpoints: trainables, optimiser, step and data iterator, written asynchronously and atomically.

The frozen base is not saved: it follows from the config (its weights or its seed). A checkpoint that was
being written when the process died has no final name and is never picked up.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, UInt32

from spacedrive_jax.config import Config
from spacedrive_jax.console import UserError
from spacedrive_jax.training.sharding import replicated

# The fingerprint of a frozen base, taken on its devices: checkpoints name the base by it.
#
# It says the same whatever folder the weights were read from and however they are spread over devices.


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


def open_manager(run_dir: Path, *, keep: int) -> ocp.CheckpointManager:
    """Opens `RUN/checkpoints`, where the newest `keep` stay."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
    return ocp.CheckpointManager((run_dir / "checkpoints").resolve(), options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    trainable: nnx.State,
    optimizer: Any,
    position: dict[str, int],
    facts: dict[str, Any],
) -> None:
    """Starts writing a checkpoint; training goes on while it is written.

    Args:
        manager: from `open_manager`.
        step: optimisation steps done.
        trainable: what training changes.
        optimizer: the optimiser's state.
        position: of the data iterator (`loader.position`).
        facts: config and fingerprints of data and base weights.

    Raises:
        UserError: the folder cannot be written; the newest whole checkpoint is named.
    """
    with naming_the_newest(manager):
        manager.save(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(nnx.to_pure_dict(trainable)),
                optimizer=ocp.args.StandardSave(optimizer),
                position=ocp.args.JsonSave(position),
                facts=ocp.args.JsonSave(facts),
            ),
        )


@contextlib.contextmanager
def naming_the_newest(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns a failed write into an error that says what is safe."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"a checkpoint could not be written to {manager.directory} ({error}); the newest whole one is "
            f"step {manager.latest_step()}. Make room or mend the folder, then --resume"
        ) from error


@contextlib.contextmanager
def closing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """On leaving, however it comes about, waits until what is being written is whole.

    Raises:
        UserError: it could not be written.
    """
    try:
        yield
    finally:
        with naming_the_newest(manager):
            manager.wait_until_finished()
        manager.close()


def restore(
    manager: ocp.CheckpointManager, step: int, trainable: nnx.State, optimizer: Any
) -> tuple[nnx.State, Any, dict[str, int], dict[str, Any]]:
    """Reads a checkpoint back onto the shardings of the given trees, whatever mesh it was written from.

    Returns:
        trainables, optimiser state, position of the data iterator, facts.
    """
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            trainable=ocp.args.StandardRestore(_abstract(nnx.to_pure_dict(trainable))),
            optimizer=ocp.args.StandardRestore(_abstract(optimizer)),
            position=ocp.args.JsonRestore(),
            facts=ocp.args.JsonRestore(),
        ),
    )
    nnx.replace_by_pure_dict(trainable, restored["trainable"])
    return trainable, restored["optimizer"], restored["position"], restored["facts"]


def read_facts(run_dir: Path, step: int) -> dict[str, Any]:
    """Reads the facts that a checkpoint was saved with."""
    # Not through a manager, which tidies the folder up: a run may be writing there.
    folder = (run_dir / "checkpoints" / str(step) / "facts").resolve()
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder)


def check_facts(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to use a checkpoint's trainables on other records or on another base.

    Args:
        saved: a checkpoint's facts.
        now: `records_fingerprint` and `base_fingerprint`, or those of the two that matter.

    Raises:
        UserError: naming what differs.
    """
    changed = [
        f"{name}: {saved.get(name)} -> {now[name]}"
        for name in ("records_fingerprint", "base_fingerprint")
        if name in now and saved.get(name) != now[name]
    ]
    if changed:
        raise UserError(
            f"the checkpoint was trained on something else: {'; '.join(changed)}. Give the same records "
            "(data.records) and weights (model.weights), or, to train on, say --accept-changes"
        )


def restore_trainable(run_dir: Path, step: int, trainable: nnx.State) -> nnx.State:
    """Reads only the trainables of a checkpoint, onto the shardings of an (abstract) state."""
    folder = (run_dir / "checkpoints" / str(step) / "trainable").resolve()
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder, _abstract(nnx.to_pure_dict(trainable)))
    nnx.replace_by_pure_dict(trainable, restored)
    return trainable


def restore_average(run_dir: Path, step: int, optimizer: Any) -> nnx.State:
    """Reads the moving average of the trainables (`train.ema_decay`) out of a checkpoint's optimiser state.

    Args:
        run_dir: run folder.
        step: of the checkpoint.
        optimizer: the (abstract) optimiser state of the run's config, on its shardings.

    Raises:
        UserError: the run keeps no average.
    """
    if optax.tree.get(optimizer, "average") is None:
        raise UserError(
            f"{run_dir} keeps no moving average of its weights: train with --train.ema-decay 0.999, say, or "
            "take the last weights"
        )
    folder = (run_dir / "checkpoints" / str(step) / "optimizer").resolve()
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder, _abstract(optimizer))
    return optax.tree.get(restored, "average")


def locate(checkpoint: Path) -> tuple[Path, int]:
    """Finds what `--checkpoint` names: a run folder (its newest checkpoint) or `RUN/checkpoints/STEP`.

    Returns:
        The run folder and the step.

    Raises:
        UserError: there is no finished checkpoint.
    """
    checkpoint = Path(checkpoint)
    if checkpoint.parent.name == "checkpoints" and checkpoint.name.isdigit():
        run_dir, step = checkpoint.parent.parent, int(checkpoint.name)
        found = checkpoint.is_dir()
    else:
        run_dir = checkpoint
        steps = [int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit()]
        found, step = bool(steps), max(steps, default=0)
    if not found or not (run_dir / "config.json").is_file():
        raise UserError(
            f"no finished checkpoint at {checkpoint}: give a run folder that `python -m spacedrive_jax "
            "train` wrote, or one of its checkpoints/STEP"
        )
    return run_dir, step


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )

"""Checkpoints: trainables, optimiser, step and data iterator, written asynchronously and atomically.

The frozen base is not saved: it follows from the config (its weights or its seed). A checkpoint that was
being written when the process died has no final name and is never picked up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from spacedrive_jax.errors import CheckpointError, ConfigError
from spacedrive_jax.io import is_bucket, require_regular
from spacedrive_jax.training.checkpoint_steps import Best, steps_of
from spacedrive_jax.training.fingerprints import (
    OPTIMIZER,
    POSITION,
    TRAINABLE,
    arrays_fingerprint,
    check_saved,
    check_signed,
    named_arrays,
    signed,
)


class _KeepBest(preservation.PreservationPolicy):
    """Keeps the checkpoint that RUN/best.json names."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = Best.read(self._run_dir)
        return [best is not None and each.step == best.step for each in checkpoints]


def open_manager(run_dir: Path, *, keep: int) -> ocp.CheckpointManager:
    """Opens `RUN/checkpoints`, where the newest `keep` stay, and the best.

    Raises:
        ConfigError: none would stay.
        CheckpointError: a checkpoint there holds a pipe or a device, at which orbax would wait for ever.
    """
    if keep < 1:
        raise ConfigError(f"train.max_to_keep is {keep}: at least the newest must stay, give 1 or more")
    for step in steps_of(run_dir):
        with naming_the_whole(run_dir, step):
            _folder(run_dir, step)
    newest = preservation.LatestN(keep)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation.AnyPreservationPolicy([newest, _KeepBest(run_dir)]),
        create=True,
        enable_async_checkpointing=True,
        # Made in the background, a folder that cannot be made leaves threads that wait for it for minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    return ocp.CheckpointManager((run_dir / "checkpoints").resolve(), options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    trainable: nnx.State,
    optimizer: Any,
    position: dict[str, int],
    metadata: dict[str, Any],
) -> None:
    """Starts writing a checkpoint; training goes on while it is written.

    Args:
        manager: from `open_manager`.
        step: optimisation steps done.
        trainable: what training changes.
        optimizer: the optimiser's state.
        position: of the data iterator (`loader.position`).
        metadata: config and fingerprints of data and base weights; those of trainables and optimiser
            join them.

    Raises:
        CheckpointError: the folder cannot be written; the newest whole checkpoint is named.
    """
    numbers = {
        TRAINABLE: arrays_fingerprint(named_arrays(nnx.to_pure_dict(trainable))),
        OPTIMIZER: arrays_fingerprint(named_arrays(optimizer)),
        POSITION: position,
    }
    with naming_the_newest(manager):
        manager.save(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(nnx.to_pure_dict(trainable)),
                optimizer=ocp.args.StandardSave(optimizer),
                position=ocp.args.JsonSave(position),
                metadata=ocp.args.JsonSave(signed(metadata | numbers)),
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
        raise CheckpointError(
            f"a checkpoint could not be written to {manager.directory} ({error}); the newest whole one is "
            f"step {manager.latest_step()}. Make room or mend the folder, then --resume"
        ) from error


@contextlib.contextmanager
def closing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """On leaving, however it comes about, waits until what is being written is whole.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        yield
    finally:
        try:
            with naming_the_newest(manager):
                manager.wait_until_finished()
        finally:
            manager.close()


def restore(
    run_dir: Path, step: int, trainable: nnx.State, optimizer: Any
) -> tuple[nnx.State, Any, dict[str, int], dict[str, Any]]:
    """Reads a checkpoint back onto the shardings of the given trees, whatever mesh it was written from.

    Later checkpoints may be there, and damaged: they are not looked at.

    Args:
        run_dir: run folder.
        step: of the checkpoint.
        trainable: described (`jax.ShapeDtypeStruct`) or real; left as it is.
        optimizer: likewise.

    Returns:
        trainables, optimiser state, position of the data iterator, metadata.

    Raises:
        CheckpointError: it is damaged; the newest whole one before it is named.
    """
    with naming_the_whole(run_dir, step):
        folder = _folder(run_dir, step)
        # Not through a manager, which opens every checkpoint of the run.
        restored: dict[str, Any] = {"metadata": _metadata(run_dir, step)}
        with ocp.StandardCheckpointer() as arrays, ocp.Checkpointer(ocp.JsonCheckpointHandler()) as position:
            restored["position"] = position.restore(folder / "position")
            _require_same_arrays(folder / "trainable", nnx.to_pure_dict(trainable))
            for name, tree in (("trainable", nnx.to_pure_dict(trainable)), ("optimizer", optimizer)):
                restored[name] = arrays.restore(folder / name, _abstract(tree))
        if restored["metadata"].get(POSITION, restored["position"]) != restored["position"]:
            raise ValueError("its position in the data is not the one that was saved")
        check_saved(restored["trainable"], restored["metadata"], TRAINABLE)
        check_saved(restored["optimizer"], restored["metadata"], OPTIMIZER)
    numbers = _with_numbers(trainable, restored["trainable"])
    return numbers, restored["optimizer"], restored["position"], restored["metadata"]


def read_metadata(run_dir: Path, step: int) -> dict[str, Any]:
    """Reads the metadata that a checkpoint was saved with.

    Raises:
        CheckpointError: they are damaged, or not there: nothing could be held against them.
    """
    with naming_the_whole(run_dir, step):
        return _metadata(run_dir, step)


def _metadata(run_dir: Path, step: int) -> dict[str, Any]:
    # Not through a manager, which tidies the folder up: a run may be writing there.
    folder = _folder(run_dir, step) / "metadata"
    if not folder.is_dir():
        raise ValueError("it lacks `metadata`, which says what it was trained on and from which config")
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        metadata = checkpointer.restore(folder)
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no JSON object")
    check_signed(metadata)
    return metadata


def _folder(run_dir: Path, step: int) -> Path:
    """The folder of a checkpoint, of plain files alone: orbax would wait for ever at a pipe.

    Raises:
        ValueError: it holds something else.
    """
    folder = (run_dir / "checkpoints" / str(step)).resolve()
    for path in () if is_bucket(folder) else folder.rglob("*"):
        if not path.is_dir():
            require_regular(path)
    return folder


def _require_same_arrays(folder: Path, tree: Any) -> None:
    """Tells a whole checkpoint of another model from a damaged one.

    Args:
        folder: of trainables.
        tree: those that its config means here, or their shapes.

    Raises:
        CheckpointError: arrays are named or shaped otherwise.
    """
    handler = ocp.StandardCheckpointHandler()
    try:
        kept = handler.metadata(epath.Path(folder)).tree
    finally:
        handler.close()
    saved, wanted = (
        {name: tuple(leaf.shape) for name, leaf in named_arrays(each).items() if hasattr(leaf, "shape")}
        for each in (kept, tree)
    )
    differing = [f"it lacks {name}" for name in sorted(wanted.keys() - saved.keys())]
    differing += [f"{name} is not known here" for name in sorted(saved.keys() - wanted.keys())]
    differing += [
        f"{name} has shape {list(saved[name])}, not {list(wanted[name])}"
        for name in sorted(saved.keys() & wanted.keys())
        if saved[name] != wanted[name]
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(
            f"the checkpoint {folder.parent} holds another model than its config means here "
            f"({'; '.join(differing[:3])}{more}): another version of spacedrive_jax wrote it (RUN/run.json "
            "names it), or the config was changed. Open it with that version or config, or train anew"
        )


@contextlib.contextmanager
def naming_the_whole(run_dir: Path, step: int) -> Iterator[None]:
    """Turns a failed read into an error that names the newest checkpoint before it that can be read."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # orbax and tensorstore raise almost anything
        if "RESOURCE_EXHAUSTED" in str(error):  # the devices are full, nothing is wrong with the file
            raise
        said = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
        earlier = [other for other in reversed(steps_of(run_dir)) if other < step]
        whole = next((other for other in earlier if _is_whole(run_dir, other)), None)
        way_out = (
            "no other one is whole: start anew with another --run-dir"
            if whole is None
            else f"the newest whole one before it is step {whole}: --step {whole} takes it"
        )
        raise CheckpointError(
            f"the checkpoint {run_dir / 'checkpoints' / str(step)} is damaged ({said}); {way_out}"
        ) from error


def _is_whole(run_dir: Path, step: int) -> bool:
    """Whether metadata, trainables and optimiser of a checkpoint can be read and belong together."""
    try:
        folder = _folder(run_dir, step)
        with ocp.StandardCheckpointer() as checkpointer:
            values = checkpointer.restore(folder / "trainable")
            checkpointer.restore(folder / "optimizer")
        check_saved(values, _metadata(run_dir, step), TRAINABLE)
    except Exception:
        return False
    return True


def restore_trainable(run_dir: Path, step: int, trainable: nnx.State) -> nnx.State:
    """Reads only the trainables of a checkpoint, onto the shardings of an (abstract) state."""
    with naming_the_whole(run_dir, step), ocp.StandardCheckpointer() as checkpointer:
        folder = _folder(run_dir, step) / "trainable"
        _require_same_arrays(folder, nnx.to_pure_dict(trainable))
        restored = checkpointer.restore(folder, _abstract(nnx.to_pure_dict(trainable)))
        check_saved(restored, _metadata(run_dir, step), TRAINABLE)
    return _with_numbers(trainable, restored)


def restore_average(run_dir: Path, step: int, optimizer: Any) -> nnx.State:
    """Reads the moving average of the trainables (`train.ema_decay`) out of a checkpoint's optimiser state.

    Args:
        run_dir: run folder.
        step: of the checkpoint.
        optimizer: the (abstract) optimiser state of the run's config, on its shardings.

    Raises:
        CheckpointError: the run keeps no average.
    """
    if optax.tree.get(optimizer, "average") is None:
        raise CheckpointError(
            f"{run_dir} keeps no moving average of its weights: train with --train.ema-decay 0.999, say, or "
            "take the last weights"
        )
    with naming_the_whole(run_dir, step), ocp.StandardCheckpointer() as checkpointer:
        folder = _folder(run_dir, step) / "optimizer"
        restored = checkpointer.restore(folder, _abstract(optimizer))
        check_saved(restored, _metadata(run_dir, step), OPTIMIZER)
    return optax.tree.get(restored, "average")


def _with_numbers(state: nnx.State, numbers: Any) -> nnx.State:
    """A state of the same variables with the numbers of a pure dict."""
    filled = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(filled, numbers)
    return filled


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )

"""Checkpoints: trainables, optimiser, step and data iterator, written asynchronously and atomically.

The frozen base is not saved: it follows from the config (its weights or its seed). A checkpoint that was
being written when the process died has no final name and is never picked up. Which ones a run has comes
first: the finished ones, the best one, those behind a step that it goes back to.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from spacedrive_jax import buckets
from spacedrive_jax.errors import CheckpointError, ConfigError, DataError
from spacedrive_jax.interop.safetensors_folder import what_it_is
from spacedrive_jax.io import is_bucket, is_there, place, require_regular
from spacedrive_jax.json_files import convert, json_digest, read_json, write_json
from spacedrive_jax.parallel import close_coroutines
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

BEST_FILE = "best.json"
COMMITTED = "commit_success.txt"
"""What orbax writes last into a checkpoint in a bucket."""


@dataclasses.dataclass(frozen=True)
class Best:
    """The best validated step of a run: RUN/best.json."""

    step: int
    measure: str
    """`train.best_by`."""
    value: float
    validated: str = ""
    """Digest of what was validated and how (`evaluation.validation`): only steps of the same one compare."""
    last: int = 0
    """The last step that was validated."""

    @classmethod
    def read(cls, run_dir: Path) -> Best | None:
        """What the run's folder says; None where nothing was validated.

        Raises:
            DataError: the file is damaged.
        """
        file = run_dir / BEST_FILE
        if not is_there(file):
            return None
        said = read_json(file)
        # A changed digit would name another checkpoint; files of before carry no digest.
        if isinstance(said, dict) and said.get("digest", json_digest(said)) != json_digest(said):
            raise DataError(f"{file} is not as it was written: remove it, and validation writes it again")
        return convert(said, cls, str(file))

    def until(self, step: int) -> Best | None:
        """What it is to a run that goes on from a step, which may lie before it."""
        return None if self.step > step else dataclasses.replace(self, last=min(self.last, step))

    def compares(self, measure: str, validated: str) -> bool:
        """Whether numbers of that measure and validation can be held against it."""
        return (self.measure, self.validated) == (measure, validated)

    def write(self, run_dir: Path) -> None:
        """Names it in the run's folder."""
        said = dataclasses.asdict(self)
        write_json(run_dir / BEST_FILE, said | {"digest": json_digest(said)})


def steps_of(run_dir: Path) -> list[int]:
    """Steps of the finished checkpoints of a run, ascending."""
    folder = run_dir / "checkpoints"
    if is_bucket(folder):  # where nothing is renamed: a file says that a checkpoint is whole
        found = [path.parent for path in folder.glob(f"*/{COMMITTED}")]
    else:
        found = list(folder.glob("*"))
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def later_than(run_dir: Path, step: int) -> list[tuple[Path, Path]]:
    """What `go_back_to` would move; moves nothing.

    Returns:
        Each later checkpoint, and its place in `RUN/set_aside`.

    Raises:
        CheckpointError: there is no checkpoint of that step, or something lies in such a place.
    """
    steps = steps_of(run_dir)
    if step not in steps:
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}, but {steps}")
    moves = []
    for later in (str(each) for each in steps if each > step):
        target = run_dir / "set_aside" / later
        if target.exists():
            raise CheckpointError(f"{target} exists: remove it, or move it away, to go back to step {step}")
        moves.append((run_dir / "checkpoints" / later, target))
    return moves


def go_back_to(run_dir: Path, step: int) -> None:
    """Sets the checkpoints behind a step aside, into `RUN/set_aside`, so that training goes on from it.

    Raises:
        CheckpointError: as `later_than`, before the first is moved.
    """
    moves = later_than(run_dir, step)
    best = Best.read(run_dir)
    if best is not None:
        kept = best.until(step)
        (run_dir / BEST_FILE).unlink() if kept is None else kept.write(run_dir)
    for checkpoint, target in moves:
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_bucket(checkpoint):
            buckets.move(checkpoint, target, first=COMMITTED)
        else:
            checkpoint.rename(target)


def locate(checkpoint: Path) -> tuple[Path, int]:
    """Finds what `--checkpoint` names: a run folder (its newest checkpoint), `RUN/best` (the best validated
    one) or `RUN/checkpoints/STEP`.

    Returns:
        The run folder and the step.

    Raises:
        CheckpointError: there is no finished checkpoint.
    """
    checkpoint = given = place(checkpoint)
    if checkpoint.name == "best" and not checkpoint.is_dir():
        best = Best.read(checkpoint.parent)
        if best is None:
            raise CheckpointError(
                f"{checkpoint.parent} has no {BEST_FILE}, which training writes when it validates "
                "(--train.validate-every)"
            )
        checkpoint = checkpoint.parent / "checkpoints" / str(best.step)
    if checkpoint.parent.name == "checkpoints" and checkpoint.name.isdecimal():
        run_dir, step = checkpoint.parent.parent, int(checkpoint.name)
        found = step in steps_of(run_dir) if is_bucket(run_dir) else checkpoint.is_dir()
    else:
        run_dir = checkpoint
        steps = steps_of(run_dir)
        found, step = bool(steps), max(steps, default=0)
    if found and (run_dir / "config.json").is_file():
        return run_dir, step
    there = steps_of(run_dir)
    kept = f" ({run_dir} keeps steps {', '.join(map(str, there))})" if there else ""
    what = f"{run_dir / 'config.json'} is missing; " if found else what_it_is(run_dir)
    raise CheckpointError(
        f"no finished checkpoint at {checkpoint if there else given}{kept}: {what}give a run folder that "
        "`python -m spacedrive_jax train` wrote, or one of its checkpoints/STEP"
    )


def standing_in(weights: str | Path) -> Path:
    """A checkpoint of the same run, where the one that was started from is there no longer.

    A run prunes its checkpoints; one that was started from it needs of it no more than what both stand on,
    once it has a checkpoint of its own. (Its base is held against that one's fingerprint.)

    Args:
        weights: `RUN/checkpoints/STEP`.

    Returns:
        The same, where it is there or the run has none at all; else the run's next one.
    """
    path = place(weights)
    if path.parent.name != "checkpoints" or not path.name.isdecimal() or path.is_dir():
        return path
    steps = steps_of(path.parent.parent)
    later = [step for step in steps if step > int(path.name)]
    return path.parent / str((later or steps)[0]) if steps else path


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
    except (OSError, ValueError) as error:  # tensorstore's are ValueErrors, a full disk's too
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        said = said if len(said) < 400 else f"{said[:200]} ... {said[-200:]}"
        raise CheckpointError(
            f"a checkpoint could not be written to {manager.directory} ({said}); the newest whole one is "
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
        close_coroutines(error)
        earlier = [other for other in reversed(steps_of(run_dir)) if other < step]
        whole = next((other for other in earlier if _is_whole(run_dir, other)), None)
        way_out = (
            "no other one is whole: start anew with another --run-dir"
            if whole is None
            else f"the newest whole one before it is step {whole}: give "
            f"{run_dir / 'checkpoints' / str(whole)}, or --step {whole}"
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

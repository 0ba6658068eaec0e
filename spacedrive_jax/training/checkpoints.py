"""Checkpoints: trainables, optimiser, step and data iterator, written asynchronously and atomically.

The frozen base is not saved: it follows from the config (its weights or its seed). A checkpoint that was
being written when the process died has no final name and is never picked up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from spacedrive_jax import buckets
from spacedrive_jax.config import Config
from spacedrive_jax.errors import CheckpointError, ConfigError, DataError
from spacedrive_jax.io import is_bucket, is_there, place, require_regular
from spacedrive_jax.json_files import convert, json_digest, read_json, write_json
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


BEST_FILE = "best.json"


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


def _metadata_fingerprint(metadata: Mapping[str, Any]) -> str:
    return json_digest({name: value for name, value in metadata.items() if name != FINGERPRINT})


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
    metadata = metadata | {
        TRAINABLE: arrays_fingerprint(_named(nnx.to_pure_dict(trainable))),
        OPTIMIZER: arrays_fingerprint(_named(optimizer)),
        POSITION: position,
    }
    metadata |= {FINGERPRINT: _metadata_fingerprint(metadata)}
    with naming_the_newest(manager):
        manager.save(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(nnx.to_pure_dict(trainable)),
                optimizer=ocp.args.StandardSave(optimizer),
                position=ocp.args.JsonSave(position),
                metadata=ocp.args.JsonSave(metadata),
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
    nnx.replace_by_pure_dict(trainable, restored["trainable"])
    return trainable, restored["optimizer"], restored["position"], restored["metadata"]


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
    known = metadata.get(FINGERPRINT)
    older = known is None and metadata.keys() <= _BEFORE_FINGERPRINT
    if known != _metadata_fingerprint(metadata) and not older:
        raise ValueError("its metadata (config and fingerprints) are not those that were saved")
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


def check_saved(values: Any, metadata: Mapping[str, Any], name: str) -> None:
    """Compares restored numbers with the fingerprint that was taken when they were saved.

    Args:
        values: trainables, or the optimiser's state.
        metadata: of the checkpoint.
        name: the fact that is their fingerprint.

    Raises:
        ValueError: they are not the ones that were saved.
    """
    if metadata.get(name) != arrays_fingerprint(_named(values)):
        what = "trainables" if name == TRAINABLE else "optimiser's numbers"
        raise ValueError(f"its {what} are not those that were saved: it is mixed up or damaged")


def _named(tree: Any) -> dict[str, Any]:
    def name(path: Any) -> str:  # the same for a list, and for the dict that orbax may give for one
        return "/".join(str(getattr(each, "key", getattr(each, "idx", each))) for each in path)

    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


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
        {name: tuple(leaf.shape) for name, leaf in _named(each).items() if hasattr(leaf, "shape")}
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


def steps_of(run_dir: Path) -> list[int]:
    """Steps of the finished checkpoints of a run, ascending."""
    folder = run_dir / "checkpoints"
    if is_bucket(folder):  # where nothing is renamed: a file says that a checkpoint is whole
        found = [path.parent for path in folder.glob(f"*/{COMMITTED}")]
    else:
        found = list(folder.glob("*"))
    return sorted(int(path.name) for path in found if path.name.isdecimal())


COMMITTED = "commit_success.txt"
"""What orbax writes last into a checkpoint in a bucket."""


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


def check_metadata(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
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


def restore_trainable(run_dir: Path, step: int, trainable: nnx.State) -> nnx.State:
    """Reads only the trainables of a checkpoint, onto the shardings of an (abstract) state."""
    with naming_the_whole(run_dir, step), ocp.StandardCheckpointer() as checkpointer:
        folder = _folder(run_dir, step) / "trainable"
        _require_same_arrays(folder, nnx.to_pure_dict(trainable))
        restored = checkpointer.restore(folder, _abstract(nnx.to_pure_dict(trainable)))
        check_saved(restored, _metadata(run_dir, step), TRAINABLE)
    nnx.replace_by_pure_dict(trainable, restored)
    return trainable


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
    if not found or not (run_dir / "config.json").is_file():
        there = steps_of(run_dir)
        kept = f" ({run_dir} keeps steps {', '.join(map(str, there))})" if there else ""
        raise CheckpointError(
            f"no finished checkpoint at {checkpoint if there else given}{kept}: give a run folder that "
            "`python -m spacedrive_jax train` wrote, or one of its checkpoints/STEP"
        )
    return run_dir, step


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


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )

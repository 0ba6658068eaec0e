"""Which checkpoints a run has: the finished ones, the best one, those behind a step that it goes back to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spacedrive_jax import buckets
from spacedrive_jax.errors import CheckpointError, DataError
from spacedrive_jax.io import is_bucket, is_there, place
from spacedrive_jax.json_files import convert, json_digest, read_json, write_json

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

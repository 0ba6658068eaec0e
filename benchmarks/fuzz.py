"""Mutates the files that somebody else may hand over, reads them, and counts what comes of it.

    python -m benchmarks.fuzz --inputs 10000 --seed 1 --out benchmarks/results/fuzz.md

Each input is one mutation of one file that this script makes (`fuzz_data`: tables, sensor files, records,
predictions; `fuzz_models`: depth sidecars, runs, checkpoints, weights, tokenizers, configs, results), read in
this process through the functions that the commands call. A reader may give the right thing or one clear
error (`SpaceDriveError`). Everything else counts against the project: another exception, more than `SECONDS`,
more than `MOST_BYTES`, a value that is silently wrong, and code of the file that runs. A reader that is to be
tried too is one entry of `targets`.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz_data import data_targets
from benchmarks.fuzz_inputs import Target
from benchmarks.fuzz_models import model_targets
from spacedrive_jax.errors import SpaceDriveError

SECONDS = 10.0
MOST_BYTES = 4 << 30
OUTCOMES = ("right", "clear error", "traceback", "hang", "over 4 GB", "silently wrong", "code executed")
BAD = OUTCOMES[2:]


class Hang(BaseException):
    """A reader took too long; no `except Exception` may swallow it."""


def targets() -> list[Target]:
    """Every kind of file that is tried."""
    return [*data_targets(), *model_targets()]


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends what takes longer than `SECONDS`, and refuses memory beyond `MOST_BYTES` of what is in use."""

    def expired(*_: Any) -> None:
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MOST_BYTES, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def outcome(target: Target, folder: Path, whole: Any) -> tuple[str, str]:
    """What reading a mutated folder came to, and the words."""
    try:
        with limited():
            value = target.read(folder)
    except SpaceDriveError as error:
        result = "clear error", str(error)
    except Hang:
        result = "hang", ""
    except MemoryError:
        result = "over 4 GB", ""
    except Exception as error:
        result = "traceback", f"{type(error).__name__}: {error}"
    else:
        result = ("right", "") if target.stands(value, whole) else ("silently wrong", "")
    return ("code executed", "") if any(folder.rglob("RAN")) else result


def fuzz(
    inputs: int, seed: int, found: Sequence[Target] | None = None
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Tries mutations, the same for the same seed.

    Args:
        inputs: how many, shared evenly by the targets.
        seed: of the mutations.
        found: what to mutate; all by default.

    Returns:
        Target to counts of outcomes, and a line on every input that went wrong.
    """
    counts: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    found = targets() if found is None else found
    for number, target in enumerate(found):
        counts[target.name] = Counter()
        with tempfile.TemporaryDirectory() as name:
            origin, copy = Path(name) / "whole", Path(name) / "copy"
            origin.mkdir()
            target.make(origin)
            pristine = Path(name) / "pristine"
            shutil.copytree(origin, pristine)
            whole = target.read(pristine)
            files = sorted(path.relative_to(origin) for path in origin.glob(target.files) if path.is_file())
            for trial in range(-(-inputs // len(found))):
                rng = np.random.default_rng([seed, number, trial])
                shutil.copytree(origin, copy)
                file = files[int(rng.integers(len(files)))]
                how = target.changes[int(rng.integers(len(target.changes)))](rng, copy / file)
                result, words = outcome(target, copy, whole)
                counts[target.name][result] += 1
                if result in BAD:
                    wrong.append(f"{target.name}, input {trial} ({file}: {how}): {result} {words[:200]}")
                shutil.rmtree(copy)
    return counts, wrong


def table(counts: dict[str, Counter[str]], seed: int) -> str:
    """The counts as Markdown."""
    total: Counter[str] = Counter()
    for each in counts.values():
        total.update(each)
    rows = [*counts.items(), ("**all**", total)]
    lines = [
        f"# Mutated inputs (seed {seed})",
        "",
        "`python -m benchmarks.fuzz`; see there for what is mutated. The last five columns must be 0.",
        "",
        "| file | inputs | " + " | ".join(OUTCOMES) + " |",
        "|---|" + "---:|" * (len(OUTCOMES) + 1),
    ]
    lines += [
        f"| {name} | {sum(each.values())} | " + " | ".join(str(each[kind]) for kind in OUTCOMES) + " |"
        for name, each in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Prints the table and every input that went wrong; 1 if there is one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a target by name")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    chosen = [target for target in targets() if arguments.only in (None, target.name)]
    counts, wrong = fuzz(arguments.inputs, arguments.seed, chosen)
    print(table(counts, arguments.seed))
    print("\n".join(wrong))
    if arguments.out:
        arguments.out.write_text(table(counts, arguments.seed))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())

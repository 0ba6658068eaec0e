"""What every part of `benchmarks/gpu_check.py` needs: its size, its clock, its results' lines."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

from benchmarks.gpu_check import ROW

Size = Literal["published", "tiny"]
_failed: list[dict[str, Any]] = []


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a part; `--size` is in every one."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--size", choices=["published", "tiny"], default="published")
    return made


def tell(**figures: Any) -> None:
    """Prints one row, so that it is kept whatever happens behind it."""
    print(ROW + json.dumps(figures), flush=True)


@contextlib.contextmanager
def each(**label: Any) -> Iterator[None]:
    """One of a part's rows: where it fails, a row says so, and the part goes on; see `finish`."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        _failed.append(label)
        said = str(error).splitlines() or [""]
        tell(**label, failed=f"{type(error).__name__}: {said[0][:160]}")


def finish() -> None:
    """Ends a part: with exit status 1 where a row failed."""
    raise SystemExit(1 if _failed else 0)


def memory_of(compiled: jax.stages.Compiled) -> Any:
    """What the compiler says of a program's memory; bytes of `argument`, `output`, `alias` and `temp`.

    Raises:
        SystemExit: this platform's compiler says nothing.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        raise SystemExit(f"the compiler of {jax.default_backend()} does not say what memory a program takes")
    return memory


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of a call that waits for its result; call it once before, so that nothing is compiled here."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)

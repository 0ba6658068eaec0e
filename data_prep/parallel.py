"""A parallel map over processes that keeps only a few items in flight and gives results in order."""

from __future__ import annotations

import collections
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_FLIGHT_PER_WORKER = 2


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yields `function(item)` for each item, in the order of the items.

    Args:
        function: importable by name, since worker processes import it.
        items: picklable; drawn only a little ahead of the results.
        workers: processes; 1 runs everything in this one.

    Raises:
        Exception: what `function` raised; items not yet started are dropped.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # Not a plain fork: the parent has threads (progress bar, OpenCV) that a forked child would inherit
    # half alive.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([function.__module__])
    remaining = iter(items)
    pending: collections.deque[Future[Result]] = collections.deque()
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        for item in itertools.islice(remaining, workers * _IN_FLIGHT_PER_WORKER):
            pending.append(pool.submit(function, item))
        while pending:
            result = pending.popleft().result()
            for item in itertools.islice(remaining, 1):
                pending.append(pool.submit(function, item))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

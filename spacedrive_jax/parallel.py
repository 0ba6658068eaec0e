"""Work shared among processes that never outlive the one that started them.

Workers end with their parent however that ends: on an exception, a signal or Ctrl-C it ends them; when it is
killed outright, each worker notices by itself, and the fork server behind them has nobody left to serve.
"""

from __future__ import annotations

import collections
import gc
import inspect
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_FLIGHT_PER_WORKER = 2


FEW = 8
"""Tasks of seconds: for fewer, starting processes takes longer than they save."""


def processes(workers: int, tasks: int) -> int:
    """How many processes a command's `--workers` means.

    Args:
        workers: the flag; 0 leaves it to the machine.
        tasks: how many there are.
    """
    return workers or (1 if tasks < FEW else min(os.cpu_count() or 1, tasks))


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yields `function(item)` for each item, in the order of the items; only a few are in flight.

    Close the iterator (`contextlib.closing`) where an error of the caller's must find the workers gone.

    Args:
        function: importable by name, since worker processes import it; or a `functools.partial` of such.
        items: picklable; drawn only a little ahead of the results.
        workers: processes; 1 runs everything in this one.

    Raises:
        Exception: what `function` raised; items not yet started are dropped, those in work are broken off.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # Not a plain fork: the parent has threads (progress bar, OpenCV, jax) that a forked child would inherit
    # half alive.
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([getattr(function, "func", function).__module__])
    remaining = iter(items)
    pending: collections.deque[Future[Result]] = collections.deque()
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    finished = False
    try:
        for item in itertools.islice(remaining, workers * _IN_FLIGHT_PER_WORKER):
            pending.append(pool.submit(_work, function, item))
        while pending:
            result = pending.popleft().result()
            for item in itertools.islice(remaining, 1):
                pending.append(pool.submit(_work, function, item))
            yield result
        finished = True
    finally:
        if not finished:
            # What they are at nobody will fetch, and it may take minutes.
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def ending_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, and SIGHUP, which a terminal or login that is closed sends, unless it is ignored (`nohup`)."""
    hung_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGHUP) if hung_up else (signal.SIGTERM,)


def raise_on_signals(kind: type[BaseException]) -> Callable[[], None]:
    """Makes SIGTERM and SIGHUP raise in the main thread, where it is, so that it cleans up as on any other
    error.

    Once: what unwinds is not cut off by a second one. An exception that meets a finaliser or a callback of
    the garbage collector is lost (Python only reports it); then the signal is sent again.

    Args:
        kind: what to raise, with the exit status (143 or 129) as its argument.

    Returns:
        What puts everything back as it was.
    """
    raised = 0
    report = sys.unraisablehook

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if not raised:
            raised = number
            raise kind(128 + number)

    def lost(unraisable: Any) -> None:
        nonlocal raised
        if issubclass(unraisable.exc_type, KeyboardInterrupt):  # Ctrl-C meets the same fate
            number: int = signal.SIGINT
        elif issubclass(unraisable.exc_type, kind):
            number, raised = raised, 0
        else:
            report(unraisable)
            return
        again = threading.Timer(0.05, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    previous = {number: signal.signal(number, stop) for number in ending_signals()}
    sys.unraisablehook = lost

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = report

    return restore


def close_coroutines(error: BaseException) -> None:
    """Closes what a library's event loop left waiting when it failed: by itself that happens when Python
    ends, where each coroutine puts a traceback of its own behind the error that was said.

    Args:
        error: how it failed; its frames let go of their variables.
    """
    report = sys.unraisablehook

    def tell(unraisable: Any) -> None:
        if not inspect.iscoroutine(unraisable.object):
            report(unraisable)

    sys.unraisablehook = tell
    try:
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        gc.collect()
    finally:
        sys.unraisablehook = report


class _Stopped(SystemExit):
    """The parent wants the worker to end; raised where it is, so that it removes what is half written."""


def _work(function: Callable[[Item], Result], item: Item) -> Result:
    try:
        return function(item)
    except _Stopped:
        os._exit(128 + signal.SIGTERM)  # else the pool would take it for the item's error and go on


def end_with_parent() -> None:
    """Ends this worker as soon as its parent is no more; leaves what a terminal sends to the parent."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise_on_signals(_Stopped)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()

"""Requests of several sessions through one call of the model: a worker thread with a bounded wait."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WAIT_SHARE = 0.25
"""Sessions that were answered together come back together, but not within microseconds."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Batched(Generic[Result]):
    """A result, and what getting it took."""

    result: Result
    queued_s: float
    """Seconds from the request until its batch began."""
    run_s: float
    """Seconds that the batch took."""
    size: int
    """Requests in the batch."""


@dataclasses.dataclass(frozen=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    since: float
    future: Future[Batched[Result]]


class Batcher(Generic[Item, Result]):
    """Runs a function over whatever has come in, from a thread of its own.

    The first request of a batch waits at most `wait_s` for others, or `WAIT_SHARE` of what a batch takes
    where that is longer, and not at all once as many are there as sessions could send. A batch over which
    the function fails is run again one by one, so that a request which cannot be answered spoils no other.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        most: int,
        wait_s: float,
        expected: Callable[[], int],
    ) -> None:
        """Starts the thread.

        Args:
            function: one to `most` items to their results, in order.
            most: items of a batch.
            wait_s: see the class.
            expected: how many requests may come at once: the sessions at work.
        """
        self._function, self._most, self._wait_s, self._expected = function, most, wait_s, expected
        self._queue: queue.Queue[_Waiting[Item, Result] | None] = queue.Queue()
        self.batches = self.requests = 0
        self._usual_s = 0.0
        self._thread = threading.Thread(target=self._work, name="policy", daemon=True)
        self._thread.start()

    def submit(self, item: Item) -> Future[Batched[Result]]:
        """Queues an item; cancelling the future before its batch begins leaves it out."""
        future: Future[Batched[Result]] = Future()
        self._queue.put(_Waiting(item, time.monotonic(), future))
        return future

    def close(self) -> None:
        """Finishes what is queued and ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        open_ = True
        while open_:
            first = self._queue.get()
            if first is None:
                return
            batch, open_ = self._collect(first)
            batch = [one for one in batch if one.future.set_running_or_notify_cancel()]
            if batch:
                self._run(batch)

    def _collect(self, first: _Waiting[Item, Result]) -> tuple[list[_Waiting[Item, Result]], bool]:
        """The batch that begins with a request; False where the queue was closed."""
        wait_s = max(self._wait_s, WAIT_SHARE * self._usual_s) if self._wait_s else 0.0
        batch, deadline = [first], time.monotonic() + wait_s
        while len(batch) < self._most:
            # What is there already is taken; only for more is there a wait.
            wait = 0.0 if len(batch) >= self._expected() else max(deadline - time.monotonic(), 0.0)
            try:
                following = self._queue.get(timeout=wait) if wait else self._queue.get_nowait()
            except queue.Empty:
                break
            if following is None:
                return batch, False
            batch.append(following)
        return batch, True

    def _run(self, batch: list[_Waiting[Item, Result]]) -> None:
        started = time.monotonic()
        try:
            results = self._function([one.item for one in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            log.warning("a batch of %d failed (%s); trying each alone", len(batch), error)
            for one in batch:
                self._run([one])
            return
        took = time.monotonic() - started
        self._usual_s += 0.2 * (took - self._usual_s)
        self.batches += 1
        self.requests += len(batch)
        for one, result in zip(batch, results, strict=True):
            one.future.set_result(Batched(result, started - one.since, took, len(batch)))

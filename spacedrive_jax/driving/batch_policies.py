"""Policies that plan for several drives at once: a model in this process, or a policy server.

Requests of several sessions go through one call of the model, in a worker thread with a bounded wait.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from jax.sharding import Mesh

from spacedrive_jax.driving.bench import PlanRequest
from spacedrive_jax.driving.client import PolicyClient, PolicyError
from spacedrive_jax.driving.driver import FailureKind, Plan, PlanError, checked_plan
from spacedrive_jax.driving.model_policy import check_depth, warm_up_record
from spacedrive_jax.driving.protocol import act_message
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.inference.open_planner import open_planner
from spacedrive_jax.inference.planner import BatchPlanner
from spacedrive_jax.io import place
from spacedrive_jax.world.filming import KEYFRAME_PERIOD

Item = TypeVar("Item")
Result = TypeVar("Result")

WAIT_SHARE = 0.25
"""Sessions that were answered together come back together, but not within microseconds."""
GLANCE = 0.002
"""Seconds between two looks at whether requests are still on their way."""

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
    where that is longer, and not at all once as many are there as sessions could send. For requests that are
    known to be on their way it waits as long as a batch takes. A batch over which
    the function fails is run again one by one, so that a request which cannot be answered spoils no other.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        most: int,
        wait_s: float,
        expected: Callable[[], int],
        coming: Callable[[], int] = lambda: 0,
    ) -> None:
        """Starts the thread.

        Args:
            function: one to `most` items to their results, in order.
            most: items of a batch.
            wait_s: see the class.
            expected: how many requests may come at once: the sessions at work.
            coming: how many have come and are being prepared.
        """
        self._function, self._most, self._wait_s = function, most, wait_s
        self._expected, self._coming = expected, coming
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
        batch, now = [first], time.monotonic()
        soon, late = now + wait_s, now + (max(wait_s, self._usual_s) if self._wait_s else 0.0)
        while len(batch) < self._most:
            # What is there already is taken; only for more is there a wait.
            now = time.monotonic()
            on_their_way = self._coming() > 0 and now < late
            wait = 0.0 if len(batch) >= self._expected() else max(soon - now, GLANCE if on_their_way else 0.0)
            try:
                following = self._queue.get(timeout=wait) if wait else self._queue.get_nowait()
            except queue.Empty:
                if on_their_way and wait:
                    continue
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


@runtime_checkable
class BatchPolicy(Protocol):
    """Answers several drives at once."""

    most: int
    """Drives whose requests it likes to get together."""

    def plans(self, requests: Sequence[PlanRequest]) -> Mapping[int, Plan | PlanError]:
        """A plan, or why there is none, for each drive's number."""

    def close(self) -> None:
        """No more requests."""


class LocalPolicy:
    """A checkpoint's model in this process: all requests go through it together.

    Batches are always filled up to the same size: other sizes are other programs, whose last bits differ, and
    a drive's bytes must not depend on which others are under way.
    """

    def __init__(self, planner: BatchPlanner) -> None:
        self.planner, self.most = planner, planner.most
        planner.sizes = (planner.most,)
        self._pool = concurrent.futures.ThreadPoolExecutor(planner.most, thread_name_prefix="sample")

    def plans(self, requests: Sequence[PlanRequest]) -> Mapping[int, Plan | PlanError]:
        """See `BatchPolicy`."""
        answers: dict[int, Plan | PlanError] = {}
        samples, numbers = [], []
        prepared = [self._pool.submit(self.planner.sample, request.record) for request in requests]
        for request, future in zip(requests, prepared, strict=True):
            try:
                samples.append(future.result())
                numbers.append(request.number)
            except SpaceDriveError as error:
                answers[request.number] = PlanError(FailureKind.CRASH, str(error))
        for first in range(0, len(samples), self.most):
            planned = self.planner.plan(samples[first : first + self.most])
            for number, plan in zip(numbers[first : first + self.most], planned, strict=True):
                answers[number] = _checked(plan.waypoints, plan.path, plan.text)
        return answers

    def close(self) -> None:
        """Ends the threads that prepare samples."""
        self._pool.shutdown()


class RemotePolicy:
    """A policy server: each drive is a session of its own, all are asked at the same time."""

    def __init__(self, url: str, most: int, deadline: float, token: str | None = None) -> None:
        """Connects to nothing yet.

        Args:
            url: `ws://host:port`.
            most: drives at a time.
            deadline: seconds within which an answer counts.
            token: of the server.
        """
        self.url, self.most, self.deadline, self.token = url, most, deadline, token
        self._clients: dict[int, PolicyClient] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(most)
        self._late: dict[int, concurrent.futures.Future[Plan | PlanError]] = {}
        """Requests whose answers have not come yet: a session is asked one thing at a time."""

    def plans(self, requests: Sequence[PlanRequest]) -> Mapping[int, Plan | PlanError]:
        """See `BatchPolicy`."""
        until = time.monotonic() + self.deadline
        concurrent.futures.wait(self._late.values(), self.deadline)
        self._late = {number: future for number, future in self._late.items() if not future.done()}
        futures = {
            request.number: self._pool.submit(self._ask, request)
            for request in requests
            if request.number not in self._late
        }
        concurrent.futures.wait(futures.values(), max(until - time.monotonic(), 0.0))
        late = PlanError(FailureKind.LATE, f"no answer within {self.deadline:g} s")
        answers: dict[int, Plan | PlanError] = {request.number: late for request in requests}
        for number, future in futures.items():
            if future.done():
                answers[number] = future.result()
            else:
                self._late[number] = future
        return answers

    def _ask(self, request: PlanRequest) -> Plan | PlanError:
        client = self._clients.get(request.number)
        try:
            if client is None:
                client = PolicyClient(self.url, token=self.token)
                client.connect()
                client.reset(f"drive {request.number}")
                self._clients[request.number] = client
            seconds = request.decision * KEYFRAME_PERIOD
            answer = client.act(act_message(request.record, request.decision, seconds))
        except (PolicyError, OSError) as error:
            return PlanError(FailureKind.CRASH, str(error))
        return _checked(answer.get("waypoints"), answer.get("path"), str(answer.get("text", "")))

    def close(self) -> None:
        """Closes all sessions."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for client in self._clients.values():
            client.close()


def _checked(waypoints: object, path: object, text: str) -> Plan | PlanError:
    try:
        return checked_plan(waypoints, path, text)
    except PlanError as error:
        return error


def name_server(url: str, token: str | None = None) -> dict[str, Any]:
    """Which model a policy server serves now, as it says itself.

    Args:
        url: `ws://host:port`.
        token: of the server.

    Raises:
        SpaceDriveError: it is away, or refuses.
    """
    try:
        with contextlib.closing(PolicyClient(url, token=token)) as client:
            said = client.connect()
    except PolicyError as error:
        raise SpaceDriveError(str(error)) from error
    return {"path": url} | {name: said.get(name) for name in ("model", "config_hash", "weights")}


def open_policy(
    checkpoint: str,
    *,
    batch_size: int,
    deadline: float,
    average: bool = False,
    token: str | None = None,
    mesh: Mesh | None = None,
) -> BatchPolicy:
    """Opens what `--checkpoint` names.

    Args:
        checkpoint: `ws://host:port` (or `wss://`) of a policy server, or a checkpoint's folder.
        batch_size: drives at a time.
        deadline: seconds within which a server's answer counts.
        average: take the moving average of the weights.
        token: of the server.
        mesh: devices of this host for the model; None for those there are.

    Raises:
        SpaceDriveError: it cannot be opened, or its depth comes from a network.
    """
    if checkpoint.startswith(("ws://", "wss://")):
        return RemotePolicy(checkpoint, batch_size, deadline, token)
    planner = open_planner(place(checkpoint), warm_up_record(), average=average, most=batch_size, mesh=mesh)
    try:
        check_depth(planner.config, None)
    except ConfigError as error:
        raise ConfigError(
            f"{checkpoint}: its depth comes from a network. Serve it (serve --checkpoint {checkpoint} "
            "--depth-model WEIGHTS) and drive --checkpoint ws://127.0.0.1:8000"
        ) from error
    return LocalPolicy(planner)

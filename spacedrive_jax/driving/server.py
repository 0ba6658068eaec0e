"""The policy server: plans for whoever drives, over websockets (docs/how-to/bench2drive.md, `protocol`).

The event loop only moves messages. Pictures are decoded in a few threads, the model runs in one, over
batches of whatever sessions have asked meanwhile. A session has one request under way at a time, so that a
client can neither flood the server nor, by not reading its answers, hold up anybody but itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import hmac
import http
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from spacedrive_jax.driving.batch_policies import Batched, Batcher
from spacedrive_jax.driving.client import PolicyError, pack, unpack
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.io import say
from spacedrive_jax.parallel import ending_signals

SEND_SECONDS = 30.0
"""A client that does not take its answer for so long is cut off."""
GRACE_SECONDS = 20.0
"""How long requests under way may take when the server is told to end."""
KEEPALIVE_SECONDS = 120.0
"""A peer that does not answer a ping for so long is gone. (A simulator that loads a town may be silent for
minutes, and simply connects again.)"""

log = logging.getLogger(__name__)


@runtime_checkable
class Policy(Protocol):
    """What is served."""

    metadata: Mapping[str, Any]
    """Sent to every client first."""
    most: int
    """Requests that `run` takes at once."""

    def warm_up(self) -> None:
        """Compiles; the server counts as healthy afterwards."""

    def prepare(self, message: Mapping[str, Any]) -> Any:
        """An `act` message as `run` takes it; called from several threads.

        Raises:
            SpaceDriveError: the message cannot be used.
        """

    def run(self, prepared: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
        """The answers to one to `most` requests, in order; called from one thread."""


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How to serve."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    token: str | None = None
    """Clients must send `Authorization: Bearer TOKEN`."""
    wait_ms: float = 5.0
    """Longest wait for further requests of a batch."""
    most_clients: int = 64
    most_bytes: int = 64 << 20
    """Largest message."""


@dataclasses.dataclass
class Served:
    """What a server did."""

    sessions: int = 0
    requests: int = 0
    batches: int = 0
    refused: int = 0
    """Messages that were answered with an error."""


class PolicyServer:
    """Serves one policy until it is told to stop."""

    def __init__(self, policy: Policy, config: ServerConfig) -> None:
        """Prepares a server; `run` opens its port."""
        self.policy, self.config = policy, config
        self.served = Served()
        self.port = config.port
        self._healthy = False
        self._acting: set[ServerConnection] = set()
        self._under_way = self._preparing = 0
        self._open = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._warming: threading.Thread | None = None

    @property
    def is_warming_up(self) -> bool:
        """Whether the policy still compiles, behind `run` too where that was stopped before it was ready."""
        return self._warming is not None and self._warming.is_alive()

    def run(self, ready: Callable[[PolicyServer], None] | None = None, *, signals: bool = False) -> Served:
        """Serves; returns after `stop`, or after SIGTERM, SIGHUP or SIGINT where `signals` are caught.

        Args:
            ready: called once the policy is warm and clients are let in.
            signals: catch them (only in the main thread).

        Raises:
            SpaceDriveError: the port cannot be opened.
        """
        return asyncio.run(self._serve(ready, signals))

    def stop(self) -> None:
        """Ends `run` from any thread: requests under way are answered, then sessions are closed."""
        if self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._stopping.set)

    async def _serve(self, ready: Callable[[PolicyServer], None] | None, signals: bool) -> Served:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        if signals:
            for number in (*ending_signals(), signal.SIGINT):
                self._loop.add_signal_handler(number, self._stopping.set)
        config = self.config
        self._batcher: Batcher[Any, Mapping[str, Any]] = Batcher(
            self.policy.run,
            most=self.policy.most,
            wait_s=config.wait_ms / 1e3,
            expected=lambda: len(self._acting),
            coming=lambda: self._preparing,
        )
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "prepare")
        try:
            server = await serve(
                self._session,
                config.host,
                config.port,
                process_request=self._admit,
                origins=[None],  # no web page may reach a server on somebody's own machine
                compression=None,
                max_size=config.most_bytes,
                max_queue=1,
                ping_timeout=KEEPALIVE_SECONDS,
            )
        except OSError as error:
            self._end_threads()
            flag = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"
            raise SpaceDriveError(
                f"cannot serve on {config.host}:{config.port} ({say(error)}): choose another --{flag}"
            ) from error
        try:
            self.port = next(iter(server.sockets)).getsockname()[1]
            if await self._warmed(self._stopping):
                self._healthy = True
                if ready is not None:
                    ready(self)
                await self._stopping.wait()
            self._healthy = False  # nobody else is let in
            await self._finish()
            server.close()
            await server.wait_closed()
        finally:
            await asyncio.to_thread(self._end_threads)
        self.served.batches, self.served.requests = self._batcher.batches, self._batcher.requests
        return self.served

    async def _warmed(self, stopping: asyncio.Event) -> bool:
        """Warms the policy up; False when the server was told to stop meanwhile."""
        done, outcome = asyncio.Event(), list[BaseException]()
        loop = asyncio.get_running_loop()

        def warm() -> None:
            try:
                self.policy.warm_up()
            except BaseException as error:
                outcome.append(error)
            with contextlib.suppress(RuntimeError):  # the server ended meanwhile
                loop.call_soon_threadsafe(done.set)

        # A thread that need not be waited for: a compile cannot be interrupted.
        self._warming = threading.Thread(target=warm, name="warm-up", daemon=True)
        self._warming.start()
        waits = [asyncio.ensure_future(event.wait()) for event in (done, stopping)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if outcome:
            raise outcome[0]
        return done.is_set()

    async def _finish(self) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        while self._under_way and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def _end_threads(self) -> None:
        self._batcher.close()
        self._threads.shutdown(cancel_futures=True)

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers /healthz, and turns clients away that may not or cannot be served."""
        if request.path.split("?")[0] == "/healthz":
            if self._healthy:
                return connection.respond(http.HTTPStatus.OK, "OK\n")
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "not ready\n")
        if self.config.token is not None:
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.config.token}".encode()):
                return connection.respond(http.HTTPStatus.UNAUTHORIZED, "wrong or missing token\n")
        if not self._healthy:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "not ready\n")
        if self._open >= self.config.most_clients:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
        return None

    async def _session(self, connection: ServerConnection) -> None:
        self._open += 1
        self.served.sessions += 1
        try:
            await self._send(connection, pack(dict(self.policy.metadata)))
            previous_s: float | None = None
            while True:
                data = await connection.recv()
                started = time.monotonic()
                self._under_way += 1
                try:
                    answer = await self._answer(connection, data, previous_s)
                    await self._send(connection, answer)
                finally:
                    self._under_way -= 1
                previous_s = time.monotonic() - started
        except ConnectionClosed:
            pass
        except TimeoutError:
            log.warning("%s does not take its answer: cut off", connection.remote_address)
            connection.transport.abort()
        except _RefusedError as refusal:
            self.served.refused += 1
            log.warning("%s: %s", connection.remote_address, refusal.text.splitlines()[-1])
            await self._refuse(connection, refusal)
        finally:
            self._open -= 1
            self._acting.discard(connection)

    async def _answer(
        self, connection: ServerConnection, data: bytes | str, previous_s: float | None
    ) -> bytes:
        if isinstance(data, str):
            raise _RefusedError("a request is one binary msgpack message, this was text", 1003)
        loop = asyncio.get_running_loop()
        started = time.monotonic()
        try:
            message = await loop.run_in_executor(self._threads, unpack, data)
            kind = message.get("kind") if isinstance(message, dict) else None
            if not isinstance(kind, str):  # an array equals nothing, and says so element by element
                raise _RefusedError(f"a request has kind act or reset, not {str(kind)[:40]!r}", 1007)
            if kind == "reset":
                return pack({"kind": "reset", "route_id": str(message.get("route_id", ""))[:200]})
            if kind != "act":
                raise _RefusedError(f"a request has kind act or reset, not {str(kind)[:40]!r}", 1007)
            self._acting.add(connection)
            self._preparing += 1
            try:
                prepared = await loop.run_in_executor(self._threads, self.policy.prepare, message)
            finally:
                self._preparing -= 1
            prepared_s = time.monotonic() - started
            batched = await asyncio.wrap_future(self._batcher.submit(prepared))
        except (PolicyError, SpaceDriveError) as error:
            raise _RefusedError(str(error), 1007) from error
        except (_RefusedError, asyncio.CancelledError):
            raise
        except Exception as error:
            log.exception("a request failed")
            raise _RefusedError(traceback.format_exc(), 1011) from error
        return pack({**batched.result, "server_timing": _timing(batched, prepared_s, previous_s)})

    async def _send(self, connection: ServerConnection, data: bytes) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await connection.send(data)

    async def _refuse(self, connection: ServerConnection, refusal: _RefusedError) -> None:
        """Says what was wrong as text, then closes."""
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await connection.send(refusal.text)
                await connection.close(refusal.code, "see the message before")
        except (ConnectionClosed, TimeoutError):
            connection.transport.abort()


class _RefusedError(Exception):
    """A request that is answered with a text and the end of its session."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.text, self.code = text, code


def _timing(batched: Batched[Any], prepared_s: float, previous_s: float | None) -> dict[str, float]:
    """`server_timing`: `infer_ms` is decoding and model, without the wait for the model to be free."""
    timing = {
        "infer_ms": 1e3 * (prepared_s + batched.run_s),
        "prepare_ms": 1e3 * prepared_s,
        "model_ms": 1e3 * batched.run_s,
        "queue_ms": 1e3 * batched.queued_s,
        "batch": batched.size,
    }
    return timing | ({} if previous_s is None else {"prev_total_ms": 1e3 * previous_s})

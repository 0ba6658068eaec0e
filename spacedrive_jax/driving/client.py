"""Client of the policy server: a websocket on which each request is one binary msgpack message.

Runs wherever CARLA does: Python 3.7 and newer with numpy, msgpack and websockets (11 and newer), nothing of
this project. Arrays travel as openpi's `msgpack_numpy` packs them; no pickle, no object arrays.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

PROTOCOL = 1
"""Version of the messages; server and client must have the same."""
RETRY_SECONDS = 5.0
"""Between two attempts to reach a server that does not answer."""
PATIENCE_SECONDS = 500.0
"""How long a server may be away. The Bench2Drive evaluator gives up on a call after 600 s."""
ANSWER_SECONDS = 500.0
"""How long a server that is there may take for an answer."""
MOST_LOSSES = 5
"""A request over which the connection was lost more often is given up: it may be what the server dies of."""
REFUSALS = (1003, 1007, 1008, 1009)
"""Close codes that blame the client: sending the same again will not help."""

log = logging.getLogger(__name__)


class PolicyError(Exception):
    """The server refused a request or failed over it; the message is its own. Trying again will not help."""


def pack(message: Any) -> bytes:
    """A message (dicts with text keys, lists, numbers, texts, bytes, numpy arrays) as msgpack.

    Raises:
        PolicyError: it holds an array that numbers cannot be read from (objects, records, complex) or another
            type that the wire does not know.
    """
    try:
        return msgpack.packb(message, default=_pack_array)
    except (TypeError, ValueError, OverflowError) as error:
        raise PolicyError(f"the message cannot be packed: {error}") from error


def unpack(data: bytes) -> Any:
    """The message that `pack` made.

    Raises:
        PolicyError: it is not one, or holds an array of another type, or one whose bytes do not fill its
            shape.
    """
    try:
        return msgpack.unpackb(data, object_hook=_unpack_array, strict_map_key=False)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise PolicyError(f"the message is not valid msgpack: {error or type(error)}") from error


def _pack_array(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"{type(value).__name__} cannot be sent")
    if value.dtype.kind not in "biuf":
        raise ValueError(f"arrays of dtype {value.dtype} cannot be sent")
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": list(value.shape),
        }
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _unpack_array(fields: dict) -> Any:
    if b"__ndarray__" not in fields and b"__npgeneric__" not in fields:
        return fields
    dtype = fields.get(b"dtype")
    # By its name alone: np.dtype would evaluate whole record types.
    if not isinstance(dtype, str) or len(dtype) > 4 or dtype[-2:-1] not in ("b", "i", "u", "f"):
        raise ValueError(f"an array of dtype {dtype!r} is not accepted")
    data = fields.get(b"data")
    if b"__npgeneric__" in fields:
        return np.dtype(dtype).type(data)
    shape = fields.get(b"shape")
    if not isinstance(data, bytes) or not isinstance(shape, (list, tuple)) or len(shape) > 8:
        raise ValueError("an array lacks its bytes or its shape")
    if not all(isinstance(side, int) and 0 <= side < 2**31 for side in shape):
        raise ValueError(f"an array has the shape {shape!r}")
    flat = np.frombuffer(data, dtype)
    count = 1
    for side in shape:
        count *= side
    if flat.size != count:
        raise ValueError(f"{flat.size} numbers do not fill an array of shape {tuple(shape)}")
    return flat.reshape(shape)


class PolicyClient:
    """A session with a policy server, which outlives the server's restarts."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        retry_seconds: float = RETRY_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """Prepares a session; nothing is sent before `connect` or the first request.

        Args:
            url: `ws://HOST:PORT`.
            token: what `serve --token` asks for.
            retry_seconds: between two attempts to reach the server.
            patience_seconds: give up when the server has been away for so long.

        Raises:
            PolicyError: the address is none.
        """
        check_url(url)
        self.url = url
        self.token = token
        self.retry_seconds = retry_seconds
        self.patience_seconds = patience_seconds
        self.metadata = {}  # type: dict
        """What the server says of itself and its model, once connected."""
        self._socket = None  # type: Any
        self._route = None  # type: str | None
        self._turn = threading.Lock()

    def connect(self) -> dict:
        """Connects, waiting for the server to be there and warm; returns its metadata.

        Raises:
            PolicyError: it speaks another protocol, refuses the token, does not come in time, or serves
                another model than when it was connected to before.
        """
        deadline = time.monotonic() + self.patience_seconds
        problem = self._attempt()
        while problem is not None:
            status = getattr(getattr(problem, "response", None), "status_code", None)
            if status in (401, 403):
                raise PolicyError(f"{self.url} refuses the token") from problem
            if time.monotonic() + self.retry_seconds > deadline:
                raise PolicyError(
                    f"{self.url} stayed away for {self.patience_seconds:.0f} s ({problem}): is it running?"
                ) from problem
            left = deadline - time.monotonic()
            log.warning("%s is not ready (%s); trying again for up to %.0f s", self.url, problem, left)
            time.sleep(self.retry_seconds)
            problem = self._attempt()
        return self.metadata

    def reset(self, route: str) -> None:
        """Tells the server that a route begins."""
        self._route = route
        self.request({"kind": "reset", "route_id": route})

    def act(self, observation: dict) -> dict:
        """Asks for a plan.

        Args:
            observation: the fields of an `act` message (see docs/how-to/bench2drive.md), without `kind`.

        Returns:
            `waypoints` (6, 2) and `path` (20, 2) in metres in the ego frame (x forward, y left; empty where
            the answer could not be read, which `status` says), `text`, `status`, `server_timing`.

        Raises:
            PolicyError: the server refused the observation or failed.
        """
        return self.request(dict(observation, kind="act"))

    def request(self, message: dict) -> dict:
        """Sends a message and waits for its answer; over a new connection where the old one is lost. Threads
        take turns.

        Raises:
            PolicyError: the server answered with an error, stays away, or does not answer.
        """
        with self._turn:
            return self._request(message)

    def _request(self, message: dict) -> dict:
        data = pack(message)
        for lost in range(MOST_LOSSES + 1):
            if self._socket is None:
                self.connect()
                if self._route is not None and message.get("kind") != "reset":
                    self._exchange(pack({"kind": "reset", "route_id": self._route}))
            try:
                return self._exchange(data)
            except (OSError, ConnectionClosed) as error:
                self.close()
                code = getattr(getattr(error, "rcvd", None), "code", None)
                if code in REFUSALS or lost == MOST_LOSSES:
                    raise PolicyError(f"{self.url} ended the session: {error}") from error
                log.warning("lost %s (%s); connecting again", self.url, error)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Ends the session; the next request would begin another."""
        socket, self._socket = self._socket, None
        if socket is not None:
            with contextlib.suppress(OSError, ConnectionClosed):
                socket.close()

    def _attempt(self) -> Exception | None:
        """Connects; what stood in the way, if anything."""
        try:
            self._open()
        except (OSError, InvalidHandshake, ConnectionClosed) as error:
            self.close()
            return error
        return None

    def _open(self) -> None:
        self._check_health()
        options = {"compression": None, "max_size": None, "open_timeout": 30}  # type: dict
        if self.token:
            options["additional_headers"] = {"Authorization": f"Bearer {self.token}"}
        # Newer releases ping by themselves and would drop a server that is compiling; and look for a proxy.
        known = inspect.signature(connect).parameters
        if "ping_timeout" in known:
            options["ping_timeout"] = None
        if "proxy" in known and _is_local(self.url):
            options["proxy"] = None
        # Old releases give the connection, new ones what opens it; entering is the same for both.
        self._socket = connect(self.url, **options).__enter__()
        metadata = unpack(self._socket.recv(60))
        if not isinstance(metadata, dict) or metadata.get("protocol") != PROTOCOL:
            said = metadata.get("protocol") if isinstance(metadata, dict) else None
            self.close()
            raise PolicyError(
                f"{self.url} speaks protocol {said}, this client {PROTOCOL}: update the older one"
            )
        if self.metadata and _named(metadata) != _named(self.metadata):
            self.close()
            raise PolicyError(
                f"{self.url} serves another model now ({_named(metadata)}) than before "
                f"({_named(self.metadata)}): serve that one again, or begin anew"
            )
        self.metadata = metadata

    def _check_health(self) -> None:
        """Raises an OSError until the server answers /healthz with 200."""
        parts = urllib.parse.urlsplit(self.url)
        scheme = "https" if parts.scheme == "wss" else "http"
        handlers = [urllib.request.ProxyHandler({})] if _is_local(self.url) else []
        opener = urllib.request.build_opener(*handlers)
        opener.open(f"{scheme}://{parts.netloc}/healthz", timeout=30).close()

    def _exchange(self, data: bytes) -> dict:
        try:
            self._socket.send(data)
            answer = self._socket.recv(ANSWER_SECONDS)
        except BaseException as error:
            # Ctrl-C too: the answer would still come, and be taken for that of the next request.
            self.close()
            if isinstance(error, TimeoutError) and error.errno is None:  # of `recv`, not of the network
                raise PolicyError(
                    f"{self.url} did not answer within {ANSWER_SECONDS:.0f} s: is it stuck?"
                ) from error
            raise
        if isinstance(answer, str):
            self.close()
            raise PolicyError(answer)
        return unpack(answer)


def check_url(url: str) -> None:
    """Refuses an address that no server can ever have; waiting for it would be in vain.

    Raises:
        PolicyError: it is no `ws://HOST:PORT`.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        fine = parts.scheme in ("ws", "wss") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or too large
        fine = False
    if not fine:
        raise PolicyError(f"{url!r} is no address of a policy server: give ws://HOST:PORT")


def _named(metadata: dict) -> dict:
    """What tells a server's model from another one."""
    return {name: metadata.get(name) for name in ("model", "config_hash", "weights")}


def _is_local(url: str) -> bool:
    return urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")

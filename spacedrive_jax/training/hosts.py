"""The hosts of a run: how they join, fail together, and stop together when one of them is taken away."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax._src import distributed  # its client has no public name; orbax takes it from here too

from spacedrive_jax.config import config_changes
from spacedrive_jax.console import Terminated, first_line
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.parallel import ending_signals

log = logging.getLogger(__name__)

T = TypeVar("T")

# Several hosts as one run: start-up from flags or from the cluster's environment.


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the hosts of a run; call it before anything touches a device.

    Args:
        coordinator: `auto` reads the cluster's environment (SLURM, Open MPI, GKE and Cloud TPU, Kubernetes);
            `HOST:PORT` of the first host goes with the other two; None is a single host.
        num_processes: hosts in the run.
        process_id: this host, from 0.

    Raises:
        SpaceDriveError: the three do not go together, or the hosts do not find each other.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise ConfigError("--num-processes and --process-id need --coordinator HOST:PORT")
        return
    explicit = coordinator != "auto"
    host, _, port = coordinator.rpartition(":")
    if explicit and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(
            f"--coordinator {coordinator} is no HOST:PORT of the first host, such as node0:1234, nor `auto`"
        )
    if explicit and (num_processes is None or process_id is None or not 0 <= process_id < num_processes):
        raise ConfigError(
            f"--coordinator {coordinator} needs --num-processes N and --process-id 0..N-1, got "
            f"{num_processes}, {process_id}; on SLURM, GKE and Cloud TPU --coordinator auto finds all three"
        )
    try:
        if explicit:
            jax.distributed.initialize(coordinator, num_processes, process_id, own_devices())
        else:
            jax.distributed.initialize(local_device_ids=own_devices())
    except (RuntimeError, ValueError) as error:
        raise SpaceDriveError(f"the hosts of the run could not be joined: {error}") from error
    threading.Thread(target=_end_with_others, name="other hosts", daemon=True).start()


def own_devices() -> list[int] | None:
    """Which GPUs of its node this host has, as `jax.distributed` wants it said; None leaves it to jax.

    Under SLURM and Open MPI jax takes one GPU for each task, that of the task's number on its node: of eight
    GPUs a task that has its node to itself would see the first alone. An empty list holds none back.
    """
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    alone = re.fullmatch(r"1(\(x\d+\))?", per_node) is not None
    return [] if alone and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None


FAILED, GONE = "spacedrive/failed", "spacedrive/gone"
"""What the hosts of a run tell each other through the service that joined them: no device, and no host that
hangs, has a part in it."""
LOOK_SECONDS, FAREWELL_SECONDS = 1.0, 20.0
EXCHANGE_MILLISECONDS = 10_000
"""Between looks at whether this process was told to end."""
_own_failure = threading.Event()


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Ends every host of a run where one of them fails; else the others wait for it in a collective.

    The others say on stderr which host failed and why, and exit with 1. A single host is left alone.
    """
    try:
        yield
    except BaseException as error:
        client = distributed.global_state.client
        if client is not None and distributed.global_state.num_processes > 1:
            _own_failure.set()
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service may be gone
                client.key_value_set(f"{FAILED}/{distributed.global_state.process_id}", first_line(error))
            kinds = {KeyboardInterrupt: 128 + signal.SIGINT, Terminated: 128 + signal.SIGTERM}
            # Ahead of jax's own farewell, which waits minutes for hosts that will not come, and whether or
            # not some thread of a library still waits for them.
            atexit.register(_leave, client, kinds.get(type(error), 1))
            overdue = threading.Timer(FAREWELL_SECONDS, _leave, (client, kinds.get(type(error), 1)))
            overdue.daemon = True
            overdue.start()
        raise


def _end_with_others() -> None:
    """Looks whether another host has failed, until this process ends."""
    client = distributed.global_state.client
    while client is not None and not _own_failure.wait(LOOK_SECONDS):
        try:
            failed = client.key_value_dir_get(FAILED)
        except jax.errors.JaxRuntimeError:  # the hosts have taken leave of each other
            return
        if failed and not _own_failure.is_set():
            name, said = failed[0]
            print(f"error: host {name.rpartition('/')[2]} of the run failed: {said}", file=sys.stderr)
            _leave(client, 1)


def _leave(client: Any, status: int) -> None:
    """Ends this process; the first host, which has the service, once the others have heard."""
    state = distributed.global_state
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{GONE}/{state.process_id}", "", allow_overwrite=True)
        deadline = time.monotonic() + (0 if state.process_id else FAREWELL_SECONDS)
        while len(client.key_value_dir_get(GONE)) < state.num_processes and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS / 10)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def is_first_host() -> bool:
    """Whether this host writes what a run has one of."""
    return jax.process_index() == 0


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The hosts of a run, as one of them sees them."""

    index: int
    count: int
    exchange: Callable[[bytes], Sequence[bytes]]
    """Hands out bytes and returns every host's, in order; all hosts call it equally often."""

    @property
    def is_first(self) -> bool:
        """Whether this host writes what a run has one of."""
        return self.index == 0

    def in_turn(self, work: Callable[[], T]) -> T:
        """Does something on the first host, then on the others; all go on when all have done it."""
        outcome: list[T] = []
        for turn in (True, False):
            if turn == self.is_first:
                outcome.append(work())
            self.exchange(b"")
        return outcome[0]

    def agree(self, metadata: Mapping[str, Any]) -> None:
        """Has all hosts go on only where they mean the same run: else each would wait for the others in a
        collective that these never come to, or train on with numbers of its own.

        Args:
            metadata: what must be the same everywhere, JSON.

        Raises:
            SpaceDriveError: on every host, naming what differs, and on which hosts.
        """
        known = [json.loads(each) for each in self.exchange(json.dumps(dict(metadata)).encode())]
        found = [
            f"host {number} has {change}"
            for number, each in enumerate(known)
            for change in config_changes(known[0], each)
        ]
        if found:
            raise SpaceDriveError(
                f"the hosts do not mean the same run (host 0's -> the other's): {'; '.join(found[:8])}. Give "
                "all of them the same installation, flags, files and disk"
            )


ALONE = Hosts(0, 1, lambda data: [data])


def hosts_of_run() -> Hosts:
    """The hosts that `connect` joined."""
    return _joined() if jax.process_count() > 1 else ALONE


@functools.cache
def _joined() -> Hosts:
    index, count, client = jax.process_index(), jax.process_count(), distributed.global_state.client
    if client is None:
        raise ConfigError(f"{count} hosts that do not know each other: give all of them --coordinator auto")
    return Hosts(index, count, exchange_through(client, index, count))


def exchange_through(client: Any, index: int, count: int) -> Callable[[bytes], Sequence[bytes]]:
    """`Hosts.exchange` by way of the service that joined the hosts.

    A collective of the devices, such as `multihost_utils.process_allgather`, would wait for all that they
    have been given to do.

    Args:
        client: of that service.
        index: this host.
        count: hosts of the run.
    """
    rounds = itertools.count()

    def place(number: int, host: int) -> str:
        return f"spacedrive/exchange/{number}/{host}"

    def received(key: str) -> bytes:
        while True:  # however long another host works; one that fails or is gone ends this one too
            try:
                return client.blocking_key_value_get_bytes(key, EXCHANGE_MILLISECONDS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def exchange(data: bytes) -> Sequence[bytes]:
        number = next(rounds)
        client.key_value_set_bytes(place(number, index), data)
        everyone = [received(place(number, host)) for host in range(count)]
        if number:  # who has come to this round has read the one before
            client.key_value_delete(place(number - 1, index))
        return everyone

    return exchange


# SIGTERM, the notice that a machine is about to be taken away; Ctrl-C, a person's; SIGHUP, a terminal's that
# is closed.


class PreemptionWatch:
    """Context in which SIGTERM, SIGHUP and Ctrl-C ask the loop to save and stop instead of ending it at once.

    A second Ctrl-C does end it at once.
    """

    def __init__(self) -> None:
        self._noticed = threading.Event()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> PreemptionWatch:
        if threading.current_thread() is threading.main_thread():
            heard = {*ending_signals(), signal.SIGINT}
            if jax.process_count() > 1:
                # jax's own notifier hears this one, and all hosts agree on the step to stop at.
                heard.discard(signal.SIGTERM)
            self._previous = {number: signal.signal(number, self._notice) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]
        self._previous = {}

    def stop_at(self, step: int, manager: ocp.CheckpointManager) -> bool:
        """Whether to save and stop behind this step; the same answer on every host."""
        if jax.process_count() > 1:
            return manager.reached_preemption(step)
        return self._noticed.is_set()

    def ask(self) -> bool:
        """Asks for what a notice asks for: that every host saves and stops.

        Returns:
            Whether to do so behind this very step: several hosts agree on a later one (`stop_at`).
        """
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # jax's notifier brings it to the others
            return False
        return True

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            log.info("stopping behind this step, with a checkpoint; Ctrl-C again stops without one")
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._noticed.set()
        self.ask()

"""SIGTERM, the notice that a machine is about to be taken away."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import jax
import orbax.checkpoint as ocp


class PreemptionWatch:
    """Context in which SIGTERM asks the loop to save and stop instead of ending the process at once."""

    def __init__(self) -> None:
        self._noticed = threading.Event()
        self._previous: object = None
        self._watches = False

    def __enter__(self) -> PreemptionWatch:
        # With several hosts jax's own notifier listens, and all hosts agree on the step to stop at.
        self._watches = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self._watches:
            self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watches:
            signal.signal(signal.SIGTERM, self._previous)  # type: ignore[arg-type]

    def stop_at(self, step: int, manager: ocp.CheckpointManager) -> bool:
        """Whether to save and stop behind this step; the same answer on every host."""
        if jax.process_count() > 1:
            return manager.reached_preemption(step)
        return self._noticed.is_set()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed.set()

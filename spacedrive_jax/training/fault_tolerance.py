"""Steps whose loss or gradient is nan or infinite: write down what they saw, tolerate a few."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType

import jax
import orbax.checkpoint as ocp

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.data.loader import MixedSamples, Samples
from spacedrive_jax.training.run_folder import save_batch_tokens
from spacedrive_jax.training.step import Metrics

log = logging.getLogger(__name__)

# SIGTERM, the notice that a machine is about to be taken away, and Ctrl-C, a person's.


class PreemptionWatch:
    """Context in which SIGTERM and Ctrl-C ask the loop to save and stop instead of ending it at once.

    A second Ctrl-C does end it at once.
    """

    def __init__(self) -> None:
        self._noticed = threading.Event()
        self._previous: dict[int, object] = {}
        self._watches = False

    def __enter__(self) -> PreemptionWatch:
        # With several hosts jax's own notifier listens, and all hosts agree on the step to stop at.
        self._watches = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self._watches:
            self._previous = {
                number: signal.signal(number, self._notice) for number in (signal.SIGTERM, signal.SIGINT)
            }
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


class NonfiniteGuard:
    """Looks at every step once the next one is under way, so that the devices never wait for the host.

    The step itself leaves the trainables alone when it is not finite, so a late look loses nothing.
    """

    def __init__(self, run_dir: Path, samples: Samples | MixedSamples, allowed: int) -> None:
        """Tolerates `allowed` such steps."""
        self._run_dir, self._samples, self._allowed = run_dir, samples, allowed
        self._pending: tuple[int, DrivingBatch, Metrics] | None = None
        self.skipped = 0

    def watch(self, step: int, host_batch: DrivingBatch, metrics: Metrics) -> None:
        """Takes note of a step that was started, and looks at the one before.

        Raises:
            FloatingPointError: more than the allowed number of steps were not finite.
        """
        self.settle()
        self._pending = (step, host_batch, metrics)

    def settle(self) -> None:
        """Looks at the step that was started last, waiting for it.

        Raises:
            FloatingPointError: as in `watch`.
        """
        if self._pending is None:
            return
        (step, batch, metrics), self._pending = self._pending, None
        if jax.device_get(metrics["finite"]):
            return
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        tokens = [self._samples.records[int(index)]["token"] for index in batch.index]
        file = save_batch_tokens(self._run_dir, step, tokens, values)
        self.skipped += 1
        if self.skipped > self._allowed:
            raise FloatingPointError(
                f"step {step} has loss {values['loss']} and gradient norm {values['grad_norm']}; its "
                f"keyframes are in {file}. Lower train.learning_rate or look at that data; --resume "
                "--skip-nonfinite N leaves up to N such steps out"
            )

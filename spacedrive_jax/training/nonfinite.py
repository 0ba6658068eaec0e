"""Steps whose loss or gradient is nan or infinite: write down what they saw, tolerate a few."""

from __future__ import annotations

from pathlib import Path

import jax

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.data.pipeline import Samples
from spacedrive_jax.training.run_folder import save_batch_tokens
from spacedrive_jax.training.step import Metrics


class NonfiniteGuard:
    """Looks at every step once the next one is under way, so that the devices never wait for the host.

    The step itself leaves the trainables alone when it is not finite, so a late look loses nothing.
    """

    def __init__(self, run_dir: Path, samples: Samples, allowed: int) -> None:
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

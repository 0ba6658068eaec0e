"""How well the machine is used: seconds a step, waiting for data, goodput, MFU."""

from __future__ import annotations

import time

import jax

from spacedrive_jax.config import Config
from spacedrive_jax.data.pipeline import SampleClock
from spacedrive_jax.scaling.flops import train_step_flops
from spacedrive_jax.scaling.topology import DEVICE_KINDS


class Throughput:
    """Clocks of a run.

    * step_seconds: wall time of the window over its steps;
    * samples_per_second: batch size over that;
    * data_wait: share of the window spent waiting for the input pipeline (0: never the bottleneck);
    * data_headroom: samples a second that the read threads could make, by the time the window's samples took
      them, over those the steps took; above 1 the pipeline keeps up. Absent where every sample was at hand
      (`data.cache_in_memory`);
    * goodput: time in steps over the time since the run was started; the first window, which compiles, does
      not count as steps, nor does waiting for data;
    * mfu: model FLOPs of a step (`scaling.flops`) over step_seconds, devices and peak rate; only where the
      device's rate is known.
    """

    def __init__(self, config: Config, started: float, samples: SampleClock) -> None:
        """Starts the clocks.

        Args:
            config: the run.
            started: when it started (time.monotonic).
            samples: what this host's samples took to make.
        """
        self._batch_size = config.train.batch_size
        self._samples, self._threads = samples, config.data.read_threads
        self._started = started
        self._productive, self._compiled = 0.0, False
        peak = DEVICE_KINDS.get(jax.devices()[0].device_kind)
        ideal = None if peak is None else train_step_flops(config).model / peak / jax.device_count()
        self._ideal_seconds = ideal
        self._reset()

    def waited(self, seconds: float) -> None:
        """Counts time spent waiting for a batch."""
        self._waiting += seconds

    def stepped(self) -> None:
        """Counts a step."""
        self._steps += 1

    def window(self) -> dict[str, float]:
        """The metrics since the last call; call it when the steps have really been done."""
        now = time.monotonic()
        elapsed, waiting = now - self._window, self._waiting
        seconds = elapsed / max(self._steps, 1)
        if self._compiled:
            self._productive += elapsed - waiting
        self._compiled = True
        self._reset()
        values = {
            "step_seconds": seconds,
            "samples_per_second": self._batch_size / seconds,
            "data_wait": waiting / elapsed,
            "goodput": self._productive / (now - self._started),
        }
        making, made = self._samples.take()
        if made:
            possible = jax.process_count() * max(self._threads, 1) * made / making
            values["data_headroom"] = possible / values["samples_per_second"]
        if self._ideal_seconds is not None:
            values["mfu"] = self._ideal_seconds / seconds
        return values

    def _reset(self) -> None:
        self._window, self._waiting, self._steps = time.monotonic(), 0.0, 0

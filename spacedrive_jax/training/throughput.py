"""How well the machine is used: seconds a step, waiting for data, goodput, MFU."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from spacedrive_jax.config import Config
from spacedrive_jax.data.loader import SampleClock
from spacedrive_jax.training.checkpoints import Best
from spacedrive_jax.training.flops import DEVICE_KINDS, train_step_flops

# What a training run says on stderr: one line when it starts and one every logging interval.


def opening_line(
    *, name: str, trainable: int, frozen: int, keyframes: int, batch_size: int, start: int, steps: int
) -> str:
    """What is about to be trained on what.

    Args:
        name: of the config.
        trainable: parameters that train.
        frozen: parameters that do not.
        keyframes: training keyframes.
        batch_size: samples a step.
        start: steps done before.
        steps: where the run ends.
    """
    since = f"resumed behind step {start}" if start else "from the start"
    return (
        f"{name}: {trainable:,} parameters train, {frozen:,} are frozen; {keyframes:,} keyframes, "
        f"{batch_size} a step; {since} to {steps}. The first step compiles."
    )


def cost_line(step: int, steps: int, step_seconds: float, *, validates: bool) -> str:
    """What a step costs and when the run ends, said once, as soon as it is known.

    Args:
        step: steps done.
        steps: where the run ends.
        step_seconds: wall time of one, compiling left out.
        validates: whether validations come on top.
    """
    seconds = (steps - step) * step_seconds
    ends = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + seconds))
    on_top = ", validations on top" if validates else ""
    return (
        f"a step takes {step_seconds:.3g} s: the other {steps - step:,} take "
        f"{tqdm.format_interval(seconds)}{on_top}, until {ends}"
    )


def other_validation_line(best: Best, measure: str) -> str:
    """Why the best step so far counts no longer.

    Args:
        best: of the run so far.
        measure: what the run goes by from now on (`train.best_by`).
    """
    why = (
        f"from now on {measure} decides"
        if measure != best.measure
        else "other keyframes, or settings, are validated from now on"
    )
    return (
        f"the best step so far, {best.step} with {best.measure} {best.value:.4g}, is compared with no more: "
        f"{why}. It stays RUN/best until the next validation"
    )


def validation_line(step: int, values: Mapping[str, float], best: bool) -> str:
    """What a validation found.

    Args:
        step: steps done.
        values: its metrics.
        best: whether it is the best of the run so far.
    """
    shown = {name.removeprefix("validation/"): value for name, value in values.items()}
    collision = f", collision {shown['collision']:.2f} %" if "collision" in shown else ""
    return (
        f"validation at step {step}: loss {shown['loss']:.4f}, L2 {shown['l2']:.2f} m{collision}, "
        f"{shown['unparsed']:.0%} unparsed, in {shown['seconds']:.1f} s"
        + ("; the best so far" if best else "")
    )


def interval_line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """Where the run stands.

    Args:
        step: steps done.
        steps: where the run ends.
        values: the metrics of that step and its window, as in metrics.jsonl.
    """
    left = tqdm.format_interval((steps - step) * values["step_seconds"])
    mfu = f", MFU {values['mfu']:.1%}" if "mfu" in values else ""
    return (
        f"step {step}/{steps}: loss {values['loss']:.4f} (language {values['loss_language']:.4f}, position "
        f"{values['loss_position']:.4f}), L2 {values['displacement_m']:.2f} m, gradient "
        f"{values['grad_norm']:.2f}, rate {values['learning_rate']:.2e}, "
        f"{values['samples_per_second']:.1f} samples/s{mfu}, {values['data_wait']:.1%} waiting for data, "
        f"{left} left"
    )


@dataclasses.dataclass(frozen=True)
class ProfileWindow:
    """Steps to trace with the profiler, into RUN/profile."""

    start: int
    steps: int


class Profiler:
    """Traces the steps of a window; a run that stops within it leaves what was traced until then."""

    def __init__(self, window: ProfileWindow | None, folder: Path) -> None:
        """Args: the steps, None for none; where the trace goes."""
        self._window, self._folder, self._running = window, folder, False

    def before(self, done: int) -> None:
        """Starts tracing where the window begins behind `done` steps."""
        if self._window is not None and done == self._window.start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def behind(self, done: int, values: Any) -> None:
        """Ends it where the window ends with step `done`, which made these values."""
        if self._running and self._window is not None and done == self._window.start + self._window.steps:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Ends it, wherever the run is."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def given_up_on_failure(self) -> Iterator[None]:
        """Removes what was traced where the block fails: a run that cannot start leaves nothing behind."""
        there = self._folder.exists(), self._folder.parent.exists()
        try:
            yield
        except BaseException:
            self.close()
            for folder, was_there in zip((self._folder, self._folder.parent), there, strict=True):
                if not was_there:
                    shutil.rmtree(folder, ignore_errors=True)
            raise


class Throughput:
    """Clocks of a run.

    * step_seconds: wall time of the window over its steps;
    * samples_per_second: batch size over that;
    * data_wait: share of the window spent waiting for the input pipeline (0: never the bottleneck);
    * data_headroom: samples a second that the read threads could make, by the time the window's samples took
      them, over those the steps took; above 1 the pipeline keeps up. Absent where every sample was at hand
      (`data.cache_in_memory`) or worker processes make the samples;
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

    def paused(self, seconds: float) -> None:
        """Leaves time out that went into something else than steps (a validation)."""
        self._window += seconds

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

"""What a step takes and how well the machine does it, in numbers and in the lines that a run prints.

Operations are counted from the config. Only matrix products count, a multiply-add as two. Attention of the
language model counts its causal half; padding counts as the device computes it. What is recomputed to save
memory is kept apart: it is work for the hardware, not for the model (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from tqdm import tqdm

from spacedrive_jax.config import Config
from spacedrive_jax.constants import NUM_CAMERAS
from spacedrive_jax.data.loader import SampleClock
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.models.config import LanguageModelConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.spacedrive_config import ModelConfig
from spacedrive_jax.training.checkpoints import Best

# Chips with their published rates, and descriptions of machines that need not be there.


GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator's published rates (Google Cloud, "TPU versions"; NVIDIA H100 and H200 data sheets)."""

    name: str
    peak_flops: float
    """Dense bfloat16 operations a second."""
    hbm_bytes: int
    hbm_bandwidth: float
    """Bytes a second."""
    interconnect: float
    """Bytes a second that a chip can send over all its links together."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9),
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9),
        Chip("v6e", 918e12, 32 * GIB, 1640e9, 448e9),
    )
}
DEVICE_KINDS = {
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
"""Peak dense bfloat16 operations a second by `device_kind`."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine to compile for."""

    name: str
    chip: Chip | None
    """None where rates are not known (the CPU devices of tests)."""
    devices: tuple[jax.Device, ...]


def describe(name: str, slices: int = 1) -> Topology:
    """Describes `v5e:1x1`, `v5e:4x4`, `v5p:4x4x4`, `v6e:8x8`, or `cpu:N` for N of this process's CPU devices.

    Args:
        name: the machine, or each of its slices.
        slices: how many of them the data-centre network joins.

    Raises:
        SpaceDriveError: the name is not of that form, libtpu is not installed, or it knows no such shape.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    kinds = [*CHIPS, "cpu"]
    if not match or match[1] not in kinds:
        raise ConfigError(
            f"--topology {name}: expected CHIP:SHAPE such as v5e:4x4; chips: {', '.join(kinds)}"
        )
    kind, count = match[1], math.prod(int(side) for side in match[2].split("x"))
    if kind == "cpu" and slices != 1:
        raise ConfigError(f"--slices {slices}: CPU devices have no slices, choose a TPU")
    if kind == "cpu":
        return Topology(name, None, _cpu_devices(count))
    # libtpu would look for a TPU host's metadata, lets one process at a time have the TPU, of which there is
    # none here, and talks on stderr.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    if importlib.util.find_spec("libtpu") is None:
        raise SpaceDriveError(
            "compiling for TPUs needs libtpu (and no TPU): pip install -r requirements-aot.txt"
        )
    # libtpu's hosts have four chips unless told otherwise; a machine of one chip has one host of one.
    hosts: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
    if slices > 1:
        hosts["num_slices"] = slices
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **hosts)
    except Exception as error:
        raise ConfigError(f"--topology {name}: libtpu does not describe it ({error})") from error
    name = name if slices == 1 else f"{slices} x {name}"
    return Topology(name, CHIPS[kind], tuple(description.devices))


def _cpu_devices(count: int) -> tuple[jax.Device, ...]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"--topology cpu:{count} needs {count} CPU devices, there are {len(devices)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return tuple(devices[:count])


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Of one step over the whole batch."""

    vision_forward: int
    decoder_forward: int
    adapter_forward: int
    head_forward: int
    backward: int
    recomputed: int
    """Of the blocks' forward pass: all of it where remat is `full`; gate, up and attention's own products
    where it is `attention`; the last alone where it is `attention_mlp`."""

    @property
    def model(self) -> int:
        """What the step needs: the numerator of MFU."""
        forward = self.vision_forward + self.decoder_forward + self.adapter_forward + self.head_forward
        return forward + self.backward

    @property
    def hardware(self) -> int:
        """What the devices compute."""
        return self.model + self.recomputed


def train_step_flops(config: Config) -> StepFlops:
    """Counts one step of a config.

    With adapters the base needs gradients of its activations only (one more forward's worth in the decoder,
    none in the vision tower, before which nothing trains); without, of its weights too.
    """
    model, data, batch = config.model, config.data, config.train.batch_size
    decoder, length = model.vlm.decoder, data.sequence_length
    vision = NUM_CAMERAS * batch * vision_flops(model, data.image_size)
    products, attention = (batch * each for each in decoder_flops(decoder, length))
    adapters = batch * adapter_flops(model, length) if model.use_lora else 0
    head = 2 * batch * data.max_targets * decoder.hidden_size * decoder.vocab_size
    forward = products + attention
    if model.use_lora:
        backward = products + 2 * attention + 2 * adapters + head
        repeated = forward + adapters
    else:
        backward = 2 * (vision + forward + head)
        repeated = forward + vision
    gate_and_up = 4 * batch * length * decoder.num_layers * decoder.hidden_size * decoder.intermediate_size
    narrow = attention + (0 if model.use_lora else vision)
    again = {"full": repeated, "attention": narrow + gate_and_up, "attention_mlp": narrow}
    recomputed = again.get(model.compute.remat, 0)
    return StepFlops(vision, forward, adapters, head, backward, recomputed)


def plan_step_flops(config: Config, answer_length: int) -> StepFlops:
    """Counts answering one batch of planning questions in one pass.

    Args:
        config: `train.batch_size` prompts of `data.sequence_length` tokens.
        answer_length: tokens of the answer's frame, run behind the prompt and scored.
    """
    model, data, batch = config.model, config.data, config.train.batch_size
    decoder, length = model.vlm.decoder, data.sequence_length + answer_length
    vision = NUM_CAMERAS * batch * vision_flops(model, data.image_size)
    adapters = batch * adapter_flops(model, length) if model.use_lora else 0
    head = 2 * batch * answer_length * decoder.hidden_size * decoder.vocab_size
    return StepFlops(vision, batch * sum(decoder_flops(decoder, length)), adapters, head, 0, 0)


def decoder_flops(config: LanguageModelConfig, length: int) -> tuple[int, int]:
    """One forward pass over a sequence: the products with weights, and attention's own."""
    width, head = config.hidden_size, config.head_dim
    attention_weights = 2 * width * head * (config.num_heads + config.num_kv_heads)
    weights = config.num_layers * (attention_weights + 3 * width * config.intermediate_size)
    scores = config.num_layers * 2 * length * length * config.num_heads * head
    return 2 * weights * length, scores


def adapter_flops(model: ModelConfig, length: int) -> int:
    """One forward pass of all low-rank adapters over a sequence."""
    decoder, rank = model.vlm.decoder, model.lora.rank
    query, key = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    inner = decoder.intermediate_size
    outer = {"q": query, "k": key, "v": key, "o": query, "gate": inner, "up": inner, "down": inner}
    weights = sum(rank * (decoder.hidden_size + outer[target]) for target in model.lora.targets)
    return 2 * weights * length * decoder.num_layers


def vision_flops(model: ModelConfig, image_size: tuple[int, int]) -> int:
    """One forward pass of the vision tower over one image, up to the decoder's width."""
    family = family_of(model.vlm)
    grid = family.image_processor(model.vlm.vision, image_size).patch_grid
    return family.vision_flops(model.vlm, grid)


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
    parts = ("language", "position", "path", "divergence")
    told = [f"{part} {values[f'loss_{part}']:.4f}" for part in parts if f"loss_{part}" in values]
    return (
        f"step {step}/{steps}: loss {values['loss']:.4f} ({', '.join(told)}), L2 "
        f"{values['displacement_m']:.2f} m, gradient {values['grad_norm']:.2f}, rate "
        f"{values['learning_rate']:.2e}, {values['samples_per_second']:.1f} samples/s{mfu}, "
        f"{values['data_wait']:.1%} waiting for data, {left} left"
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
    * mfu: model FLOPs of a step (`train_step_flops`) over step_seconds, devices and peak rate; only where the
      device's rate is known.
    """

    def __init__(self, config: Config, started: float, samples: SampleClock, share: int) -> None:
        """Starts the clocks.

        Args:
            config: the run.
            started: when it started (time.monotonic).
            samples: what this host's samples took to make.
            share: how many of a batch this host makes.
        """
        self._batch_size, self._share = config.train.batch_size, share
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
            possible = max(self._threads, 1) * made / making
            values["data_headroom"] = possible * seconds / self._share
        if self._ideal_seconds is not None:
            values["mfu"] = self._ideal_seconds / seconds
        return values

    def _reset(self) -> None:
        self._window, self._waiting, self._steps = time.monotonic(), 0.0, 0

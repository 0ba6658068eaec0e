"""Floating-point operations of a training or planning step, counted from the config.

Only matrix products count, a multiply-add as two. Attention of the decoder counts its causal half; padding
counts as the device computes it. What is recomputed to save memory is kept apart: it is work for the
hardware, not for the model (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from spacedrive_jax.config import Config
from spacedrive_jax.constants import NUM_CAMERAS
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.models.config import LanguageModelConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.spacedrive import ModelConfig

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
DEVICE_KINDS = {"TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12} | {
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

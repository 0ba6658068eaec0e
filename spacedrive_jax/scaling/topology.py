"""Chips with their published rates, and descriptions of machines that need not be there."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax

from spacedrive_jax.console import UserError

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


def describe(name: str) -> Topology:
    """Describes `v5e:4x4`, `v5p:4x4x4`, `v6e:8x8`, or `cpu:N` for N of this process's CPU devices.

    Raises:
        UserError: the name is not of that form, libtpu is not installed, or it knows no such shape.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    kinds = [*CHIPS, "cpu"]
    if not match or match[1] not in kinds:
        raise UserError(f"--topology {name}: expected CHIP:SHAPE such as v5e:4x4; chips: {', '.join(kinds)}")
    kind, count = match[1], math.prod(int(side) for side in match[2].split("x"))
    if kind == "cpu":
        return Topology(name, None, _cpu_devices(count))
    # libtpu would look for a TPU host's metadata, lets one process at a time have the TPU, of which there is
    # none here, and talks on stderr.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs libtpu (and no TPU): pip install -r requirements-aot.txt")
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        raise UserError(f"--topology {name}: libtpu does not describe it ({error})") from error
    return Topology(name, CHIPS[kind], tuple(description.devices))


def _cpu_devices(count: int) -> tuple[jax.Device, ...]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology cpu:{count} needs {count} CPU devices, there are {len(devices)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return tuple(devices[:count])

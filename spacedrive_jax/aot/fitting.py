"""What would fit where a training step ran out of memory, by the compiler's own account of smaller ones."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterator

import jax

from spacedrive_jax.aot.plan import bytes_per_chip, make_plan, product_bytes, residual_bytes
from spacedrive_jax.config import Config, change
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.models.partitioning import BATCH_AXES
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.step import make_train_step
from spacedrive_jax.training.throughput import Topology

log = logging.getLogger(__name__)

COMPILED = 4
"""Programs that are compiled at most; each takes a minute at 7B."""
MORE_DEVICES = "--mesh.data 1 --mesh.fsdp -1"
"""Flags that spread a run's weights over all devices there are; `data` takes them all by default."""


def device_memory() -> int | None:
    """Bytes that one of this process's devices has; None where it does not say.

    CPU devices share the machine's memory.
    """
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    return None


def least_bytes(config: Config) -> int:
    """What a training step takes at least on one device, by its shapes alone."""
    mesh = make_mesh(config.mesh)
    step = make_train_step(config, mesh)
    state = bytes_per_chip((step.trainable, step.frozen, step.optimizer_state))
    return state + residual_bytes(config, mesh) + product_bytes(config, mesh)


def what_fits(config: Config, limit: int | None = None) -> str:
    """Flags under which a run's training step fits its devices, the cheapest first.

    Args:
        config: the run that did not fit.
        limit: bytes of one device; None for what this process's devices have.

    Returns:
        What to do, for an error; empty where the devices do not say how much memory they have.
    """
    limit = device_memory() if limit is None else limit
    if limit is None:
        return ""
    log.info("looking for what fits: compiling up to %d smaller steps", COMPILED)
    topology = Topology("these devices", None, tuple(jax.devices()))
    compiled, tried = 0, []
    for flags, smaller in _smaller(config):
        try:
            needed: float = least_bytes(smaller)
            if needed <= limit:
                if compiled == COMPILED:
                    continue  # may fit; its least bytes are no account of it
                compiled += 1
                needed = make_plan(smaller, topology).peak_bytes
                if needed <= limit:
                    return (
                        f"{' '.join(flags)} fits: by `aot`'s account a step then takes {needed / 1e9:.1f} GB "
                        f"of a device's {limit / 1e9:.1f} GB"
                    )
        except (SpaceDriveError, jax.errors.JaxRuntimeError):
            continue  # one that these devices cannot even compile
        tried.append(needed)
    if tried:
        found = (
            f"nothing that was tried fits a device's {limit / 1e9:.1f} GB (the smallest step takes "
            f"{min(tried) / 1e9:.1f} GB)"
        )
    else:
        found = f"there is no smaller step of this batch to try on a device's {limit / 1e9:.1f} GB"
    return (
        f"{found}: use more devices ({MORE_DEVICES}) or larger ones; `aot CONFIG --topology CHIP:SHAPE "
        "--search` finds which"
    )


def _smaller(config: Config) -> Iterator[tuple[list[str], Config]]:
    """Configs that learn the same from the same batches in less memory."""
    mesh = make_mesh(config.mesh)
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    flags: list[str] = []
    if config.model.compute.remat != "full":
        config = change(config, config.name, {"model.compute.remat": "full"})
        flags = ["--model.compute.remat full"]
        yield flags, config
    quantized = [config.model.compute.base_quantization]
    if quantized == ["none"] and config.model.use_lora:
        quantized += ["int8", "int4"]
    for storage in quantized:
        stored = change(config, config.name, {"model.compute.base_quantization": storage})
        told = flags + ([f"--model.compute.base-quantization {storage}"] if storage != quantized[0] else [])
        pieces = config.train.grad_accum_steps
        if storage != quantized[0]:
            yield told, stored
        while config.train.batch_size % (2 * pieces * ways) == 0:
            pieces *= 2
            train = dataclasses.replace(stored.train, grad_accum_steps=pieces)
            yield [*told, f"--train.grad-accum-steps {pieces}"], dataclasses.replace(stored, train=train)

"""Which layouts of a run to try on a machine, and which is best."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import get_args

from spacedrive_jax.config import Config, MeshConfig
from spacedrive_jax.console import UserError
from spacedrive_jax.scaling.plan import Plan
from spacedrive_jax.vlm.config import RematPolicy


def parse_mesh(text: str) -> MeshConfig:
    """Reads `data=2,fsdp=4,tensor=2`; axes not named are 1.

    Raises:
        UserError: an axis is unknown or its size is not a number.
    """
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.lstrip("-").isdigit():
            raise UserError(f"--mesh {text}: expected AXIS=NUMBER of {', '.join(sizes)}, got {part!r}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def search_space(config: Config, devices: int) -> Iterator[Config]:
    """Meshes with every axis a power of two, then larger batches, then every remat policy."""
    powers = [1 << shift for shift in range(devices.bit_length()) if (1 << shift) <= devices]
    meshes = [
        MeshConfig(devices // (fsdp * tensor), fsdp, tensor)
        for tensor in powers
        for fsdp in reversed(powers)
        if devices % (fsdp * tensor) == 0 and config.model.vlm.decoder.num_heads % tensor == 0
    ]
    policies = sorted(get_args(RematPolicy), key=lambda policy: policy != config.model.compute.remat)
    for policy, growth, mesh in itertools.product(policies, (1, 2), meshes):
        batch = config.train.batch_size * growth
        if batch % (mesh.data * mesh.fsdp):
            continue
        compute = dataclasses.replace(config.model.compute, remat=policy)
        yield dataclasses.replace(
            config,
            mesh=mesh,
            model=dataclasses.replace(config.model, compute=compute),
            train=dataclasses.replace(config.train, batch_size=batch),
        )


def cost(plan: Plan) -> float:
    """What to rank by: seconds of a step per sample, or bytes moved where no rates are known."""
    return (plan.step_seconds or plan.moved_bytes) / plan.batch_size

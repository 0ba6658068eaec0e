"""Machines in several parts: TPU slices, or GPU nodes, that only the data-centre network (DCN) joins.

Inside a part chips have fast links of their own (ICI, NVLink). jaxlib numbers the parts by `slice_index`, GPU
nodes too. A mesh goes over them with its axes that send least: `data` first, then `fsdp`; `tensor`, which
sends activations in every block, stays inside.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from spacedrive_jax.errors import ConfigError

FIND = -1
"""As many slices as the devices say."""


def slice_of(device: jax.Device) -> int:
    """The number of a device's slice or node; 0 where its platform has none."""
    return int(getattr(device, "slice_index", 0) or 0)


def split_over_slices(sizes: Sequence[int], slices: int) -> tuple[int, int, int]:
    """How often each axis is repeated over slices.

    Args:
        sizes: data, fsdp, tensor over all devices.
        slices: how many slices.

    Returns:
        The DCN part of each axis; their product is `slices`.

    Raises:
        ConfigError: data x fsdp does not divide over the slices.
    """
    data, fsdp, tensor = sizes
    over_data = math.gcd(data, slices)
    over_fsdp = math.gcd(fsdp, slices // over_data)
    if over_data * over_fsdp != slices:
        raise ConfigError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not lie over {slices} slices (TPU slices "
            "or GPU nodes): data, or data x fsdp, must be a multiple of them, and tensor stay inside one"
        )
    return over_data, over_fsdp, 1


def slice_devices(
    sizes: Sequence[int], devices: Sequence[jax.Device], slices: int = FIND
) -> np.ndarray | None:
    """The devices of a mesh that goes over slices.

    Args:
        sizes: data, fsdp, tensor; their product is the number of devices.
        devices: of the whole run.
        slices: how many parts the machine has; `FIND` takes the devices' word. A number that the devices do
            not say themselves means processes: hosts of a platform that knows no slices.

    Returns:
        Devices, one axis for each size; None where there is but one slice.

    Raises:
        ConfigError: the devices do not lie on so many slices, on some are more than on others, or the mesh
            does not divide over them.
    """
    numbers = [slice_of(device) for device in devices]
    by_process = slices not in (FIND, 1) and len(set(numbers)) == 1
    if by_process:
        numbers = [device.process_index for device in devices]
    found = Counter(numbers)
    if slices != FIND and len(found) != slices and not (slices == 1 and len(found) == 1):
        part = "processes" if by_process else "slices (TPU slices or GPU nodes)"
        raise ConfigError(f"mesh.slices {slices}, but the devices lie on {len(found)} {part}: set it to -1")
    if len(found) == 1:
        return None
    if len(set(found.values())) > 1:
        raise ConfigError(f"a mesh needs as many devices on every slice, found {dict(sorted(found.items()))}")
    dcn = split_over_slices(sizes, len(found))
    inside = [size // repeats for size, repeats in zip(sizes, dcn, strict=True)]
    options: dict[str, Any] = {"process_is_granule": by_process, "allow_split_physical_axes": True}
    return mesh_utils.create_hybrid_device_mesh(inside, dcn, devices, **options)

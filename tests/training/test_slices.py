"""Meshes over nodes and slices, on devices that are not there."""

import dataclasses

import numpy as np
import pytest

from spacedrive_jax.config import MeshConfig
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.training import sharding
from spacedrive_jax.training.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    client: None = None


def nodes(count, gpus=8):
    """GPUs of several nodes; jaxlib numbers a node as a slice."""
    return [Device(number, number // gpus, number // gpus) for number in range(count * gpus)]


def tpu_slices(count, rows, columns, kind="TPU v5 lite"):
    """Slices of v5e chips, four to a host, as libtpu numbers them."""
    devices = []
    for number in range(count):
        for y in range(rows):
            for x in range(columns):
                host = number * rows * columns // 4 + y // 2 * columns // 2 + x // 2
                place = len(devices)
                devices.append(Device(place, number, host, "tpu", kind, (x, y, 0)))
    return devices


def slice_numbers(placed):
    return np.vectorize(lambda device: device.slice_index)(placed)


def test_32_gpus_on_four_nodes():
    placed = sharding.slice_devices((4, 8, 1), nodes(4))
    assert placed.shape == (4, 8, 1)
    np.testing.assert_array_equal(slice_numbers(placed)[:, :, 0], np.arange(4)[:, None].repeat(8, 1))
    # fsdp 16 over data 2: each pair of nodes holds one copy of the model.
    numbers = slice_numbers(sharding.slice_devices((2, 16, 1), nodes(4)))[:, :, 0]
    np.testing.assert_array_equal(numbers, [[0] * 8 + [1] * 8, [2] * 8 + [3] * 8])
    # tensor stays within a node.
    numbers = slice_numbers(sharding.slice_devices((1, 16, 2), nodes(4)))
    assert (numbers[..., 0] == numbers[..., 1]).all()
    assert {device.id for device in placed.flat} == set(range(32))


def test_axes_share_a_physical_axis_of_one_slice():
    placed = sharding.devices_along_links((16, 2, 2), tpu_slices(1, 8, 8, "TPU v6 lite"))
    assert len({device.id for device in placed.flat}) == 64
    coords = np.vectorize(lambda device: device.coords[:2], otypes=[object])(placed)
    for first, second in coords.reshape(-1, 2):
        assert np.abs(np.subtract(first, second)).sum() == 1  # tensor lies over one link


def test_two_v5e_slices():
    placed = sharding.slice_devices((2, 16, 1), tpu_slices(2, 4, 4))
    np.testing.assert_array_equal(slice_numbers(placed)[:, :, 0], [[0] * 16, [1] * 16])
    numbers = slice_numbers(sharding.slice_devices((1, 32, 1), tpu_slices(2, 4, 4)))
    np.testing.assert_array_equal(numbers[0, :, 0], [0] * 16 + [1] * 16)


def test_data_takes_what_it_can_of_the_slices():
    assert sharding.split_over_slices((8, 4, 1), 4) == (4, 1, 1)
    assert sharding.split_over_slices((6, 8, 1), 4) == (2, 2, 1)
    assert sharding.split_over_slices((1, 16, 4), 8) == (1, 8, 1)
    with pytest.raises(
        ConfigError, match=r"fsdp=1, tensor=32 does not lie over 4 slices.*tensor stay inside"
    ):
        sharding.split_over_slices((1, 1, 32), 4)


def test_a_wrong_number_of_slices_is_named():
    with pytest.raises(ConfigError, match=r"mesh\.slices 2, but the devices lie on 4 slices"):
        sharding.slice_devices((4, 8, 1), nodes(4), 2)
    assert sharding.slice_devices((1, 8, 1), nodes(1)) is None
    assert sharding.slice_devices((1, 8, 1), nodes(1), 1) is None
    with pytest.raises(ConfigError, match="as many devices on every slice"):
        sharding.slice_devices((1, 12, 1), nodes(2)[:12])


def test_processes_stand_for_slices_where_a_platform_has_none():
    devices = [dataclasses.replace(device, slice_index=0, platform="cpu") for device in nodes(2, 4)]
    assert sharding.slice_devices((2, 4, 1), devices) is None
    placed = sharding.slice_devices((2, 4, 1), devices, 2)
    hosts = np.vectorize(lambda device: device.process_index)(placed)
    np.testing.assert_array_equal(hosts[:, :, 0], [[0] * 4, [1] * 4])


def test_one_device_needs_no_slices():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ConfigError, match=r"mesh\.slices 3"):
        make_mesh(MeshConfig(slices=3))

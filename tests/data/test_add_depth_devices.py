"""`add-depth` on several devices and hosts writes what one device writes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_prep.add_depth import add_depth
from spacedrive_jax.data.records import open_records
from spacedrive_jax.inference.depth_network import DepthNetworkConfig
from tests.conftest import ROOT
from tests.models.depth.sweeps import walls_around
from tests.models.depth.tiny_unidepth import save_tiny
from tests.record_factory import make_record, write_records

KEYFRAMES = 5


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    made = [make_record(rng, lidar=walls_around(10.0 + 4 * index)) for index in range(KEYFRAMES)]
    return write_records(tmp_path_factory.mktemp("world") / "records", {"train": made})


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    save_tiny(folder / "weights")
    file = folder / "network.json"
    file.write_text(json.dumps({"weights": str(folder / "weights"), "image_size": [42, 56], "grid": [2, 3]}))
    return file


@pytest.fixture(scope="module")
def expected(records, network, tmp_path_factory) -> dict[str, np.ndarray]:
    """From one device, with one chunk."""
    copy = tmp_path_factory.mktemp("one") / "records"
    shutil.copytree(records, copy)
    add_depth(open_records(copy), DepthNetworkConfig.from_file(network))
    return sidecar(copy)


def sidecar(records: Path) -> dict[str, np.ndarray]:
    """Rows of the finished sidecar, in the records' order."""
    (provenance,) = (records / "depth").glob("*/provenance.json")
    chunks = [load_file(provenance.parent / name) for name in json.loads(provenance.read_text())["chunks"]]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def launch(arguments: list[str], *, devices: int) -> subprocess.Popen:
    """Starts a script on so many fake devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def facts(process: subprocess.Popen) -> dict:
    """The JSON object of a process that must succeed."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return json.loads(out.splitlines()[-1])


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(got["patch_depth"], expected["patch_depth"], rtol=1e-5)
    np.testing.assert_allclose(got["alignment"], expected["alignment"], rtol=1e-4, atol=1e-4)


def test_four_devices_write_what_one_writes_without_talking(records, network, expected, tmp_path):
    copy = tmp_path / "records"
    shutil.copytree(records, copy)
    script = str(ROOT / "tests" / "data" / "add_depth_on_devices.py")
    found = facts(launch([script, str(copy), str(network)], devices=4))
    # Two keyframes of six images a step: three for each device. The fifth keyframe is filled up to eight.
    assert found["step"] == {"devices": 4, "images_each": 3, "collectives": []}
    assert_same(sidecar(copy), expected)


def two_hosts(records: Path, network: Path, die_after: tuple[int, int]) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    script = str(ROOT / "tests" / "data" / "add_depth_process.py")
    command = ["add-depth", "--records", str(records), "--model", str(network), "--json"]
    command += ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id"]
    return [launch([script, str(die_after[host]), *command, str(host)], devices=1) for host in range(2)]


def test_two_hosts_share_the_keyframes_and_go_on_after_a_kill(records, network, expected, tmp_path):
    copy = tmp_path / "records"
    shutil.copytree(records, copy)
    first, second = two_hosts(copy, network, die_after=(-1, 1))
    second.communicate(timeout=300)
    assert second.returncode == -signal.SIGKILL
    first.kill()  # it waits for the other
    first.communicate()
    assert not list((copy / "depth").glob("*/provenance.json"))
    done = {file.name for file in (copy / "depth").glob("*/chunk-*.safetensors")}
    assert "chunk-00001.safetensors" in done
    assert "chunk-00003.safetensors" not in done

    hosts = [facts(host) for host in two_hosts(copy, network, die_after=(-1, -1))]
    assert hosts[1]["reused"] == 1
    assert hosts[0]["fingerprint"] == hosts[1]["fingerprint"]
    assert_same(sidecar(copy), expected)

"""A run trained on one machine predicts on another: other meshes, several hosts, the same file."""

import dataclasses
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from spacedrive_jax.config import MeshConfig
from spacedrive_jax.data.loader import evaluation_batches
from spacedrive_jax.training.sharding import local_rows, make_mesh, mesh_here, place_rows
from spacedrive_jax.training.train import train
from tests.conftest import ROOT
from tests.training.runs import make_records, tiny


def test_a_mesh_that_does_not_fit_becomes_fsdp():
    assert dict(mesh_here(MeshConfig(data=4, fsdp=8)).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@dataclasses.dataclass
class Numbered:
    """Samples that count how often they are made."""

    count: int
    made: list

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        self.made.append(place)
        return {"place": np.int32(place)}


@pytest.mark.usefixtures("unchecked")
def test_a_host_makes_its_share_of_every_batch(monkeypatch):
    monkeypatch.setattr("spacedrive_jax.data.loader.stack", lambda each: [sample["place"] for sample in each])
    samples = Numbered(7, [])
    batches = list(evaluation_batches(samples, 4, rows=[2, 3]))
    # Of the second batch three samples count; the last one is repeated for the fourth place.
    assert batches == [([2, 3], 4), ([6, 6], 3)]
    assert samples.made == [2, 3, 6]
    whole = list(evaluation_batches(samples, 4))
    assert whole == [([0, 1, 2, 3], 4), ([4, 5, 6, 6], 3)]


@pytest.mark.usefixtures("unchecked")
def test_rows_land_where_the_mesh_wants_them():
    mesh = make_mesh(MeshConfig())
    rows = local_rows(4, mesh)
    assert rows == [0, 1, 2, 3]
    batch = {"index": np.arange(4, dtype=np.int32), "pixels": np.arange(8.0).reshape(4, 2)}
    placed = place_rows(batch, rows, 4, mesh)
    np.testing.assert_array_equal(placed["index"], batch["index"])
    np.testing.assert_array_equal(placed["pixels"], batch["pixels"])


def command(run_dir, records, out, *flags):
    return [
        *(sys.executable, "-m", "spacedrive_jax", "predict", "--checkpoint", str(run_dir)),
        *("--records", str(records), "--split", "train", "--out", str(out), "--batch-size", "4"),
        *flags,
    ]


@pytest.mark.slow
def test_two_hosts_and_two_devices_write_the_file_of_one(tmp_path):
    records, run_dir = make_records(tmp_path / "records"), tmp_path / "run"
    config = tiny(records, run_dir, steps=2)
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=192)))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    one = tmp_path / "one.jsonl"
    subprocess.run(command(run_dir, records, one), cwd=ROOT, env=environment, check=True)

    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    devices = tmp_path / "devices.jsonl"
    subprocess.run(
        command(run_dir, records, devices, "--mesh", "data=1,fsdp=2"),
        cwd=ROOT,
        env={**environment, "XLA_FLAGS": flags},
        check=True,
    )
    assert devices.read_bytes() == one.read_bytes()

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    hosts = tmp_path / "hosts.jsonl"
    joined = (
        "--mesh",
        "data=2",
        "--coordinator",
        f"localhost:{port}",
        "--num-processes",
        "2",
        "--process-id",
    )
    running = [
        subprocess.Popen(command(run_dir, records, hosts, *joined, str(index)), cwd=ROOT, env=environment)
        for index in range(2)
    ]
    try:
        assert [host.wait(400) for host in running] == [0, 0]
    finally:
        for host in running:
            host.kill()
    assert hosts.read_bytes() == one.read_bytes()

    def export(kind, out, *flags):
        program = [sys.executable, "-m", "spacedrive_jax", "export-weights"]
        return [*program, "--to", kind, str(run_dir), "--out", str(out), *flags]

    subprocess.run(export("hf", tmp_path / "one"), cwd=ROOT, env=environment, check=True)
    joined = ("--mesh", "data=1,fsdp=2", *joined[2:])
    running = [
        subprocess.Popen(export("hf", tmp_path / "both", *joined, str(index)), cwd=ROOT, env=environment)
        for index in range(2)
    ]
    try:
        assert [host.wait(400) for host in running] == [0, 0]
    finally:
        for host in running:
            host.kill()
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "both").iterdir()}

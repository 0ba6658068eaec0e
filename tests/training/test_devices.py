"""The same run on any number of devices and hosts."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from spacedrive_jax.cli.main import main
from spacedrive_jax.config import load_config
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.models.partitioning import logical_to_mesh_axes
from spacedrive_jax.training.sharding import check_replication
from spacedrive_jax.training.state import abstract_state
from spacedrive_jax.training.train import train
from tests.conftest import ROOT
from tests.training.runs import TINY, losses_of, make_records, tiny
from tests.training.same_losses import STEPS


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data") / "records")


def environment(devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def test_any_number_of_devices_has_the_same_losses_and_one_compilation(records):
    script = ROOT / "tests" / "training" / "same_losses.py"
    done = subprocess.run(
        [sys.executable, str(script), str(records)],
        cwd=ROOT,
        env=environment(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (one, compiled), *others = json.loads(done.stdout.splitlines()[-1])
    assert len(one) == STEPS
    assert compiled == 1
    for losses, programs in others:
        np.testing.assert_allclose(losses, one, rtol=1e-5)
        assert programs == 1


def test_two_hosts_train_as_one_and_one_goes_on_alone(records, tmp_path):
    """Their devices lie crosswise, as on TPUs: both hosts hold every sample, and half of the model."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    run_dir, alone = tmp_path / "run", tmp_path / "alone"
    script = ROOT / "tests" / "training" / "crossed_hosts.py"
    command = [sys.executable, str(script), "train", str(TINY), "--run-dir", str(run_dir)]
    command += ["--data.records", str(records), "--train.steps", str(STEPS), "--mesh.data", "1"]
    command += ["--mesh.fsdp", "2", "--mesh.tensor", "2", "--train.checkpoint-every", str(STEPS)]
    command += ["--coordinator", f"localhost:{port}", "--num-processes", "2"]
    hosts = [
        subprocess.Popen(
            [*command, "--process-id", str(index)],
            cwd=ROOT,
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for host in hosts:
        _, error = host.communicate(timeout=400)
        assert host.returncode == 0, error
    assert json.loads((run_dir / "run.json").read_text())["hosts"] == 2

    train(tiny(records, alone, steps=STEPS, checkpoint_every=STEPS))
    np.testing.assert_allclose(losses_of(run_dir), losses_of(alone), rtol=1e-5)
    # One host goes on where two stopped, with the same samples in the same order.
    longer = {"steps": STEPS + 2, "checkpoint_every": STEPS}
    for folder in (run_dir, alone):
        train(tiny(records, folder, **longer), resume=True, accept_changes=True)
    np.testing.assert_allclose(losses_of(run_dir), losses_of(alone), rtol=1e-5)
    assert len(losses_of(run_dir)) == STEPS + 2


def test_hosts_need_each_other(capsys):
    assert main(["train", str(TINY), "--num-processes", "2"]) == 1
    assert "--coordinator HOST:PORT" in capsys.readouterr().err
    assert main(["train", str(TINY), "--coordinator", "here:1", "--num-processes", "2"]) == 1
    assert "--process-id 0..N-1" in capsys.readouterr().err


def test_logical_axes_become_mesh_axes_in_the_order_of_the_table():
    mesh = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"))
    assert logical_to_mesh_axes(("vocab", "embed"), (512, 64), mesh) == PartitionSpec("tensor", "fsdp")
    residual = logical_to_mesh_axes(("batch", "sequence", None), (8, 6, 3), mesh)
    assert residual == PartitionSpec(("data", "fsdp"), "tensor", None)
    # What does not divide stays whole, or takes fewer axes.
    assert logical_to_mesh_axes(("embed",), (6,), mesh) == PartitionSpec(None)
    assert logical_to_mesh_axes(("images",), (8,), mesh) == PartitionSpec(("data", "fsdp"))
    # An axis of the mesh is used once.
    assert logical_to_mesh_axes(("mlp", "vocab"), (4, 4), mesh) == PartitionSpec(None, "tensor")


def test_a_replicated_model_is_refused_by_name():
    devices = AbstractMesh((1, 4, 1), ("data", "fsdp", "tensor"))

    def state(spec):
        leaf = jax.ShapeDtypeStruct((64, 8), np.float32, sharding=jax.sharding.NamedSharding(devices, spec))
        return nnx.State({"table": nnx.Param(leaf)})

    check_replication(state(PartitionSpec("fsdp")), devices)
    with pytest.raises(SpaceDriveError, match=r"512 of 512 parameters .* table \(512\)"):
        check_replication(state(PartitionSpec()), devices)


def test_the_published_model_is_split_on_every_mesh_that_is_let_through():
    config = load_config("spacedrive_plus_qwen_7b")

    def placed(*sizes):
        mesh = AbstractMesh(sizes, ("data", "fsdp", "tensor"))
        _, trainable, frozen = abstract_state(config, mesh)
        return nnx.merge_state(trainable, frozen), mesh

    for sizes in ((1, 16, 1), (1, 4, 4), (4, 1, 4)):
        check_replication(*placed(*sizes))
    # 28 heads, 4 of keys and values, do not go eight ways: the attention's weights would stay whole.
    with pytest.raises(SpaceDriveError, match=r"attention\.[qo]\.kernel .*attention\.[qo]\.kernel "):
        check_replication(*placed(1, 1, 8))


def test_heads_of_keys_stay_whole_where_they_are_fewer_than_the_ways():
    """As many keys' heads as there are go around; the queries' heads are cut all the same."""
    mesh = AbstractMesh((1, 2, 8), ("data", "fsdp", "tensor"))
    assert logical_to_mesh_axes(("embed", "kv_heads", "head_dim"), (64, 4, 16), mesh) == PartitionSpec(
        "fsdp", None, None
    )
    assert logical_to_mesh_axes(("embed", "heads", "head_dim"), (64, 32, 16), mesh) == PartitionSpec(
        "fsdp", "tensor", None
    )
    # Images go over every device that their number divides among.
    assert logical_to_mesh_axes(("images", None), (96, 3), mesh) == PartitionSpec(
        ("data", "fsdp", "tensor"), None
    )
    assert logical_to_mesh_axes(("images", None), (6, 3), mesh) == PartitionSpec(("data", "fsdp"), None)

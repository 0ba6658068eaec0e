"""The launch recipes as far as they can be held to account without their clusters."""

import re
import shlex
import subprocess
import tomllib

import pytest
import yaml
from jax._src.clusters import ClusterEnv

from spacedrive_jax.config import MeshConfig
from spacedrive_jax.training.hosts import own_devices
from spacedrive_jax.training.sharding import split_over_slices
from tests.conftest import ROOT

LAUNCH = ROOT / "configs" / "launch"


def trained(script):
    """The flags of the one `spacedrive_jax train` in a shell script."""
    (command,) = re.findall(r"spacedrive_jax train ((?:[^\n]*\\\n)*[^\n|>]*)", script)
    words = shlex.split(command.replace("\\\n", " "))
    return {
        word[2:]: value for word, value in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")
    }


def test_the_slurm_script_parses():
    subprocess.run(["bash", "-n", LAUNCH / "slurm.sh"], check=True)


@pytest.mark.parametrize("name", ["gke_tpu.yaml", "gke_tpu_slices.yaml"])
def test_kubernetes_recipes_parse_and_end_where_preempted(name):
    documents = list(yaml.safe_load_all((LAUNCH / name).read_text()))
    job = documents[-1]["spec"]
    if name == "gke_tpu_slices.yaml":
        (slices,) = job["replicatedJobs"]
        job = slices["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    shell, flag, script = container["command"]
    subprocess.run([shell, "-n", flag, script], check=True)
    assert job["completions"] == job["parallelism"] == 4
    assert "--resume --coordinator auto" in script
    flags = trained(script)
    if name == "gke_tpu_slices.yaml":
        mesh = MeshConfig(int(flags["mesh.data"]), int(flags["mesh.fsdp"]), slices=int(flags["mesh.slices"]))
        chips = slices["replicas"] * job["completions"] * container["resources"]["limits"]["google.com/tpu"]
        assert mesh.slices == slices["replicas"]
        assert mesh.data * mesh.fsdp == chips == int(flags["train.batch-size"])
        assert split_over_slices((mesh.data, mesh.fsdp, mesh.tensor), mesh.slices) == (2, 1, 1)


def test_the_slurm_example_lies_over_its_nodes():
    text = (LAUNCH / "slurm.sh").read_text()
    flags = ("nodes", "mesh.data", "mesh.fsdp")
    nodes, data, fsdp = (int(re.search(rf"--{flag} (\d+)", text)[1]) for flag in flags)
    gpus = int(re.search(r"--gpus-per-node=(\d+)", text)[1])
    assert nodes * gpus == data * fsdp
    assert split_over_slices((data, fsdp, 1), nodes) == (nodes, 1, 1)


@pytest.mark.parametrize(("tasks", "seen"), [("1(x4)", []), ("1", []), ("8(x4)", [0])])
def test_a_task_that_has_its_node_to_itself_sees_all_its_gpus(tasks, seen, monkeypatch):
    slurm = {"JOB_ID": "1", "STEP_NODELIST": "n[1-4]", "NTASKS": "4", "PROCID": "0", "LOCALID": "0"}
    for name, value in (slurm | {"STEP_TASKS_PER_NODE": tasks}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS", raising=False)
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, own_devices(), None, 1)
    assert found == (found[0], 4, 0, seen)


def test_the_accelerators_extras_follow_the_pin():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = re.search(r"^jax==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    assert extras["cuda"] == [f"jax[cuda13]>={pinned},<0.11"]
    assert extras["tpu"] == [f"jax[tpu]>={pinned},<0.11"]

import importlib.util
import json
import os
import subprocess
import sys
import typing

import pytest

from spacedrive_jax.aot.search import POLICIES, parse_mesh
from spacedrive_jax.cli.aot import Aot
from spacedrive_jax.cli.main import main
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.models.config import BaseQuantization, RematPolicy
from spacedrive_jax.training.throughput import describe
from tests.conftest import ROOT

TINY = str(ROOT / "tests" / "tiny_config.py")
FIELDS = {"fits", "peak_bytes", "hbm_bytes", "flops_per_chip", "mfu_bound", "compile_seconds", "mesh"}


def aot(*arguments: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "spacedrive_jax", "aot", TINY, *arguments, "--json"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_sharded_step_compiles_for_eight_devices():
    done = aot("--topology", "cpu:8", "--mesh", "data=2,fsdp=2,tensor=2", "--batch-size", "8", devices=8)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert set(facts) >= FIELDS
    assert facts["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    kinds = {each["kind"] for each in facts["collectives"]}
    assert {"all-gather", "all-reduce"} <= kinds
    # Each device holds a fraction of the model and of its optimiser's two moments.
    assert facts["optimizer_bytes"] == pytest.approx(2 * facts["parameter_bytes"], rel=0.01)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_step_compiles_for_a_tpu():
    done = aot("--topology", "v5e:2x2", "--mesh", "data=2,fsdp=2")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["fits"]
    assert facts["hbm_bytes"] == 16 << 30
    assert 0 < facts["mfu_bound"] <= 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_two_slices_count_what_goes_between_them():
    done = aot("--topology", "v5e:2x2", "--slices", "2", "--mesh", "data=2,fsdp=4", "--batch-size", "8")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["chips"], facts["slices"]) == (8, 2)
    between = {each["kind"]: each["bytes"] for each in facts["dcn_collectives"]}
    # data alone goes between slices: a chip's quarter of the trained parts' gradients, not the base.
    assert 0 < between["all-reduce"] < facts["optimizer_bytes"]
    assert "DCN" in done.stdout


def test_what_cannot_be_compiled_is_refused_with_a_reason(capsys):
    assert main(["aot", TINY, "--topology", "v9:4x4"]) == 1
    assert "chips: v5e, v5p, v6e, cpu" in capsys.readouterr().err
    assert main(["aot", TINY, "--topology", "cpu:1", "--mesh", "fsdp=3"]) == 1
    assert "does not fit 1 devices" in capsys.readouterr().err
    with pytest.raises(SpaceDriveError, match="got 'rows=2'"):
        parse_mesh("rows=2")
    for size in ("²", "", "--1", "9" * 5000):
        with pytest.raises(SpaceDriveError, match="got 'data="):
            parse_mesh(f"data={size}")
    with pytest.raises(SpaceDriveError, match="names an axis twice"):
        parse_mesh("data=1,fsdp=2,data=3")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_way_to_get_it_is_named():
    with pytest.raises(SpaceDriveError, match=r"pip install -r requirements-aot\.txt"):
        describe("v5e:2x2")


def test_the_planning_step_compiles_too():
    done = aot(
        "--topology", "cpu:4", "--step", "plan", "--mesh", "fsdp=2,tensor=2", "--batch-size", "2", devices=4
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["optimizer_bytes"] == 0
    assert facts["hardware_flops_per_chip"] == facts["flops_per_chip"] > 0


def test_search_ranks_what_it_compiled_and_remembers_it(tmp_path, capsys):
    results = tmp_path / "plans.json"
    command = ["aot", TINY, "--topology", "cpu:1", "--search", "--batch-size", "4", "--results", str(results)]

    def search(*more):
        status, (out, err) = main([*command, "--json", *more]), capsys.readouterr()
        return status, out, err

    status, out, _ = search("--limit", "2")
    facts = json.loads(out.splitlines()[-1])
    assert (status, facts["tried"], len(facts["ranked"]), facts["untried"]) == (0, 2, 2, 4)
    status, again, _ = search("--limit", "0")
    assert json.loads(again.splitlines()[-1])["ranked"] == facts["ranked"]
    assert again.count("  known") == 2
    results.write_text("[]")
    status, _, err = search()
    assert status == 1
    assert "does not hold plans of a search" in err


def test_every_policy_and_base_can_be_asked_for():
    fields = typing.get_type_hints(Aot)
    for name, known in (("remat", RematPolicy), ("base_quantization", BaseQuantization)):
        asked = typing.get_args(typing.get_args(fields[name])[0])
        assert set(asked) == set(typing.get_args(known))
    assert set(POLICIES) == set(typing.get_args(RematPolicy))


def test_search_chooses_mesh_and_remat(capsys):
    for flag in (("--mesh", "fsdp=2"), ("--remat", "full")):
        assert main(["aot", TINY, "--topology", "cpu:1", "--search", *flag]) == 1
        assert f"leave {flag[0]} out" in capsys.readouterr().err

"""Eight fake devices give the numbers of one, whichever way parameters and samples are spread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("sharded_forward.py")


@pytest.fixture(scope="module", params=["qwen_plus_train", "llava_plus_train"])
def results(request):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("sharded_forward.py"),
            ROOT / "tests/golden" / request.param,
        ],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["data", "fsdp", "tensor", "all"])
def test_logits_are_those_of_one_device(results, mesh):
    assert results[mesh]["error"] < 2e-5


def test_generated_ids_are_those_of_one_device(results):
    assert results["all"]["same_ids"]


@pytest.mark.parametrize(
    ("mesh", "share"), [("data", (1.0, 1.0)), ("fsdp", (0.12, 0.16)), ("all", (0.25, 0.35))]
)
def test_a_device_holds_its_share_of_the_parameters(results, mesh, share):
    assert share[0] <= results[mesh]["share"] <= share[1]

"""Several hosts of one run: the notice that one of them is taken away reaches them all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

from spacedrive_jax.training import checkpoint_steps
from spacedrive_jax.training.train import train
from tests.conftest import ROOT
from tests.training.runs import TINY, losses_of, make_records, tiny

LIMIT = 400
"""Seconds after which a host is given up."""


def start_hosts(records, run_dir, *flags):
    """Two hosts with a device each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "spacedrive_jax",
        "train",
        str(TINY),
        "--run-dir",
        str(run_dir),
        "--json",
    ]
    command += ["--data.records", str(records), "--coordinator", f"localhost:{port}", "--num-processes", "2"]
    return [
        subprocess.Popen(
            [*command, *flags, "--process-id", str(index)],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def test_a_host_that_fails_takes_the_others_along():
    """The first one, which has the service by which they hear of it; the other waits in a collective."""
    script = ROOT / "tests" / "training" / "one_host_fails.py"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            [sys.executable, str(script), coordinator, str(index), "0"],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [host.communicate(timeout=LIMIT)[1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [1, 1], said
    assert said[0].splitlines()[-1].endswith("DataError: records are damaged")
    assert said[1] == "error: host 0 of the run failed: records are damaged\n"


def wait_for_steps(hosts, run_dir, steps):
    deadline = time.monotonic() + LIMIT
    log = run_dir / "metrics.jsonl"
    while not log.is_file() or log.read_text().count("\n") < steps:
        for host in hosts:
            assert host.poll() is None, host.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_on_one_host_saves_the_same_step_on_both(tmp_path):
    records = make_records(tmp_path / "records")
    run_dir = tmp_path / "run"
    hosts = start_hosts(records, run_dir, "--train.steps", "100000", "--train.checkpoint-every", "100000")
    try:
        wait_for_steps(hosts, run_dir, 3)
        hosts[1].send_signal(signal.SIGTERM)
        outputs = [host.communicate(timeout=LIMIT) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], outputs
    metadata = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert not metadata[0]["finished"]
    assert metadata[0]["step"] == metadata[1]["step"] >= 3
    assert checkpoint_steps.locate(run_dir)[1] == metadata[0]["step"]

    # What both wrote is whole: one host alone goes on from it, with no step lost and none done twice.
    done = metadata[0]["step"]
    train(tiny(records, run_dir, steps=done + 1), resume=True, accept_changes=True)
    assert [step for step, _ in losses_of(run_dir)] == list(range(1, done + 2))

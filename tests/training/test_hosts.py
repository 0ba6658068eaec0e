"""Several hosts of one run: the notice that one of them is taken away reaches them all."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from jaxlib import _jax as runtime  # as jax.distributed itself has it

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.training import checkpoints, run_folder
from spacedrive_jax.training.hosts import Hosts, exchange_through
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


@pytest.mark.usefixtures("hang_ups")
def test_a_closed_terminal_of_one_host_saves_the_same_step_on_both(tmp_path):
    """SIGHUP is passed on as SIGTERM, which jax's notifier hears on one host and brings to the others."""
    records = make_records(tmp_path / "records")
    run_dir = tmp_path / "run"
    hosts = start_hosts(records, run_dir, "--train.steps", "100000", "--train.checkpoint-every", "100000")
    try:
        wait_for_steps(hosts, run_dir, 3)
        hosts[1].send_signal(signal.SIGHUP)
        outputs = [host.communicate(timeout=LIMIT) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], outputs
    metadata = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert not metadata[0]["finished"]
    assert metadata[0]["step"] == metadata[1]["step"] >= 3
    assert checkpoints.locate(run_dir)[1] == metadata[0]["step"]

    # What both wrote is whole: one host alone goes on from it, with no step lost and none done twice.
    done = metadata[0]["step"]
    train(tiny(records, run_dir, steps=done + 1), resume=True, accept_changes=True)
    assert [step for step, _ in losses_of(run_dir)] == list(range(1, done + 2))


def two_hosts(work):
    """What two hosts return or raise, played by threads."""
    barrier, sent, outcome = threading.Barrier(2), [b"", b""], {}

    def host(index):
        def exchange(data):
            sent[index] = data
            barrier.wait(LIMIT)
            received = list(sent)
            barrier.wait(LIMIT)
            return received

        try:
            outcome[index] = work(Hosts(index, 2, exchange))
        except SpaceDriveError as error:
            outcome[index] = str(error)

    threads = [threading.Thread(target=host, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def test_hosts_exchange_bytes_without_their_devices():
    """Two hosts' clients, played by threads: what each says in every round, and nothing is left of it."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    service = runtime.get_distributed_runtime_service(address, 2)
    clients = [runtime.get_distributed_runtime_client(address, host, init_timeout=LIMIT) for host in range(2)]
    said = [[b"", b"some", b"\x00" * 3], [b"other", b"", b"last"]]

    def host(index):
        clients[index].connect()
        exchange = exchange_through(clients[index], index, 2)
        return [list(exchange(data)) for data in said[index]]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        heard = list(pool.map(host, range(2)))
    assert heard[0] == heard[1] == [list(each) for each in zip(*said, strict=True)]
    left = {key for key, _ in clients[0].key_value_dir_get_bytes("spacedrive/exchange")}
    assert left == {"spacedrive/exchange/2/0", "spacedrive/exchange/2/1"}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda client: client.shutdown(), clients))
    service.shutdown()


def test_hosts_that_mean_different_runs_say_so_on_both(tmp_path):
    def meaning(records, **fields):
        config = tiny(tmp_path / "here", tmp_path / "run", **fields)
        return run_folder.shared_metadata(config, 0, records, {"resume": False})

    one, other = meaning("abc"), meaning("abd", steps=7)
    assert two_hosts(lambda hosts: hosts.agree(one)) == {0: None, 1: None}
    said = two_hosts(lambda hosts: hosts.agree(one if hosts.is_first else other))
    assert said[0] == said[1]
    assert "host 1 has config.train.steps: 4 -> 7; host 1 has records' fingerprint: abc -> abd" in said[0]
    # Where each has its own copy of the records, and how it reads them, is its own business.
    elsewhere = run_folder.shared_metadata(
        tiny(tmp_path / "there", tmp_path / "run"), 0, "abc", {"resume": False}
    )
    assert one == elsewhere


def test_a_run_folder_that_hosts_do_not_share_is_refused_on_both(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SEEN_WITHIN", 0.1)
    folders = [tmp_path / "one", tmp_path / "other"]
    assert two_hosts(lambda hosts: run_folder.require_shared(folders[0], hosts)) == {0: None, 1: None}
    assert list(tmp_path.iterdir()) == []
    said = two_hosts(lambda hosts: run_folder.require_shared(folders[hosts.index], hosts))
    assert "is not one folder: what host 0 wrote there is not seen on host 1" in said[0]
    assert said[1].partition(": ")[2] == said[0].partition(": ")[2]
    assert list(tmp_path.iterdir()) == []

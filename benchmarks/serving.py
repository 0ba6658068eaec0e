"""What the policy server adds to the model: round trips of six JPEGs, and four clients together and in turn.

The server runs in a process of its own (`python -m spacedrive_jax serve`), its clients in this one. They send
what the Bench2Drive agent sends (six views of 1600 x 900 in JPEG quality 20, a LiDAR's sweep where the model
reads one) or what `drive` sends. A round trip is from the client's call to its answer; less `infer_ms`
(decoding and model, as the server tells) it is what messages, queue and batching cost.

    PYTHONPATH=. python benchmarks/serving.py --checkpoint demo/run --out serving.md
    PYTHONPATH=. python benchmarks/serving.py --checkpoint examples/demo/model --sender drive
    PYTHONPATH=. python benchmarks/serving.py --pretend 50
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.driving.bench2drive_rig import IMAGE_SIZE, JPEG_QUALITY, camera_intrinsics, camera_to_ego
from spacedrive_jax.driving.client import PROTOCOL, PolicyClient, pack
from spacedrive_jax.driving.protocol import partial_record
from spacedrive_jax.driving.server import PolicyServer, ServerConfig

CLIENTS = 4


def view(seed: int, size: tuple[int, int]) -> np.ndarray:
    """A picture with about the detail of a street: as many bytes in JPEG as CARLA's."""
    rng = np.random.default_rng(seed)
    width, height = size
    coarse = rng.integers(0, 255, (height // 20 + 1, width // 20 + 1, 3), dtype=np.uint8)
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)


class Sender(NamedTuple):
    """Who asks."""

    size: tuple[int, int]
    """Of the views, width and height."""
    quality: int
    """Of their JPEGs."""
    knows_depth: bool
    """The embedded world sends every pixel's depth where the model reads it, CARLA a LiDAR's sweep."""


SENDERS = {
    "bench2drive": Sender(IMAGE_SIZE, JPEG_QUALITY, knows_depth=False),
    "drive": Sender((352, 198), 95, knows_depth=True),
}
SWEEP_POINTS = 33_000
"""Of two ticks of CARLA's LiDAR, half of whose returns the evaluator drops."""


def observation(cameras: list[str], sender: Sender, reads: Sequence[str]) -> dict[str, Any]:
    """An `act` message.

    Args:
        cameras: in the server's order.
        sender: whose.
        reads: the model's depth sources.
    """
    size = sender.size
    options = [cv2.IMWRITE_JPEG_QUALITY, sender.quality]
    images = [cv2.imencode(".jpg", view(row, size), options)[1].tobytes() for row in range(len(cameras))]
    past = np.tile(np.eye(4), (4, 1, 1))
    past[:, 0, 3] = [-2.0, -4.0, -6.0, -8.0]
    message = {
        "step": 0,
        "time_s": 2.0,
        "images": images,
        "camera_intrinsics": np.stack([camera_intrinsics(name, size) for name in cameras]),
        "camera_to_ego": np.stack([camera_to_ego(name) for name in cameras]),
        "can_bus": np.zeros(13),
        "past_can_bus": np.zeros((2, 13)),
        "past_to_ego": past,
        "past_mask": np.ones(4, bool),
        "command": 4,
        "past_command": np.array([4, 4]),
        "target_points": np.array([[20.0, 0.0], [40.0, 0.0]]),
    }
    if sender.knows_depth and "exact" in reads:
        far = 20 * np.random.default_rng(0).integers(50, 500, (size[1] // 20 + 1, size[0] // 20 + 1))
        depth = cv2.resize(far.astype(np.uint16), size, interpolation=cv2.INTER_NEAREST)
        message["exact_depth"] = [cv2.imencode(".png", depth)[1].tobytes()] * len(cameras)
    elif {"lidar", "fused"} & set(reads):
        rng = np.random.default_rng(0)
        angle, reach = rng.uniform(0, 2 * np.pi, SWEEP_POINTS), rng.uniform(4, 50, SWEEP_POINTS)
        height = rng.uniform(0, 3, SWEEP_POINTS)
        rest = np.zeros(SWEEP_POINTS)
        sweep = np.stack([reach * np.cos(angle), reach * np.sin(angle), height, rest, rest], axis=1)
        message["lidar"], message["lidar_to_ego"] = sweep.astype("<f4").tobytes(), np.eye(4)
    return message


def served(checkpoint: Path, wait_ms: float) -> tuple[subprocess.Popen[str], str]:
    command = [
        sys.executable,
        "-m",
        "spacedrive_jax",
        "serve",
        "--checkpoint",
        str(checkpoint),
        "--port",
        "0",
    ]
    command += ["--batch-size", str(CLIENTS), "--wait-ms", str(wait_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]


class Pretended:
    """A policy whose batches take the same time whatever their size, as small ones do on an accelerator."""

    most = CLIENTS

    def __init__(self, milliseconds: float) -> None:
        self.seconds = milliseconds / 1e3
        outputs = {"protocol": PROTOCOL, "model": f"pretended, {milliseconds:g} ms a batch", "depth": []}
        self.metadata: Mapping[str, Any] = outputs | {"cameras": list(CAMERAS)}

    def warm_up(self) -> None:
        """Nothing to compile."""

    def prepare(self, message: Mapping[str, Any]) -> Any:
        """Checks the message as a model would."""
        return partial_record(message)

    def run(self, prepared: Sequence[Any]) -> list[dict[str, Any]]:
        """Answers after the time."""
        time.sleep(self.seconds)
        nothing = np.zeros((0, 2))
        return [{"waypoints": nothing, "path": nothing, "text": "", "status": "unparsed"} for _ in prepared]


def pretend(milliseconds: float, wait_ms: float, port: Any) -> None:
    """Serves such a policy until it is terminated, and tells its port."""
    server = PolicyServer(Pretended(milliseconds), ServerConfig(port=0, wait_ms=wait_ms))
    server.run(lambda ready: port.send(ready.port), signals=True)


def calls(client: PolicyClient, message: dict[str, Any], count: int) -> list[tuple[float, dict[str, float]]]:
    """Milliseconds and the server's own timing of each call."""
    found = []
    for _ in range(count):
        started = time.perf_counter()
        timing = client.act(message)["server_timing"]
        found.append((1e3 * (time.perf_counter() - started), timing))
    return found


class Throughput(NamedTuple):
    """What all clients together got."""

    rate: float
    """Answers a second."""
    server_ms: float
    """Processor time of the server for an answer."""
    clients_ms: float
    """Processor time of the clients for an answer."""
    model_ms: float
    """A call of the model, median."""
    batch: float
    """Requests in a batch, mean."""


def processor_seconds(pid: int) -> float:
    """Processor time that a process has taken."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def throughput(
    clients: list[PolicyClient], message: dict[str, Any], count: int, pid: int, *, together: bool
) -> Throughput:
    """Answers of `count` calls of each client, all at once or one after the other.

    Args:
        clients: connected.
        message: what each sends.
        count: calls of each.
        pid: of the server.
        together: at once.
    """
    before = processor_seconds(pid), time.process_time()
    started = time.perf_counter()
    if together:
        with ThreadPoolExecutor(len(clients)) as pool:
            found = [*itertools.chain(*pool.map(lambda client: calls(client, message, count), clients))]
    else:
        found = [calls(client, message, 1)[0] for _ in range(count) for client in clients]
    seconds = time.perf_counter() - started
    server, own = processor_seconds(pid) - before[0], time.process_time() - before[1]
    answers, timings = len(found), [timing for _, timing in found]
    return Throughput(
        answers / seconds,
        1e3 * server / answers,
        1e3 * own / answers,
        statistics.median(timing["model_ms"] for timing in timings),
        statistics.mean(timing["batch"] for timing in timings),
    )


def throughput_table(in_turn: Throughput, batched: Throughput) -> list[str]:
    """Both ways side by side, and what the machine's cores bound."""
    cores = len(os.sched_getaffinity(0))
    spent = [each.server_ms + each.clients_ms for each in (in_turn, batched)]
    both = (in_turn, batched)
    rows = [
        ("answers a second", *(f"{each.rate:.1f}" for each in both)),
        ("requests in a batch", *(f"{each.batch:.1f}" for each in both)),
        ("a call of the model, ms", *(f"{each.model_ms:.1f}" for each in both)),
        ("processor time of the server an answer, ms", *(f"{each.server_ms:.1f}" for each in both)),
        ("processor time of the clients an answer, ms", *(f"{each.clients_ms:.1f}" for each in both)),
    ]
    return [
        f"| {CLIENTS} clients | taken in turn | batched |",
        "|---|---|---|",
        *(f"| {name} | {one} | {other} |" for name, one, other in rows),
        "",
        f"Batched over in turn: {batched.rate / in_turn.rate:.2f}x. Where a turn keeps a core busy, batching "
        "brings what it saves of an",
        f"answer's processor time, on all cores: at most {cores} x {spent[0]:.1f} / {spent[1]:.1f} = "
        f"{cores * spent[0] / spent[1]:.1f}x.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    policies = parser.add_mutually_exclusive_group(required=True)
    policies.add_argument("--checkpoint", type=Path, help="run folder, such as make demo's")
    policies.add_argument("--pretend", type=float, help="instead of a model: milliseconds that a batch takes")
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument(
        "--sender",
        choices=SENDERS,
        default="bench2drive",
        help="who sends: the Bench2Drive agent (1600x900), or `drive` (352x198, exact depth)",
    )
    parser.add_argument("--wait-ms", type=float, default=5.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    process: Any
    if arguments.pretend is None:
        process, url = served(arguments.checkpoint, arguments.wait_ms)
    else:
        here, there = multiprocessing.Pipe()
        settings = (arguments.pretend, arguments.wait_ms, there)
        process = multiprocessing.get_context("spawn").Process(target=pretend, args=settings)
        process.start()
        url = f"ws://127.0.0.1:{here.recv()}"
    try:
        clients = [PolicyClient(url) for _ in range(CLIENTS)]
        for client in clients:
            client.connect()
        metadata = clients[0].metadata
        sender = SENDERS[arguments.sender]
        message = observation(metadata["cameras"], sender, metadata["depth"])
        calls(clients[0], message, 5)
        alone = calls(clients[0], message, arguments.calls)
        for client in clients[1:]:
            calls(client, message, 1)
        in_turn = throughput(clients, message, arguments.calls, process.pid, together=False)
        together = throughput(clients, message, arguments.calls, process.pid, together=True)
    finally:
        process.terminate()
        process.join(60) if arguments.pretend is not None else process.wait(60)
    overhead = [total - timing["infer_ms"] for total, timing in alone]
    tenths = statistics.quantiles(overhead, n=10)
    size = len(pack(message | {"kind": "act"})) / 1e6
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"model {metadata['model']}, views {sender.size[0]}x{sender.size[1]}, message {size:.2f} MB",
        "",
        "| | ms, median |",
        "|---|---|",
        f"| round trip, one client | {statistics.median(total for total, _ in alone):.1f} |",
        f"| of it decoding | {statistics.median(timing['prepare_ms'] for _, timing in alone):.1f} |",
        f"| of it model | {statistics.median(timing['model_ms'] for _, timing in alone):.1f} |",
        f"| the rest: messages, queue | {statistics.median(overhead):.1f} (nine in ten: {tenths[-1]:.1f}) |",
        "",
        *throughput_table(in_turn, together),
    ]
    table = "\n".join(lines) + "\n"
    print(table, end="")
    if arguments.out is not None:
        arguments.out.write_text(table)


if __name__ == "__main__":
    main()

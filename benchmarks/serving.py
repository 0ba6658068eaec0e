"""What the policy server adds to the model: round trips of six JPEGs, and four clients together and in turn.

The server runs in a process of its own (`python -m spacedrive_jax serve`), its clients in this one: six views
of 1600 x 900 in JPEG quality 20, as the Bench2Drive agent sends them. A round trip is from the client's call
to its answer; less `infer_ms` (decoding and model, as the server tells) it is what messages, queue and
batching cost.

    PYTHONPATH=. python benchmarks/serving.py --checkpoint demo/run --out serving.md
    PYTHONPATH=. python benchmarks/serving.py --pretend 50
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def observation(cameras: list[str], size: tuple[int, int], *, depth: bool) -> dict[str, Any]:
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
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
    if depth:
        far = np.full((size[1], size[0]), 5000, np.uint16)
        message["exact_depth"] = [cv2.imencode(".png", far)[1].tobytes()] * len(cameras)
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


def throughput(clients: list[PolicyClient], message: dict[str, Any], count: int, *, together: bool) -> float:
    """Answers a second of all clients."""
    started = time.perf_counter()
    if together:
        threads = [threading.Thread(target=calls, args=(client, message, count)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        for _ in range(count):
            for client in clients:
                calls(client, message, 1)
    return count * len(clients) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    policies = parser.add_mutually_exclusive_group(required=True)
    policies.add_argument("--checkpoint", type=Path, help="run folder, such as make demo's")
    policies.add_argument("--pretend", type=float, help="instead of a model: milliseconds that a batch takes")
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--size", type=int, nargs=2, default=IMAGE_SIZE, help="width and height of the views")
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
        message = observation(metadata["cameras"], tuple(arguments.size), depth="exact" in metadata["depth"])
        calls(clients[0], message, 5)
        alone = calls(clients[0], message, arguments.calls)
        for client in clients[1:]:
            calls(client, message, 1)
        in_turn = throughput(clients, message, arguments.calls // 4, together=False)
        together = throughput(clients, message, arguments.calls, together=True)
    finally:
        process.terminate()
        process.join(60) if arguments.pretend is not None else process.wait(60)
    overhead = [total - timing["infer_ms"] for total, timing in alone]
    tenths = statistics.quantiles(overhead, n=10)
    size = len(pack(message | {"kind": "act"})) / 1e6
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"model {metadata['model']}, views {arguments.size[0]}x{arguments.size[1]}, message {size:.2f} MB",
        "",
        "| | ms, median |",
        "|---|---|",
        f"| round trip, one client | {statistics.median(total for total, _ in alone):.1f} |",
        f"| of it decoding | {statistics.median(timing['prepare_ms'] for _, timing in alone):.1f} |",
        f"| of it model | {statistics.median(timing['model_ms'] for _, timing in alone):.1f} |",
        f"| the rest: messages, queue | {statistics.median(overhead):.1f} (nine in ten: {tenths[-1]:.1f}) |",
        "",
        f"| {CLIENTS} clients | answers a second |",
        "|---|---|",
        f"| taken in turn | {in_turn:.1f} |",
        f"| batched | {together:.1f} ({together / in_turn:.2f}x) |",
    ]
    table = "\n".join(lines) + "\n"
    print(table, end="")
    if arguments.out is not None:
        arguments.out.write_text(table)


if __name__ == "__main__":
    main()

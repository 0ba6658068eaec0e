"""A server with a policy of the test's own, in a thread or process of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spacedrive_jax.driving.client import PROTOCOL, PolicyClient
from spacedrive_jax.driving.protocol import partial_record
from spacedrive_jax.driving.server import PolicyServer, ServerConfig
from tests.record_factory import CAMERA_YAWS, camera_to_ego, encode_jpeg


class Straight:
    """Plans 1 m/s straight ahead, from valid messages; `slow` seconds a batch; step 13 makes it fail."""

    def __init__(self, slow: float = 0.0, most: int = 8) -> None:
        self.metadata: Mapping[str, Any] = {"protocol": PROTOCOL, "model": "straight"}
        self.most, self.slow, self.sizes, self.seen = most, slow, [], []

    def warm_up(self) -> None:
        time.sleep(self.slow)

    def prepare(self, message: Mapping[str, Any]) -> int:
        self.seen.append(partial_record(message))
        return message["step"]

    def run(self, prepared: Sequence[int]) -> list[dict[str, Any]]:
        self.sizes.append(len(prepared))
        time.sleep(self.slow)
        if 13 in prepared:
            raise RuntimeError("step 13 is unlucky")
        way = np.stack([np.arange(1.0, 7.0) / 2, np.zeros(6)], axis=1)
        return [
            {"waypoints": way, "path": np.zeros((0, 2)), "text": str(step), "status": "ok"}
            for step in prepared
        ]


@contextlib.contextmanager
def serving(policy: Any, **config: Any) -> Iterator[PolicyServer]:
    """A healthy server on a free port; its `url` is set."""
    server = PolicyServer(policy, ServerConfig(port=config.pop("port", 0), **config))
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(lambda _: ready.set(),))
    thread.start()
    try:
        assert ready.wait(30)
        server.url = f"ws://127.0.0.1:{server.port}"  # type: ignore[attr-defined]
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def client_of(server: PolicyServer, **options: Any) -> PolicyClient:
    options = {"retry_seconds": 0.1, "patience_seconds": 20.0} | options
    return PolicyClient(server.url, **options)  # type: ignore[attr-defined]


def observation(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A whole `act` message of a car that drives at 4 m/s."""
    past = np.tile(np.eye(4), (4, 1, 1))
    past[:, 0, 3] = [-2.0, -4.0, -6.0, -8.0]
    image = encode_jpeg(np.full((45, 80, 3), 120, np.uint8))
    whole = {
        "step": number,
        "time_s": number * 0.05,
        "images": [image] * 6,
        "camera_intrinsics": np.tile([[60.0, 0, 40], [0, 60, 22.5], [0, 0, 1]], (6, 1, 1)),
        "camera_to_ego": np.stack([camera_to_ego(yaw) for yaw in CAMERA_YAWS]),
        "can_bus": np.arange(13.0),
        "past_can_bus": np.ones((2, 13)),
        "past_to_ego": past,
        "past_mask": np.ones(4, bool),
        "command": 1,
        "past_command": np.array([4, 4]),
        "target_points": np.array([[10.0, 0.0], [30.0, 2.0]]),
    }
    return {name: value for name, value in (whole | changes).items() if value is not None}

"""The policy that a checkpoint is: messages to records, records to samples, samples to plans."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from spacedrive_jax import exact
from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.config import Config, to_json
from spacedrive_jax.constants import CAMERAS, NUM_CAMERAS, NUM_PAST, NUM_WAYPOINTS
from spacedrive_jax.data.depth_cache import CachedDepth, NetworkKind
from spacedrive_jax.data.depth_sources import NETWORKS, record_patch_depth
from spacedrive_jax.data.lidar import UNALIGNED, Alignment
from spacedrive_jax.data.route import RoadOption
from spacedrive_jax.data.schema import Record, blank_record
from spacedrive_jax.driving.client import PROTOCOL
from spacedrive_jax.driving.protocol import PAST_SECONDS, partial_record
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.inference.depth_network import DepthNetworkConfig, KeyframeDepth, camera_alignments
from spacedrive_jax.inference.planner import BatchPlanner, Plan

NATIVE_SIZE = (900, 1600)
"""Height and width of the pictures that the warm-up uses."""
LONGEST_LOCATION = "singapore"
"""Prompts are compiled for a place of so many letters, rounded up to `LENGTH_STEP` tokens."""


@dataclasses.dataclass(frozen=True)
class DepthNetwork:
    """A depth network that runs beside the model, for pictures that come without depth."""

    kind: NetworkKind
    pooling: str
    run: Callable[[list[Record]], Sequence[CachedDepth]]
    """Records to the depth of their views, fitted to their sweeps where `data.depth` asks for fused depth."""


def open_depth_network(weights: Path, config: Config) -> DepthNetwork:
    """Loads the depth network of a run for pictures that come without depth.

    Args:
        weights: its weights, or a JSON file as add-depth takes it.
        config: of the run: image size, channel order, pooling and grid are its own.

    Raises:
        SpaceDriveError: the weights cannot be read, or the JSON file does not describe a network.
    """
    network = DepthNetworkConfig.of(weights).for_run(config)
    runner, kind, fused = KeyframeDepth(network), network.kind(), "fused" in config.data.depth.sources

    def run(records: list[Record]) -> list[CachedDepth]:
        full, patches = runner(records)
        return [
            CachedDepth(
                kind,
                network.pooling,
                pooled,
                tuple(camera_alignments(record, views)) if fused else (UNALIGNED,) * NUM_CAMERAS,
                (),
            )
            for record, views, pooled in zip(records, full, patches, strict=True)
        ]

    return DepthNetwork(kind, network.pooling, run)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    sample: DrivingBatch
    record: Record | None
    """Kept where a network must still see the pictures."""


class ModelPolicy:
    """Serves a planner (see `spacedrive_jax.driving.server.Policy`)."""

    def __init__(self, planner: BatchPlanner, network: DepthNetwork | None = None, weights: str = "") -> None:
        """Prepares a policy.

        Args:
            planner: the model.
            network: needed where the config's depth sources are networks'.
            weights: fingerprint of the model's numbers, by which clients tell it from another one.

        Raises:
            ConfigError: the config's depth comes from a network and none is given.
        """
        check_depth(planner.config, network)
        self.planner, self.network = planner, network
        self.most = planner.most
        self.metadata: Mapping[str, Any] = metadata_of(planner.config) | {"weights": weights}

    def warm_up(self) -> None:
        """Compiles the model, and the network for every number of keyframes, too."""
        record = warm_up_record()
        self.planner.warm_up(record, self._placeholder())
        if self.network is not None:
            for count in range(1, self.most + 1):
                self.network.run([record] * count)

    def prepare(self, message: Mapping[str, Any]) -> _Prepared:
        """Decodes a message into a sample.

        Raises:
            SpaceDriveError: the message lacks something, or holds what cannot be used.
        """
        record = partial_record(message)
        if self.network is None:
            return _Prepared(self.planner.sample(record), None)
        return _Prepared(self.planner.sample(record, self._placeholder(swept=bool(record["lidar"]))), record)

    def run(self, prepared: Sequence[_Prepared]) -> list[dict[str, Any]]:
        """Plans."""
        samples = [one.sample for one in prepared]
        if self.network is not None:
            records = [one.record for one in prepared if one.record is not None]
            samples = [
                self._with_depth(sample, record, depth)
                for sample, record, depth in zip(samples, records, self.network.run(records), strict=True)
            ]
        return [_answer(plan) for plan in self.planner.plan(samples)]

    def _placeholder(self, *, swept: bool = True) -> CachedDepth | None:
        """Depth in the network's place: a sample can be built before the network ran.

        Args:
            swept: there is a sweep that the network's depth can be fitted to.
        """
        if self.network is None:
            return None
        depth = np.ones((NUM_CAMERAS, *self.planner.builder.images.token_grid), np.float32)
        fitted = Alignment(1.0, 0.0, 1) if swept else UNALIGNED
        return CachedDepth(self.network.kind, self.network.pooling, depth, (fitted,) * NUM_CAMERAS, ())

    def _with_depth(self, sample: DrivingBatch, record: Record, depth: CachedDepth) -> DrivingBatch:
        grid, config = self.planner.builder.images.token_grid, self.planner.config.data.depth
        patch_depth, _ = record_patch_depth(record, grid, config, depth)
        return dataclasses.replace(sample, patch_depth=patch_depth)


def check_depth(config: Config, network: DepthNetwork | None) -> None:
    """Refuses a config whose depth nobody could give.

    Raises:
        ConfigError: naming the sources and the flag.
    """
    if config.model.visual_positions == "none":
        return  # nothing reads it
    sources = config.data.depth.sources
    wanted = [source for source in sources if source in (*NETWORKS, "fused")]
    if wanted and network is None:
        raise ConfigError(f"the model's depth comes from {' and '.join(wanted)}: give --depth-model WEIGHTS")
    if network is not None and network.kind not in sources and "fused" not in sources:
        raise ConfigError(
            f"--depth-model is {network.kind}, the model's depth comes from {', '.join(sources)}"
        )


def metadata_of(config: Config) -> dict[str, Any]:
    """What a server says first."""
    return {
        "protocol": PROTOCOL,
        "model": config.name,
        "config_hash": hashlib.sha256(to_json(config).encode()).hexdigest()[:16],
        "image_size": list(config.data.image_size),
        "cameras": list(CAMERAS),
        "history_s": list(PAST_SECONDS[:NUM_PAST]),
        "outputs": {
            "waypoints": {"shape": [NUM_WAYPOINTS, 2], "step_s": 0.5},
            "path": {"shape": [config.model.path_points, 2], "step_m": 1.0},
        },
        "frame": "ego x forward y left",
        "route_input": config.data.command,
        "depth": list(config.data.depth.sources),
    }


def warm_up_record() -> Record:
    """A record with black pictures and every number as long in words as it may become."""
    height, width = NATIVE_SIZE
    _, jpeg = cv2.imencode(".jpg", np.zeros((height, width, 3), np.uint8))
    # All zero is sky.
    _, depth = cv2.imencode(".png", np.zeros((height, width), np.uint16))
    focal = width / (2 * exact.tan(math.radians(35.0)))
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
    forward = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1.0]])
    past = np.tile(np.eye(4), (NUM_PAST, 1, 1))
    past[:, :2, 3] = -188.88
    return blank_record() | {
        "token": "warm-up",
        "location": LONGEST_LOCATION,
        "timestamp_us": 10_000_000,
        "images": [jpeg.tobytes()] * NUM_CAMERAS,
        "image_size": np.tile(np.array(NATIVE_SIZE, np.int32), (NUM_CAMERAS, 1)),
        "exact_depth": [depth.tobytes()] * NUM_CAMERAS,
        "camera_intrinsics": np.tile(intrinsics, (NUM_CAMERAS, 1, 1)),
        "camera_to_ego": np.tile(forward, (NUM_CAMERAS, 1, 1)),
        "past_to_ego": past,
        "past_mask": np.ones(NUM_PAST, bool),
        "past_timestamp_us": np.array([9_500_000, 9_000_000], np.int64),
        "can_bus": np.full(13, -188.88),
        "can_bus_valid": True,
        "command_route": np.int32(RoadOption.LANE_FOLLOW),
    }


def _answer(plan: Plan) -> dict[str, Any]:
    return {"waypoints": plan.waypoints, "path": plan.path, "text": plan.text, "status": plan.status}

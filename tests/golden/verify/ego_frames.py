"""Frames of a recorded stream as the record that this project keeps of a keyframe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spacedrive_jax.constants import NUM_PAST
from spacedrive_jax.data.ego_status import MEMORY_GAP_US
from tests.golden.verify.check import Check, compare

Arrays = Mapping[str, np.ndarray]
COMMAND_AND_CAN = 14
"""Numbers that the published memory keeps of a frame beside its pose."""


def record_of_frames(frames: Sequence[Mapping[str, Any]], *, from_start: bool) -> dict[str, Any]:
    """The fields of a record that the ego status reads, with the past that the published memory still held.

    That memory empties where two frames are two seconds or more apart, in either direction. Its clock is
    float32 on the first frame that a process sees, on a grid of 128 s for real timestamps, so that the second
    frame finds a gap and the first hand-over is lost. This project's records lose nothing; the loss is
    replayed here.

    Args:
        frames: timestamp (s), ego_pose, command, can_bus of a keyframe and up to two before it, newest
            first.
        from_start: the oldest of them is the first that the process saw.
    """
    now, *before = frames
    seconds = [float(frame["timestamp"]) for frame in frames]
    if from_start:
        seconds[-1] = float(np.float32(seconds[-1]))
    gaps = np.abs(np.diff(seconds)) >= MEMORY_GAP_US / 1e6
    past = np.zeros((NUM_PAST, 4, 4))
    can_bus, commands = np.zeros((NUM_PAST, 13)), np.zeros(NUM_PAST)
    times = np.zeros(NUM_PAST, np.int64)
    for index, frame in enumerate(before):
        past[index] = np.linalg.inv(now["ego_pose"].astype(np.float64)) @ frame["ego_pose"]
        can_bus[index], commands[index] = frame["can_bus"], frame["command"]
        times[index] = round(seconds[index + 1] * 1e6)
    held = np.zeros(NUM_PAST, bool)
    held[: len(before)] = ~np.logical_or.accumulate(gaps)
    return {
        "timestamp_us": round(seconds[0] * 1e6),
        "past_timestamp_us": times,
        "past_mask": held,
        "past_to_ego": past,
        "can_bus": now["can_bus"],
        "past_can_bus": can_bus,
        "command_released": now["command"],
        "past_command_released": commands,
    }


def memory_checks(prefix: str, status: np.ndarray, expected: Arrays) -> list[Check]:
    """The past in the ego status against the published memory.

    Args:
        prefix: what the recorded names start with.
        status: (B, 74) ego status.
        expected: recorded arrays, some of which may be absent.
    """
    can_bus = status[:, : COMMAND_AND_CAN * NUM_PAST].reshape(-1, NUM_PAST, COMMAND_AND_CAN)
    poses = status[:, -16 * NUM_PAST :].reshape(-1, NUM_PAST, 4, 4)
    results: dict[str, tuple[np.ndarray, dict[str, float]]] = {
        "memory_egopose_at_forward": (poses, {"atol": 1e-3}),
        "memory_canbus_at_forward": (can_bus, {"rtol": 1e-6}),
    }
    return [
        compare(f"{prefix}{key}", ours, expected[f"{prefix}{key}"], **tolerance)
        for key, (ours, tolerance) in results.items()
        if f"{prefix}{key}" in expected
    ]

"""The contract between the data pipeline and the model."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

LENGTH_STEP = 64
"""Prompts are cut to a multiple of so many tokens, so that few lengths are compiled for."""

Leaf = Any
"""numpy on the host, jax on the devices."""


class TokenType(enum.IntEnum):
    """What stands at a place of the token sequence instead of, or besides, its token's embedding."""

    TEXT = 0
    IMAGE = 1
    """A visual token."""
    EGO_FEATURE = 2
    """The ego status, through its MLP."""
    EGO_POSITION = 3
    """A past ego position, through the coordinate encoder."""
    COORDINATE = 4
    """A position token of the text: a coordinate's encoding where position input is on."""
    TARGET_POINT = 5
    """A position token of the question that stands for a target point: always its encoding."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DrivingBatch:
    """Fixed shapes, everything the jitted step needs; a sample is a batch without the leading axis B.

    Token layout, ego slots and labels are settled on the host. Lengths are in metres, in the ego frame of
    the keyframe. M supervised tokens, C coordinates, T waypoints, R path points, E ego status numbers.
    """

    token_ids: Int[Leaf, "*B S"]
    """Right-padded."""
    lengths: Int[Leaf, "*B"]
    """Valid tokens."""
    position_ids: Int[Leaf, "*B 3 S"]
    """Rotary positions (time, row, column), 0 in the padding."""
    rope_delta: Int[Leaf, "*B"]
    """The generated token at index i has rotary position i + offset."""
    token_type_ids: Int[Leaf, "*B S"]
    """`TokenType` of every place."""

    pixel_values: UInt8[Leaf, "*B N H W 3"] | Float[Leaf, "*B N P K"]
    """The views, 0..255, of `data.image_size`, which the device takes through the family's image processor;
    or what that makes of them, floats: normalised, flattened patches."""
    patch_depth: Float[Leaf, "*B N h w"]
    """Pooled z-depth of every visual token."""
    intrinsics: Float[Leaf, "*B N 3 3"]
    """Pixels of the images handed to the processor."""
    camera_to_ego: Float[Leaf, "*B N 4 4"]

    ego_status: Float[Leaf, "*B E"]
    past_positions: Float[Leaf, "*B 2 3"]
    """Ego origin at t-1 and t-2."""

    coordinates: Float[Leaf, "*B C 3"]
    """The coordinates that the COORDINATE slots stand for, in order; zeros behind the last."""
    target_indices: Int[Leaf, "*B M"]
    """Places whose hidden state predicts a supervised token (the one before it); 0 where unused."""
    target_ids: Int[Leaf, "*B M"]
    target_mask: Bool[Leaf, "*B M"]

    waypoint_indices: Int[Leaf, "*B T"]
    """Places of the answer's indicators, whose hidden states are regressed."""
    waypoints: Float[Leaf, "*B T 2"]
    waypoint_mask: Bool[Leaf, "*B T"]
    """False throughout where the future is incomplete."""

    index: Int[Leaf, "*B"]
    """Row of the keyframe in its records split."""

    path_indices: Int[Leaf, "*B R"] | None = None
    """Places of the path's indicators, behind the waypoints'; None (and the next two) without a path."""
    path: Float[Leaf, "*B R 2"] | None = None
    """Every metre of the future path."""
    path_mask: Bool[Leaf, "*B R"] | None = None
    """False where the recorded future ends earlier."""

    @property
    def size(self) -> int:
        """B."""
        return self.token_ids.shape[0]


def stack(samples: list[DrivingBatch]) -> DrivingBatch:
    """Stacks samples along a new leading axis (numpy, on the host)."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *samples)


def prompt_length(batch: DrivingBatch) -> int:
    """Places that hold the longest prompt of a batch, in steps of `LENGTH_STEP` so that few lengths are
    compiled for.
    """
    whole = batch.token_ids.shape[1]
    return min(-(-int(batch.lengths.max()) // LENGTH_STEP) * LENGTH_STEP, whole)


def without_padding(batch: DrivingBatch, length: int) -> DrivingBatch:
    """Cuts the token axis: the room that training needs for answers is nothing but padding in a prompt."""
    return dataclasses.replace(
        batch,
        token_ids=batch.token_ids[:, :length],
        position_ids=batch.position_ids[:, :, :length],
        token_type_ids=batch.token_type_ids[:, :length],
    )

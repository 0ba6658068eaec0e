"""Multimodal position ids (M-RoPE) of text with still images, on the host.

Text counts up alike on all three axes. An image's tokens share one time, and its rows and columns count up
from there; the text behind it goes on from the largest position used (Wang et al. 2024, section 2.1). Which
tokens are an image is told by spans, not ids: an image id that stands for something else counts as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from spacedrive_jax.console import UserError


class ImageSpan(NamedTuple):
    """A run of visual tokens: where it starts and its grid in merged tokens."""

    start: int
    rows: int
    columns: int

    @property
    def length(self) -> int:
        """Tokens in the run."""
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        """Index behind the last token."""
        return self.start + self.length


class MropePositions(NamedTuple):
    """Position ids and how to go on from them."""

    positions: Int[np.ndarray, "3 S"]
    delta: int
    """The token at index i >= S, text, has position i + delta on every axis."""


def mrope_positions(length: int, image_spans: Sequence[ImageSpan]) -> MropePositions:
    """Position ids of one sequence.

    Args:
        length: Tokens in the sequence, padding not counted.
        image_spans: The images' runs of visual tokens, in order, not overlapping.

    Returns:
        Positions on the axes time, row, column (int32) and the offset for generated tokens.

    Raises:
        UserError: If spans overlap, are out of order or leave the sequence.
    """
    pieces: list[np.ndarray] = []
    index = position = 0
    for span in image_spans:
        if span.start < index or span.stop > length or span.length < 1:
            raise UserError(
                f"image span {tuple(span)} must start at or behind token {index} and end by token {length}"
            )
        text = np.arange(span.start - index) + position
        pieces.append(np.broadcast_to(text, (3, len(text))))
        position += len(text)
        rows, columns = np.indices((span.rows, span.columns)).reshape(2, -1)
        pieces.append(np.stack([np.zeros_like(rows), rows, columns]) + position)
        position += max(span.rows, span.columns)
        index = span.stop
    text = np.arange(length - index) + position
    pieces.append(np.broadcast_to(text, (3, len(text))))
    positions = np.concatenate(pieces, axis=1).astype(np.int32)
    return MropePositions(positions, position + len(text) - length)


def find_image_spans(
    token_ids: Int[np.ndarray, " S"], merged_grids: Sequence[tuple[int, int]], image_token_id: int
) -> list[ImageSpan]:
    """Finds the images' placeholder runs by id, one per grid.

    Args:
        token_ids: The sequence; every run of `image_token_id` is an image here.
        merged_grids: Rows and columns of each image in merged tokens, in order.
        image_token_id: Id of the placeholder token.

    Returns:
        One span per image.

    Raises:
        UserError: If the number or lengths of the runs differ from the grids.
    """
    is_image = np.concatenate([[False], np.asarray(token_ids) == image_token_id, [False]])
    edges = np.flatnonzero(is_image[1:] != is_image[:-1])
    starts, stops = edges[::2], edges[1::2]
    found = (stops - starts).tolist()
    expected = [rows * columns for rows, columns in merged_grids]
    if found != expected:
        raise UserError(
            f"the text has runs of {found} image tokens (id {image_token_id}) but the images have {expected} "
            "visual tokens; give one placeholder run per image"
        )
    return [ImageSpan(int(start), *grid) for start, grid in zip(starts, merged_grids, strict=True)]

"""Prompts with images on the host: which image stands where, and the position ids that follow.

Images are handed over as transformers does it: the patches of all images of the batch one after the other,
sample by sample, and a grid for each image. Images of one call may differ in size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.positions import RopePositions

Grids = tuple[tuple[int, int], ...]
"""Rows and columns of each image."""


class PromptLayout(NamedTuple):
    """A batch of prompts laid out."""

    position_ids: Int[np.ndarray, "3 B S"]
    """Zero in the padding."""
    rope_delta: Int[np.ndarray, " B"]
    """Offset of each sample's generated tokens."""
    visual_index: Int[np.ndarray, "B S"]
    """The visual token that stands in a slot, counted over all images of the batch; -1 where none does."""


def image_grids(images: Float[Array | np.ndarray, "... K"] | None, image_grid: Any) -> Grids:
    """The patch grid of every image.

    Args:
        images: Patches of all images in order; leading axes are one after the other.
        image_grid: (rows, columns) of every image, or a row for each image: (rows, columns), or
            (1, rows, columns) as transformers' `image_grid_thw`.

    Returns:
        One grid for each image; empty without images.

    Raises:
        ConfigError: The grids make no sense, or are those of other images.
    """
    if images is None or images.size == 0:
        if images is not None or (image_grid is not None and np.ndim(image_grid) == 2 and len(image_grid)):
            raise ConfigError(
                f"images {None if images is None else images.shape} and image_grid belong together"
            )
        return ()
    if image_grid is None:
        raise ConfigError("image_grid (patch rows, patch columns) is needed with images")
    patches = images.size // images.shape[-1]
    grid = np.asarray(image_grid)
    one_for_all = grid.shape == (2,)
    if grid.ndim == 2 and grid.shape[1] == 3 and (grid[:, 0] == 1).all():
        grid = grid[:, 1:]
    rows_of_two = grid.ndim == 2 and grid.shape[1] == 2
    if not (one_for_all or rows_of_two) or grid.dtype.kind not in "iu" or (grid < 1).any():
        raise ConfigError(
            f"image_grid {np.asarray(image_grid).tolist()} must be (patch rows, patch columns), or an array "
            "(images, 2) of them"
        )
    if one_for_all:
        grid = np.tile(grid, (patches // int(grid.prod()), 1))
    if int(grid.prod(axis=1).sum()) != patches:
        raise ConfigError(
            f"images {images.shape} hold {patches} patches, but image_grid {np.asarray(image_grid).tolist()} "
            f"asks for {'whole images of it' if one_for_all else int(grid.prod(axis=1).sum())}"
        )
    return tuple((int(rows), int(columns)) for rows, columns in grid)


def lay_out(
    token_ids: Int[np.ndarray, "B S"],
    lengths: Int[np.ndarray, " B"],
    visual_grids: Grids,
    *,
    image_token_id: int,
    sequence_positions: Callable[[np.ndarray, Sequence[tuple[int, int]]], RopePositions],
) -> PromptLayout:
    """Lays prompts out in which every image token id is a visual token.

    Each sample takes as many of the images still left, in order, as its image tokens hold.

    Args:
        token_ids: Right-padded ids.
        lengths: Valid tokens of each sample.
        visual_grids: Rows and columns of each image in visual tokens, all samples' images in order.
        image_token_id: The placeholder.
        sequence_positions: The family's position ids of one sequence.

    Returns:
        The layout.

    Raises:
        ConfigError: The placeholders do not fit the images.
    """
    batch, length = token_ids.shape
    valid = np.arange(length) < lengths[:, None]
    is_image = (token_ids == image_token_id) & valid
    position_ids = np.zeros((3, batch, length), np.int32)
    rope_delta = np.zeros(batch, np.int32)
    left = list(visual_grids)
    for row, count in enumerate(lengths):
        own: list[tuple[int, int]] = []
        missing = int(is_image[row].sum())
        while missing > 0 and left:
            own.append(left.pop(0))
            missing -= own[-1][0] * own[-1][1]
        position_ids[:, row, :count], rope_delta[row] = sequence_positions(token_ids[row, :count], own)
    if left:
        raise ConfigError(
            f"{len(left)} of {len(visual_grids)} images have no image tokens (id {image_token_id})"
        )
    ordinal = np.cumsum(is_image.reshape(-1)).reshape(is_image.shape) - 1
    return PromptLayout(position_ids, rope_delta, np.where(is_image, ordinal, -1).astype(np.int32))

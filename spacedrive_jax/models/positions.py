"""Where tokens stand: position ids of text with images (M-RoPE), prompts laid out, rotary tables.

Text counts up alike on all three axes. An image's tokens share one time, and its rows and columns count up
from there; the text behind it goes on from the largest position used (Wang et al. 2024, section 2.1). Which
tokens are an image is told by spans, not ids: an image id that stands for something else counts as text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spacedrive_jax.errors import ConfigError

# Rotary position embeddings: 1-D or multimodal (three axes) for the language model, 2-D for the tower.
#
# Channels are paired across the two halves of a head (channel j with j + head_dim / 2), as in LLaMA.


class RotaryTables(NamedTuple):
    """Cosines and sines of the rotary angles, float32, half a head wide."""

    cos: Float[Array, "... S half"]
    sin: Float[Array, "... S half"]


def inverse_frequencies(count: int, theta: float) -> Float[np.ndarray, " count"]:
    """Angular frequencies theta ** (-j / count) for j = 0 .. count - 1, radians per position."""
    exponents = np.arange(0, 2 * count, 2, dtype=np.float32) / np.float32(2 * count)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def frequency_axes(
    count: int, sections: tuple[int, ...], *, interleaved: bool = False
) -> Int[np.ndarray, " count"]:
    """The position axis that each of the language model's frequencies follows.

    Args:
        count: half of the head size.
        sections: see `LanguageModelConfig.mrope_section`.
        interleaved: see `LanguageModelConfig.mrope_interleaved`.
    """
    if not interleaved:
        return np.repeat(np.arange(len(sections)), sections)
    axes = np.zeros(count, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def decoder_rotary(
    position_ids: Int[Array, "A B S"], axes: Int[np.ndarray, " half"], theta: float
) -> RotaryTables:
    """Rotary tables of the language model: each frequency follows its own position axis.

    With three axes this is the multimodal embedding of Qwen2-VL (Wang et al. 2024, section 2.1); with one it
    is the ordinary 1-D embedding.

    Args:
        position_ids: position of every token on each axis (time, row, column); text has the same on all.
        axes: axis of each frequency (`frequency_axes`).
        theta: base of the frequencies.

    Returns:
        Tables of shape (B, S, head_dim / 2).
    """
    axis_of_frequency, frequencies = axes, inverse_frequencies(len(axes), theta)
    per_frequency = jnp.moveaxis(position_ids.astype(jnp.float32)[axis_of_frequency], 0, -1)
    angles = per_frequency * frequencies[None, None]
    return RotaryTables(jnp.cos(angles), jnp.sin(angles))


def vision_rotary(
    rows: Int[np.ndarray, " P"], columns: Int[np.ndarray, " P"], head_dim: int, theta: float = 10000.0
) -> RotaryTables:
    """Rotary tables of the vision tower: a quarter of the channels follows the row, a quarter the column.

    Args:
        rows: patch row of every patch in the sequence.
        columns: patch column of every patch in the sequence.
        head_dim: channels of a head.
        theta: base of the frequencies.

    Returns:
        Tables of shape (P, head_dim / 2).
    """
    frequencies = inverse_frequencies(head_dim // 4, theta)
    angles = np.concatenate(
        [axis.astype(np.float32)[:, None] * frequencies for axis in (rows, columns)], axis=-1
    )
    return RotaryTables(jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles)))


def rotate(heads: Float[Array, "... S K H"], tables: RotaryTables) -> Float[Array, "... S K H"]:
    """Turns every head by its token's angles, in float32, and returns the dtype that came in."""
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    # A tower's tables are of one image, the language model's of every sample.
    cos, sin = (jax.lax.broadcast_to_rank(each[..., None, :], heads.ndim) for each in tables)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(heads.dtype)


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


class RopePositions(NamedTuple):
    """Position ids and how to go on from them."""

    position_ids: Int[np.ndarray, "3 S"]
    rope_delta: int
    """The token at index i >= S, text, has position i + delta on every axis."""


def mrope_positions(length: int, image_spans: Sequence[ImageSpan]) -> RopePositions:
    """Position ids of one sequence.

    Args:
        length: tokens in the sequence, padding not counted.
        image_spans: the images' runs of visual tokens, in order, not overlapping.

    Returns:
        Positions on the axes time, row, column (int32) and the offset for generated tokens.

    Raises:
        ConfigError: spans overlap, are out of order or leave the sequence.
    """
    pieces: list[np.ndarray] = []
    index = position = 0
    for span in image_spans:
        if span.start < index or span.stop > length or span.length < 1:
            raise ConfigError(
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
    position_ids = np.concatenate(pieces, axis=1).astype(np.int32)
    return RopePositions(position_ids, position + len(text) - length)


def find_image_spans(
    token_ids: Int[np.ndarray, " S"], merged_grids: Sequence[tuple[int, int]], image_token_id: int
) -> list[ImageSpan]:
    """Finds the images' placeholder runs by id, one per grid.

    Args:
        token_ids: the sequence; every run of `image_token_id` is an image here.
        merged_grids: rows and columns of each image in merged tokens, in order.
        image_token_id: id of the placeholder token.

    Returns:
        One span per image.

    Raises:
        ConfigError: the number or lengths of the runs differ from the grids.
    """
    is_image = np.concatenate([[False], np.asarray(token_ids) == image_token_id, [False]])
    edges = np.flatnonzero(is_image[1:] != is_image[:-1])
    starts, stops = edges[::2], edges[1::2]
    found = (stops - starts).tolist()
    expected = [rows * columns for rows, columns in merged_grids]
    if found != expected:
        raise ConfigError(
            f"the text has runs of {found} image tokens (id {image_token_id}) but the images have {expected} "
            "visual tokens; give one placeholder run per image"
        )
    return [ImageSpan(int(start), *grid) for start, grid in zip(starts, merged_grids, strict=True)]


def plain_positions(length: int, images: Sequence[ImageSpan]) -> RopePositions:
    """Positions 0, 1, 2, … on every axis, images or not (models whose rotary embedding is 1-D)."""
    del images
    return mrope_positions(length, [])


def plain_sequence_positions(
    token_ids: Int[np.ndarray, " S"], visual_grids: Sequence[tuple[int, int]], image_token_id: int
) -> RopePositions:
    """`plain_positions` of a sequence in which every image token id is a visual token.

    Raises:
        ConfigError: there are more or fewer of them than the images have.
    """
    expected = sum(rows * columns for rows, columns in visual_grids)
    found = int(np.count_nonzero(np.asarray(token_ids) == image_token_id))
    if found != expected:
        raise ConfigError(
            f"the text has {found} image tokens (id {image_token_id}) but the {len(visual_grids)} images "
            f"have {expected} visual tokens"
        )
    return plain_positions(len(token_ids), [])


# Prompts with images, on the host: which image stands where.
#
# Images are handed over as transformers does it: the patches of all images of the batch one after the other,
# sample by sample, and a grid for each image. Images of one call may differ in size.


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


def image_grids(pixel_values: Float[Array | np.ndarray, "... K"] | None, image_grid_thw: Any) -> Grids:
    """The patch grid of every image.

    Args:
        pixel_values: patches of all images in order; leading axes are one after the other.
        image_grid_thw: transformers' (images, 3), a row (1, patch rows, patch columns) for each image; or one
            such triple for all of them.

    Returns:
        One grid for each image; empty without images.

    Raises:
        ConfigError: the grids make no sense, or are those of other images.
    """
    if pixel_values is None or pixel_values.size == 0:
        rows = image_grid_thw is not None and np.ndim(image_grid_thw) == 2 and len(image_grid_thw)
        if pixel_values is not None or rows:
            found = None if pixel_values is None else pixel_values.shape
            raise ConfigError(f"pixel_values {found} and image_grid_thw belong together")
        return ()
    if image_grid_thw is None:
        raise ConfigError("image_grid_thw (1, patch rows, patch columns) is needed with pixel_values")
    patches = pixel_values.size // pixel_values.shape[-1]
    grid = np.asarray(image_grid_thw)
    one_for_all = grid.shape == (3,)
    rows_of_three = grid.ndim == 2 and grid.shape[1] == 3
    whole = grid.dtype.kind in "iu" and (grid >= 1).all()
    if not (one_for_all or rows_of_three) or not whole or (grid[..., 0] != 1).any():
        raise ConfigError(
            f"image_grid_thw {grid.tolist()} must be (1, patch rows, patch columns), or an array (images, 3) "
            "of them: video is not read"
        )
    if one_for_all:
        grid = np.tile(grid, (patches // int(grid.prod()), 1))
    if int(grid.prod(axis=1).sum()) != patches:
        raise ConfigError(
            f"pixel_values {pixel_values.shape} hold {patches} patches, but image_grid_thw "
            f"{np.asarray(image_grid_thw).tolist()} asks for "
            f"{'whole images of it' if one_for_all else int(grid.prod(axis=1).sum())}"
        )
    return tuple((int(rows), int(columns)) for _, rows, columns in grid)


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
        token_ids: right-padded ids.
        lengths: valid tokens of each sample.
        visual_grids: rows and columns of each image in visual tokens, all samples' images in order.
        image_token_id: the placeholder.
        sequence_positions: the family's position ids of one sequence.

    Returns:
        The layout.

    Raises:
        ConfigError: the placeholders do not fit the images.
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

"""Where each patch of a fixed grid stands in window order: integer tables, worked out on the host.

The vision tower runs in *window order*: all patches of one attention window next to each other, the 2x2
patches of a merged token next to each other within it. Windows at the right and lower border may be
smaller than the rest.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Int

from spacedrive_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, eq=False)
class WindowLayout:
    """The tables of one grid. P patches, V merged tokens, W windows of at most `capacity` patches.

    `patch_order[p]` is the processor's index of the patch at place p in window order, `token_order[v]` the
    row-major index of merged token v in window order and `token_inverse` the way back. `rows` and `columns`
    are patch coordinates in window order. `slots[w, s]` is the place of patch s of window w (its last patch
    again where the window is not full), `window_lengths[w]` its number of patches, and `places[p]` the slot
    of place p among the W * capacity. `ragged` tells whether any window is not full.
    """

    patch_order: Int[np.ndarray, " P"]
    token_order: Int[np.ndarray, " V"]
    token_inverse: Int[np.ndarray, " V"]
    rows: Int[np.ndarray, " P"]
    columns: Int[np.ndarray, " P"]
    slots: Int[np.ndarray, "W capacity"]
    window_lengths: Int[np.ndarray, " W"]
    places: Int[np.ndarray, " P"]

    @property
    def ragged(self) -> bool:
        """Whether some window is smaller than the rest."""
        return bool((self.window_lengths != self.slots.shape[1]).any())


@functools.lru_cache(maxsize=64)
def window_layout(grid: tuple[int, int], merge_size: int, window_tokens: int) -> WindowLayout:
    """Works out window order for a grid of patches.

    Args:
        grid: Patch rows and columns of the image.
        merge_size: Side of a merged token in patches.
        window_tokens: Side of a window in merged tokens.

    Returns:
        The layout.

    Raises:
        ConfigError: If the grid does not divide into merged tokens.
    """
    height, width = grid
    if height < 1 or width < 1 or height % merge_size or width % merge_size:
        raise ConfigError(
            f"an image grid of {height}x{width} patches does not divide into {merge_size}x{merge_size} "
            "merged tokens; resize the image so that both sides are multiples"
        )
    token_rows, token_columns = np.indices((height // merge_size, width // merge_size)).reshape(2, -1)
    windows_across = -(-width // (merge_size * window_tokens))
    window_of_token = token_rows // window_tokens * windows_across + token_columns // window_tokens
    token_order = np.argsort(window_of_token, kind="stable")  # row-major within a window

    merged_patches = merge_size**2
    patch_order = (token_order[:, None] * merged_patches + np.arange(merged_patches)).reshape(-1)
    inner_rows, inner_columns = np.indices((merge_size, merge_size)).reshape(2, -1)
    rows = (token_rows[token_order, None] * merge_size + inner_rows).reshape(-1)
    columns = (token_columns[token_order, None] * merge_size + inner_columns).reshape(-1)

    window_lengths = np.bincount(window_of_token) * merged_patches
    capacity = int(window_lengths.max())
    starts = np.cumsum(window_lengths) - window_lengths
    slots = starts[:, None] + np.minimum(np.arange(capacity), window_lengths[:, None] - 1)
    window_of_place = np.repeat(np.arange(len(window_lengths)), window_lengths)
    places = window_of_place * capacity + np.arange(height * width) - starts[window_of_place]
    return WindowLayout(
        patch_order=patch_order,
        token_order=token_order,
        token_inverse=np.argsort(token_order),
        rows=rows,
        columns=columns,
        slots=slots,
        window_lengths=window_lengths,
        places=places,
    )


def full_attention_flags(depth: int, blocks: tuple[int, ...]) -> Bool[np.ndarray, " depth"]:
    """One flag per block: True where it attends to the whole image."""
    flags = np.zeros(depth, dtype=bool)
    flags[list(blocks)] = True
    return flags


# The Qwen2.5-VL vision tower (Bai et al. 2025, section 2.1.1).
#

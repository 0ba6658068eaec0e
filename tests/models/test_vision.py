from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVision
from spacedrive_jax.models.vision_transformer import window_layout

from .conftest import random_module, tiny_config

CONFIG = tiny_config().vision  # windows of 2x2 merged tokens, 4x4 patches


def build(config=CONFIG) -> QwenVision:
    return random_module(lambda: QwenVision(config, compute=ComputeConfig(), rngs=nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run(graph, state, values, grid):
    return nnx.merge(graph, state)(values, grid)


def run(model: QwenVision, values, grid):
    return _run(*nnx.split(model), values, grid)


@pytest.fixture(scope="module")
def tower() -> QwenVision:
    return build()


def pixels(images: int, grid: tuple[int, int], seed: int = 0):
    shape = (images, grid[0] * grid[1], CONFIG.patch_channels)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@given(rows=st.integers(1, 13), columns=st.integers(1, 13), window=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_window_order_holds_every_patch_once_and_windows_together(rows, columns, window):
    grid = (2 * rows, 2 * columns)
    layout = window_layout(grid, 2, window)
    patches = grid[0] * grid[1]
    assert sorted(layout.patch_order) == list(range(patches))
    np.testing.assert_array_equal(layout.token_order[layout.token_inverse], np.arange(patches // 4))

    # The processor's order: 2x2 blocks in row-major order, row-major within.
    blocks = np.indices((rows, columns)).reshape(2, -1).T
    inner = np.indices((2, 2)).reshape(2, -1).T
    coordinates = (2 * blocks[:, None] + inner).reshape(-1, 2)[layout.patch_order]
    np.testing.assert_array_equal(layout.rows, coordinates[:, 0])
    np.testing.assert_array_equal(layout.columns, coordinates[:, 1])

    side = 2 * window
    assert layout.window_lengths.sum() == patches
    for slots, length in zip(layout.slots, layout.window_lengths, strict=True):
        mine = coordinates[slots[:length]] // side
        assert (mine == mine[0]).all()
    flat = layout.slots.reshape(-1)
    np.testing.assert_array_equal(flat[layout.places], np.arange(patches))
    whole_side = side if min(grid) >= side else None
    if whole_side and grid[0] % side == 0 and grid[1] % side == 0:
        assert not layout.ragged


def test_six_hundred_forty_pixel_grid_has_ragged_windows():
    layout = window_layout((46, 46), 2, 4)
    assert layout.ragged
    assert layout.slots.shape == (36, 64)
    assert sorted(set(layout.window_lengths.tolist())) == [36, 48, 64]


def test_grid_must_divide_into_merged_tokens():
    with pytest.raises(SpaceDriveError, match="5x4 patches"):
        window_layout((5, 4), 2, 4)


def test_pixels_must_fit_the_grid(tower):
    with pytest.raises(SpaceDriveError, match=r"\(1, 16, 96\).*4x6"):
        tower(pixels(1, (4, 4)), (4, 6))


def test_images_do_not_see_each_other(tower):
    grid = (6, 10)
    together = run(tower, pixels(3, grid), grid)
    assert together.shape == (3, grid[0] * grid[1] // 4, CONFIG.out_hidden_size)
    for image in range(3):
        alone = run(tower, pixels(3, grid)[image : image + 1], grid)[0]
        np.testing.assert_allclose(together[image], alone, atol=1e-6)


def test_a_windowed_block_keeps_to_its_window_and_a_full_one_does_not():
    """One changed patch moves its own window's tokens only, unless a block attends to the whole image."""
    grid = (6, 10)

    def moved(full_blocks):
        config = dataclasses.replace(CONFIG, full_attention_blocks=full_blocks)
        model = build(config)
        values = pixels(1, grid)
        difference = run(model, values.at[0, 0].add(3.0), grid) - run(model, values, grid)
        return np.abs(difference).max(-1).reshape(3, 5) > 1e-9

    windowed = np.zeros((3, 5), bool)
    windowed[:2, :2] = True
    np.testing.assert_array_equal(moved(()), windowed)
    assert moved((2,)).all()


def test_gradients_reach_every_parameter(tower):
    graph, state = nnx.split(tower)

    def loss(state):
        return jnp.square(nnx.merge(graph, state)(pixels(2, (6, 10)), (6, 10))).mean()

    gradients = jax.jit(jax.grad(loss))(state)
    for path, leaf in nnx.to_flat_state(gradients):
        value = np.asarray(leaf[...])
        assert np.isfinite(value).all(), path
        assert np.abs(value).max() > 0, path

"""A depth network's blocks are compared one by one, those that the decoder does not tap too."""

import jax
import numpy as np
from flax import nnx

from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.depth.backbone import Dinov2, Dinov2Config
from tests.golden.verify.depth import _every_block


def test_blocks_between_taps_are_kept():
    config = Dinov2Config(width=16, depth=6, heads=2, taps=(1, 2, 4, 6), position_grid=(3, 3))
    encoder = Dinov2(config, compute=ComputeConfig(), rngs=nnx.Rngs(0))
    tokens = jax.random.normal(jax.random.key(0), (1, 10, 16))
    blocks = _every_block(encoder, tokens)
    assert blocks.shape == (6, 1, 10, 16)
    tapped = blocks[np.array(config.taps) - 1]
    np.testing.assert_allclose(tapped, encoder.block_outputs(tokens), atol=1e-6)
    assert np.abs(np.diff(blocks, axis=0)).max(axis=(1, 2, 3)).min() > 0

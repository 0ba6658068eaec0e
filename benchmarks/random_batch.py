"""A training batch of random tokens and pixels in the shapes of a config, for benchmarks."""

from __future__ import annotations

import jax
import numpy as np

from spacedrive_jax.aot.memory import abstract_batch
from spacedrive_jax.batch import DrivingBatch, TokenType
from spacedrive_jax.config import Config
from spacedrive_jax.constants import NUM_CAMERAS
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.data.transforms import EGO_TOKEN_TYPES
from spacedrive_jax.models.families.qwen2_5_vl import QwenVLConfig
from spacedrive_jax.models.positions import ImageSpan, mrope_positions
from spacedrive_jax.training.sharding import make_mesh


def random_batch(config: Config, seed: int) -> DrivingBatch:
    """Sequences without padding: six images, ego tokens, a question, and an answer of six waypoints.

    Every target place is used, so that no work is saved by masks.

    Args:
        config: of Qwen2.5-VL; `train.batch_size` samples.
        seed: of everything random.
    """
    vlm, tokenizer = config.model.vlm, load_tokenizer(config.data.tokenizer)
    assert isinstance(vlm, QwenVLConfig)
    generator = np.random.default_rng(seed)
    abstract = abstract_batch(config, config.train.batch_size, make_mesh(config.mesh))
    zeros: DrivingBatch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    samples, length = zeros.token_ids.shape
    _, _, rows, columns = zeros.patch_depth.shape
    targets, waypoints = zeros.target_indices.shape[1], zeros.waypoint_indices.shape[1]

    # Words have ids above the special tokens of either vocabulary.
    special = (tokenizer.indicator, tokenizer.position, vlm.image_token_id)
    words = np.setdiff1d(np.arange(16, vlm.decoder.vocab_size), [*special, vlm.vision_start_token_id])
    token_ids = generator.choice(words, (samples, length)).astype(np.int32)
    token_type_ids = zeros.token_type_ids
    visual = rows * columns
    spans = [ImageSpan(8 + camera * (visual + 8), rows, columns) for camera in range(NUM_CAMERAS)]
    for span in spans:
        token_ids[:, span.start - 1] = vlm.vision_start_token_id
        token_ids[:, span.start : span.stop] = vlm.image_token_id
        token_ids[:, span.stop] = vlm.vision_end_token_id
        token_type_ids[:, span.start : span.stop] = TokenType.IMAGE
    behind = spans[-1].stop + 1
    ego = EGO_TOKEN_TYPES[config.model.ego_status]
    token_type_ids[:, behind : behind + len(ego)] = ego
    answer = length - targets
    if answer < behind + len(ego):
        raise ValueError(f"data.sequence_length {length} is too short for the images and {targets} targets")
    indicators = answer + 2 * np.arange(waypoints)
    token_ids[:, indicators] = tokenizer.indicator
    token_ids[:, indicators + 1] = tokenizer.position
    token_type_ids[:, indicators + 1] = TokenType.COORDINATE

    position_ids, offset = mrope_positions(length, spans)
    zeros.lengths[:], zeros.position_ids[:], zeros.rope_delta[:] = length, position_ids, offset
    zeros.token_ids[:] = token_ids
    zeros.pixel_values[:] = generator.integers(0, 256, zeros.pixel_values.shape)
    zeros.patch_depth[:] = generator.uniform(2.0, 60.0, zeros.patch_depth.shape)
    zeros.intrinsics[:] = [[300.0, 0.0, 200.0], [0.0, 300.0, 100.0], [0.0, 0.0, 1.0]]
    zeros.camera_to_ego[:] = np.eye(4)
    zeros.target_indices[:] = np.arange(answer - 1, length - 1)
    zeros.target_ids[:] = token_ids[:, answer:]
    zeros.target_mask[:] = True
    zeros.waypoint_indices[:] = indicators
    zeros.waypoints[:] = generator.normal(0.0, 5.0, zeros.waypoints.shape)
    zeros.waypoint_mask[:] = True
    return zeros

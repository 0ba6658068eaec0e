"""Batches without data: their shapes, and random ones of those shapes for tests and benchmarks."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Sharding

from spacedrive_jax.batch import DrivingBatch, TokenType
from spacedrive_jax.config import Config
from spacedrive_jax.constants import NUM_CAMERAS, NUM_PAST, NUM_WAYPOINTS, STATUS_SIZE
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.data.transforms import EGO_TOKEN_TYPES
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.positions import ImageSpan


def batch_spec(
    config: Config, batch_size: int | None = None, *, sharding: Sharding | None = None
) -> DrivingBatch:
    """The shapes and types of a run's batches, from its config alone.

    Args:
        config: of the run.
        batch_size: B; the config's when None.
        sharding: of every leaf, such as `batch_sharding(mesh)`; None leaves it open.

    Returns:
        A batch of `jax.ShapeDtypeStruct`: what the input pipeline makes, without the numbers.
    """
    batch_size = config.train.batch_size if batch_size is None else batch_size
    data, vision = config.data, config.model.vlm.vision
    images = family_of(config.model.vlm).image_processor(vision, data.image_size)
    length, targets = data.sequence_length, data.max_targets
    points = config.model.path_points

    def array(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)

    return DrivingBatch(
        token_ids=array(np.int32, length),
        lengths=array(np.int32),
        position_ids=array(np.int32, 3, length),
        rope_delta=array(np.int32),
        token_type_ids=array(np.int32, length),
        pixel_values=array(np.uint8, NUM_CAMERAS, *data.image_size, 3),
        patch_depth=array(np.float32, NUM_CAMERAS, *images.token_grid),
        intrinsics=array(np.float32, NUM_CAMERAS, 3, 3),
        camera_to_ego=array(np.float32, NUM_CAMERAS, 4, 4),
        ego_status=array(np.float32, STATUS_SIZE),
        past_positions=array(np.float32, NUM_PAST, 3),
        coordinates=array(np.float32, data.max_coordinates, 3),
        target_indices=array(np.int32, targets),
        target_ids=array(np.int32, targets),
        target_mask=array(np.bool_, targets),
        waypoint_indices=array(np.int32, NUM_WAYPOINTS),
        waypoints=array(np.float32, NUM_WAYPOINTS, 2),
        waypoint_mask=array(np.bool_, NUM_WAYPOINTS),
        index=array(np.int32),
        path_indices=array(np.int32, points) if points else None,
        path=array(np.float32, points, 2) if points else None,
        path_mask=array(np.bool_, points) if points else None,
    )


def fake_batch(config: Config, seed: int = 0) -> DrivingBatch:
    """A training batch of random tokens, pixels and numbers, on the host.

    Sequences without padding: six images, the ego tokens, a question, an answer of six waypoints. Every
    target is used, so that no work is saved by masks.

    Args:
        config: of the run.
        seed: of everything random.

    Raises:
        ConfigError: data.sequence_length has no room for the images and data.max_targets.
    """
    vlm, family = config.model.vlm, family_of(config.model.vlm)
    tokenizer = load_tokenizer(config.data.tokenizer, family.chat)
    generator = np.random.default_rng(seed)
    batch: DrivingBatch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), batch_spec(config))
    samples, length = batch.token_ids.shape
    _, _, rows, columns = batch.patch_depth.shape
    targets, waypoints = batch.target_indices.shape[1], batch.waypoint_indices.shape[1]

    special = [tokenizer.indicator, tokenizer.position, *tokenizer.special.values(), vlm.image_token_id]
    # Words have ids above the special tokens of every small vocabulary.
    words = np.setdiff1d(np.arange(16, vlm.decoder.vocab_size), special)
    token_ids = generator.choice(words, (samples, length)).astype(np.int32)
    visual = rows * columns
    spans = [ImageSpan(8 + camera * (visual + 8), rows, columns) for camera in range(NUM_CAMERAS)]
    for span in spans:
        token_ids[:, span.start : span.stop] = vlm.image_token_id
        batch.token_type_ids[:, span.start : span.stop] = TokenType.IMAGE
        for name, place in (("vision_start", span.start - 1), ("vision_end", span.stop)):
            if name in tokenizer.special:
                token_ids[:, place] = tokenizer.special[name]
    behind = spans[-1].stop + 1
    ego = EGO_TOKEN_TYPES[config.model.ego_status]
    batch.token_type_ids[:, behind : behind + len(ego)] = ego
    answer = length - targets
    if answer < behind + len(ego):
        raise ConfigError(f"data.sequence_length {length} is too short for the images and {targets} targets")
    indicators = answer + 2 * np.arange(waypoints)
    token_ids[:, indicators] = tokenizer.indicator
    token_ids[:, indicators + 1] = tokenizer.position
    batch.token_type_ids[:, indicators + 1] = TokenType.COORDINATE

    position_ids, rope_delta = family.position_ids(length, spans)
    batch.lengths[:], batch.position_ids[:], batch.rope_delta[:] = length, position_ids, rope_delta
    batch.token_ids[:] = token_ids
    batch.pixel_values[:] = generator.integers(0, 256, batch.pixel_values.shape)
    batch.patch_depth[:] = generator.uniform(2.0, 60.0, batch.patch_depth.shape)
    batch.intrinsics[:] = [[300.0, 0.0, 200.0], [0.0, 300.0, 100.0], [0.0, 0.0, 1.0]]
    batch.camera_to_ego[:] = np.eye(4)
    batch.target_indices[:] = np.arange(answer - 1, length - 1)
    batch.target_ids[:] = token_ids[:, answer:]
    batch.target_mask[:] = True
    batch.waypoint_indices[:] = indicators
    batch.waypoints[:] = generator.normal(0.0, 5.0, batch.waypoints.shape)
    batch.waypoint_mask[:] = True
    return batch

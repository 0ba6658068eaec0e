"""The shapes of a batch, from the config alone."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.config import Config
from spacedrive_jax.data.ego_status import STATUS_SIZE
from spacedrive_jax.data.images import ImageProcessor
from spacedrive_jax.data.records import NUM_CAMERAS, NUM_PAST, NUM_WAYPOINTS
from spacedrive_jax.training.sharding import batch_sharding


def abstract_batch(config: Config, batch_size: int, mesh: Mesh) -> DrivingBatch:
    """A batch without its numbers: what `place_batch` returns for `batch_size` samples of the config."""
    sharding = batch_sharding(mesh)
    data, vision = config.data, config.model.vlm.vision
    images = ImageProcessor(vision, data.image_size)
    length, targets = data.sequence_length, data.max_targets
    points = config.model.path_points

    def array(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)

    rows, columns = images.patch_grid
    return DrivingBatch(
        token_ids=array(np.int32, length),
        lengths=array(np.int32),
        positions=array(np.int32, 3, length),
        position_offset=array(np.int32),
        slots=array(np.int32, length),
        pixel_values=array(np.uint8, NUM_CAMERAS, rows * columns, vision.patch_channels),
        patch_depth=array(np.float32, NUM_CAMERAS, *images.token_grid),
        intrinsics=array(np.float32, NUM_CAMERAS, 3, 3),
        camera_to_ego=array(np.float32, NUM_CAMERAS, 4, 4),
        ego_status=array(np.float32, STATUS_SIZE),
        past_positions=array(np.float32, NUM_PAST, 3),
        coordinates=array(np.float32, data.max_coordinates, 3),
        target_places=array(np.int32, targets),
        target_ids=array(np.int32, targets),
        target_mask=array(np.bool_, targets),
        waypoint_places=array(np.int32, NUM_WAYPOINTS),
        waypoints=array(np.float32, NUM_WAYPOINTS, 2),
        waypoint_mask=array(np.bool_, NUM_WAYPOINTS),
        index=array(np.int32),
        path_places=array(np.int32, points) if points else None,
        path=array(np.float32, points, 2) if points else None,
        path_mask=array(np.bool_, points) if points else None,
    )

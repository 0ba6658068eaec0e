"""Drawing the camera images a nuScenes folder does not have."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.data.keyframe_agents import AgentTracks, global_boxes
from spacedrive_jax.data.keyframe_map import DrivableMap
from spacedrive_jax.world.stage import Backdrop
from spacedrive_jax.world.views import DrawnBox, DrawnView, GroundRaster, draw_view, prepare_ground

GROUND_EXTENT = 100.0
"""Half side, in metres, of the drivable raster handed to the renderer."""
GROUND_CELLS = 1000
GROUND_GRID = 10.0
"""Metres; rasters start on this grid, so that neighbouring keyframes see the same cells."""


def scene_seed(seed: int, scene_name: str) -> int:
    """The renderer's seed for a scene: one light for all its keyframes."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{scene_name}".encode()).digest()[:4])


def ground_around(drivable_map: DrivableMap | None, ego_xy: Float[np.ndarray, "2"]) -> GroundRaster:
    """The drivable ground around a global point; all undrivable where there is no map."""
    centre = np.round(ego_xy / GROUND_GRID) * GROUND_GRID
    if drivable_map is None:
        drivable = np.zeros((GROUND_CELLS, GROUND_CELLS), np.uint8)
    else:
        # Yaw 0 turns the patch's forward and left axes into global x and y; the renderer wants rows along y.
        drivable = np.ascontiguousarray(drivable_map.raster(centre, 0.0, GROUND_EXTENT, GROUND_CELLS).T)
    return GroundRaster(
        drivable=drivable,
        origin_xy=(float(centre[0] - GROUND_EXTENT), float(centre[1] - GROUND_EXTENT)),
        resolution=2 * GROUND_EXTENT / GROUND_CELLS,
    )


def backdrop_around(drivable_map: DrivableMap | None, ego_xy: Float[np.ndarray, "2"], seed: int) -> Backdrop:
    """Ground and scenery for the six views of a keyframe.

    Args:
        drivable_map: the scene's map, if there is one.
        ego_xy: ego position, metres, global frame.
        seed: see `scene_seed`.
    """
    return prepare_ground(ground_around(drivable_map, ego_xy), seed)


def boxes_to_draw(tracks: AgentTracks, rows: Sequence[int]) -> list[DrawnBox]:
    """A keyframe's annotations as the renderer takes them, global frame."""
    return [
        DrawnBox(
            centre=box[:3],
            size=(float(box[3]), float(box[4]), float(box[5])),
            yaw=float(box[6]),
            category=tracks.category[row],
            instance_token=tracks.instance_token[row],
        )
        for row, box in zip(rows, global_boxes(tracks, tuple(rows)), strict=True)
    ]


def draw_missing_view(
    boxes: Sequence[DrawnBox],
    backdrop: Backdrop,
    intrinsics: Float[np.ndarray, "3 3"],
    camera_to_ego: Float[np.ndarray, "4 4"],
    ego_to_global: Float[np.ndarray, "4 4"],
    image_size: tuple[int, int],
    seed: int,
) -> DrawnView:
    """Draws one camera image and its exact depth.

    Args:
        boxes: what to draw, global frame.
        backdrop: see `backdrop_around`.
        intrinsics: camera matrix in pixels of `image_size`.
        camera_to_ego: static calibration.
        ego_to_global: ego pose at the camera's time.
        image_size: height and width in pixels.
        seed: the one the backdrop was made with.
    """
    return draw_view(
        boxes, backdrop, intrinsics, exact.matmul(ego_to_global, camera_to_ego), image_size, seed
    )

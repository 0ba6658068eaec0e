"""The six cameras of nuScenes, in the project's order."""

CAMERAS: tuple[str, ...] = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_FRONT_LEFT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
)
"""Axis N of every array with one row per camera (images, intrinsics, extrinsics, depth)."""

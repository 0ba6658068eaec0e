"""Sizes and names that the record, the batch and the model share."""

from __future__ import annotations

CAMERAS: tuple[str, ...] = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_FRONT_LEFT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
)
"""Axis N of every array with one row per camera (images, intrinsics, extrinsics, depth): nuScenes' names."""
NUM_CAMERAS = len(CAMERAS)
EGO_LENGTH = 4.084
"""Metres, of the Renault Zoe that recorded nuScenes."""
EGO_WIDTH = 1.85
EGO_CENTRE = 1.4
"""Metres from the origin of the ego frame, which nuScenes puts on the rear axle, forward to the middle of the
vehicle: its box spans -0.64 to 3.44 m. (The published metrics put it elsewhere: `evaluation.protocols`.)"""
NUM_WAYPOINTS = 6
"""T: future ego positions and agent steps, 3 s at 2 Hz."""
WAYPOINT_STEP = 0.5
"""Seconds between two waypoints, as between two keyframes."""
FARTHEST = 1e5
"""Metres. No waypoint lies there: nothing gets that far in three seconds."""
NUM_PAST = 2
"""Past keyframes whose ego state is known."""
NUM_TARGET_POINTS = 2
"""Target points: the next nodes of the route, which a driver is told of."""
NUM_PATH_POINTS = 50
"""Points of the path ahead, one a metre."""
CAN_BUS_SIZE = 13
"""orientation quaternion w x y z | acceleration xyz | rotation rate xyz | velocity xyz."""
STATUS_SIZE = NUM_PAST * (1 + CAN_BUS_SIZE) + 1 + CAN_BUS_SIZE + NUM_PAST * 16
"""E, 74: command and CAN bus of the two past keyframes, of now, two past relative poses."""

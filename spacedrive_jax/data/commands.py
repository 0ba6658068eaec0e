"""The two driving-command rules: the published one, which sees the future, and one that cannot.

Both sort an angle into eight classes: 0 strictly forward, 1 forward, 2 slightly right, 3 right, 4 sharp
right, 5 slightly left, 6 left, 7 sharp left.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from spacedrive_jax import exact

MINIMUM_MOTION = 0.5
"""Metres; an endpoint nearer than this counts as standing still, class 0."""
HORIZON = 3.0
"""Seconds to the endpoint: six keyframes."""


def angle_class(degrees: float) -> int:
    """The command class of an angle: 2..4 for positive angles, 5..7 for negative ones.

    The bounds (0.4, 2, 10 and 20 degrees) belong to the inner class (nuscenes_fields spec, stage C).
    """
    magnitude = abs(degrees)
    if magnitude <= 0.4:
        return 0
    if magnitude <= 2.0:
        return 1
    size = 0 if magnitude <= 10.0 else 1 if magnitude <= 20.0 else 2
    return (2 if degrees > 0 else 5) + size


def released_command(endpoint: Float[np.ndarray, "3"]) -> int:
    """The command of the published data: from the ground-truth endpoint, words mirrored.

    The published script calls a positive angle "right" although +y is left in the ego frame; published
    checkpoints were trained with these words, so parity needs them (nuscenes_fields spec, stage C).

    Args:
        endpoint: x, y (metres) and yaw (radians) of the ego vehicle three seconds ahead in the current ego
            frame, zeros where that keyframe does not exist. All three enter the published half-metre test.
    """
    if exact.norm(endpoint) < MINIMUM_MOTION:
        return 0
    return angle_class(float(np.degrees(exact.arctan2(endpoint[1], endpoint[0]))))


def decided_by_rounding(endpoint: Float[np.ndarray, "3"]) -> bool:
    """Whether an endpoint lies within 1e-9 (metres or degrees) of a bound of `released_command`.

    What was recorded for such an endpoint is the rounding of the machine that recorded it, not the rule:
    comparisons leave it out.
    """
    degrees = abs(float(np.degrees(exact.arctan2(endpoint[1], endpoint[0]))))
    near_bound = any(abs(degrees - bound) < 1e-9 for bound in (0.4, 2.0, 10.0, 20.0))
    return abs(float(exact.norm(endpoint)) - MINIMUM_MOTION) < 1e-9 or near_bound


def navigation_command(
    past_to_ego: Float[np.ndarray, "2 4 4"],
    past_mask: Bool[np.ndarray, "2"],
    seconds_ago: Float[np.ndarray, "2"],
) -> int:
    """A command without a look at the future, with words that mean what they say.

    Drives on for three seconds with the speed and the yaw rate of the past keyframes (a unicycle) and
    takes the direction of the point reached. Without a past keyframe, or nearly at rest: class 0.

    Args:
        past_to_ego: poses of the previous two keyframes in the current ego frame, newest first.
        past_mask: which of them exist.
        seconds_ago: how long before now they were.
    """
    count = int(past_mask.sum())
    if count == 0:
        return 0
    oldest = count - 1
    positions = np.concatenate([np.zeros((1, 2)), past_to_ego[:count, :2, 3]])
    steps = positions[:-1] - positions[1:]
    # Reversing shows as motion against the ego heading.
    distance = float(np.sum(np.copysign(exact.norm(steps), steps[:, 0])))
    past_yaw = exact.arctan2(past_to_ego[oldest, 1, 0], past_to_ego[oldest, 0, 0])
    speed = distance / seconds_ago[oldest]
    turn = -past_yaw / seconds_ago[oldest] * HORIZON
    cos, sin = exact.cos_sin(turn / 2)
    # Chord of an arc of length speed * HORIZON that turns by `turn`.
    chord = speed * HORIZON * (sin / (turn / 2) if turn else 1.0)
    if abs(chord) < MINIMUM_MOTION:
        return 0
    endpoint = chord * np.array([cos, sin])
    return angle_class(-float(np.degrees(exact.arctan2(endpoint[1], endpoint[0]))))

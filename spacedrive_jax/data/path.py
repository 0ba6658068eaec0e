"""The path head's target: where the ego vehicle goes, metre by metre, whatever its speed (closed loop)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from spacedrive_jax import exact

SPACING = 1.0
"""Metres between path points."""
STANDING = 0.05
"""Metres between two poses below which the vehicle stands: such a pose says nothing about the path."""
SAMPLES_PER_METRE = 20
"""How finely the curve is measured."""


class Path(NamedTuple):
    """Points along the future path, ego frame, metres."""

    points: Float[np.ndarray, "R 2"]
    """At 1 m, 2 m, ... along the path; where the recorded future ends earlier, straight on from there."""
    mask: Bool[np.ndarray, " R"]
    """The points that the recorded future reaches."""


def future_path(
    waypoints: Float[np.ndarray, "T 2"],
    yaw: Float[np.ndarray, " T"],
    num_points: int,
    route_ahead: Float[np.ndarray, "M 2"] | None = None,
) -> Path:
    """Resamples the recorded future at every metre of its length, and the route behind its end.

    A cubic runs through the poses with the vehicle's heading at each (Hermite), so that a turn between two
    poses half a second apart is not cut short. The original takes its points from the planned route
    (SimLingo's data); a log has no route but the one that was driven.

    Args:
        waypoints: future positions, all valid, ego frame, metres.
        yaw: headings there, radians.
        num_points: R.
        route_ahead: points of the route beyond the last of them, ego frame, metres; the path goes on there.
    """
    poses = np.concatenate([np.zeros((1, 2)), np.asarray(waypoints, np.float64)])
    headings = np.concatenate([[0.0], np.asarray(yaw, np.float64)])
    kept = [0]
    for index in range(1, len(poses)):
        if exact.norm(poses[index] - poses[kept[-1]]) >= STANDING:
            kept.append(index)
    poses, headings = poses[kept], headings[kept]
    curve = _curve(poses, headings)
    if route_ahead is not None and len(route_ahead):
        curve = np.concatenate([curve, route_ahead])
        step = curve[-1] - curve[-2]
        headings = np.array([exact.arctan2(float(step[1]), float(step[0]))])
        poses = curve[-2:]
    lengths = np.concatenate([[0.0], np.cumsum(exact.norm(np.diff(curve, axis=0)))])
    wanted = SPACING * np.arange(1, num_points + 1)
    along = np.minimum(wanted, lengths[-1])
    points = np.stack([np.interp(along, lengths, curve[:, axis]) for axis in range(2)], axis=1)
    points += (wanted - along)[:, None] * _last_direction(poses, headings)
    return Path(points.astype(np.float32), wanted <= lengths[-1] + 1e-6)


def _curve(poses: Float[np.ndarray, "K 2"], headings: Float[np.ndarray, " K"]) -> Float[np.ndarray, "M 2"]:
    """Dense points of the Hermite cubic through the poses, over their chord length."""
    if len(poses) == 1:
        return poses
    steps = np.diff(poses, axis=0)
    chords = np.concatenate([[0.0], np.cumsum(exact.norm(steps))])
    tangents = np.stack(exact.cos_sin(headings), axis=1)
    # Driving backwards, the path runs against the heading.
    neighbours = np.concatenate([steps[:1], steps]) + np.concatenate([steps, steps[-1:]])
    tangents *= np.where(np.sum(tangents * neighbours, axis=1) < 0, -1.0, 1.0)[:, None]
    count = max(2, int(np.ceil(chords[-1] * SAMPLES_PER_METRE)))
    dense = np.union1d(np.linspace(0.0, chords[-1], count), chords)
    piece = np.clip(np.searchsorted(chords, dense, side="right") - 1, 0, len(steps) - 1)
    length = np.diff(chords)[piece]
    t = ((dense - chords[piece]) / length)[:, None]
    rest = 1 - t
    start, end = poses[piece], poses[piece + 1]
    leaving, arriving = (length[:, None] * tangents[piece + side] for side in (0, 1))
    # Hermite's basis: values and slopes at both ends.
    return rest * rest * ((1 + 2 * t) * start + t * leaving) + t * t * ((3 - 2 * t) * end - rest * arriving)


def _last_direction(
    poses: Float[np.ndarray, "K 2"], headings: Float[np.ndarray, " K"]
) -> Float[np.ndarray, "2"]:
    heading = np.array(exact.cos_sin(headings[-1]))
    backwards = len(poses) > 1 and float(exact.dot(heading, poses[-1] - poses[-2])) < 0
    return -heading if backwards else heading

"""Runs a scene: every mover decides once per time step from where everybody is."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

from spacedrive_jax import exact
from spacedrive_jax.world.step import Cast, Tracks, Traffic
from spacedrive_jax.world.town import Town
from spacedrive_jax.world.traffic import TIME_STEP, Motion


def simulate(town: Town, cast: Cast, duration: float) -> list[Motion]:
    """Simulates a scene.

    Args:
        town: the road network.
        cast: who takes part.
        duration: seconds.

    Returns:
        One motion per mover, sampled every `TIME_STEP` seconds from 0 to at least `duration`.
    """
    whole = Traffic(town, cast)
    states = [whole.start()]
    for _ in range(int(np.ceil(duration / TIME_STEP)) + 1):
        states.append(whole.step(states[-1]))
    history = np.stack([[state.s, state.speed, state.acceleration] for state in states], axis=1)
    return [Motion(*history[:, :, i]) for i in range(len(cast.movers))]


def corners(poses: Float[np.ndarray, "A 3"], half: Float[np.ndarray, "A 2"]) -> Float[np.ndarray, "A 4 2"]:
    """Footprint corners of boxes given by centre pose (x, y, heading) and half length and width."""
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    local = signs * half[:, None]
    cos, sin = (part[:, None] for part in exact.cos_sin(poses[:, 2]))
    x = cos * local[..., 0] - sin * local[..., 1]
    y = sin * local[..., 0] + cos * local[..., 1]
    return np.stack([x, y], axis=-1) + poses[:, None, :2]


def overlapping_pairs(
    poses: Float[np.ndarray, "A 3"], half: Float[np.ndarray, "A 2"]
) -> Int[np.ndarray, "M 2"]:
    """Pairs (a < b) of oriented rectangles that overlap, by the separating axis theorem.

    Args:
        poses: centre x, y and heading of each rectangle.
        half: half length and half width of each.
    """
    radii = exact.norm(half)
    pairs = cKDTree(poses[:, :2]).query_pairs(2 * radii.max(), output_type="ndarray")
    apart = exact.norm(poses[pairs[:, 0], :2] - poses[pairs[:, 1], :2]) > radii[pairs].sum(axis=1)
    pairs = pairs[~apart]
    points = corners(poses, half)
    separated = np.zeros(len(pairs), dtype=bool)
    for first, second in ((0, 1), (1, 0)):
        own, other = pairs[:, first], pairs[:, second]
        relative = points[other] - poses[own, None, :2]
        cos, sin = (part[:, None] for part in exact.cos_sin(poses[own, 2]))
        along = cos * relative[..., 0] + sin * relative[..., 1]
        aside = cos * relative[..., 1] - sin * relative[..., 0]
        for values, extent in ((along, half[own, 0]), (aside, half[own, 1])):
            separated |= (values.min(axis=1) > extent) | (values.max(axis=1) < -extent)
    return pairs[~separated]


def first_collisions(cast: Cast, motions: list[Motion], duration: float, clearance: float = 0.05) -> set[str]:
    """Keys of everybody (never the ego vehicle) to leave out so that nobody overlaps anybody.

    Args:
        cast: who took part.
        motions: the simulated motions.
        duration: seconds to check, every time step.
        clearance: metres added around every footprint.
    """
    moving, still = cast.movers, cast.obstacles
    sizes = [mover.size[:2] for mover in moving] + [item.size[:2] for item in still]
    half = np.array(sizes).reshape(-1, 2) / 2 + clearance
    keys = [mover.key for mover in moving] + [item.key for item in still]
    fixed = np.array([item.pose for item in still]).reshape(-1, 3)
    rank = np.arange(len(keys))  # later in the cast gives way
    removed: set[str] = set()
    tracks = Tracks(moving)
    for step in range(int(duration / TIME_STEP)):
        moved = tracks.poses(np.array([motion.s[step] for motion in motions]))
        hits = overlapping_pairs(np.concatenate([moved, fixed]), half)
        for a, b in hits:
            if keys[a] not in removed and keys[b] not in removed:
                removed.add(keys[max(rank[a], rank[b])])
    return removed

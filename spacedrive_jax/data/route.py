"""The way a driver is told of: where a route turns, where its nodes stand, which place on it is nearest.

A route is a polyline in global metres. From a bare polyline only left, right and lane follow can be told;
sources that know junctions and lanes (Bench2Drive) give the other words themselves.

The path head's target (closed loop): where the ego vehicle goes, metre by metre, whatever its speed.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_TARGET_POINTS

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
    poses: Float[np.ndarray, "K 2"], headings: Float[np.ndarray, " headings"]
) -> Float[np.ndarray, "2"]:
    heading = np.array(exact.cos_sin(headings[-1]))
    backwards = len(poses) > 1 and float(exact.dot(heading, poses[-1] - poses[-2])) < 0
    return -heading if backwards else heading


class RoadOption(enum.IntEnum):
    """CARLA's commands."""

    VOID = -1
    LEFT = 1
    RIGHT = 2
    STRAIGHT = 3
    LANE_FOLLOW = 4
    CHANGE_LANE_LEFT = 5
    CHANGE_LANE_RIGHT = 6


COMMAND_REACH = 50.0
"""Metres ahead within which a turn is announced."""
NODE_SPACING = 8.0
"""Metres between nodes along the route: close enough to tell the lane, as a lane-level map does. (Bench2Drive
thins its plan to 50 m between turns, and its clips have their own nodes.)"""
PASSED = 4.0
"""Metres; a node nearer than this counts as passed (Bench2Drive's near planner)."""
_TURN_WINDOW = 20
"""Metres over which a change of heading counts as a turn..."""
_TURN_ANGLE = np.pi / 4.5
"""... when it exceeds 40 degrees."""
_CHORD = 3
"""Metres of the chords that headings are measured on: longer than the noise of a recorded route."""


class Route:
    """A polyline prepared for questions along it."""

    def __init__(self, points: Float[np.ndarray, "K 2"]) -> None:
        """Args: points in driving order, global metres, at least two different ones."""
        points = np.asarray(points, np.float64)
        steps = exact.norm(np.diff(points, axis=0))
        points = points[np.concatenate([[True], steps > 1e-6])]
        lengths = np.concatenate([[0.0], np.cumsum(steps[steps > 1e-6])])
        count = max(int(np.ceil(lengths[-1])), 1) + 1
        self.lengths = np.minimum(np.arange(count, dtype=np.float64), lengths[-1])
        """Metres along the route, one point a metre and its end."""
        self.points = np.stack(
            [np.interp(self.lengths, lengths, points[:, axis]) for axis in range(2)], axis=1
        )
        ahead = np.minimum(np.arange(count) + _CHORD, count - 1)
        behind = np.maximum(ahead - _CHORD, 0)
        chords = self.points[ahead] - self.points[behind]
        self.headings = np.unwrap(exact.arctan2(chords[:, 1], chords[:, 0]))
        self.turns = self._find_turns()
        """(from, to, command) of every turn, metres along the route."""
        self.nodes = self._find_nodes()
        """Where the route's nodes stand, metres along it."""

    def _find_turns(self) -> list[tuple[float, float, RoadOption]]:
        later = np.minimum(np.arange(len(self.points)) + _TURN_WINDOW, len(self.points) - 1)
        change = self.headings[later] - self.headings
        turns: list[tuple[float, float, RoadOption]] = []
        turning = np.abs(change) > _TURN_ANGLE
        bounds = np.flatnonzero(np.diff(np.concatenate([[False], turning, [False]]).astype(int)))
        for first, last in bounds.reshape(-1, 2):
            # The window that turns most lies about the turn; others reach into it from before and after.
            middle = int(first + np.argmax(np.abs(change[first:last]))) + _TURN_WINDOW / 2
            word = RoadOption.LEFT if change[int(middle - _TURN_WINDOW / 2)] > 0 else RoadOption.RIGHT
            turns.append((max(middle - 12.0, 0.0), min(middle + 12.0, float(self.lengths[-1])), word))
        return turns

    def _find_nodes(self) -> list[float]:
        end = float(self.lengths[-1])
        nodes = [NODE_SPACING * number for number in range(int(end / NODE_SPACING) + 1)]
        return nodes if nodes[-1] == end else [*nodes, end]

    def project(self, position: Float[np.ndarray, "2"], yaw: float) -> tuple[float, float]:
        """The nearest place on the route that leads the vehicle's way.

        Args:
            position: global metres.
            yaw: radians; a stretch that leads the other way counts as 20 m further off.

        Returns:
            Metres along the route, and the distance to it.
        """
        starts, steps = self.points[:-1], np.diff(self.points, axis=0)
        offsets = position - starts
        squared = np.maximum(steps[:, 0] * steps[:, 0] + steps[:, 1] * steps[:, 1], 1e-12)
        along = np.clip((offsets[:, 0] * steps[:, 0] + offsets[:, 1] * steps[:, 1]) / squared, 0.0, 1.0)
        missed = exact.norm(offsets - along[:, None] * steps)
        cos, sin = exact.cos_sin(yaw)
        against = steps[:, 0] * cos + steps[:, 1] * sin < 0
        nearest = int(np.argmin(missed + 20.0 * against))
        low, high = self.lengths[nearest], self.lengths[nearest + 1]
        return float(low + along[nearest] * (high - low)), float(missed[nearest])

    def command(self, s: float) -> RoadOption:
        """The command at a place: the first turn that has not ended and begins within `COMMAND_REACH`."""
        for first, last, word in self.turns:
            if last > s and first < s + COMMAND_REACH:
                return word
        return RoadOption.LANE_FOLLOW

    def at(self, s: Float[np.ndarray, " M"]) -> Float[np.ndarray, "M 2"]:
        """Points at some metres along the route; its end beyond it."""
        return np.stack([np.interp(s, self.lengths, self.points[:, axis]) for axis in range(2)], axis=1)

    def target_points(self, s: float) -> Float[np.ndarray, "2 2"]:
        """The next two nodes, global metres; the last one twice where only one is left."""
        ahead = [node for node in self.nodes if node > s + PASSED][:NUM_TARGET_POINTS]
        ahead += [self.nodes[-1]] * (NUM_TARGET_POINTS - len(ahead))
        return self.at(np.array(ahead))

"""The way a driver is told of: where a route turns, where its nodes stand, which place on it is nearest.

A route is a polyline in global metres. From a bare polyline only left, right and lane follow can be told;
sources that know junctions and lanes (Bench2Drive) give the other words themselves.
"""

from __future__ import annotations

import enum

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_TARGETS


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
NODE_SPACING = 50.0
"""Metres; nodes of the route are never further apart (Bench2Drive's thinning)."""
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
        corners = sorted({0.0, float(self.lengths[-1]), *(s for turn in self.turns for s in turn[:2])})
        nodes = [corners[0]]
        for corner in corners[1:]:
            while corner - nodes[-1] > NODE_SPACING:
                nodes.append(nodes[-1] + NODE_SPACING)
            nodes.append(corner)
        return nodes

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

    def targets(self, s: float) -> Float[np.ndarray, "2 2"]:
        """The next two nodes, global metres; the last one twice where only one is left."""
        ahead = [node for node in self.nodes if node > s + PASSED][:NUM_TARGETS]
        ahead += [self.nodes[-1]] * (NUM_TARGETS - len(ahead))
        return self.at(np.array(ahead))

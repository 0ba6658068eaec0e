"""Runs a scene: every mover decides once per time step from where everybody is."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

from spacedrive_jax.world import traffic
from spacedrive_jax.world.town import Town
from spacedrive_jax.world.traffic import TIME_STEP, Gate, Motion, Mover, Obstacle, Signals, Zebra


@dataclasses.dataclass(frozen=True)
class Cast:
    """Who takes part in a scene. Movers come first in all arrays, the ego vehicle first of all."""

    movers: tuple[Mover, ...]
    obstacles: tuple[Obstacle, ...]
    signals: Signals


def simulate(town: Town, cast: Cast, duration: float) -> list[Motion]:
    """Simulates a scene.

    Args:
        town: the road network.
        cast: who takes part.
        duration: seconds.

    Returns:
        One motion per mover, sampled every `TIME_STEP` seconds from 0 to at least `duration`.
    """
    return _Simulation(town, cast).run(int(np.ceil(duration / TIME_STEP)) + 2)


class Tracks:
    """Box centre poses of many movers at once; routes are evenly spaced, so a pose is two table rows."""

    def __init__(self, movers: tuple[Mover, ...]) -> None:
        routes = [mover.route for mover in movers]
        counts = np.array([len(route.points) for route in routes])
        self.first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.last = counts - 1.0
        self.spacing = np.array([route.lengths[-1] for route in routes]) / self.last
        self.table = np.concatenate([np.column_stack([r.points, r.headings]) for r in routes])
        self.ahead = np.array([mover.reference_to_centre for mover in movers])

    def poses(self, s: Float[np.ndarray, "A"]) -> Float[np.ndarray, "A 3"]:
        """x, y, heading of every box centre at arc lengths `s`."""
        position = np.clip(s / self.spacing, 0.0, self.last - 1e-6)
        low = position.astype(int)
        rows = self.first + low
        result = self.table[rows] + (position - low)[:, None] * (self.table[rows + 1] - self.table[rows])
        result[:, 0] += self.ahead * np.cos(result[:, 2])
        result[:, 1] += self.ahead * np.sin(result[:, 2])
        return result


class _Simulation:
    """The mutable state of one run."""

    def __init__(self, town: Town, cast: Cast) -> None:
        self.town, self.cast = town, cast
        self.movers = cast.movers
        self.profiles = [traffic.speed_limit_profile(mover.route) for mover in self.movers]
        self.s = np.array([mover.start for mover in self.movers])
        self.speed = np.array([mover.speed for mover in self.movers])
        sizes = [mover.size[:2] for mover in self.movers] + [item.size[:2] for item in cast.obstacles]
        self.half = np.array(sizes).reshape(-1, 2) / 2
        still = np.array([item.pose for item in cast.obstacles]).reshape(-1, 3)
        self.poses = np.concatenate([np.zeros((len(self.movers), 3)), still])
        self.all_speeds = np.zeros(len(self.poses))
        self.tracks = Tracks(self.movers)
        self.on_foot = np.array([m.pedestrian for m in self.movers] + [False] * len(still))
        self.radii = np.hypot(self.half[:, 0], self.half[:, 1])
        self.walkers: dict[int, list[int]] = {}
        """Movers who walk over each crossing."""
        self.arrivals: dict[int, list[tuple[int, Zebra]]] = {}
        """Vehicles whose routes lead over each crossing, and where."""
        self.entries: dict[int, list[tuple[int, Gate]]] = {}
        """Vehicles whose routes lead over each signalised junction, and where."""
        for i, mover in enumerate(self.movers):
            if mover.crossing >= 0:
                self.walkers.setdefault(mover.crossing, []).append(i)
            for zebra in mover.route.zebras:
                self.arrivals.setdefault(zebra.crossing, []).append((i, zebra))
            for gate in mover.route.gates:
                self.entries.setdefault(gate.junction, []).append((i, gate))
        self.conflicts: dict[tuple[int, Zebra, int], float] = {}
        """How far along a walker's route a vehicle's path lies, by vehicle, zebra and walker."""
        self._refresh()

    def _refresh(self) -> None:
        self.poses[: len(self.movers)] = self.tracks.poses(self.s)
        self.all_speeds[: len(self.movers)] = self.speed

    def run(self, steps: int) -> list[Motion]:
        history = np.zeros((3, steps, len(self.movers)))
        for step in range(steps):
            time = step * TIME_STEP
            wanted = np.array([self._decide(i, time) for i in range(len(self.movers))])
            # Stop exactly at zero within the step, so that speed and distance stay consistent.
            acceleration = np.maximum(wanted, -self.speed / TIME_STEP)
            history[:, step] = self.s, self.speed, acceleration
            self.s = self.s + self.speed * TIME_STEP + 0.5 * acceleration * TIME_STEP**2
            self.speed = np.maximum(self.speed + acceleration * TIME_STEP, 0.0)
            self._refresh()
        return [Motion(*history[:, :, i]) for i in range(len(self.movers))]

    def _decide(self, i: int, time: float) -> float:
        mover = self.movers[i]
        route, s, speed = mover.route, float(self.s[i]), float(self.speed[i])
        front = s + mover.reference_to_centre + self.half[i, 0]
        end = float(route.lengths[-1]) - 1.0
        if mover.pedestrian:
            return self._walk(i, front, front >= end, time)
        limit = float(np.interp(s, route.lengths, self.profiles[i]))
        wanted = min(mover.desired_speed(time), limit)
        options = [traffic.follow_acceleration(speed, wanted, max(end - front, 0.0), speed, mover)]
        gap, leader_speed = self._leader(i, front)
        options.append(traffic.follow_acceleration(speed, wanted, gap, speed - leader_speed, mover))
        stop = min(self._gate_stop(i, front, time), self._zebra_stop(i, front, time))
        if np.isfinite(stop):
            gap = max(stop - front + mover.standstill_gap - 0.4, 0.0)
            options.append(traffic.follow_acceleration(speed, wanted, gap, speed, mover))
        return min(options)

    def _walk(self, i: int, front: float, arrived: bool, time: float) -> float:
        """Pedestrians reach their pace at once, wait at the kerb and stop before obstacles."""
        mover = self.movers[i]
        if mover.crossing >= 0:
            if self.s[i] < 0.6 and not self._may_walk(mover, time):
                return -4.0
            arrived = arrived or self._leader(i, front)[0] < 0.6
        return -3.0 if arrived else (mover.desired_speed(time) - float(self.speed[i])) / 0.4

    def _leader(self, i: int, front: float) -> tuple[float, float]:
        """Gap to, and speed along the route of, the first thing that stands in the swept corridor."""
        mover = self.movers[i]
        reach = traffic.LOOKAHEAD if not mover.pedestrian else 4.0
        first = mover.route.lengths.searchsorted(front - self.half[i, 0])
        last = mover.route.lengths.searchsorted(front + reach)
        points = mover.route.points[first:last]
        if not len(points):
            return np.inf, 0.0
        # Whoever is further than this from the box around the corridor cannot stand in it.
        margins = (self.radii + mover.size[1] / 2 + 0.8)[:, None]
        positions = self.poses[:, :2]
        close = (positions > points.min(axis=0) - margins) & (positions < points.max(axis=0) + margins)
        near = np.flatnonzero(close[:, 0] & close[:, 1])
        near = near[near != i]
        if mover.pedestrian:
            near = near[~self.on_foot[near]]
        if not len(near):
            return np.inf, 0.0
        offsets = points[:, None] - positions[near]
        squared = (offsets**2).sum(axis=-1)
        closest = squared.argmin(axis=0)
        lateral = np.sqrt(squared[closest, np.arange(len(near))])
        relative = self.poses[near, 2] - mover.route.headings[first:last][closest]
        cos, sin = np.abs(np.cos(relative)), np.abs(np.sin(relative))
        half = self.half[near]
        lateral_extent = half[:, 0] * sin + half[:, 1] * cos
        along_extent = half[:, 0] * cos + half[:, 1] * sin
        # People on the road need room; predicted half a second ahead they need more.
        margin = np.where(self.on_foot[near], 0.8, 0.35)
        clearance = mover.size[1] / 2 + lateral_extent + margin
        in_corridor = (lateral < clearance) & (closest < len(points) - 1)
        gaps = mover.route.lengths[first:last][closest] - front - along_extent
        in_corridor &= gaps > -2 * self.half[i, 0]
        if not in_corridor.any():
            return np.inf, 0.0
        pick = np.flatnonzero(in_corridor)[np.argmin(gaps[in_corridor])]
        towards = self.all_speeds[near[pick]] * np.cos(relative[pick])
        return float(gaps[pick]), float(max(towards, 0.0))

    def _gate_stop(self, i: int, front: float, time: float) -> float:
        """Arc length of the stop line at which the vehicle must hold, inf when it may go."""
        for gate in self.movers[i].route.gates:
            if front > gate.stop + 2.5 or gate.stop - front > traffic.LOOKAHEAD:
                continue  # already committed, or far away
            green = self.cast.signals.green_arm(gate.junction, time) == gate.arm
            can_stop = gate.stop - front > self.speed[i] ** 2 / (2 * 4.5) - 1.0
            if (not green or self._occupied(i, gate.junction, gate.arm)) and can_stop:
                return gate.stop
        return np.inf

    def _occupied(self, i: int, junction: int, arm: int) -> bool:
        for j, gate in self.entries[junction]:
            if j == i or gate.arm == arm:
                continue
            centre = self.s[j] + self.movers[j].reference_to_centre
            if centre + self.half[j, 0] > gate.stop + 2.5 and centre - self.half[j, 0] < gate.leave:
                return True
        return False

    def _zebra_stop(self, i: int, front: float, time: float) -> float:
        for zebra in self.movers[i].route.zebras:
            line = zebra.near - 1.5
            if front > zebra.near or line - front > traffic.LOOKAHEAD:
                continue
            room = line - front
            braking = self.speed[i] ** 2 / 2
            if room > braking / 5.0 - 0.5 and self._someone_walks(i, zebra):
                return line
            if room > braking / 3.0 and self._someone_waits(zebra.crossing, time):
                return line
        return np.inf

    def _someone_walks(self, i: int, zebra: Zebra) -> bool:
        """Whether a pedestrian on the crossing has not yet left the vehicle's path behind."""
        return any(
            self.s[j] != 0.0 and self.s[j] < self._conflict(i, zebra, j) + self.half[i, 1] + 1.3
            for j in self.walkers.get(zebra.crossing, ())
        )

    def _conflict(self, i: int, zebra: Zebra, j: int) -> float:
        """Arc length at which the walker's route passes the middle of the vehicle's way over the zebra."""
        key = i, zebra, j
        if key not in self.conflicts:
            path = self.movers[i].route.pose((zebra.near + zebra.far) / 2)[:2]
            walk = self.movers[j].route
            self.conflicts[key] = float(walk.lengths[np.argmin(np.hypot(*(walk.points - path).T))])
        return self.conflicts[key]

    def _someone_waits(self, crossing: int, time: float) -> bool:
        """Whether somebody at the kerb has the right to walk now."""
        return any(
            self.s[j] == 0.0 and self._has_way(self.movers[j], time) for j in self.walkers.get(crossing, ())
        )

    def _has_way(self, walker: Mover, time: float) -> bool:
        crossing = self.town.crossings[walker.crossing]
        green = (
            crossing.junction >= 0 and self.cast.signals.green_arm(crossing.junction, time) == crossing.arm
        )
        return time >= walker.departure and not green

    def _may_walk(self, mover: Mover, time: float) -> bool:
        """A pedestrian steps out when the signal and the approaching vehicles allow it."""
        if not self._has_way(mover, time):
            return False
        return not self._threatened(mover.crossing)

    def _threatened(self, crossing: int) -> bool:
        for j, zebra in self.arrivals.get(crossing, ()):
            front = self.s[j] + self.movers[j].reference_to_centre + self.half[j, 0]
            rear = front - 2 * self.half[j, 0]
            distance = zebra.near - 1.5 - front
            occupying = distance <= 0 and rear < zebra.far + 0.5
            if occupying or 0 < distance < self.speed[j] ** 2 / (2 * 3.6) + 0.3 * self.speed[j]:
                return True
        return False


def corners(poses: Float[np.ndarray, "A 3"], half: Float[np.ndarray, "A 2"]) -> Float[np.ndarray, "A 4 2"]:
    """Footprint corners of boxes given by centre pose (x, y, heading) and half length and width."""
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    local = signs * half[:, None]
    cos, sin = np.cos(poses[:, 2])[:, None], np.sin(poses[:, 2])[:, None]
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
    radii = np.hypot(half[:, 0], half[:, 1])
    pairs = cKDTree(poses[:, :2]).query_pairs(2 * radii.max(), output_type="ndarray")
    apart = np.hypot(*(poses[pairs[:, 0], :2] - poses[pairs[:, 1], :2]).T) > radii[pairs].sum(axis=1)
    pairs = pairs[~apart]
    points = corners(poses, half)
    separated = np.zeros(len(pairs), dtype=bool)
    for first, second in ((0, 1), (1, 0)):
        own, other = pairs[:, first], pairs[:, second]
        relative = points[other] - poses[own, None, :2]
        cos, sin = np.cos(poses[own, 2])[:, None], np.sin(poses[own, 2])[:, None]
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

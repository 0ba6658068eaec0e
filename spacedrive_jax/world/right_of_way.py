"""Where a mover has to hold: at lights, at stop signs, for who goes first, at crossings.

At a junction with lights a vehicle enters on green, while nobody from another arm is inside. At one without,
who gives way accepts a gap: it goes where nobody who goes first, and nobody who is inside already, would come
near it, as far as it foresees its own way and theirs.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from spacedrive_jax import exact
from spacedrive_jax.world.paths import corners, separated
from spacedrive_jax.world.traffic import (
    COMFORT_BRAKING,
    LOOKAHEAD,
    CastOnRoutes,
    Gate,
    Mover,
    Priority,
    Zebra,
)

FORESIGHT = 5.0
"""Seconds that an alert driver looks ahead, in steps of `FORESIGHT_STEP`."""
FORESIGHT_STEP = 0.2
STANDS_AT_SIGN = 1.5
"""Seconds for which a vehicle stands at a stop sign, so that it is seen to have stopped."""
AT_THE_LINE = 1.2
"""Metres from the front to the stop line within which a vehicle that stands has stopped at its sign."""
STANDING = 0.1
"""m/s below which it stands (Bench2Drive's)."""
GAP_S = 8.0
"""Seconds that a driver looks ahead before it enters a junction without lights."""
DECIDES = 6.0, 4.0
"""Metres before the line, and seconds more, from which on it does."""
FARTHEST = 100.0
"""Metres before the line beyond which nobody comes into question."""
GAP_MARGIN_S = 0.8
"""Seconds by which it passes before or behind others there,"""
GAP_MARGIN_M = (1.0, 0.3)
"""and metres before and behind it and to its sides."""


class RightOfWay:
    """Everybody at one instant, and who of them has to hold where."""

    def __init__(
        self,
        whole: CastOnRoutes,
        time: float,
        s: Float[np.ndarray, "A"],
        speed: Float[np.ndarray, "A"],
        since: Float[np.ndarray, "A"],
        stood: Float[np.ndarray, "A"],
        poses: Float[np.ndarray, "R 3"],
        off_route: bool,
    ) -> None:
        """Notes where everybody is.

        Args:
            whole: who moves along which route.
            time: seconds since the start of the simulation.
            s: arc lengths along the routes, metres.
            speed: m/s.
            since: when each mover's part was triggered, seconds.
            stood: seconds at the stop sign before each.
            poses: box centre x, y in metres and heading in radians, of what stands still behind the movers.
            off_route: whether the ego vehicle is too far from its route for its arc length to say anything.
        """
        self.whole, self.time = whole, time
        self.s, self.speed, self.since, self.stood, self.poses = s, speed, since, stood, poses
        self.movers, self.half = whole.movers, whole.half
        self.radii, self.on_foot = whole.radii, whole.on_foot
        self.x, self.y = np.ascontiguousarray(poses[:, 0]), np.ascontiguousarray(poses[:, 1])
        self.close = whole.close(self.x, self.y)
        self.front = s + whole.tracks.ahead + self.half[: len(s), 0]
        """Arc length of every mover's front."""
        self.all_speeds = np.zeros(len(poses))
        self.all_speeds[: len(s)] = speed
        self._found: dict[int, tuple[dict[int, Gate], dict[int, np.ndarray]]] = {}
        """What `_ways` has found."""
        self.astray = 0 if off_route else -1
        """The mover whose arc length says nothing (an ego vehicle far from its route), -1 for none."""

    def _stops(self, who: Int[np.ndarray, "D"]) -> Float[np.ndarray, "A"]:
        """Arc length of the line at which every mover must hold, inf where it may go."""
        looking = set(who.tolist())
        gates, zebras = np.full(len(self.movers), np.inf), np.full(len(self.movers), np.inf)
        for i, gate in self.whole.gates:
            front = self.front[i]
            if front > gate.stop + 2.5 or gate.stop - front > LOOKAHEAD:
                continue  # already committed, or far away
            if i in looking and np.isinf(gates[i]) and self._held_by(i, gate):
                gates[i] = gate.stop
        for i, zebra in self.whole.zebras:
            front, line = self.front[i], zebra.near - 1.5
            if front > zebra.near or line - front > LOOKAHEAD:
                continue
            if i in looking and np.isinf(zebras[i]) and self._yields_at(i, zebra, line - front):
                zebras[i] = line
        return np.minimum(gates, zebras)

    def _held_by(self, i: int, gate: Gate) -> bool:
        """Whether a light, a sign or somebody else keeps a vehicle that still can stop out of a junction."""
        signals = self.whole.cast.signals
        can_stop = gate.stop - self.front[i] > self.speed[i] * self.speed[i] / (2 * 4.5) - 1.0
        priority = signals.priorities.get(gate.junction)
        if priority is not None:
            stands = priority.signed(gate.arm) and self.stood[i] < STANDS_AT_SIGN
            return bool(can_stop and (stands or self._gives_way(i, gate, priority)))
        green = gate.arm in signals.green_arms(gate.junction, self.time)
        return bool((not green or self._occupied(i, gate.junction, gate.arm)) and can_stop)

    def _gives_way(self, i: int, gate: Gate, priority: Priority) -> bool:
        """Whether a vehicle that went on now would come near who goes first, or is inside already."""
        if gate.stop - self.front[i] > DECIDES[0] + DECIDES[1] * self.speed[i]:
            return False
        if self.astray >= 0 and i != self.astray and self._inside_junction(gate.junction):
            return True
        gates, ways = self._ways(gate.junction)
        side = self.whole.town.side
        first = [
            j
            for j, other in gates.items()
            if j not in (i, self.astray)
            and other.arm != gate.arm
            and (self.front[j] > other.stop + 2.5 or priority.rank(other, side) < priority.rank(gate, side))
        ]
        return (
            i in ways and bool(first) and self._meets(i, ways[i], first, np.stack([ways[j] for j in first]))
        )

    def _meets(
        self, i: int, own: Float[np.ndarray, "K 3"], who: list[int], others: Float[np.ndarray, "M K 3"]
    ) -> bool:
        """Whether a vehicle comes within the margins of one of some others, given their poses from now on."""
        late, count = round(GAP_MARGIN_S / FORESIGHT_STEP), len(own)
        now = np.concatenate([np.arange(late, count), np.arange(count), np.arange(count - late)])
        then = np.concatenate([np.arange(count - late), np.arange(count), np.arange(late, count)])
        half, radii = self.half[i] + GAP_MARGIN_M, self.radii[who]
        apart = exact.norm(own[now, :2] - others[:, then, :2])
        number, instant = np.nonzero(apart < float(exact.norm(half)) + radii[:, None])
        mine, theirs = own[now[instant]], others[number, then[instant]]
        halves = np.broadcast_to(half, (len(mine), 2)), self.half[np.array(who)[number]]
        clear = separated(corners(theirs, halves[1]), mine, halves[0])
        clear |= separated(corners(mine, halves[0]), theirs, halves[1])
        return not clear.all()

    def _ways(self, junction: int) -> tuple[dict[int, Gate], dict[int, Float[np.ndarray, "K 3"]]]:
        """Of all vehicles near a junction, their way over it, and their box centre poses from now on."""
        if junction not in self._found:
            gates = {
                j: gate
                for j, gate in self.whole.entries[junction]
                if gate.stop - FARTHEST < self.front[j] < gate.leave + LOOKAHEAD
            }
            who = np.array(list(gates), int)
            s = self._runs(who)
            for row, j in enumerate(gates):
                if self._acts(j):
                    s[row] = self._future(j, GAP_S)[1]
            poses = self.whole.tracks.poses(s.T, who).swapaxes(0, 1)
            self._found[junction] = gates, dict(zip(gates, poses, strict=True))
        return self._found[junction]

    def _runs(self, who: Int[np.ndarray, "M"]) -> Float[np.ndarray, "M K"]:
        """Arc lengths from now on, every `FORESIGHT_STEP` for `GAP_S`, of vehicles on a free road: as fast as
        they want to and the bends allow.
        """
        whole, tracks = self.whole, self.whole.tracks
        s, speed = self.s[who], self.speed[who]
        wishes = np.array([self._wish(j) for j in who.tolist()])
        faster = whole.idm_parameters[who, 0] * FORESIGHT_STEP
        first, last, spacing = tracks.first[who], tracks.last[who], tracks.spacing[who]
        result = np.empty((len(who), round(GAP_S / FORESIGHT_STEP)))
        for k in range(result.shape[1]):
            result[:, k] = s
            place = np.minimum(s / spacing, last).astype(int)
            limit = np.minimum(wishes, whole.limits[first + place])
            later = np.minimum(speed + faster, np.maximum(limit, speed - COMFORT_BRAKING * FORESIGHT_STEP))
            s, speed = s + (speed + later) / 2 * FORESIGHT_STEP, later
        return result

    def _occupied(self, i: int, junction: int, arm: int) -> bool:
        for j, gate in self.whole.entries[junction]:
            if j in (i, self.astray) or gate.arm == arm:
                continue
            centre = self.s[j] + self.movers[j].reference_to_centre
            if centre + self.half[j, 0] > gate.stop + 2.5 and centre - self.half[j, 0] < gate.leave:
                return True
        return self.astray >= 0 and self._inside_junction(junction)

    def _inside_junction(self, junction: int) -> bool:
        """Whether an ego vehicle far from its route stands in a junction."""
        area = self.whole.town.junctions[junction]
        return bool(exact.norm(self.poses[0, :2] - area.centre) < area.radius + self.half[0, 0])

    def _yields_at(self, i: int, zebra: Zebra, room: float) -> bool:
        """Whether a vehicle has to stop, and can, for people on a crossing or with the right to walk."""
        braking = self.speed[i] * self.speed[i] / 2
        return bool(
            (room > braking / 5.0 - 0.5 and self._someone_walks(i, zebra))
            or (room > braking / 3.0 and self._someone_waits(zebra.crossing))
        )

    def _someone_walks(self, i: int, zebra: Zebra) -> bool:
        """Whether a pedestrian on the crossing has not yet left the vehicle's path behind."""
        return any(
            self.s[j] != 0.0 and self.s[j] < self._conflict(i, zebra, j) + self.half[i, 1] + 1.3
            for j in self.whole.walkers.get(zebra.crossing, ())
        )

    def _conflict(self, i: int, zebra: Zebra, j: int) -> float:
        """Arc length at which the walker's route passes the middle of the vehicle's way over the zebra."""
        key = i, zebra, j
        conflicts = self.whole.conflicts
        if key not in conflicts:
            path = self.movers[i].route.pose((zebra.near + zebra.far) / 2)[:2]
            walk = self.movers[j].route
            conflicts[key] = float(walk.lengths[np.argmin(exact.norm(walk.points - path))])
        return conflicts[key]

    def _someone_waits(self, crossing: int) -> bool:
        """Whether somebody at the kerb has the right to walk now."""
        return any(
            self.s[j] == 0.0 and self._has_way(self.movers[j]) for j in self.whole.walkers.get(crossing, ())
        )

    def _has_way(self, walker: Mover) -> bool:
        crossing, signals = self.whole.town.crossings[walker.crossing], self.whole.cast.signals
        lit = crossing.junction >= 0 and crossing.junction not in signals.priorities
        green = lit and crossing.arm in signals.green_arms(crossing.junction, self.time)
        return self.time >= walker.departure and not green

    def _may_walk(self, mover: Mover) -> bool:
        """A pedestrian steps out when the signal and the approaching vehicles allow it."""
        if not self._has_way(mover):
            return False
        return not self._threatened(mover.crossing)

    def _threatened(self, crossing: int) -> bool:
        if self.astray >= 0 and self._bears_down(crossing):
            return True
        for j, zebra in self.whole.arrivals.get(crossing, ()):
            if j == self.astray:
                continue
            front = self.s[j] + self.movers[j].reference_to_centre + self.half[j, 0]
            rear = front - 2 * self.half[j, 0]
            distance = zebra.near - 1.5 - front
            occupying = distance <= 0 and rear < zebra.far + 0.5
            if occupying or 0 < distance < exact.power(self.speed[j], 2) / (2 * 3.6) + 0.3 * self.speed[j]:
                return True
        return False

    def _bears_down(self, crossing: int) -> bool:
        """Whether an ego vehicle far from its route is on a crossing or about to be."""
        x, y, yaw = self.poses[0]
        polygon = self.whole.town.crossings[crossing].polygon - (x, y)
        cos, sin = exact.cos_sin(yaw)
        along = exact.dot(polygon, np.array([cos, sin]))
        aside = exact.dot(polygon, np.array([-sin, cos]))
        speed, front = float(self.speed[0]), float(self.half[0, 0])
        reach = front + speed * speed / (2 * 3.6) + 0.3 * speed
        beside = aside.min() > self.half[0, 1] or aside.max() < -self.half[0, 1]
        return not beside and bool(along.max() > -front and along.min() < reach)

    def _wish(self, i: int) -> float:
        """Wanted speed: the mover's own, or what its part says once that has begun."""
        mover = self.movers[i]
        if mover.part is not None and self.time >= self.since[i]:
            return mover.part.speed_at(self.time - float(self.since[i]))
        return mover.desired_speed(self.time)

    def _acts(self, i: int) -> bool:
        """Whether a mover plays its part now, and yields to nobody."""
        part = self.movers[i].part
        return part is not None and bool(0.0 <= self.time - self.since[i] < part.yields_after)

    def _future(self, j: int, horizon: float = FORESIGHT) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Times from now, arc lengths and speeds that actor `j`'s part leads to."""
        part, s, speed = self.movers[j].part, float(self.s[j]), float(self.speed[j])
        assert part is not None
        elapsed = self.time - float(self.since[j])
        rows = []
        for k in range(round(horizon / FORESIGHT_STEP)):
            rows.append((k * FORESIGHT_STEP, s, speed))
            wanted = part.speed_at(elapsed + k * FORESIGHT_STEP)
            change = min(
                max(wanted - speed, -part.braking * FORESIGHT_STEP), part.acceleration * FORESIGHT_STEP
            )
            s, speed = s + (speed + change / 2) * FORESIGHT_STEP, speed + change
        times, lengths, speeds = np.array(rows).T
        return times, lengths, speeds

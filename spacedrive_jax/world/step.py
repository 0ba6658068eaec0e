"""The traffic, stepped: every mover decides from where everybody is, then everybody moves.

Drivers keep their distance to whatever comes first (leaders, lines, the end of their route), people on foot
wait at the kerb until they may and can walk, and triggered actors play their parts.

The ego vehicle either follows its own route like all others (`EgoBody` None: recordings) or is a body that
somebody else steers; the others then react to its true box, wherever it stands.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from spacedrive_jax import exact
from spacedrive_jax.world.paths import overlapping_pairs
from spacedrive_jax.world.right_of_way import AT_THE_LINE, STANDING, RightOfWay
from spacedrive_jax.world.town import Town
from spacedrive_jax.world.traffic import (
    LOOKAHEAD,
    TIME_STEP,
    Cast,
    CastOnRoutes,
    Motion,
    Tracks,
    follow_acceleration,
)

OFF_ROUTE = 6.0
"""Metres beside its route from which on a steered ego vehicle is seen by its box alone."""
COARSE = 8
"""Points of a corridor of which one is looked at first."""


class Moment(RightOfWay):
    """What a mover can know when it decides: everybody at one instant."""

    def decide(self, first: int) -> Float[np.ndarray, "D"]:
        """The accelerations that the movers from `first` on want, m/s^2."""
        count = len(self.movers)
        parts = [i for i in self.whole.parts if self._acts(i)]
        drives = ~self.on_foot[:count]
        drives[:first], drives[parts] = False, False
        gaps, leader_speeds = self._leaders(drives | self.whole.crosses)
        wanted = np.zeros(count)
        drivers = np.flatnonzero(drives)
        wanted[drivers] = self._drive(drivers, gaps[drivers], leader_speeds[drivers])
        for i in np.flatnonzero(self.on_foot[:count]).tolist():
            wanted[i] = self._walk(i, float(gaps[i]))
        for i in parts:
            wanted[i] = self._act(i)
        return wanted[first:]

    def _drive(
        self, who: Int[np.ndarray, "D"], gaps: Float[np.ndarray, "D"], leader_speeds: Float[np.ndarray, "D"]
    ) -> Float[np.ndarray, "D"]:
        """Drivers keep their distance to whatever comes first: leaders, lines, the end of their route."""
        speed, front, parameters = self.speed[who], self.front[who], self.whole.idm_parameters[who]
        wishes = [min(self._wish(i), self._limit(i)) for i in who.tolist()]
        wanted = np.array(wishes).reshape(len(who))
        room = np.maximum(self.whole.tracks.ends[who] - 1.0 - front, 0.0)
        stops = self._stops(who)[who]
        # A line is not a bumper: the front comes to stand 0.4 m before it.
        line = np.maximum(stops - front + parameters[:, 2] - 0.4, 0.0)
        options = [
            follow_acceleration(speed, wanted, room, speed, parameters),
            follow_acceleration(speed, wanted, gaps, speed - leader_speeds, parameters),
            follow_acceleration(speed, wanted, line, speed, parameters),
        ]
        slowest = np.minimum(np.minimum(options[0], options[1]), options[2])
        for k in [k for k, i in enumerate(who.tolist()) if self.movers[i].alert]:
            for gap, leader_speed in self._foreseen(int(who[k]), float(front[k])):
                closing = speed[k : k + 1] - leader_speed
                option = follow_acceleration(
                    speed[k : k + 1], wanted[k : k + 1], np.array([gap]), closing, parameters[k : k + 1]
                )
                slowest[k] = min(slowest[k], option[0])
        return slowest

    def _limit(self, i: int) -> float:
        """The fastest comfortable speed where a mover is, m/s."""
        return float(np.interp(self.s[i], self.movers[i].route.lengths, self.whole.profiles[i]))

    def _walk(self, i: int, gap: float) -> float:
        """Pedestrians reach their pace at once, wait at the kerb and stop before obstacles."""
        mover = self.movers[i]
        arrived = self.front[i] >= self.whole.tracks.ends[i] - 1.0
        if mover.crossing >= 0:
            if self.s[i] < 0.6 and not self._may_walk(mover):
                return -4.0
            arrived = arrived or gap < 0.6
        return -3.0 if arrived else (self._wish(i) - float(self.speed[i])) / 0.4

    def _leaders(self, who: Bool[np.ndarray, "A"]) -> tuple[Float[np.ndarray, "A"], Float[np.ndarray, "A"]]:
        """Gaps to, and speeds along the routes of, the first things that stand in the swept corridors.

        Args:
            who: the movers that look.
        """
        whole, tracks = self.whole, self.whole.tracks
        count = len(self.movers)
        gaps, speeds = np.full(count, np.inf), np.zeros(count)
        first, span = np.zeros(count, int), np.zeros(count, int)
        for k in np.flatnonzero(who).tolist():
            lengths, front = self.movers[k].route.lengths, self.front[k]
            first[k] = lengths.searchsorted(front - self.half[k, 0])
            span[k] = lengths.searchsorted(front + whole.reach[k]) - first[k]
        # Every pair of one who looks and one who is near, and the corridor's points, as far as it reaches.
        i, j = np.nonzero(self.close & (who & (span > 0))[:, None])
        if not len(i):
            return gaps, speeds
        # Most are out of reach by any of the corridor's points, which are seen from every eighth of them.
        base, half_width = tracks.first + first, self.half[: len(who), 1]
        coarse = np.minimum(np.arange(0, span.max() + COARSE, COARSE), span[i, None] - 1)
        rows = base[i, None] + coarse
        squared = (tracks.x[rows] - self.x[j, None]) ** 2 + (tracks.y[rows] - self.y[j, None]) ** 2
        most = self.radii[j] + half_width[i] + 0.8 + COARSE / 2 * tracks.spacing[i] + 0.1
        possible = squared.min(axis=1) < most * most
        i, j = i[possible], j[possible]
        steps = np.arange(span.max())
        rows = np.minimum(base[i, None] + steps, len(tracks.x) - 1)
        squared = (tracks.x[rows] - self.x[j, None]) ** 2 + (tracks.y[rows] - self.y[j, None]) ** 2
        squared[steps >= span[i, None]] = np.inf
        place = squared.argmin(axis=1)
        beside = np.sqrt(squared[np.arange(len(i)), place])
        # Whoever is further than this from the corridor cannot stand in it; few are left to look at closely.
        left = beside < self.radii[j] + half_width[i] + 0.8
        i, j, place, beside = i[left], j[left], place[left], beside[left]
        row = base[i] + place
        aligned, turned = exact.cos_sin(self.poses[j, 2] - tracks.table[row, 2])
        cos, sin = np.abs(aligned), np.abs(turned)
        lateral_extent = self.half[j, 0] * sin + self.half[j, 1] * cos
        along_extent = self.half[j, 0] * cos + self.half[j, 1] * sin
        # People on the road need room; predicted half a second ahead they need more.
        margin = np.where(self.on_foot[j], 0.8, 0.35)
        gap = tracks.lengths[row] - self.front[i] - along_extent
        inside = (beside < half_width[i] + lateral_extent + margin) & (place < span[i] - 1)
        inside &= gap > -2 * self.half[i, 0]
        i, gap = i[inside], gap[inside]
        towards = np.maximum(self.all_speeds[j[inside]] * aligned[inside], 0.0)
        order = np.lexsort((gap, i))  # keeps the order of equals
        looking, nearest = np.unique(i[order], return_index=True)
        gaps[looking], speeds[looking] = gap[order][nearest], towards[order][nearest]
        return gaps, speeds

    def _act(self, i: int) -> float:
        """Somebody who yields to nobody: only the wanted speed and the end of the route count."""
        part = self.movers[i].part
        assert part is not None
        route, s, speed = self.movers[i].route, float(self.s[i]), float(self.speed[i])
        wanted = 0.0 if s + self.half[i, 0] >= float(route.lengths[-1]) - 1.0 else self._wish(i)
        return min(max((wanted - speed) / TIME_STEP, -part.braking), part.acceleration)

    def _foreseen(self, i: int, front: float) -> list[tuple[float, float]]:
        """Gaps to, and speeds along the way of, triggered actors that will come into mover `i`'s way."""
        mover = self.movers[i]
        first = mover.route.lengths.searchsorted(front - 2 * self.half[i, 0])
        last = mover.route.lengths.searchsorted(front + LOOKAHEAD)
        points = mover.route.points[first:last]
        found: list[tuple[float, float]] = []
        for j in self.whole.parts:
            if np.isinf(self.since[j]) or not len(points):
                continue
            times, s, speeds = self._future(j)
            poses = self.movers[j].route.pose(s)
            offsets = points[:, None] - poses[:, :2]
            squared = offsets[..., 0] ** 2 + offsets[..., 1] ** 2
            closest = squared.argmin(axis=0)
            relative = poses[:, 2] - mover.route.headings[first:last][closest]
            aligned, turned = exact.cos_sin(relative)
            cos, sin = np.abs(aligned), np.abs(turned)
            half = self.half[j]
            aside = mover.size[1] / 2 + half[0] * sin + half[1] * cos + 0.5
            along = half[0] * cos + half[1] * sin
            lateral = np.sqrt(squared[closest, np.arange(len(s))])
            inside = np.flatnonzero((lateral < aside) & (closest < len(points) - 1) & (closest > 0))
            if not len(inside):
                continue
            enters = inside[0]
            place = mover.route.lengths[first:last][closest]
            towards = max(float(speeds[enters] * aligned[enters]), 0.0)
            near = float(np.min(place[inside] - along[inside])) if towards < 1.0 else float(
                place[enters] - towards * times[enters] - along[enters]
            )  # fmt: skip
            far = float(np.max(place[inside] + along[inside]))
            speed = max(float(self.speed[i]), 0.1)
            passed = (far + 2 * self.half[i, 0] - front) / speed < times[enters] - 1.0
            gap = near - front
            if gap > -1.0 and not passed:
                found.append((max(gap, 0.0), towards))
        return found


@dataclasses.dataclass(frozen=True)
class EgoBody:
    """An ego vehicle that is steered from outside, as the others see it."""

    pose: tuple[float, float, float]
    """x, y, heading of its rear axle, global frame."""
    speed: float
    acceleration: float


@dataclasses.dataclass(frozen=True)
class TrafficState:
    """Everybody at one instant. Plain numbers: it can be kept, copied, written to JSON and gone on from."""

    step: int
    """Time steps since the start."""
    s: Float[np.ndarray, "A"]
    """Arc length of every mover on its route; of a steered ego vehicle, that of the nearest point."""
    speed: Float[np.ndarray, "A"]
    acceleration: Float[np.ndarray, "A"]
    """Decided now and held until the next step, m/s^2."""
    since: Float[np.ndarray, "A"]
    """When each mover's part was triggered, seconds; inf where it has none or waits."""
    stood: Float[np.ndarray, "A"]
    """Seconds that each mover has stood at the stop sign of the junction before it."""

    @property
    def time(self) -> float:
        """Seconds since the start."""
        return self.step * TIME_STEP


class Traffic(CastOnRoutes):
    """A cast that moves."""

    def start(self, ego: EgoBody | None = None) -> TrafficState:
        """Everybody at time 0.

        Args:
            ego: where the steered ego vehicle stands; None lets it follow its own route.
        """
        s = np.array([mover.start for mover in self.movers])
        speed = np.array([mover.speed for mover in self.movers])
        since = np.full(len(self.movers), np.inf)
        return self._decided(0, s, speed, since, np.zeros(len(self.movers)), ego)

    def step(self, state: TrafficState, ego: EgoBody | None = None) -> TrafficState:
        """Everybody one time step later.

        Args:
            state: everybody now.
            ego: where the steered ego vehicle is then; None lets it follow its own route.
        """
        acceleration = state.acceleration
        s = state.s + state.speed * TIME_STEP + 0.5 * acceleration * TIME_STEP**2
        speed = np.maximum(state.speed + acceleration * TIME_STEP, 0.0)
        if ego is not None:
            s[0] = state.s[0]
        return self._decided(state.step + 1, s, speed, state.since, state.stood, ego)

    def rejoin(self, state: TrafficState, acceleration: float) -> TrafficState:
        """The same instant with the ego vehicle back on its route, to drive it by itself from here.

        Args:
            state: of a steered ego vehicle.
            acceleration: kept for its first time step, m/s^2; its driver decides from the next on.
        """
        held = state.acceleration.copy()
        held[0] = max(acceleration, -float(state.speed[0]) / TIME_STEP)
        return dataclasses.replace(state, acceleration=held)

    def poses(self, state: TrafficState, ego: EgoBody | None = None) -> Float[np.ndarray, "R 3"]:
        """x, y, heading of every box centre: movers first, then obstacles."""
        return self._poses(state.s, ego)

    def _poses(self, s: Float[np.ndarray, "A"], ego: EgoBody | None) -> Float[np.ndarray, "R 3"]:
        poses = np.concatenate([self.tracks.poses(s), self.still])
        if ego is not None:
            x, y, yaw = ego.pose
            ahead = self.movers[0].reference_to_centre
            cos, sin = exact.cos_sin(yaw)
            poses[0] = x + ahead * cos, y + ahead * sin, yaw
        return poses

    def _decided(
        self,
        step: int,
        s: Float[np.ndarray, "A"],
        speed: Float[np.ndarray, "A"],
        since: Float[np.ndarray, "A"],
        stood: Float[np.ndarray, "A"],
        ego: EgoBody | None,
    ) -> TrafficState:
        off_route = False
        if ego is not None:
            s[0], aside = self.movers[0].route.project(np.array(ego.pose[:2]), float(s[0]))
            speed[0] = ego.speed
            off_route = abs(aside) > OFF_ROUTE
        poses = self._poses(s, ego)
        if self.parts:
            since = self._triggered(step * TIME_STEP, poses[0, :2], float(speed[0]), since)
        if self.signs:
            stood = self._halted(s, speed, stood)
        moment = Moment(self, step * TIME_STEP, s, speed, since, stood, poses, off_route)
        first = 0 if ego is None else 1
        wanted = moment.decide(first)
        # Stop exactly at zero within the step, so that speed and distance stay consistent.
        acceleration = np.maximum(wanted, -speed[first:] / TIME_STEP)
        if ego is not None:
            acceleration = np.concatenate([[ego.acceleration], acceleration])
        return TrafficState(step, s, speed, acceleration, since, stood)

    def _triggered(
        self, time: float, place: Float[np.ndarray, "2"], speed: float, since: Float[np.ndarray, "A"]
    ) -> Float[np.ndarray, "A"]:
        """`since` with the parts that begin now."""
        since = since.copy()
        for i in self.parts:
            part = self.movers[i].part
            assert part is not None
            if np.isinf(since[i]) and part.trigger.reached(place, speed, time):
                since[i] = time
        return since

    def _halted(
        self, s: Float[np.ndarray, "A"], speed: Float[np.ndarray, "A"], stood: Float[np.ndarray, "A"]
    ) -> Float[np.ndarray, "A"]:
        """`stood` one time step later: what counts is forgotten behind the junction."""
        stood = stood.copy()
        for i, gate in self.signs:
            front = s[i] + self.tracks.ahead[i] + self.half[i, 0]
            if front > gate.leave:
                stood[i] = 0.0
            elif speed[i] < STANDING and abs(gate.stop - front) < AT_THE_LINE:
                stood[i] += TIME_STEP
        return stood


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

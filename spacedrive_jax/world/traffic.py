"""Microscopic traffic: vehicles, cyclists and pedestrians that follow fixed routes without colliding.

Longitudinal control is the Intelligent Driver Model (Treiber, Hennecke, Helbing, Phys. Rev. E 62, 2000) with
a speed profile limited by the route's curvature; junction entries obey a split-phase signal and a reservation
(nobody enters while a vehicle from another arm is inside); everybody yields at crossings.

Here is what does not change while they move: routes, who takes part, and the tables of both. `step` moves
them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from spacedrive_jax import exact
from spacedrive_jax.world import paths
from spacedrive_jax.world.town import STOP_SETBACK, Crossing, Town

TIME_STEP = 0.1
LATERAL_ACCELERATION = 2.2
COMFORT_BRAKING = 2.0
HARDEST_BRAKING = 7.0
SIGNAL_PERIOD = 9.0
ALL_RED = 2.5
LOOKAHEAD = 55.0
ROUTE_SPACING = 0.5
PROJECTION_WINDOW = (6.0, 20.0)
"""Metres of a route behind and ahead of the last known place in which the next is looked for."""


@dataclasses.dataclass(frozen=True)
class Gate:
    """A junction on a route: arc lengths of the stop line, of the entry and of the exit."""

    junction: int
    arm: int
    stop: float
    enter: float
    leave: float
    turn: str


@dataclasses.dataclass(frozen=True)
class Zebra:
    """A crossing on a route: index into the town's crossings and the arc lengths it covers."""

    crossing: int
    near: float
    far: float


@dataclasses.dataclass(frozen=True)
class Route:
    """A path with everything a driver must know about it. Points are `ROUTE_SPACING` metres apart."""

    points: Float[np.ndarray, "K 2"]
    lengths: Float[np.ndarray, "K"]
    headings: Float[np.ndarray, "K"]
    curvatures: Float[np.ndarray, "K"]
    gates: tuple[Gate, ...] = ()
    zebras: tuple[Zebra, ...] = ()

    def pose(self, s: Float[np.ndarray, "..."] | float) -> Float[np.ndarray, "... 3"]:
        """x, y (metres) and heading (radians) at arc length `s`."""
        columns = (self.points[:, 0], self.points[:, 1], self.headings)
        return np.stack([np.interp(s, self.lengths, column) for column in columns], axis=-1)

    def curvature(self, s: Float[np.ndarray, "..."] | float) -> Float[np.ndarray, "..."] | np.float64:
        """Signed curvature at arc length `s`, 1/m."""
        return np.interp(s, self.lengths, self.curvatures)

    def project(self, point: Float[np.ndarray, "2"], near: float) -> tuple[float, float]:
        """The nearest place on the route's segments to a point.

        Args:
            point: global x, y in metres.
            near: arc length around which to look (`PROJECTION_WINDOW`), so that a route that comes back to
                the same spot is not cut short.

        Returns:
            Arc length, and how far to the left of the route the point lies, metres.
        """
        behind, ahead = PROJECTION_WINDOW
        first = max(int(self.lengths.searchsorted(near - behind)) - 1, 0)
        last = min(int(self.lengths.searchsorted(near + ahead)) + 1, len(self.points) - 1)
        first = min(first, last - 1)
        starts = self.points[first:last]
        steps = self.points[first + 1 : last + 1] - starts
        offsets = point - starts
        squared = steps[:, 0] ** 2 + steps[:, 1] ** 2
        along = (offsets[:, 0] * steps[:, 0] + offsets[:, 1] * steps[:, 1]) / squared
        along = np.minimum(np.maximum(along, 0.0), 1.0)
        missed = offsets - along[:, None] * steps
        nearest = int(np.argmin(missed[:, 0] ** 2 + missed[:, 1] ** 2))
        low, high = self.lengths[first + nearest], self.lengths[first + nearest + 1]
        (step_x, step_y), (x, y) = steps[nearest], missed[nearest]
        side = step_x * y - step_y * x
        distance = float(np.sqrt(x * x + y * y))
        return float(low + along[nearest] * (high - low)), distance if side >= 0 else -distance


@dataclasses.dataclass(frozen=True)
class Trigger:
    """When a part begins: the ego vehicle comes near a place (srunner's two conditions), or at a time."""

    place: tuple[float, float]
    """Where the ego vehicle's way meets the actor's, global metres."""
    seconds: float = 0.0
    """Time in which the ego vehicle would reach the place at its present speed."""
    metres: float = 0.0
    """Distance to the place, whichever comes first."""
    at: float = math.inf
    """Seconds since the start at which the part begins in any case."""

    def reached(self, ego: Float[np.ndarray, "2"], speed: float, time: float) -> bool:
        """Whether the part begins now, with the ego vehicle's box centre at `ego` and its speed in m/s."""
        x, y = float(ego[0]) - self.place[0], float(ego[1]) - self.place[1]
        distance = math.sqrt(x * x + y * y)
        return time >= self.at or distance <= self.metres or distance <= self.seconds * speed


@dataclasses.dataclass(frozen=True)
class Part:
    """What an actor of a scenario does once it is triggered."""

    trigger: Trigger
    speeds: tuple[tuple[float, float], ...]
    """(seconds since the trigger, wanted speed from then on in m/s), in time order."""
    yields_after: float = math.inf
    """Seconds since the trigger from which on it minds others again; an adversary never does."""
    acceleration: float = 4.0
    braking: float = 8.0
    """Hardest changes of speed of one who does not yield, m/s^2."""

    def speed_at(self, elapsed: float) -> float:
        """Wanted speed some seconds after the trigger, m/s."""
        wanted = 0.0
        for since, speed in self.speeds:
            if elapsed >= since:
                wanted = speed
        return wanted


@dataclasses.dataclass(frozen=True)
class Mover:
    """Somebody who moves along a route.

    `reference_to_centre` is how far the box centre lies ahead of the point that follows the route (0 for
    all but the ego vehicle, whose rear axle follows it).
    """

    key: str
    category: str
    size: tuple[float, float, float]
    """Length, width, height in metres."""
    route: Route
    start: float
    """Arc length at time 0."""
    speed: float
    """Speed at time 0, m/s."""
    desired_speed: Callable[[float], float]
    """Wanted speed in m/s as a function of time in seconds."""
    crossing: int = -1
    """The crossing this pedestrian walks over, an index into the town's crossings; -1 for none."""
    departure: float = 0.0
    """A pedestrian waits at the kerb until this time, seconds."""
    reference_to_centre: float = 0.0
    acceleration: float = 1.8
    headway: float = 1.3
    standstill_gap: float = 2.2
    part: Part | None = None
    """What it does when the ego vehicle comes near, in place of going on as before."""
    alert: bool = False
    """Foresees what triggered actors will do (the expert of scenarios with adversaries)."""

    @property
    def pedestrian(self) -> bool:
        """Whether this is somebody on foot."""
        return self.category.startswith("human.")

    @property
    def idm_parameters(self) -> tuple[float, float, float]:
        """Of the Intelligent Driver Model: acceleration (m/s^2), headway (s), standstill gap (metres)."""
        return self.acceleration, self.headway, self.standstill_gap


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """Something that stands still: parked vehicles, cones, barriers, waiting people."""

    key: str
    category: str
    size: tuple[float, float, float]
    pose: tuple[float, float, float]
    attribute: str = ""


@dataclasses.dataclass(frozen=True)
class Motion:
    """What one mover did. Acceleration is constant within a time step, so all of it is consistent."""

    s: Float[np.ndarray, "T"]
    speed: Float[np.ndarray, "T"]
    acceleration: Float[np.ndarray, "T"]

    def at(self, time: float) -> tuple[float, float, float]:
        """Arc length, speed and acceleration at a time in seconds."""
        step = int(min(max(time / TIME_STEP, 0.0), len(self.s) - 1))
        elapsed = time - step * TIME_STEP
        acceleration = float(self.acceleration[step])
        speed = float(self.speed[step])
        travelled = speed * elapsed + 0.5 * acceleration * (elapsed * elapsed)
        return float(self.s[step]) + travelled, max(speed + acceleration * elapsed, 0.0), acceleration


Phase = tuple[float, tuple[int, ...]]
"""Of a junction's signals: seconds from which on, and the arms that have green then."""


@dataclasses.dataclass(frozen=True)
class Priority:
    """Who goes first at a junction without lights."""

    minor: tuple[int, ...]
    """Arms from which vehicles give way to all others."""
    stop: bool = False
    """Whether a stop sign stands at each of them."""

    def signed(self, arm: int) -> bool:
        """Whether a stop sign stands at an arm."""
        return self.stop and arm in self.minor

    def rank(self, gate: Gate, side: float) -> tuple[bool, bool, int]:
        """An order of those who come by different arms: the lower goes first.

        Minor arms give way, then whoever turns across the oncoming traffic; no two are equal.

        Args:
            gate: the junction on a vehicle's way.
            side: of the town's traffic (`Town.side`).
        """
        return gate.arm in self.minor, gate.turn == ("left" if side < 0 else "right"), gate.arm


@dataclasses.dataclass(frozen=True)
class Signals:
    """Split-phase signals: one arm at a time is green; scripts may say who has green at some junctions, or
    take their lights away.
    """

    offsets: Float[np.ndarray, "J"]
    arms: tuple[tuple[int, ...], ...]
    scripted: dict[int, tuple[Phase, ...]]
    """Junction to its phases in time order."""
    priorities: Mapping[int, Priority] = dataclasses.field(default_factory=dict)
    """Junctions without lights."""

    def green_arms(self, junction: int, time: float) -> tuple[int, ...]:
        """The arms that have green: one, none while all are red, two where a script has it so, and all where
        there are no lights, so that nobody waits for one or runs one.
        """
        if junction in self.priorities:
            return self.arms[junction]
        if junction in self.scripted:
            current: tuple[int, ...] = ()
            for since, arms in self.scripted[junction]:
                current = arms if time >= since else current
            return current
        phase = (time + self.offsets[junction]) / SIGNAL_PERIOD
        if (phase % 1.0) * SIGNAL_PERIOD > SIGNAL_PERIOD - ALL_RED:
            return ()
        arms = self.arms[junction]
        return (arms[int(phase) % len(arms)],)

    def holds_back(self, gate: Gate) -> bool:
        """Whether a vehicle may have to wait at a junction at time 0."""
        priority = self.priorities.get(gate.junction)
        return gate.arm not in self.green_arms(gate.junction, 0.0) or bool(
            priority and gate.arm in priority.minor
        )


def lane_route(town: Town, keys: list[str], lateral: float = 0.0, smoothing: float = 1.2) -> Route:
    """Joins lanes and connectors into one smooth route with its gates and zebras.

    Args:
        town: the road network.
        keys: lane keys in driving order, each a successor of the one before.
        lateral: metres to the left of the lane centres (cyclists keep to the edge).
        smoothing: metres (standard deviation) of smoothing of the joined centre lines.
    """
    pieces = [town.lanes[key] for key in keys]
    joined = np.concatenate([pieces[0].centre] + [piece.centre[1:] for piece in pieces[1:]])
    points = paths.smooth(paths.resample(joined, ROUTE_SPACING), smoothing / ROUTE_SPACING)
    if lateral:
        points = paths.offset(points, lateral)
    points = paths.resample(points, ROUTE_SPACING)
    lengths = paths.arc_lengths(points)

    def nearest(point: Float[np.ndarray, "2"]) -> float:
        return float(lengths[np.argmin(exact.norm(points - point))])

    gates = tuple(
        Gate(
            lane.junction,
            lane.arm,
            nearest(lane.centre[0]) - STOP_SETBACK,
            nearest(lane.centre[0]),
            nearest(lane.centre[-1]),
            lane.turn,
        )
        for lane in pieces
        if lane.road is None and town.junctions[lane.junction].signalised
    )
    return Route(
        points,
        lengths,
        paths.headings(points),
        paths.curvatures(points),
        gates,
        tuple(_zebras(points, lengths, town.crossings)),
    )


def free_route(points: Float[np.ndarray, "K 2"]) -> Route:
    """A route over any polyline, for pedestrians."""
    points = paths.resample(points, ROUTE_SPACING)
    return Route(points, paths.arc_lengths(points), paths.headings(points), paths.curvatures(points))


def _zebras(
    points: Float[np.ndarray, "K 2"], lengths: Float[np.ndarray, "K"], crossings: tuple[Crossing, ...]
) -> list[Zebra]:
    found = []
    for index, crossing in enumerate(crossings):
        centre = crossing.polygon.mean(axis=0)
        across = crossing.walk[1] - crossing.walk[0]
        across = across / exact.norm(across)
        relative = points - centre
        along = np.abs(exact.dot(relative, np.array([across[1], -across[0]])))
        inside = (along < 1.8) & (np.abs(exact.dot(relative, across)) < exact.norm(crossing.walk[1] - centre))
        if inside.any():
            s = lengths[inside]
            found.append(Zebra(index, float(s.min()), float(s.max())))
    return sorted(found, key=lambda zebra: zebra.near)


def speed_limit_profile(route: Route) -> Float[np.ndarray, "K"]:
    """The fastest comfortable speed along a route: curvature first, then braking backwards from it."""
    bend = np.abs(route.curvatures)
    window = np.maximum.reduce([np.roll(bend, shift) for shift in range(-3, 4)])
    limit = np.sqrt(LATERAL_ACCELERATION / np.maximum(window, 1e-3))
    for i in range(len(limit) - 2, -1, -1):
        step = route.lengths[i + 1] - route.lengths[i]
        limit[i] = min(limit[i], np.sqrt(limit[i + 1] * limit[i + 1] + 2 * 0.8 * COMFORT_BRAKING * step))
    return limit


def follow_acceleration(
    speed: Float[np.ndarray, "*A"],
    wanted: Float[np.ndarray, "*A"],
    gap: Float[np.ndarray, "*A"],
    closing_speed: Float[np.ndarray, "*A"],
    parameters: Float[np.ndarray, "*A 3"],
) -> Float[np.ndarray, "*A"]:
    """The Intelligent Driver Model, of any number of drivers at once.

    Args:
        speed: own speed, m/s.
        wanted: desired speed, m/s.
        gap: bumper to bumper distance to the leader, metres (inf without one).
        closing_speed: own speed minus the leader's, m/s.
        parameters: acceleration, headway and standstill gap (`Mover.idm_parameters`).

    Returns:
        Acceleration in m/s^2, never harder than `HARDEST_BRAKING`.
    """
    acceleration, headway, standstill_gap = (parameters[..., place] for place in range(3))
    ratio = speed / np.maximum(wanted, 0.1)
    free = np.where(
        ratio < 1,
        acceleration * (1 - exact.power(ratio, 4)),
        -np.minimum(1.2 * (speed - wanted), 2.5),
    )
    dynamic = speed * headway + speed * closing_speed / (2 * np.sqrt(acceleration * COMFORT_BRAKING))
    desired_gap = standstill_gap + np.maximum(dynamic, 0.0)
    interaction = acceleration * exact.power(desired_gap / np.maximum(gap, 0.3), 2)
    return np.minimum(np.maximum(free - interaction, -HARDEST_BRAKING), acceleration)


@dataclasses.dataclass(frozen=True)
class Cast:
    """Who takes part in a scene. Movers come first in all arrays, the ego vehicle first of all."""

    movers: tuple[Mover, ...]
    obstacles: tuple[Obstacle, ...]
    signals: Signals


class Tracks:
    """Box centre poses of many movers at once; routes are evenly spaced, so a pose is two table rows."""

    def __init__(self, movers: tuple[Mover, ...]) -> None:
        routes = [mover.route for mover in movers]
        counts = np.array([len(route.points) for route in routes])
        self.first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.last = counts - 1.0
        self.spacing = np.array([route.lengths[-1] for route in routes]) / self.last
        self.table = np.concatenate([np.column_stack([r.points, r.headings]) for r in routes])
        self.x, self.y = np.ascontiguousarray(self.table[:, 0]), np.ascontiguousarray(self.table[:, 1])
        self.lengths = np.concatenate([route.lengths for route in routes])
        self.ends = np.array([route.lengths[-1] for route in routes])
        self.ahead = np.array([mover.reference_to_centre for mover in movers])

    def poses(
        self, s: Float[np.ndarray, "*T A"], who: Int[np.ndarray, "A"] | slice = slice(None)
    ) -> Float[np.ndarray, "*T A 3"]:
        """x, y, heading of every box centre at arc lengths `s`, or of those in `who` alone."""
        position = np.clip(s / self.spacing[who], 0.0, self.last[who] - 1e-6)
        low = position.astype(int)
        rows = self.first[who] + low
        result = self.table[rows] + (position - low)[..., None] * (self.table[rows + 1] - self.table[rows])
        cos, sin = exact.cos_sin(result[..., 2])
        result[..., 0] += self.ahead[who] * cos
        result[..., 1] += self.ahead[who] * sin
        return result


class CastOnRoutes:
    """A cast in its town, as tables: all that can be worked out before anybody moves."""

    def __init__(self, town: Town, cast: Cast) -> None:
        self.town, self.cast = town, cast
        self.movers = cast.movers
        self.profiles = [speed_limit_profile(mover.route) for mover in self.movers]
        self.limits = np.concatenate(self.profiles)
        """All profiles, one after the other as in `tracks.table`."""
        sizes = [mover.size[:2] for mover in self.movers] + [item.size[:2] for item in cast.obstacles]
        self.half = np.array(sizes).reshape(-1, 2) / 2
        self.still = np.array([item.pose for item in cast.obstacles]).reshape(-1, 3)
        self.tracks = Tracks(self.movers)
        self.on_foot = np.array([m.pedestrian for m in self.movers] + [False] * len(self.still))
        self.radii = exact.norm(self.half)
        count = len(self.movers)
        # A corridor begins at the box centre; 2 m more than its length for the way there being no straight
        # line. Whoever is further off than that from the centre cannot stand in it.
        self.reach = np.where(self.on_foot[:count], 4.0, LOOKAHEAD)
        """Metres ahead of its front that each mover looks."""
        reach = self.reach + 2.8
        reach = reach + self.half[:count, 0] + self.half[:count, 1]
        self.farthest = (reach[:, None] + self.radii) ** 2
        """Squared metres between two box centres from which on nobody has to look, movers first."""
        self.noticed = ~np.eye(count, len(self.half), dtype=bool)
        """Whom each mover looks at when near: all but itself; people on foot do not mind each other."""
        self.noticed &= ~(self.on_foot[:count, None] & self.on_foot)
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
        self.signs = [
            (i, gate)
            for i, mover in enumerate(self.movers)
            for gate in mover.route.gates
            if gate.junction in cast.signals.priorities
            and cast.signals.priorities[gate.junction].signed(gate.arm)
        ]
        """Vehicles whose routes lead past a stop sign, and to which junction."""
        self.gates = [(i, gate) for i, mover in enumerate(self.movers) for gate in mover.route.gates]
        self.zebras = [(i, zebra) for i, mover in enumerate(self.movers) for zebra in mover.route.zebras]
        self.parts = [i for i, mover in enumerate(self.movers) if mover.part is not None]
        self.idm_parameters = np.array([mover.idm_parameters for mover in self.movers])
        self.crosses = np.array([mover.crossing >= 0 for mover in self.movers])
        """Who walks over a crossing."""
        self.conflicts: dict[tuple[int, Zebra, int], float] = {}
        """How far along a walker's route a vehicle's path lies, by vehicle, zebra and walker."""

    def close(self, x: Float[np.ndarray, "R"], y: Float[np.ndarray, "R"]) -> Bool[np.ndarray, "A R"]:
        """Whom each mover has to look at: all who could stand in its corridor, given the box centres."""
        count = len(self.movers)
        squared = (x[:count, None] - x) ** 2 + (y[:count, None] - y) ** 2
        return (squared < self.farthest) & self.noticed

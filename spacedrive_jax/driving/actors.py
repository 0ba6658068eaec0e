"""Those who play a part: each is a few numbers (srunner's, where it has the scenario) and where it stands.

They yield to nobody while they play it: a driver who does not look meets them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.world import surroundings, traffic
from spacedrive_jax.world.scenario import EGO_AHEAD, EGO_SIZE, WARM_UP, Script, UnplayableError
from spacedrive_jax.world.town import LANE_WIDTH, Road, Town
from spacedrive_jax.world.traffic import Mover, Obstacle, Part, Route, Trigger


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where the parts are played."""

    town: Town
    script: Script
    route: Route
    """The ego vehicle's."""
    rng: np.random.Generator

    def lane_at(self, s: float) -> tuple[Road, int]:
        """The road, and the lane's index from its middle, that the route follows at a place.

        Raises:
            UnplayableError: the place is in a junction.
        """
        total = 0.0
        for key in self.script.keys:
            lane = self.town.lanes[key]
            total += lane.length
            if s < total:
                if lane.road is None:
                    raise UnplayableError("the place lies in a junction")
                return self.town.roads[lane.road], lane.index
        raise UnplayableError("the place lies beyond the route")

    def beside(self, s: float, aside: float) -> Float[np.ndarray, "2"]:
        """The point `aside` metres from the route towards the traffic side's kerb."""
        x, y, yaw = self.route.pose(s)
        cos, sin = exact.cos_sin(float(yaw))
        left = self.town.side * aside
        return np.array([x - left * sin, y + left * cos])

    def kerbs(self, s: float) -> tuple[float, float]:
        """Metres from the route to the near and to the far kerb."""
        road, index = self.lane_at(s)
        middle = (index + 0.5) * LANE_WIDTH
        return road.half_width - middle, road.half_width + middle


FLOW_GAP = 4.5
"""Metres between the middles of two who cross one behind the other."""
FLOW_HEADWAY = 0.8
"""Seconds that the drivers in a `Flow` keep behind each other once they look."""
MEETS = 6.2
"""m/s from the start to a place at which it meets the middle of a `Flow`."""
CUT_IN_ROOM = 10.0
"""Metres from who pulls out of a lane to who stands before it there: enough to get by."""


@runtime_checkable
class Actor(Protocol):
    """Somebody with a part."""

    def cast(self, stage: Stage, key: str) -> tuple[Sequence[Mover], Sequence[Obstacle]]:
        """Who it is and what stands around it."""


@dataclasses.dataclass(frozen=True)
class Crosser:
    """Somebody who crosses the road in front of the ego vehicle."""

    speed: float
    """m/s."""
    seconds: float
    metres: float
    """The trigger: time to arrival, or distance."""
    category: str = "human.pedestrian.adult"
    where: Literal["road", "exit"] = "road"
    """On the road ahead, or on the crossing behind the first junction."""
    hidden_behind: str | None = None
    """Category of what stands between it and the ego vehicle until it steps out."""
    count: int = 1
    """How many, one `FLOW_GAP` behind the other."""

    def cast(self, stage: Stage, key: str) -> tuple[Sequence[Mover], Sequence[Obstacle]]:
        """See `Actor`."""
        start = stage.script.start
        s = start + 38.0 if self.where == "road" else _first_gate(stage).leave + 3.0
        near, far = stage.kerbs(s)
        # So that it meets a driver who goes on as before: from as far as it gets in the trigger's time, or,
        # where the kerb is further, from there and as much earlier.
        lost = self.speed / (2 * Part.acceleration)
        away = max(near + 0.7, self.speed * (self.seconds - lost))
        seconds = away / self.speed + lost
        if self.where == "road":
            # Far enough that it still stands when the drive begins.
            begins = start + (WARM_UP + 0.5 + seconds) * stage.script.cruise_speed
            s = max(s, begins) + float(stage.rng.uniform(0.0, 10.0))
            if stage.kerbs(s) != (near, far):
                raise UnplayableError("the road changes its width on the way")
        place = stage.beside(s, 0.0)
        part = Part(
            Trigger((float(place[0]), float(place[1])), seconds, self.metres),
            ((0.0, self.speed),),
        )
        movers = []
        for number in range(self.count):
            # The first goes furthest, so that those behind it do not run into it there.
            behind, beyond = number * FLOW_GAP, (self.count - 1 - number) * FLOW_GAP
            line = np.stack([stage.beside(s, away + behind), stage.beside(s, -far - 1.5 - beyond)])
            size = surroundings.draw_size(self.category, stage.rng)
            name = f"{key}-{number}" if number else key
            route = traffic.free_route(line)
            movers.append(Mover(name, self.category, size, route, 0.0, 0.0, _still, part=part))
        props = []
        if self.hidden_behind is not None:
            extent = surroundings.draw_size(self.hidden_behind, stage.rng)
            before = s - extent[0] / 2 - 1.2
            x, y = stage.beside(before, near - extent[1] / 2 - 0.15)
            yaw = float(stage.route.pose(before)[2])
            props.append(
                Obstacle(
                    f"{key}-cover", self.hidden_behind, extent, (float(x), float(y), yaw), "vehicle.parked"
                )
            )
        return movers, props


@dataclasses.dataclass(frozen=True)
class Lead:
    """A car ahead that brakes hard, stands and goes on."""

    speed: float = 8.0
    stands: float = 6.0
    """Seconds (srunner: 10)."""
    braking: float = 6.5
    """m/s^2."""

    def cast(self, stage: Stage, key: str) -> tuple[Sequence[Mover], Sequence[Obstacle]]:
        """See `Actor`."""
        size = surroundings.draw_size("vehicle.car", stage.rng)
        gap = float(stage.rng.uniform(13.0, 17.0)) + size[0] / 2 + EGO_SIZE[0] / 2 + EGO_AHEAD
        at = WARM_UP + float(stage.rng.uniform(2.0, 4.0))
        part = Part(
            Trigger((0.0, 0.0), at=at),
            ((0.0, 0.0), (self.stands, self.speed)),
            braking=self.braking,
            acceleration=2.0,
        )
        speed = self.speed
        return [
            Mover(
                key,
                "vehicle.car",
                size,
                stage.route,
                stage.script.start + gap,
                speed,
                lambda _: speed,
                part=part,
            )
        ], []


@dataclasses.dataclass(frozen=True)
class Blocker:
    """A car that stands behind the junction and leaves after a while."""

    stands: float = 6.0
    """Seconds after the ego vehicle comes near (srunner: 10)."""

    def cast(self, stage: Stage, key: str) -> tuple[Sequence[Mover], Sequence[Obstacle]]:
        """See `Actor`."""
        size = surroundings.draw_size("vehicle.car", stage.rng)
        s = _first_gate(stage).leave + 5.0
        stage.lane_at(s)
        x, y = stage.beside(s, 0.0)
        part = Part(
            Trigger((float(x), float(y)), metres=30.0),
            ((0.0, 0.0), (self.stands, 7.0)),
            yields_after=self.stands,
        )
        return [Mover(key, "vehicle.car", size, stage.route, s, 0.0, _still, part=part)], []


@dataclasses.dataclass(frozen=True)
class RedRunner:
    """A car from the side that runs its red light."""

    seconds: float = 3.0
    metres: float = 12.0
    speed: float = 13.0
    """srunner has 2.2 s and 60 km/h for a car that is at once so fast; this one speeds up."""
    before: float = 25.0
    """Metres before the place at which the ways cross, standing until triggered."""

    def cast(self, stage: Stage, key: str) -> tuple[Sequence[Mover], Sequence[Obstacle]]:
        """See `Actor`."""
        route, place, meets_at = _way_across(stage, "side")
        if meets_at < self.before + 3.0:
            raise UnplayableError("the road from the side is too short")
        trigger = Trigger((float(place[0]), float(place[1])), self.seconds, self.metres)
        part = Part(trigger, ((0.0, self.speed),), acceleration=6.0)
        size = surroundings.draw_size("vehicle.car", stage.rng)
        start = meets_at - self.before
        return [Mover(key, "vehicle.car", size, route, start, 0.0, _still, part=part)], []


@dataclasses.dataclass(frozen=True)
class Oncoming:
    """Cars at the stop line on the other side, which go straight on when the ego vehicle comes to turn."""

    seconds: float = 4.2
    metres: float = 20.0
    at: float = 7.0
    """Seconds after the first decision at which they go in any case."""
    speed: float = 9.0
    count: int = 2
    apart: float = 9.0
    """Metres between the middles of two."""

    def cast(self, stage: Stage, key: str) -> tuple[Sequence[Mover], Sequence[Obstacle]]:
        """See `Actor`."""
        route, place, meets_at = _way_across(stage, "opposite")
        trigger = Trigger((float(place[0]), float(place[1])), self.seconds, self.metres, WARM_UP + self.at)
        movers = []
        for number in range(self.count):
            size = surroundings.draw_size("vehicle.car", stage.rng)
            start = route.gates[0].stop - size[0] / 2 - 1.0 - number * self.apart
            if start < size[0]:
                raise UnplayableError("the road from the other side is too short")
            # As long as it takes to get by who turns.
            passed = (meets_at + 6.0 - start) / self.speed + self.speed / (2 * Part.acceleration)
            part = Part(trigger, ((0.0, self.speed),), passed)
            name = f"{key}-{number}" if number else key
            movers.append(Mover(name, "vehicle.car", size, route, start, 0.0, _still, part=part))
        return movers, []


@dataclasses.dataclass(frozen=True)
class Flow:
    """A row of cars through the first junction, under way from the start: its middle meets a driver who goes
    on at `MEETS`.
    """

    comes_from: Literal["side", "opposite"]
    enters: bool = False
    """Whether it leads into the lane that the ego vehicle turns into; straight across otherwise."""
    count: int = 4
    speed: float = 8.0
    """As fast as it can be round the bend, where it turns (srunner: 20 m/s)."""
    apart: float = 14.0
    """Metres between the middles of two (srunner: 25 to 50 between bumpers, at 20 m/s)."""

    def cast(self, stage: Stage, key: str) -> tuple[Sequence[Mover], Sequence[Obstacle]]:
        """See `Actor`."""
        route, place, meets_at = _way_across(stage, self.comes_from, enters=self.enters)
        own = stage.route.lengths[int(np.argmin(exact.norm(stage.route.points - place)))]
        middle = meets_at - self.speed * float(own - stage.script.start) / MEETS
        movers = []
        for number in range(self.count):
            size = surroundings.draw_size("vehicle.car", stage.rng)
            start = middle + ((self.count - 1) / 2 - number) * self.apart
            if start < size[0]:
                raise UnplayableError("the road that the row comes by is too short")
            # Until it is by the place; then it drives like anybody.
            part = Part(
                Trigger((float(place[0]), float(place[1])), at=0.0),
                ((0.0, self.speed),),
                (meets_at + 8.0 - start) / self.speed,
            )
            movers.append(
                Mover(
                    f"{key}-{number}",
                    "vehicle.car",
                    size,
                    route,
                    start,
                    self.speed,
                    _still,
                    headway=FLOW_HEADWAY,
                    part=part,
                )
            )
        return movers, []


@dataclasses.dataclass(frozen=True)
class CutIn:
    """A standing car that pulls out in front of the ego vehicle: from the kerb, or from the lane beside,
    where somebody stands before it.
    """

    out_of: Literal["kerb", "lane"] = "kerb"

    seconds: float = 3.0
    metres: float = 18.0
    """srunner has 2.35 s and 10 m (2.7 s and 15 m out of a lane) for a car that is at once as fast as the
    others; this one speeds up."""
    speed: float = 6.0
    merged: float = 4.0
    """Seconds after which it is in the lane and drives like anybody."""

    def cast(self, stage: Stage, key: str) -> tuple[Sequence[Mover], Sequence[Obstacle]]:
        """See `Actor`."""
        s = stage.script.start + float(stage.rng.uniform(34.0, 44.0))
        stands = self._stands(stage, s)
        along = np.arange(0.0, 13.0, 0.5)
        aside = stands * (0.5 + 0.5 * exact.cos_sin(np.pi * along / 13.0)[0])
        merging = np.stack([stage.beside(s + float(a), float(b)) for a, b in zip(along, aside, strict=True)])
        rest = stage.route.points[stage.route.lengths > s + 13.5]
        route = traffic.free_route(np.concatenate([merging, rest]))
        x, y = stage.beside(s + 6.0, 0.0)
        trigger = Trigger((float(x), float(y)), self.seconds, self.metres)
        part = Part(trigger, ((0.0, self.speed),), acceleration=3.0, yields_after=self.merged)
        size = surroundings.draw_size("vehicle.car", stage.rng)
        mover = Mover(key, "vehicle.car", size, route, 0.0, 0.0, _still, part=part)
        if self.out_of == "kerb":
            return [mover], []
        extent = surroundings.draw_size("vehicle.truck", stage.rng)
        ahead = s + size[0] / 2 + CUT_IN_ROOM + extent[0] / 2
        x, y = stage.beside(ahead, stands)
        pose = (float(x), float(y), float(stage.route.pose(ahead)[2]))
        return [mover], [Obstacle(f"{key}-ahead", "vehicle.truck", extent, pose, "vehicle.stopped")]

    def _stands(self, stage: Stage, s: float) -> float:
        """Metres from the route, towards the traffic side's kerb, at which it stands.

        Raises:
            UnplayableError: there is no room to stand there, or to pull out.
        """
        near, _ = stage.kerbs(s)
        stage.kerbs(s + 20.0)
        if self.out_of == "lane":
            road, index = stage.lane_at(s)
            if road.lanes < 2:
                raise UnplayableError("there is no lane beside")
            return LANE_WIDTH if index == 0 else -LANE_WIDTH
        if near < 3.6:
            raise UnplayableError("there is no room at the kerb")
        return near - 1.2


@dataclasses.dataclass(frozen=True)
class Standing:
    """A car that stands in the lane."""

    def cast(self, stage: Stage, key: str) -> tuple[Sequence[Mover], Sequence[Obstacle]]:
        """See `Actor`."""
        s = stage.script.start + float(stage.rng.uniform(40.0, 52.0))
        stage.lane_at(s)
        x, y = stage.beside(s, float(stage.rng.uniform(-0.3, 0.3)))
        size = surroundings.draw_size("vehicle.car", stage.rng)
        yaw = float(stage.route.pose(s)[2]) + float(stage.rng.uniform(-0.2, 0.2))
        return [], [Obstacle(key, "vehicle.car", size, (float(x), float(y), yaw), "vehicle.stopped")]


@dataclasses.dataclass(frozen=True)
class HeadOn:
    """An oncoming car that strays into the ego vehicle's lane and back into its own (NeuroNCAP's frontal)."""

    seconds: float = 5.0
    metres: float = 25.0
    speed: float = 9.0
    before: float = 40.0
    """Metres before the place at which the two meet, standing until triggered."""
    beyond: float = 30.0
    """Metres behind that place at which it stops, long back in its lane."""

    def cast(self, stage: Stage, key: str) -> tuple[Sequence[Mover], Sequence[Obstacle]]:
        """See `Actor`."""
        s = stage.script.start + float(stage.rng.uniform(46.0, 56.0))
        ends = [stage.lane_at(at) for at in (s - self.beyond, s + self.before)]
        if ends[0] != ends[1] or ends[0][1] != 0:
            raise UnplayableError("the lane beside the oncoming traffic is too short")
        along = np.arange(self.before, -self.beyond - 0.25, -0.5)
        # In the ego vehicle's lane for 12 m, and as much again to come over and to go back.
        away = np.clip((np.abs(along) - 6.0) / 12.0, 0.0, 1.0)
        aside = -LANE_WIDTH * (0.5 - 0.5 * exact.cos_sin(np.pi * away)[0])
        line = np.stack([stage.beside(s + float(a), float(b)) for a, b in zip(along, aside, strict=True)])
        x, y = stage.beside(s, 0.0)
        part = Part(
            Trigger((float(x), float(y)), self.seconds, self.metres), ((0.0, self.speed),), acceleration=6.0
        )
        size = surroundings.draw_size("vehicle.car", stage.rng)
        route = traffic.free_route(line)
        return [Mover(key, "vehicle.car", size, route, 0.0, 0.0, _still, part=part)], []


def _way_across(
    stage: Stage, comes_from: Literal["side", "opposite"], *, enters: bool = False
) -> tuple[Route, Float[np.ndarray, "2"], float]:
    """A way through the first junction that meets the ego vehicle's.

    Args:
        stage: where.
        comes_from: an arm beside the ego vehicle's, or the one on the other side.
        enters: it leads into the lane that the ego vehicle turns into; straight across otherwise.

    Returns:
        The way, and where it meets the ego vehicle's: global metres, and metres along it.

    Raises:
        UnplayableError: there is none.
    """
    gate = _first_gate(stage)
    own = stage.route.points[(stage.route.lengths > gate.enter) & (stage.route.lengths < gate.leave)]
    crossing = []
    for connector in stage.town.lanes.values():
        if connector.road is not None or connector.junction != gate.junction:
            continue
        if (connector.arm - gate.arm) % 4 not in ((2,) if comes_from == "opposite" else (1, 3)):
            continue
        if not (connector.successors[0] in stage.script.keys if enters else connector.turn == "straight"):
            continue
        distances = exact.norm(own[:, None] - connector.centre)
        if distances.min() < 1.0:
            meets = np.unravel_index(int(np.argmin(distances)), distances.shape)
            crossing.append((connector.key, own[meets[0]]))
    if not crossing:
        raise UnplayableError("no such way meets the route")
    across, place = crossing[int(stage.rng.integers(len(crossing)))]
    lanes = stage.town.lanes
    arriving = next(
        lane.key for lane in lanes.values() if across in lane.successors and lane.road is not None
    )
    route = traffic.lane_route(stage.town, [arriving, across, lanes[across].successors[0]])
    return route, place, float(route.lengths[int(np.argmin(exact.norm(route.points - place)))])


def _first_gate(stage: Stage) -> traffic.Gate:
    if not stage.route.gates:
        raise UnplayableError("the route passes no signalised junction")
    return stage.route.gates[0]


def _still(_: float) -> float:
    return 0.0

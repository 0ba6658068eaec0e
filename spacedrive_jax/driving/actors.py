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
from spacedrive_jax.world import paths, surroundings, traffic
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
            total += float(paths.arc_lengths(lane.centre)[-1])
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
        line = np.stack([stage.beside(s, away), stage.beside(s, -far - 1.5)])
        place = stage.beside(s, 0.0)
        size = surroundings.draw_size(self.category, stage.rng)
        part = Part(
            Trigger((float(place[0]), float(place[1])), seconds, self.metres),
            ((0.0, self.speed),),
        )
        mover = Mover(key, self.category, size, traffic.free_route(line), 0.0, 0.0, _still, part=part)
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
        return [mover], props


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
    before: float = 25.0
    """Metres before the place at which the ways cross, standing until triggered."""

    def cast(self, stage: Stage, key: str) -> tuple[Sequence[Mover], Sequence[Obstacle]]:
        """See `Actor`."""
        gate = _first_gate(stage)
        own = stage.route.points[(stage.route.lengths > gate.enter) & (stage.route.lengths < gate.leave)]
        crossing = []
        for connector in stage.town.lanes.values():
            arm = connector.arm
            if connector.road is None and connector.junction == gate.junction and arm != gate.arm:
                if connector.turn != "straight":
                    continue
                distances = exact.norm(own[:, None] - connector.centre)
                if distances.min() < 1.0:
                    meets = np.unravel_index(int(np.argmin(distances)), distances.shape)
                    crossing.append((connector.key, own[meets[0]]))
        if not crossing:
            raise UnplayableError("no way straight across meets the route")
        key_across, place = crossing[int(stage.rng.integers(len(crossing)))]
        arriving = next(
            lane.key
            for lane in stage.town.lanes.values()
            if key_across in lane.successors and lane.road is not None
        )
        leaving = stage.town.lanes[key_across].successors[0]
        route = traffic.lane_route(stage.town, [arriving, key_across, leaving])
        meets_at = float(route.lengths[int(np.argmin(exact.norm(route.points - place)))])
        if meets_at < self.before + 3.0:
            raise UnplayableError("the road from the side is too short")
        trigger = Trigger((float(place[0]), float(place[1])), self.seconds, self.metres)
        part = Part(trigger, ((0.0, self.speed),), acceleration=6.0)
        size = surroundings.draw_size("vehicle.car", stage.rng)
        start = meets_at - self.before
        return [Mover(key, "vehicle.car", size, route, start, 0.0, _still, part=part)], []


@dataclasses.dataclass(frozen=True)
class CutIn:
    """A car at the kerb that pulls out in front of the ego vehicle."""

    seconds: float = 3.0
    metres: float = 18.0
    """srunner has 2.35 s and 10 m for a car that is at once as fast as the others; this one speeds up."""
    speed: float = 6.0
    merged: float = 4.0
    """Seconds after which it is in the lane and drives like anybody."""

    def cast(self, stage: Stage, key: str) -> tuple[Sequence[Mover], Sequence[Obstacle]]:
        """See `Actor`."""
        s = stage.script.start + float(stage.rng.uniform(34.0, 44.0))
        near, _ = stage.kerbs(s)
        stage.kerbs(s + 20.0)
        if near < 3.6:
            raise UnplayableError("there is no room at the kerb")
        along = np.arange(0.0, 13.0, 0.5)
        aside = (near - 1.2) * (0.5 + 0.5 * exact.cos_sin(np.pi * along / 13.0)[0])
        merging = np.stack([stage.beside(s + float(a), float(b)) for a, b in zip(along, aside, strict=True)])
        rest = stage.route.points[stage.route.lengths > s + 13.5]
        route = traffic.free_route(np.concatenate([merging, rest]))
        x, y = stage.beside(s + 6.0, 0.0)
        trigger = Trigger((float(x), float(y)), self.seconds, self.metres)
        part = Part(trigger, ((0.0, self.speed),), acceleration=3.0, yields_after=self.merged)
        size = surroundings.draw_size("vehicle.car", stage.rng)
        return [Mover(key, "vehicle.car", size, route, 0.0, 0.0, _still, part=part)], []


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


def _first_gate(stage: Stage) -> traffic.Gate:
    if not stage.route.gates:
        raise UnplayableError("the route passes no signalised junction")
    return stage.route.gates[0]


def _still(_: float) -> float:
    return 0.0

"""Casts a scene: what the expert is going to experience, and who else is on the road.

All is named by tokens of 32 hexadecimal digits, hashed from the seed and what they name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from spacedrive_jax import exact
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.world import paths, surroundings, traffic
from spacedrive_jax.world.step import first_collisions, simulate
from spacedrive_jax.world.town import STOP_SETBACK, Lane, Town, next_lane
from spacedrive_jax.world.traffic import (
    Cast,
    Motion,
    Mover,
    Obstacle,
    Phase,
    Priority,
    Route,
    Signals,
    Tracks,
)
from spacedrive_jax.world.vehicle import VehicleState


def make_token(*parts: object) -> str:
    """A token that depends on all parts, as unique as sha256's first 128 bits."""
    return hashlib.sha256("/".join(str(part) for part in parts).encode()).hexdigest()[:32]


MANOEUVRES = (
    "turn_left",
    "follow",
    "start",
    "turn_right",
    "stop",
    "cruise",
    "pedestrian",
    "straight",
    "brake",
    "bend",
)
"""What the script arranges for the ego vehicle; a scene takes one by its number."""

WARM_UP = 1.0
"""Seconds simulated before the first keyframe."""

EGO_SIZE = (5.5, 1.9, 1.6)
EGO_AHEAD = 0.65
"""The ego box spans -2.1 to 3.4 m around the rear axle: the car and the metrics' 4.08 m footprint both."""

_PHRASES = {
    "turn_left": "Turn left at intersection",
    "turn_right": "Turn right at intersection",
    "straight": "Cross intersection",
    "stop": "Arrive at intersection, wait at red light",
    "start": "Wait at intersection, start at green light",
    "follow": "Follow slower vehicle",
    "brake": "Brake behind stopping vehicle",
    "pedestrian": "Stop for pedestrian crossing",
    "cruise": "Drive along the road",
    "bend": "Follow sharp bend",
}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A cast with its simulated motions, free of collisions."""

    town: Town
    manoeuvre: str
    description: str
    cast: Cast
    motions: tuple[Motion, ...]
    driven: tuple[VehicleState | None, ...] = ()
    """The ego vehicle at every time step, None at those at which it followed its script; empty where it
    always did."""

    @property
    def ego(self) -> Mover:
        """The ego vehicle."""
        return self.cast.movers[0]

    @functools.cached_property
    def tracks(self) -> Tracks:
        """Where every mover's box is, given the arc lengths."""
        return Tracks(self.cast.movers)


@dataclasses.dataclass(frozen=True)
class Script:
    """The ego vehicle's part."""

    keys: list[str]
    start: float
    speed: float
    cruise_speed: float
    signals: dict[int, tuple[Phase, ...]]
    extras: tuple[Mover, ...] = ()
    priorities: Mapping[int, Priority] = dataclasses.field(default_factory=dict)
    """Junctions whose lights are taken away."""


class UnplayableError(SpaceDriveError):
    """An actor that a scenario needs would drive or walk through somebody: another draw is wanted."""


Actors = Callable[[Route], tuple[Sequence[Mover], Sequence[Obstacle]]]
"""From the ego vehicle's route to those who play a part in a scenario."""


def build_scenario(town: Town, manoeuvre: str, duration: float, rng: np.random.Generator) -> Scenario:
    """Writes, simulates and cleans up one scene.

    Whoever would overlap somebody else is left out (never the ego vehicle) and the scene is simulated
    again, until nobody drives through anybody.

    Args:
        town: the road network.
        manoeuvre: one of `MANOEUVRES`.
        duration: seconds after the warm-up.
        rng: the only source of randomness.
    """
    total = WARM_UP + duration
    return cast_scenario(town, write_script(town, manoeuvre, total, rng), manoeuvre, total, rng)


def cast_scenario(
    town: Town,
    script: Script,
    manoeuvre: str,
    total: float,
    rng: np.random.Generator,
    actors: Actors | None = None,
) -> Scenario:
    """Puts everybody around a script, simulates it and leaves out whoever is in somebody's way.

    Args:
        town: the road network.
        script: the ego vehicle's part.
        manoeuvre: one of `MANOEUVRES`, which decides how free the road ahead is kept.
        total: seconds, the warm-up included.
        rng: the only source of randomness.
        actors: those who play a part besides the script's own; the ego vehicle's driver then foresees them.

    Raises:
        UnplayableError: an actor cannot play its part.
    """
    route = traffic.lane_route(town, script.keys)
    signals = Signals(
        rng.uniform(0, 100, len(town.junctions)),
        tuple(j.arms for j in town.junctions),
        script.signals,
        script.priorities,
    )
    cruise_speed = script.cruise_speed
    ego = Mover(
        "ego",
        "vehicle.car",
        EGO_SIZE,
        route,
        script.start,
        script.speed,
        lambda _: cruise_speed,
        reference_to_centre=EGO_AHEAD,
        acceleration=1.6,
        headway=1.4,
        standstill_gap=3.0,
        alert=actors is not None,
    )
    playing: Sequence[Mover] = ()
    props: Sequence[Obstacle] = ()
    if actors is not None:
        playing, props = actors(route)
    taken = (ego, *script.extras, *playing)
    movers = taken + surroundings.moving_crowd(town, taken, signals, total, manoeuvre, rng)
    obstacles = (*props, *surroundings.standing_crowd(town, route, script.start, rng))
    needed = {mover.key for mover in playing} | {item.key for item in props}
    cast = Cast(movers, obstacles, signals)
    while True:
        motions = simulate(town, cast, total)
        removed = first_collisions(cast, motions, total)
        if not removed:
            break
        if removed & needed:
            raise UnplayableError(f"{', '.join(sorted(removed & needed))} would run into somebody")
        cast = Cast(
            tuple(mover for mover in cast.movers if mover.key not in removed),
            tuple(item for item in cast.obstacles if item.key not in removed),
            signals,
        )
    return Scenario(town, manoeuvre, _describe(manoeuvre, cast), cast, tuple(motions))


def write_script(town: Town, manoeuvre: str, total: float, rng: np.random.Generator) -> Script:
    """Decides where the ego vehicle starts, which way it goes and what the signals do for it."""
    cruise = float(rng.uniform(8.0, 11.5))
    if manoeuvre in ("turn_left", "turn_right", "straight", "stop", "start"):
        return _junction_script(town, manoeuvre, total, cruise, rng)
    if manoeuvre == "pedestrian":
        return _pedestrian_script(town, total, cruise, rng)
    roads = [lane for lane in _road_lanes(town) if lane.length > 70]
    if manoeuvre == "bend":
        lanes = [lane for lane in _road_lanes(town) if _leads_to_bend(town, lane)]
        lane = lanes[rng.integers(len(lanes))]
        start = max(4.0, lane.length - rng.uniform(25.0, 40.0))
        keys = extend_route(town, [lane.key], start + total * cruise + 60, rng)
        return Script(keys, start, cruise * 0.8, cruise, {})
    lane = roads[rng.integers(len(roads))]
    start = float(rng.uniform(4.0, 12.0))
    keys = extend_route(town, [lane.key], start + total * cruise + 60, rng)
    signals = _green_wave(town, keys)
    if manoeuvre == "cruise":
        return Script(keys, start, cruise * rng.uniform(0.7, 1.0), cruise, signals)
    slow = float(rng.uniform(3.5, 5.5))
    stop_at = float(rng.uniform(3.0, 4.5))
    if manoeuvre == "follow":
        plan: Callable[[float], float] = lambda _: slow  # noqa: E731
    else:
        plan = lambda time: 7.0 if time < stop_at or time > stop_at + 6.5 else 0.0  # noqa: E731
    category = str(rng.choice(["vehicle.car", "vehicle.truck", "vehicle.bus.rigid"], p=[0.5, 0.25, 0.25]))
    size = surroundings.draw_size(category, rng)
    gap = float(rng.uniform(12.0, 18.0)) + size[0] / 2 + EGO_SIZE[0] / 2
    speed = slow if manoeuvre == "follow" else 7.0
    lead = Mover("lead", category, size, traffic.lane_route(town, keys), start + gap, speed, plan)
    return Script(keys, start, speed + 1.0, cruise, signals, (lead,))


def _junction_script(
    town: Town, manoeuvre: str, total: float, cruise: float, rng: np.random.Generator
) -> Script:
    turn = manoeuvre.removeprefix("turn_") if manoeuvre.startswith("turn_") else "straight"
    if manoeuvre == "start":
        turn = str(rng.choice(["left", "right", "straight"]))
    options = [
        (lane.key, key)
        for lane in _road_lanes(town)
        for key in lane.successors
        if town.junctions[lane.junction].signalised and town.lanes[key].turn == turn and lane.length > 45.0
    ]
    key, connector = options[rng.integers(len(options))]
    lane = town.lanes[key]
    keys = extend_route(town, [key, connector], lane.length + total * cruise + 40, rng)
    signals = _green_wave(town, keys)
    other = next(arm for arm in town.junctions[lane.junction].arms if arm != lane.arm)
    if manoeuvre == "start":
        start = lane.length - STOP_SETBACK - EGO_SIZE[0] / 2 - EGO_AHEAD - float(rng.uniform(0.8, 2.0))
        green = WARM_UP + float(rng.uniform(1.5, 3.5))
        signals[lane.junction] = ((-1.0, (other,)), (green - 2.0, ()), (green, (lane.arm,)))
        return Script(keys, start, 0.0, cruise, signals)
    if manoeuvre == "stop":
        start = max(3.0, lane.length - float(rng.uniform(45.0, 60.0)))
        green = WARM_UP + float(rng.uniform(9.0, 12.0))
        signals[lane.junction] = ((-1.0, (other,)), (green, (lane.arm,)))
        return Script(keys, start, cruise * 0.85, cruise, signals)
    start = max(3.0, lane.length - float(rng.uniform(22.0, 34.0)))
    return Script(keys, start, min(cruise, 7.5), cruise, signals)


def _pedestrian_script(town: Town, total: float, cruise: float, rng: np.random.Generator) -> Script:
    options = []
    for index, crossing in enumerate(town.crossings):
        if crossing.junction >= 0:
            continue
        for lane in _road_lanes(town):
            if lane.road == crossing.road:
                nearest = np.argmin(exact.norm(lane.centre - crossing.polygon.mean(axis=0)))
                options.append((index, lane.key, paths.arc_lengths(lane.centre)[nearest]))
    index, key, at = options[rng.integers(len(options))]
    start = max(2.0, float(at) - float(rng.uniform(36.0, 46.0)))
    keys = extend_route(town, [key], start + total * cruise + 60, rng)
    walkers = []
    for number in range(int(rng.integers(1, 4))):
        ends = town.crossings[index].walk[:: 1 if rng.random() < 0.5 else -1]
        departure = float(rng.uniform(0.0, 0.4)) + 0.7 * number
        walkers.append(surroundings.crossing_walker(f"walker{number}", ends, index, departure, rng))
    return Script(keys, start, cruise * 0.75, cruise, _green_wave(town, keys), tuple(walkers))


def extend_route(town: Town, keys: list[str], length: float, rng: np.random.Generator) -> list[str]:
    """Continues a lane sequence over random successors until it is at least `length` metres long."""
    keys = list(keys)
    total = sum(town.lanes[key].length for key in keys)
    while total < length:
        keys.append(next_lane(town, keys[-1], rng))
        total += town.lanes[keys[-1]].length
    return keys


def _green_wave(town: Town, keys: list[str]) -> dict[int, tuple[Phase, ...]]:
    """The first junction on the way stays green for the ego vehicle; later ones run their own plan."""
    for key in keys:
        lane = town.lanes[key]
        if lane.road is None and town.junctions[lane.junction].signalised:
            return {lane.junction: ((-1.0, (lane.arm,)),)}
    return {}


def _road_lanes(town: Town) -> list[Lane]:
    return [lane for lane in town.lanes.values() if lane.road is not None]


def _leads_to_bend(town: Town, lane: Lane) -> bool:
    """Whether the lane runs into a junction of two arms at a right angle."""
    arms = town.junctions[lane.junction].arms
    return len(arms) == 2 and (arms[1] - arms[0]) % 2 == 1 and lane.length > 30.0


def _describe(manoeuvre: str, cast: Cast) -> str:
    """A short scene text in the style of nuScenes."""
    phrases = [_PHRASES[manoeuvre]]
    categories = [m.category for m in cast.movers[1:]] + [item.category for item in cast.obstacles]
    parked = sum(item.category == "vehicle.car" for item in cast.obstacles)
    walking = sum(mover.pedestrian for mover in cast.movers)
    if parked > 5:
        phrases.append("parked cars")
    if walking > 4:
        phrases.append("peds on sidewalk")
    if any(mover.crossing >= 0 for mover in cast.movers):
        phrases.append("peds crossing crosswalk")
    names = {
        "vehicle.bus.rigid": "bus",
        "vehicle.truck": "truck",
        "vehicle.bicycle": "bicycle",
        "vehicle.motorcycle": "motorcycle",
        "vehicle.construction": "construction vehicle",
        "movable_object.trafficcone": "construction",
    }
    phrases += [name for category, name in names.items() if category in categories]
    return ", ".join(phrases)

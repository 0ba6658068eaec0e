"""Everybody but the ego vehicle: traffic on the lanes, parked rows, work zones, people on the sidewalks."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.world import paths, traffic
from spacedrive_jax.world.town import (
    LANE_WIDTH,
    SIDEWALK_WIDTH,
    STOP_SETBACK,
    Lane,
    Road,
    Town,
    merges,
    next_lane,
)
from spacedrive_jax.world.traffic import Mover, Obstacle, Route, Signals

RANGE = 85.0
"""Metres around the ego vehicle's way that are populated."""

_SIZES: dict[str, tuple[tuple[float, float, float], float]] = {
    # mean length, width, height in metres and relative spread
    "vehicle.car": ((4.5, 1.85, 1.6), 0.06),
    "vehicle.truck": ((7.2, 2.45, 3.1), 0.08),
    "vehicle.bus.rigid": ((10.8, 2.65, 3.3), 0.04),
    "vehicle.motorcycle": ((2.1, 0.8, 1.55), 0.05),
    "vehicle.bicycle": ((1.75, 0.6, 1.7), 0.05),
    "vehicle.construction": ((5.6, 2.2, 3.0), 0.05),
    "vehicle.emergency.police": ((4.8, 1.9, 1.7), 0.02),
    "human.pedestrian.adult": ((0.65, 0.65, 1.74), 0.06),
    "human.pedestrian.child": ((0.5, 0.5, 1.2), 0.08),
    "human.pedestrian.construction_worker": ((0.7, 0.7, 1.76), 0.04),
    "movable_object.trafficcone": ((0.4, 0.4, 0.9), 0.08),
    "movable_object.barrier": ((0.55, 2.0, 1.0), 0.03),
    "movable_object.pushable_pullable": ((0.6, 0.6, 1.05), 0.08),
    "static_object.bicycle_rack": ((5.5, 1.5, 1.1), 0.05),
}
_MOVING = ("vehicle.car", "vehicle.truck", "vehicle.bus.rigid", "vehicle.motorcycle", "vehicle.bicycle")
_MOVING_SHARE = (0.74, 0.07, 0.05, 0.07, 0.07)


def draw_size(category: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """A plausible length, width and height in metres, whole millimetres as in nuScenes."""
    mean, spread = _SIZES[category]
    factors = 1 + np.clip(rng.normal(0, spread, 3), -2 * spread, 2 * spread)
    length, width, height = (round(float(m * f), 3) for m, f in zip(mean, factors, strict=True))
    return length, width, height


def crossing_walker(
    key: str, ends: Float[np.ndarray, "2 2"], crossing: int, departure: float, rng: np.random.Generator
) -> Mover:
    """A pedestrian who walks from `ends[0]` to `ends[1]` over a crossing, not before `departure` seconds."""
    across = (ends[1] - ends[0]) / exact.norm(ends[1] - ends[0])
    aside = np.array([-across[1], across[0]]) * rng.uniform(-1.0, 1.0)
    line = np.stack([ends[0] + aside, ends[1] + aside + across * 1.2])
    pace = float(rng.uniform(1.1, 1.6))
    return Mover(
        key,
        "human.pedestrian.adult",
        draw_size("human.pedestrian.adult", rng),
        traffic.free_route(line),
        0.0,
        0.0,
        lambda _: pace,
        crossing=crossing,
        departure=departure,
    )


def moving_crowd(
    town: Town,
    taken: tuple[Mover, ...],
    signals: Signals,
    total: float,
    manoeuvre: str,
    rng: np.random.Generator,
) -> tuple[Mover, ...]:
    """Vehicles, cyclists and pedestrians around the ego vehicle's way.

    Args:
        town: the road network.
        taken: movers that are already placed, the ego vehicle first.
        signals: who has green, so that queues start with plausible speeds.
        total: seconds the routes must last.
        manoeuvre: the ego vehicle's script; some need a free road ahead.
        rng: the only source of randomness.
    """
    ego = taken[0]
    way = _way(ego.route, ego.start)
    occupied = [mover.route.pose(mover.start) for mover in taken]
    clear_ahead = 22.0 if manoeuvre in ("stop", "start") else 45.0
    movers: list[Mover] = []
    for lane in _nearby_lanes(town, way):
        if all(merges(town, connector) for connector in lane.successors):
            continue
        length = lane.length
        s = rng.uniform(2.0, 24.0)
        while s < length - STOP_SETBACK - 3.0:
            pose = _lane_pose(lane, s)
            if _far_from_way(pose, ego, clear_ahead) and all(_apart(pose, other) for other in occupied):
                mover = _vehicle(town, lane, s, f"vehicle{len(movers)}", signals, total, rng)
                movers.append(mover)
                occupied.append(pose)
            # Where no lights hold them up, nobody would find a gap in a row.
            s += rng.uniform(60.0, 90.0) if lane.junction in signals.priorities else rng.uniform(13.0, 42.0)
    movers += _sidewalk_walkers(town, way, rng)
    turning = manoeuvre.startswith("turn_") and bool(ego.route.gates)
    kept_clear = ego.route.gates[0].junction if turning else -1
    movers += _crossing_walkers(town, way, total, manoeuvre, kept_clear, rng)
    return tuple(movers)


def _vehicle(
    town: Town, lane: Lane, s: float, key: str, signals: Signals, total: float, rng: np.random.Generator
) -> Mover:
    category = str(rng.choice(_MOVING, p=_MOVING_SHARE))
    outermost = town.roads[lane.road if lane.road is not None else 0].lanes - 1 == lane.index
    if category == "vehicle.bicycle" and not outermost:
        category = "vehicle.car"
    size = draw_size(category, rng)
    bicycle = category == "vehicle.bicycle"
    wanted = float(rng.uniform(3.5, 5.0) if bicycle else rng.uniform(6.5, 10.5))
    keys, reach = [lane.key], lane.length
    while reach < s + wanted * total + 40.0:
        keys.append(next_lane(town, keys[-1], rng))
        reach += town.lanes[keys[-1]].length
    lateral = town.side * (LANE_WIDTH / 2 - 0.65) if bicycle else float(rng.normal(0.0, 0.08))
    route = traffic.lane_route(town, keys, lateral)
    speed = min(wanted, float(np.interp(s, route.lengths, traffic.speed_limit_profile(route))))
    for gate in route.gates[:1]:
        if signals.holds_back(gate):
            room = max(gate.stop - s - size[0] / 2 - 1.0, 0.0)
            speed = min(speed, float(np.sqrt(2 * 1.2 * room)))
    return Mover(
        key,
        category,
        size,
        route,
        s,
        speed,
        lambda _: wanted,
        acceleration=float(rng.uniform(1.3, 2.0)),
        headway=float(rng.uniform(1.1, 1.7)),
    )


def _sidewalk_walkers(town: Town, way: Float[np.ndarray, "K 2"], rng: np.random.Generator) -> list[Mover]:
    walkers: list[Mover] = []
    for road in _nearby_roads(town, way):
        for side in (-1.0, 1.0):
            for _ in range(int(rng.poisson(2.6))):
                lateral = side * (road.half_width + rng.uniform(0.7, SIDEWALK_WIDTH - 0.5))
                line = paths.offset(road.centre, lateral)
                first = int(rng.integers(0, max(1, len(line) - 30)))
                line = line[first : first + 45]
                line = line[:: 1 if rng.random() < 0.5 else -1]
                child = rng.random() < 0.08
                category = "human.pedestrian.child" if child else "human.pedestrian.adult"
                pace = float(rng.uniform(0.9, 1.7))
                walkers.append(
                    Mover(
                        f"sidewalk{len(walkers)}",
                        category,
                        draw_size(category, rng),
                        traffic.free_route(line),
                        0.0,
                        pace,
                        lambda _, pace=pace: pace,  # type: ignore[misc]
                    )
                )
    return walkers


def _crossing_walkers(
    town: Town,
    way: Float[np.ndarray, "K 2"],
    total: float,
    manoeuvre: str,
    kept_clear: int,
    rng: np.random.Generator,
) -> list[Mover]:
    """People who want to cross; none at the junction `kept_clear`, where the ego vehicle is to turn."""
    walkers: list[Mover] = []
    for index, crossing in enumerate(town.crossings):
        nearby = exact.norm(way - crossing.polygon.mean(axis=0)).min() < 45.0
        wanted = rng.random(), rng.integers(1, 3)
        if not nearby or wanted[0] > (0.3 if crossing.junction < 0 else 0.45):
            continue
        mid_block = crossing.junction < 0
        if crossing.junction == kept_clear and not mid_block:
            continue
        if manoeuvre in ("cruise", "follow", "pedestrian") and mid_block:
            continue
        for _ in range(int(wanted[1])):
            ends = crossing.walk[:: 1 if rng.random() < 0.5 else -1]
            departure = float(rng.uniform(0.0, total * 0.6))
            walkers.append(crossing_walker(f"crossing{len(walkers)}", ends, index, departure, rng))
    return walkers


def standing_crowd(town: Town, route: Route, start: float, rng: np.random.Generator) -> tuple[Obstacle, ...]:
    """Parked vehicles, work zones, waiting people and street furniture that nuScenes annotates."""
    way = _way(route, start)
    items: list[Obstacle] = []
    for road in _nearby_roads(town, way):
        for side in (-1.0, 1.0):
            if road.parking:
                items += _parking_row(town, road, side, len(items), rng)
            items += _sidewalk_things(road, side, len(items), rng)
    return tuple(items)


def _parking_row(
    town: Town, road: Road, side: float, number: int, rng: np.random.Generator
) -> list[Obstacle]:
    line = paths.offset(road.centre, side * (road.lanes * LANE_WIDTH + road.parking / 2))
    lengths, headings = paths.arc_lengths(line), paths.headings(line)
    turned = 0.0 if side == town.side else np.pi
    blocked = [c.polygon.mean(axis=0) for c in town.crossings if c.road == road.index]
    work_zone = rng.random() < 0.18
    items: list[Obstacle] = []
    s = 12.0 + rng.uniform(0.0, 4.0)
    while s < lengths[-1] - 12.0:
        x, y = (float(np.interp(s, lengths, line[:, axis])) for axis in range(2))
        heading = float(np.interp(s, lengths, headings)) + turned
        free = all(exact.hypot(x - float(c[0]), y - float(c[1])) > road.half_width + 5.5 for c in blocked)
        if free and work_zone and s < lengths[-1] - 30.0:
            items += _work_zone(line, lengths, headings, s, side, number + len(items), rng)
            work_zone = False
            s += 20.0
            continue
        if free and rng.random() < 0.62:
            category = "vehicle.motorcycle" if rng.random() < 0.08 else "vehicle.car"
            size = draw_size(category, rng)
            attribute = "cycle.without_rider" if category == "vehicle.motorcycle" else "vehicle.parked"
            jitter = float(rng.normal(0, 0.02))
            key = f"parked{number + len(items)}"
            items.append(Obstacle(key, category, size, (x, y, heading + jitter), attribute))
        s += rng.uniform(5.9, 7.2)
    return items


def _work_zone(
    line: Float[np.ndarray, "K 2"],
    lengths: Float[np.ndarray, "K"],
    headings: Float[np.ndarray, "K"],
    s: float,
    side: float,
    number: int,
    rng: np.random.Generator,
) -> list[Obstacle]:
    """Barriers at both ends, cones along the lane, a machine and a worker between them."""

    def place(kind: str, along: float, aside: float, turn: float = 0.0, attribute: str = "") -> Obstacle:
        heading = float(np.interp(s + along, lengths, headings))
        x, y = (float(np.interp(s + along, lengths, line[:, axis])) for axis in range(2))
        cos, sin = exact.cos_sin(heading)
        x -= side * aside * sin
        y += side * aside * cos
        key = f"work{number}-{along:.1f}-{aside:.1f}"
        return Obstacle(key, kind, draw_size(kind, rng), (x, y, heading + turn), attribute)

    items = [place("movable_object.barrier", along, 0.0) for along in (0.0, 15.0)]
    items += [place("movable_object.trafficcone", along, -1.0) for along in np.arange(1.5, 14.5, 2.5)]
    items.append(place("vehicle.construction", 6.0, 0.25, attribute="vehicle.parked"))
    worker = "human.pedestrian.construction_worker"
    items.append(place(worker, 11.5, 0.3, 1.0, "pedestrian.standing"))
    return items


def _sidewalk_things(road: Road, side: float, number: int, rng: np.random.Generator) -> list[Obstacle]:
    items: list[Obstacle] = []
    kinds = ("human.pedestrian.adult", "movable_object.pushable_pullable", "static_object.bicycle_rack")
    for kind, rate in zip(kinds, (1.0, 0.5, 0.25), strict=True):
        for _ in range(int(rng.poisson(rate))):
            aside = side * (road.half_width + (rng.uniform(0.6, 1.2) if kind != kinds[2] else 1.9))
            line = paths.offset(road.centre, aside)
            spot = int(rng.integers(8, max(9, len(line) - 8)))
            heading = float(paths.headings(line)[spot])
            if kind == kinds[0]:
                heading += float(rng.uniform(-np.pi, np.pi))
            attribute = "pedestrian.standing" if kind == kinds[0] else ""
            pose = (float(line[spot, 0]), float(line[spot, 1]), heading)
            items.append(Obstacle(f"thing{number + len(items)}", kind, draw_size(kind, rng), pose, attribute))
    return items


def _way(route: Route, start: float) -> Float[np.ndarray, "K 2"]:
    ahead = (route.lengths > start - 20.0) & (route.lengths < start + 150.0)
    return route.points[ahead][::8]


def _nearby_lanes(town: Town, way: Float[np.ndarray, "K 2"]) -> list[Lane]:
    roads = {road.index for road in _nearby_roads(town, way)}
    return [lane for lane in town.lanes.values() if lane.road in roads]


def _nearby_roads(town: Town, way: Float[np.ndarray, "K 2"]) -> list[Road]:
    def distance(road: Road) -> float:
        return float(exact.norm(road.centre[::4, None] - way[None]).min())

    return [road for road in town.roads if distance(road) < RANGE]


def _lane_pose(lane: Lane, s: float) -> Float[np.ndarray, "3"]:
    lengths = paths.arc_lengths(lane.centre)
    columns = (lane.centre[:, 0], lane.centre[:, 1], paths.headings(lane.centre))
    return np.array([np.interp(s, lengths, column) for column in columns])


def _far_from_way(pose: Float[np.ndarray, "3"], ego: Mover, clear_ahead: float) -> bool:
    """Keeps the ego vehicle's own lane free behind it and for some metres ahead."""
    distances = exact.norm(ego.route.points - pose[:2])
    nearest = int(np.argmin(distances))
    ahead = ego.route.lengths[nearest] - ego.start
    return bool(distances[nearest] > 2.5 or ahead > clear_ahead or ahead < -16.0)


def _apart(pose: Float[np.ndarray, "3"], other: Float[np.ndarray, "3"]) -> bool:
    """Vehicles in the same direction keep 13 m at the start; others need only not touch."""
    forward = np.array(exact.cos_sin(other[2]))
    delta = pose[:2] - other[:2]
    aside = abs(exact.dot(delta, np.array([-forward[1], forward[0]])))
    return bool(aside > 2.6 or abs(exact.dot(delta, forward)) > 13.0)

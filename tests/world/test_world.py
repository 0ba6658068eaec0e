"""The stepped world: on rails it is the simulation, steered it is a body that others react to."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from spacedrive_jax.errors import DataError
from spacedrive_jax.world.paths import overlapping_pairs
from spacedrive_jax.world.right_of_way import STANDING, STANDS_AT_SIGN
from spacedrive_jax.world.scenario import EGO_AHEAD, Scenario, build_scenario
from spacedrive_jax.world.step import first_collisions, simulate
from spacedrive_jax.world.town import Town
from spacedrive_jax.world.traffic import (
    TIME_STEP,
    Cast,
    Gate,
    Motion,
    Mover,
    Priority,
    Route,
    Signals,
    lane_route,
    speed_limit_profile,
)
from spacedrive_jax.world.vehicle import Control
from spacedrive_jax.world.world import World, WorldState

STRAIGHT = Control(0.0, 0.0)


@pytest.fixture(scope="module")
def scenario(towns: dict[str, Town]) -> Scenario:
    return build_scenario(towns["boston-seaport"], "turn_left", 4.0, np.random.default_rng(3))


def same(first: WorldState, second: WorldState) -> bool:
    return first.vehicle == second.vehicle and all(
        np.array_equal(getattr(first.traffic, name), getattr(second.traffic, name))
        for name in ("step", "s", "speed", "acceleration", "since", "stood")
    )


def test_on_rails_the_world_is_the_simulation(scenario: Scenario) -> None:
    world = World(scenario)
    world.reset(steered=False)
    for _ in range(50):
        world.step()
    motions = simulate(scenario.town, scenario.cast, 5.0)
    for motion, seen in zip(motions, world.recording().motions, strict=True):
        for name in ("s", "speed", "acceleration"):
            assert np.array_equal(getattr(motion, name)[:51], getattr(seen, name))


def test_a_state_is_kept_branched_and_gone_back_to(scenario: Scenario) -> None:
    world = World(scenario)
    world.reset()
    for _ in range(10):
        world.step(Control(1.0, 0.05))
    kept = world.state
    first = [world.step(Control(-2.0, 0.1)) for _ in range(5)]
    world.restore(kept)
    branch = world.state
    for _ in range(5):  # a branch leaves no trace
        _, branch = world.advance(branch, Control(2.0, -0.3))
    assert same(world.state, kept)
    again = [world.step(Control(-2.0, 0.1)) for _ in range(5)]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


def test_a_state_goes_through_json_with_all_its_bits(scenario: Scenario) -> None:
    world = World(scenario)
    world.reset()
    for _ in range(7):
        world.step(Control(0.7, 0.01))
    read = WorldState.from_json(json.loads(json.dumps(world.state.to_json())))
    assert same(read, world.state)
    other = World(scenario)
    with pytest.raises(DataError, match="give `earlier`"):
        other.restore(read)
    other.restore(read, world.states)
    assert same(other.step(STRAIGHT), world.step(STRAIGHT))
    with pytest.raises(DataError, match="not the values"):
        WorldState.from_json({"traffic": {}})


def test_others_stop_behind_an_ego_vehicle_that_stands_in_their_way(
    towns: dict[str, Town],
) -> None:
    scenario = build_scenario(towns["boston-seaport"], "cruise", 12.0, np.random.default_rng(5))
    ego = scenario.ego
    follower = dataclasses.replace(
        ego,
        key="follower",
        start=ego.start - 0.0,
        speed=6.0,
        reference_to_centre=0.0,
        desired_speed=lambda _: 6.0,
    )
    ahead = dataclasses.replace(ego, start=ego.start + 30.0, speed=0.0)
    cast = dataclasses.replace(scenario.cast, movers=(ahead, follower), obstacles=())
    world = World(dataclasses.replace(scenario, cast=cast, motions=()))
    world.reset(shift=(0.9, 0.4))  # askew in its lane
    assert world.state.vehicle is not None
    for _ in range(120):
        world.step(Control(-7.0, 0.0))
    half = np.array([ahead.size[:2], follower.size[:2]]) / 2
    poses = world.poses(world.state)
    assert not len(overlapping_pairs(poses, half))
    assert world.state.traffic.speed[1] < 0.05
    gap = world.state.traffic.s[0] - world.state.traffic.s[1]
    assert gap < 12.0  # it came near, and stopped


def test_the_ego_vehicle_may_leave_its_lane_and_its_place_on_the_route_follows(scenario: Scenario) -> None:
    world = World(scenario)
    world.reset()
    for _ in range(30):
        world.step(Control(1.0, 0.3))
    vehicle = world.state.vehicle
    assert vehicle is not None
    route = scenario.ego.route
    distances = np.hypot(*(route.points - (vehicle.x, vehicle.y)).T)
    assert distances.min() > 2.0
    s = float(world.state.traffic.s[0])
    assert abs(s - route.lengths[int(distances.argmin())]) < 1.0
    x, y, yaw = world.poses(world.state)[0]
    assert np.allclose((x - EGO_AHEAD * np.cos(yaw), y - EGO_AHEAD * np.sin(yaw)), (vehicle.x, vehicle.y))


def test_the_wheel_changes_hands(scenario: Scenario) -> None:
    world = World(scenario)
    world.reset(steered=False)
    for _ in range(10):
        world.step()
    place = world.poses(world.state)[0]
    world.hand_over(steered=True)
    assert np.allclose(world.poses(world.state)[0], place, atol=1e-9)
    world.step(STRAIGHT)
    world.hand_over(steered=False)
    world.step()
    assert world.state.vehicle is None
    assert world.state.time == pytest.approx(12 * TIME_STEP)


def crossing_ways(town: Town) -> tuple[Route, Route]:
    """Two ways over one junction: a turn across who comes from the side to which it leads, and such a one."""
    for turn in town.lanes.values():
        if turn.road is not None or not town.junctions[turn.junction].signalised or turn.turn != "left":
            continue
        # From the left straight on: met by who turns left.
        across = [
            lane
            for lane in town.lanes.values()
            if lane.road is None
            and (lane.junction, lane.arm) == (turn.junction, (turn.arm + 3) % 4)
            and lane.turn == "straight"
        ]
        if across:
            ways = []
            for connector in (turn, across[0]):
                before = next(key for key, lane in town.lanes.items() if connector.key in lane.successors)
                ways.append(lane_route(town, [before, connector.key, connector.successors[0]]))
            if all(way.gates[0].stop > 75.0 for way in ways):
                return ways[0], ways[1]
    raise AssertionError("the town has no such junction")


def meet(
    town: Town, away: tuple[float, float], minor: int | None, *, stop: bool = False
) -> tuple[list[Motion], tuple[Route, Route]]:
    """Two cars, so many metres before their stop lines, at a junction without lights.

    Args:
        town: where.
        away: metres.
        minor: which of the two gives way.
        stop: whether it has a stop sign.
    """
    ways = crossing_ways(town)
    cars = tuple(
        Mover(
            f"car{k}", "vehicle.car", (4.5, 1.8, 1.5), way, way.gates[0].stop - 2.25 - off, 7.0, lambda _: 8.0
        )
        for k, (way, off) in enumerate(zip(ways, away, strict=True))
    )
    gates = [way.gates[0] for way in ways]
    priority = Priority(() if minor is None else (gates[minor].arm,), stop)
    arms = tuple(junction.arms for junction in town.junctions)
    signals = Signals(np.zeros(len(arms)), arms, {}, {gates[0].junction: priority})
    cast = Cast(cars, (), signals)
    motions = simulate(town, cast, 20.0)
    assert not first_collisions(cast, motions, 20.0)
    return motions, ways


def enters(motion: Motion, way: Route) -> float:
    """Seconds after which a car's front is 3 m behind its stop line."""
    return TIME_STEP * int(np.argmax(motion.s + 2.25 > way.gates[0].stop + 3.0))


@pytest.mark.parametrize(("minor", "away"), [(0, (14.0, 30.0)), (1, (30.0, 25.0))])
def test_who_gives_way_holds_at_the_line_for_who_goes_first(
    towns: dict[str, Town], minor: int, away: tuple[float, float]
) -> None:
    first = 1 - minor
    motions, ways = meet(towns["boston-seaport"], away, minor)
    enters_first = enters(motions[first], ways[first])
    assert enters_first + 0.5 < enters(motions[minor], ways[minor])
    # At its own line, not in the other's way; and who goes first does not brake for it.
    front = motions[minor].s[round(enters_first / TIME_STEP)] + 2.25
    assert front < ways[minor].gates[0].stop + 1.0
    limits = speed_limit_profile(ways[first])
    free = np.minimum(np.interp(motions[first].s, ways[first].lengths, limits), 7.0)
    assert np.all(motions[first].speed[:80] > 0.8 * free[:80])


def test_a_gap_that_is_long_enough_is_taken(towns: dict[str, Town]) -> None:
    motions, ways = meet(towns["boston-seaport"], (8.0, 70.0), 0)
    assert motions[0].speed[: round(enters(motions[0], ways[0]) / TIME_STEP)].min() > 3.0
    assert enters(motions[0], ways[0]) < enters(motions[1], ways[1])


@pytest.mark.parametrize("stop", [False, True])
def test_a_vehicle_stands_at_a_stop_sign_before_it_goes_on(towns: dict[str, Town], stop: bool) -> None:
    motions, ways = meet(towns["boston-seaport"], (25.0, -60.0), 0, stop=stop)
    standing = motions[0].s[motions[0].speed < STANDING] + 2.25 - ways[0].gates[0].stop
    assert TIME_STEP * len(standing) >= STANDS_AT_SIGN if stop else not len(standing)
    assert np.all(np.abs(standing) < 1.0)
    assert 0.0 < enters(motions[0], ways[0]) < 15.0


def test_minor_roads_then_turns_across_the_oncoming_traffic_give_way() -> None:
    def rank(arm: int, turn: str, side: float = -1.0) -> tuple[bool, bool, int]:
        return Priority((0, 2)).rank(Gate(0, arm, 0.0, 5.0, 20.0, turn), side)

    assert rank(3, "straight") < rank(1, "left") < rank(0, "straight") < rank(2, "left")
    assert rank(1, "right") < rank(3, "left")
    assert rank(3, "left", 1.0) < rank(1, "right", 1.0)  # where traffic keeps to the left

"""The stepped world: on rails it is the simulation, steered it is a body that others react to."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from spacedrive_jax.errors import DataError
from spacedrive_jax.world.paths import overlapping_pairs
from spacedrive_jax.world.scenario import EGO_AHEAD, Scenario, build_scenario
from spacedrive_jax.world.step import simulate
from spacedrive_jax.world.town import Town
from spacedrive_jax.world.traffic import TIME_STEP
from spacedrive_jax.world.vehicle import Control
from spacedrive_jax.world.world import World, WorldState

STRAIGHT = Control(0.0, 0.0)


@pytest.fixture(scope="module")
def scenario(towns: dict[str, Town]) -> Scenario:
    return build_scenario(towns["boston-seaport"], "turn_left", 4.0, np.random.default_rng(3))


def same(first: WorldState, second: WorldState) -> bool:
    return first.vehicle == second.vehicle and all(
        np.array_equal(getattr(first.traffic, name), getattr(second.traffic, name))
        for name in ("step", "s", "speed", "acceleration", "since")
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

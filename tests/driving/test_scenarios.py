"""What scenario kinds arrange, and that adversaries do not wait for anybody."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spacedrive_jax.driving import scenarios
from spacedrive_jax.driving.driver import Driver
from spacedrive_jax.driving.infractions import overlapping
from spacedrive_jax.driving.policies import route_constant_speed
from spacedrive_jax.driving.scenarios import (
    HELD_OUT,
    KINDS,
    TEST_SEED,
    TRAINING_SEEDS,
    DriveSpec,
    build_drive,
    drive_set,
    town_of_drives,
)
from spacedrive_jax.world.scenario import EGO_AHEAD, EGO_SIZE, WARM_UP, Script
from spacedrive_jax.world.stage import signal_states
from spacedrive_jax.world.town import LOCATIONS, TEST_TOWN, Town
from spacedrive_jax.world.traffic import lane_route
from spacedrive_jax.world.world import World


def test_the_same_numbers_stage_the_same_drive() -> None:
    spec = DriveSpec(0, "T_Junction", "boston-seaport", 0)
    (first, goal), (again, same) = build_drive(spec), build_drive(spec)
    assert goal == same
    assert all(np.array_equal(a.s, b.s) for a, b in zip(first.motions, again.motions, strict=True))
    gate = first.ego.route.gates[0]
    assert len(first.town.junctions[gate.junction].arms) == 3
    assert gate.turn == "left"


def test_a_red_light_holds_the_turn_for_its_time() -> None:
    scenario, _ = build_drive(DriveSpec(0, "VanillaSignalizedTurnEncounterRedLight", "boston-seaport", 0))
    gate, signals = scenario.ego.route.gates[0], scenario.cast.signals
    assert gate.turn == "left"
    assert gate.arm not in signals.green_arms(gate.junction, WARM_UP + 8.9)
    assert gate.arm in signals.green_arms(gate.junction, WARM_UP + 10.1)


@pytest.mark.parametrize(
    "kind",
    [
        "DynamicObjectCrossing",
        "ParkingCutIn",
        "HardBreakRoute",
        "SignalizedJunctionLeftTurn",
        "NeuroNCAPFrontal",
        "NeuroNCAPSide",
        "NonSignalizedJunctionLeftTurn",
        "NonSignalizedJunctionRightTurn",
    ],
)
def test_who_does_not_look_meets_the_adversary_and_the_scripts_driver_does_not(kind: str) -> None:
    scenario, _ = build_drive(DriveSpec(0, kind, "boston-seaport", 1))
    actors = [i for i, mover in enumerate(scenario.cast.movers) if mover.part is not None]
    half = np.array([item.size[:2] for item in (*scenario.cast.movers, *scenario.cast.obstacles)]) / 2

    def meets(*, blind: bool) -> bool:
        world, driver = World(scenario), Driver()
        world.reset(steered=False)
        hit = False
        for step in range(round((WARM_UP + KINDS[kind].seconds) * 10)):
            if step == round(WARM_UP * 10) and blind:
                world.hand_over(steered=True)
            vehicle = world.state.vehicle
            if vehicle is not None and step % 5 == 0:
                driver.follow(route_constant_speed(world, {}), vehicle, world.state.time)
            world.step(None if vehicle is None else driver.control(vehicle, world.state.time))
            hit = hit or bool({*actors} & {*overlapping(world.poses(world.state), half).tolist()})
        assert np.isfinite(world.state.traffic.since[actors]).all()
        return hit

    assert meets(blind=True)
    assert not meets(blind=False)


def test_the_third_town_differs_in_its_geometry() -> None:
    sizes = {location: len(town_of_drives(location).junctions) for location in (*LOCATIONS, TEST_TOWN)}
    assert sizes == {"boston-seaport": 25, "singapore-onenorth": 25, TEST_TOWN: 16}
    assert town_of_drives(TEST_TOWN).right_hand


def test_sets_to_collect_in_have_towns_of_their_own() -> None:
    first, second = (town_of_drives("boston-seaport", world) for world in (TEST_SEED, 5001))
    assert not np.array_equal(first.junctions[0].centre, second.junctions[0].centre)
    worlds = {name: [spec.world for spec in drive_set(name)] for name in TRAINING_SEEDS}
    kinds_in_towns = 2 * (len(KINDS) - len(HELD_OUT))
    assert worlds["train"] == list(range(5001, 5001 + kinds_in_towns))
    assert worlds["train_more"] == list(range(8001, 8001 + 3 * kinds_in_towns))
    assert TEST_SEED not in {*worlds["train"], *worlds["train_more"]}


def test_the_kinds_held_out_are_driven_and_never_collected_in() -> None:
    assert set(HELD_OUT) <= {spec.kind for spec in drive_set("full")} & {s.kind for s in drive_set("unseen")}
    for name in (*TRAINING_SEEDS, "medium"):
        assert not set(HELD_OUT) & {spec.kind for spec in drive_set(name)}


def test_who_turns_across_the_oncoming_traffic_has_green_with_it() -> None:
    """Left in the town that keeps to the right, right in the one that keeps to the left."""
    turns = {}
    for town in LOCATIONS:
        scenario, _ = build_drive(DriveSpec(0, "SignalizedJunctionLeftTurn", town, 0))
        gate, signals = scenario.ego.route.gates[0], scenario.cast.signals
        turns[town] = gate.turn
        assert set(signals.green_arms(gate.junction, 8.0)) == {gate.arm, (gate.arm + 2) % 4}
        # Not a red light that is run: their light is green, as the ego vehicle's.
        shown = signal_states(scenario, 8.0)
        lights = [(j.index, arm) for j in scenario.town.junctions if j.signalised for arm in j.arms]
        assert shown[lights.index((gate.junction, (gate.arm + 2) % 4))] == "green"
    assert turns == {"boston-seaport": "left", "singapore-onenorth": "right"}


WITHOUT_LIGHTS = [name for name, kind in KINDS.items() if kind.junction != "lights"]


@pytest.mark.parametrize("town", [*LOCATIONS, TEST_TOWN])
def test_junctions_without_lights_are_found_in_every_town(town: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for who plays a part there; the simulation is left out."""

    def placed(town: Town, script: Script, manoeuvre: str, total: float, rng: Any, actors: Any = None) -> Any:
        if actors is not None:
            actors(lane_route(town, script.keys))
        return town, script

    monkeypatch.setattr(scenarios, "cast_scenario", placed)
    monkeypatch.setattr(scenarios, "goal_of", lambda scenario, kind: 0.0)
    assert len(WITHOUT_LIGHTS) == 4
    for name in WITHOUT_LIGHTS:
        (built, script), _ = build_drive(DriveSpec(0, name, town, 0))
        gate = lane_route(built, script.keys).gates[0]
        ((junction, priority),) = script.priorities.items()
        assert junction == gate.junction
        assert (gate.arm in priority.minor) is (KINDS[name].junction != "goes first")
        assert priority.signed(gate.arm) is (KINDS[name].junction == "stop sign")


def test_a_stop_sign_takes_the_place_of_the_lights() -> None:
    scenario, _ = build_drive(DriveSpec(0, "VanillaNonSignalizedTurnEncounterStopsign", TEST_TOWN, 0))
    gate = scenario.ego.route.gates[0]
    shown = signal_states(scenario, 3.0)
    lights = [(j.index, arm) for j in scenario.town.junctions if j.signalised for arm in j.arms]
    here = {
        arm: shown[lights.index((junction, arm))] for junction, arm in lights if junction == gate.junction
    }
    assert here.pop(gate.arm) == "stop"
    assert {here.pop(arm) for arm in ((gate.arm + 1) % 4, (gate.arm + 3) % 4)} == {""}
    assert set(here.values()) <= {"stop"}
    assert {"red"} < set(shown)  # the other junctions keep theirs
    # The script's driver stops there, in the place where that counts.
    motion, line = scenario.motions[0], gate.stop - EGO_SIZE[0] / 2 - EGO_AHEAD
    standing = motion.s[motion.speed < 0.1]
    assert len(standing) >= 15
    assert np.all((standing > line - 1.0) & (standing < line))


def test_a_drive_that_stops_at_a_red_light_goes_on_behind_it() -> None:
    """Whoever runs the light must be seen to."""
    scenario, goal = build_drive(DriveSpec(0, "stop", "boston-seaport", 0))
    assert goal == scenario.ego.route.gates[0].stop + 12.0
    assert scenario.motions[0].at(WARM_UP + KINDS["stop"].seconds)[0] >= goal

"""Learning from mistakes: the expert's way from wherever a vehicle stands, as records to train on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from spacedrive_jax.data.records import open_records
from spacedrive_jax.driving.driver import Plan
from spacedrive_jax.driving.recovery import (
    CollectedRecords,
    Sway,
    expert_target,
    shifted_recording,
    with_target,
)
from spacedrive_jax.errors import DataError
from spacedrive_jax.world.scenario import build_scenario
from spacedrive_jax.world.town import Town, build_town
from spacedrive_jax.world.world import World
from tests.record_factory import make_record


@pytest.fixture(scope="module")
def town() -> Town:
    return build_town("boston-seaport", np.random.default_rng(0))


@pytest.mark.parametrize(("aside", "turn"), [(0.0, 0.0), (0.8, 0.12), (-0.8, -0.12)])
def test_the_experts_way_leads_back_to_the_lane(town: Town, aside: float, turn: float) -> None:
    scenario = build_scenario(town, "cruise", 4.0, np.random.default_rng(2))
    world = World(scenario)
    world.reset(shift=(aside, turn))
    before = world.state
    target = expert_target(world)
    assert world.state is before
    vehicle = before.vehicle
    assert vehicle is not None
    cos, sin = np.cos(vehicle.yaw), np.sin(vehicle.yaw)
    x, y = target.waypoints[-1]
    end = np.array([vehicle.x + cos * x - sin * y, vehicle.y + sin * x + cos * y])
    _, beside = scenario.ego.route.project(end, scenario.ego.start + 15.0)
    assert abs(beside) < 0.25
    assert np.all(np.diff(np.hypot(*target.waypoints.T)) > 1.0)
    assert abs(target.path[0, 1]) < abs(aside) * 0.3 + 0.15  # the path begins at the vehicle
    record = with_target(make_record(np.random.default_rng(0)), target)
    np.testing.assert_array_equal(record["waypoints"], target.waypoints)
    assert record["waypoint_mask"].all()


def test_a_shifted_recording_begins_beside_the_lane_and_comes_back(town: Town) -> None:
    scenario = build_scenario(town, "cruise", 4.0, np.random.default_rng(2))
    shifted = shifted_recording(scenario, 0.7, 4.5, np.random.default_rng(0))
    assert shifted.driven[:7] == (None,) * 7
    vehicles = [vehicle for vehicle in shifted.driven if vehicle is not None]
    assert len(vehicles) >= 39
    beside = []
    for vehicle, near in ((vehicles[0], shifted.motions[0].s[7]), (vehicles[-1], shifted.motions[0].s[-1])):
        _, aside = scenario.ego.route.project(np.array([vehicle.x, vehicle.y]), near)
        beside.append(abs(aside))
    route = scenario.ego.route.pose(shifted.motions[0].s[7])
    turned = abs(np.degrees(vehicles[0].yaw - route[2]))
    assert 0.3 <= beside[0] <= 1.0
    assert 5.0 <= turned <= 10.0
    assert beside[1] < 0.2
    again = shifted_recording(scenario, 0.7, 4.5, np.random.default_rng(0))
    assert again.driven == shifted.driven


def test_who_sways_keeps_beside_the_line_for_a_while_and_does_not_turn_on_the_spot() -> None:
    straight = np.stack([3.0 * np.arange(1, 7), np.zeros(6)], axis=1)
    path = np.stack([np.arange(1.0, 21.0), np.zeros(20)], axis=1)
    sway = Sway(np.random.default_rng(0))
    plans = [sway.disturb(Plan(straight, path=path)) for _ in range(200)]
    aside = np.array([plan.waypoints[-1, 1] for plan in plans])
    pace = np.array([plan.waypoints[-1, 0] for plan in plans]) / straight[-1, 0]
    quiet = aside == 0.0
    assert 0.1 < quiet.mean() < 0.5
    assert ((np.abs(aside[~quiet]) >= 0.3) & (np.abs(aside[~quiet]) <= 1.0)).all()
    assert ((pace[~quiet] >= 0.6) & (pace[~quiet] <= 1.3)).all()
    assert (aside > 0).any()
    assert (aside < 0).any()
    changes = np.flatnonzero(np.diff(aside))
    assert np.diff(changes).max() >= 2  # decisions in a row
    for plan in plans:
        assert plan.path is not None
        assert plan.path[-1, 1] == plan.waypoints[-1, 1]
        assert abs(plan.path[0, 1]) <= 0.25
    assert not sway.disturb(Plan(np.zeros((6, 2)))).waypoints.any()


def test_who_perturbs_speeds_too_stops_for_nothing_now_and_then() -> None:
    straight = np.stack([np.arange(1, 7) * 4.0, np.zeros(6)], axis=1)

    def paces(*, slows: bool) -> list[float]:
        sway = Sway(np.random.default_rng(0), slows=slows)
        return [float(sway.disturb(Plan(straight)).waypoints[0, 0]) / 4.0 for _ in range(400)]

    assert min(paces(slows=False)) >= 0.6
    slow = np.array(paces(slows=True))
    assert slow.min() == 0.0
    assert 0.05 < float(np.mean(slow == 0.0)) < 0.3
    assert 0.2 < float(np.mean(slow < 0.6)) < 0.6
    assert 0.15 < float(np.mean(slow == 1.0)) < 0.5


def test_collected_records_are_a_folder_that_training_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second, third = (make_record(rng) for _ in range(3))
    records = CollectedRecords(tmp_path / "collected")
    records.add("b", [third])
    records.add("a", [first, second])
    again = CollectedRecords(tmp_path / "collected")  # as after a resume
    assert again.finish(["a", "none", "b"], {"policy": "test"}) == 3
    tokens = [record["token"] for record in open_records(tmp_path / "collected", "train")]
    assert tokens == [record["token"] for record in (first, second, third)]
    assert again.finish(["a", "none", "b"], {"policy": "test"}) == 3  # `drive --resume` of a whole run
    assert not [path.name for path in (tmp_path / "collected").iterdir() if "parts" in path.name]
    with pytest.raises(DataError, match="no drive left a record"):
        CollectedRecords(tmp_path / "empty").finish(["a"], {})


def test_killed_while_it_tidies_up_a_collection_keeps_all_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = CollectedRecords(tmp_path / "collected")
    for drive in "ab":
        records.add(drive, [make_record(np.random.default_rng(0))])

    def killed(folder: Path, **options: bool) -> None:
        next(iter(folder.iterdir())).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            records.finish(["a", "b"], {})
    assert CollectedRecords(tmp_path / "collected").finish(["a", "b"], {}) == 2
    assert len(open_records(tmp_path / "collected")) == 2
    assert not list((tmp_path / "collected").glob(".*"))

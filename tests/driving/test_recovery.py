"""Learning from mistakes: the expert's way from wherever a vehicle stands, as records to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spacedrive_jax.data.records import open_records
from spacedrive_jax.driving.recovery import CollectedRecords, expert_target, with_target
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
    with pytest.raises(DataError, match="no drive left a record"):
        CollectedRecords(tmp_path / "empty").finish(["a"], {})

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spacedrive_jax.cli.evaluate import ScoreBench2Drive
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.evaluation.bench2drive import (
    ABILITIES,
    ability_rates,
    comfort,
    read_results,
    read_route_set,
    score_routes,
)

ROOT = Path(__file__).resolve().parents[2]
SLOW = "Average speed is {}% of the surrounding traffic's one"


def record(route: int, **changes: Any) -> dict[str, Any]:
    infractions = {kind: [] for kind in ("collisions_vehicle", "red_light", "min_speed_infractions")}
    return {
        "route_id": f"RouteScenario_{route}_rep0",
        "scenario_name": changes.pop("scenario", "ParkingCutIn") + "_1",
        "save_name": f"route{route}",
        "status": changes.pop("status", "Completed"),
        "infractions": infractions | changes.pop("infractions", {}),
        "scores": {"score_route": 100, "score_penalty": 1.0, "score_composed": 100.0}
        | changes.pop("scores", {}),
        **changes,
    }


def write(path: Path, *records: object) -> Path:
    path.write_text(json.dumps({"_checkpoint": {"records": list(records)}}))
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Perfect but slow; a collision; a failure half way; speed checks that do not count."""
    return write(
        tmp_path / "results.json",
        record(1, infractions={"min_speed_infractions": [SLOW.format(50), SLOW.format("70.5")]}),
        record(2, infractions={"collisions_vehicle": ["bump"]}, scores={"score_composed": 60.0}),
        record(
            3,
            status="Failed - Agent got blocked",
            scores={"score_route": 50.0, "score_composed": 50.0},
            infractions={"min_speed_infractions": [SLOW.format("2000.0"), SLOW.format(90)]},
        ),
        record(4, status="Perfect", infractions={"min_speed_infractions": [SLOW.format("1500.1")]}),
    )


def test_missing_routes_count_as_zero(results: Path) -> None:
    result = ScoreBench2Drive((results,)).run()
    assert result["driving_score"] == pytest.approx((100 + 60 + 50 + 100) / 220)
    assert result["success_rate"] == pytest.approx(100 * 2 / 220)
    assert result["efficiency"] == pytest.approx(((50 + 70.5) / 2 + 90) / 2)
    assert (result["routes"], result["route_set"], result["missing"]) == (4, 220, 216)
    assert result["without_speed"] == ("2", "4")
    assert result["inconsistent"] == ()
    assert result["statuses"] == {"Completed": 2, "Failed - Agent got blocked": 1, "Perfect": 1}


def test_route_set_from_a_file(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    routes = tmp_path / "set.xml"
    routes.write_text('<routes><route id="1" town="T"/><route id="2"/><route id="9"/></routes>')
    result = ScoreBench2Drive((results,), routes=routes).run()
    assert result["driving_score"] == pytest.approx(160 / 3)
    assert result["success_rate"] == pytest.approx(100 / 3)
    assert result["missing_routes"] == ("9",)
    assert result["foreign_routes"] == ("3", "4")
    assert "not in the set and not counted: 3, 4" in capsys.readouterr().out
    (tmp_path / "set.json").write_text("[1, 2, 9]")
    (tmp_path / "set.txt").write_text("1\n2\n\n9\n")
    assert read_route_set(tmp_path / "set.json") == read_route_set(tmp_path / "set.txt") == ["1", "2", "9"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.xml", "<routes>", "is not XML"),
        ("a.xml", "<routes><route/></routes>", "has no id"),
        ("a.xml", "<routes/>", "holds no route"),
        ("a.xml", '<!DOCTYPE r [<!ENTITY a "b">]><routes/>', "declares XML entities"),
        ("a.json", '{"1": 2}', "must be a list of route numbers"),
        ("a.json", "[1,", "is not JSON"),
        ("a.json", "[1, true]", "must be a list of route numbers"),
        ("a.txt", "1\n1\n", "1 occur more than once"),
        ("a.txt", "# our routes\n1\n", "'# our routes' is no route number"),
        ("a.txt", "1, 2\n", "'1, 2' is no route number"),
        ("A.XML", "<routes>", "is not XML"),
    ],
)
def test_bad_route_sets(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SpaceDriveError, match=problem):
        read_route_set(tmp_path / name)


def test_shards_are_one_run(results: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "shard.json", record(5))
    assert ScoreBench2Drive((results, other)).run()["routes"] == 5
    with pytest.raises(SpaceDriveError, match="route 1 occurs twice"):
        read_results([results, results])


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"route_id": 7}, '"route_id" must be a text'),
        ({"route_id": "seven"}, '"route_id" must look like'),
        ({"status": None}, '"status" must be a text'),
        ({"scores": {"score_composed": "98"}}, '"score_composed" must be a number'),
        ({"scores": {"score_composed": float("nan")}}, '"score_composed" must be within 0 and 100'),
        ({"infractions": {"red_light": "once"}}, '"red_light" must be a list'),
    ],
)
def test_bad_records(tmp_path: Path, bad: dict[str, Any], problem: str) -> None:
    path = write(tmp_path / "r.json", record(1), record(2) | bad if "route_id" in bad else record(2, **bad))
    with pytest.raises(SpaceDriveError, match=r"r\.json, record 1: ") as caught:
        read_results([path])
    assert problem in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(SpaceDriveError, match="cannot read"):
        read_results([tmp_path / "absent.json"])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SpaceDriveError, match="no Bench2Drive result file"):
        read_results([tmp_path / "list.json"])
    with pytest.raises(SpaceDriveError, match="221 results for a set of 220"):
        score_routes(read_results([write(tmp_path / "many.json", *map(record, range(221)))]))
    with pytest.raises(SpaceDriveError, match="no result of a route in the set"):
        score_routes([], ["1"])


@pytest.mark.parametrize("kind", ["min_speed_infractions", "outside_route_lanes"])
@pytest.mark.parametrize("said", ["slow", "is 50,5% of", "is 1.5e-05% of", "is -3% of", "is nan% of"])
def test_percentages_that_cannot_be_read(tmp_path: Path, kind: str, said: str) -> None:
    path = write(tmp_path / "x.json", record(1, infractions={kind: [said]}))
    with pytest.raises(SpaceDriveError, match=f"route 1: no percentage in {kind} '{said}'"):
        ScoreBench2Drive((path,)).run()


def test_scores_that_do_not_follow_are_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.json",
        record(1, infractions={"red_light": ["ran"]}, scores={"score_composed": 100.0}),
        record(
            2,
            infractions={"outside_route_lanes": ["outside for 4 meters (6.12% of the completed route)"]},
            scores={"score_composed": 93.88},
        ),
    )
    assert score_routes(read_results([path])).inconsistent == ("1",)


def test_abilities(tmp_path: Path) -> None:
    assert {name: len(types) for name, types in ABILITIES.items()} == {
        "overtaking": 9,
        "merging": 16,
        "emergency_brake": 12,
        "give_way": 2,
        "traffic_signs": 19,
    }
    path = write(
        tmp_path / "r.json",
        record(1, scenario="Accident"),
        record(2, scenario="T_Junction", status="Failed - x", scores={"score_route": 60.0}),
        record(3, scenario="T_Junction", status="Failed - x", scores={"score_route": 40.0}),
        record(4, scenario="EnterActorFlow", infractions={"red_light": ["ran"]}),
        record(5, scenario="InvadingTurn"),
        record(6, scenario="ControlLoss"),
    )
    results = read_results([path])
    rates = ability_rates(results)
    assert (rates["overtaking"], rates["merging"], rates["traffic_signs"], rates["mean"]) == (
        100,
        0,
        None,
        None,
    )
    rates = ability_rates(results, {"2": 0.5, "3": 0.5, "4": 0.5})
    assert rates["traffic_signs"] == pytest.approx(100 / 3)
    assert rates["mean"] == pytest.approx((100 + 0 + 100 + 100 + 100 / 3) / 5)
    successes = [result.success for result in results if result.route in ("2", "3", "4")]
    older = 100 * (1 + sum(successes)) / 6
    assert rates["traffic_signs_0_0_3"] == pytest.approx(older)
    assert rates["mean_0_0_3"] == pytest.approx((100 + 0 + 100 + 100 + older) / 5)
    with pytest.raises(SpaceDriveError, match=r"route 2 .* is missing"):
        ability_rates(results, {})
    junctions = tmp_path / "junctions.json"
    junctions.write_text('{"2": 0.5, "3": 0.5, "4": 0.5}')
    assert ScoreBench2Drive((path,), junctions=junctions).run()["abilities"] == rates
    junctions.write_text('{"2": "far"}')
    with pytest.raises(SpaceDriveError, match="must be an object of route number"):
        ScoreBench2Drive((path,), junctions=junctions).run()


def motion(steps: int, acceleration: float = 0.0, yaw_rate: float = 0.0) -> np.ndarray:
    """Driving along x: acceleration ahead, turning at a constant rate."""
    values = np.zeros((steps, 4, 3))
    values[:, 0, 0], values[:, 1, 2], values[:, 2, 0], values[:, 3, 1] = acceleration, yaw_rate, 1, 1
    return values


def test_comfort() -> None:
    assert comfort(motion(45)) == 1
    assert comfort(motion(45, acceleration=2.5)) == 0  # above 2.40 m/s²
    assert comfort(motion(45, acceleration=-4.0)) == 1
    assert comfort(motion(45, yaw_rate=1.0)) == 0  # above 0.95
    jump = motion(60)
    jump[30:, 0, 0] = 2.0  # a jerk in the second of three pieces
    assert comfort(jump) == pytest.approx(2 / 3)
    jump[30:, 0, 0] = 0.0
    jump[50:] = motion(10, acceleration=2.5)
    assert comfort(jump[:59]) == 1  # the tail of 19 steps is dropped
    assert comfort(motion(10)) == 1
    with pytest.raises(SpaceDriveError, match="at least 3 steps"):
        comfort(motion(2))


def test_comfort_from_logs(results: Path, tmp_path: Path) -> None:
    names = ("acceleration", "angular_velocity", "forward_vector", "right_vector")
    for route, acceleration in ((1, 0.0), (2, 3.0)):
        folder = tmp_path / "logs" / f"route{route}"
        folder.mkdir(parents=True)
        steps = motion(40, acceleration).tolist()
        content = {str(index): dict(zip(names, step, strict=True)) for index, step in enumerate(steps)}
        (folder / "metric_info.json").write_text(json.dumps(content))
    result = ScoreBench2Drive((results,), metric_info=tmp_path / "logs").run()
    assert result["comfort"] == 50
    assert result["without_motion"] == ["3", "4"]
    (folder / "metric_info.json").write_text('{"0": {"acceleration": [0, 0]}}')
    with pytest.raises(SpaceDriveError, match=r"route 2: .*every step must have acceleration"):
        ScoreBench2Drive((results,), metric_info=tmp_path / "logs").run()


@pytest.mark.parametrize(
    ("name", "routes", "score", "success", "efficiency"),
    [
        ("VAD.json", 213, 42.350736, 15.0, 157.9496),
        ("tfpp_b2d_traj_merged.json", 220, 84.205907, 67.272727, 245.1038),
    ],
)
def test_published_runs(name: str, routes: int, score: float, success: float, efficiency: float) -> None:
    path = ROOT.parent / "shared" / "bench2drive" / name
    if not path.is_file():
        pytest.skip("the published result files are not on this machine")
    result = ScoreBench2Drive((path,)).run()
    assert result["driving_score"] == pytest.approx(score, abs=1e-6)
    assert result["success_rate"] == pytest.approx(success, abs=1e-6)
    assert result["efficiency"] == pytest.approx(efficiency, abs=1e-4)
    assert (result["routes"], result["missing"]) == (routes, 220 - routes)
    assert result["inconsistent"] == ()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 5000, b'{"_checkpoint": 1, "_checkpoint": 2}'])
def test_damaged_result_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(SpaceDriveError, match=r"cannot read .*r\.json"):
        read_results([tmp_path / "r.json"])

"""Every penalty of Bench2Drive on hand-made drives, on both sides of its threshold."""

from __future__ import annotations

import numpy as np
import pytest

from spacedrive_jax.driving.infractions import (
    DEVIATION,
    collisions,
    completion,
    messages,
    outside_metres,
    overlapping,
    red_lights,
    speed_percentages,
    stop_signs,
    waits_at_red,
    went_wrong,
)
from spacedrive_jax.driving.results import drive_record, metric_info, result_file
from spacedrive_jax.evaluation.bench2drive import PENALTIES, read_results, score_routes
from spacedrive_jax.json_files import write_json
from spacedrive_jax.world.scenario import EGO_AHEAD
from spacedrive_jax.world.traffic import Priority
from tests.driving.hand_made import LANES, Other, cruise, make_log

FRONT = 3.4
"""Metres from the rear axle to the front of the ego vehicle's box."""


def record_of(log, ending="goal", failures=None):
    return drive_record(
        log,
        LANES,
        index=0,
        number=7,
        kind="cruise",
        town="boston-seaport",
        ending=ending,
        expert_metres=log.goal - log.start,
        decisions=(),
        failures=failures or {},
    )


def test_a_clean_drive_is_perfect() -> None:
    record = record_of(make_log(cruise(140.0)))
    assert record["status"] == "Perfect"
    assert record["scores"] == {"score_route": 100.0, "score_penalty": 1.0, "score_composed": 100.0}
    assert {type(score) for score in record["scores"].values()} == {float}


def test_checks_of_the_speed_are_entries_and_no_offence(tmp_path) -> None:
    """As in the evaluator's own files: every entry counts, and only who has none is perfect."""
    x = cruise(140.0)
    beside = np.stack([x + 10, np.full_like(x, 1.75), np.full_like(x, np.pi)], axis=1)
    record = record_of(make_log(x, others=(Other("vehicle.car", beside, 16.0),)))
    assert (record["status"], record["num_infractions"]) == ("Completed", 20)
    assert record["scores"]["score_composed"] == 100.0
    write_json(tmp_path / "results.json", result_file([record], 1))
    assert score_routes(read_results([tmp_path / "results.json"]), ["7"]).success_rate == 100.0


def test_who_gets_nowhere_keeps_its_penalty() -> None:
    wall = Other("vehicle.car", np.array([12.0, -1.75, 0.0]))
    scores = record_of(make_log(10.0 - 0.05 * np.arange(20), others=(wall,)), "blocked")["scores"]
    assert scores == {"score_route": 0.0, "score_penalty": 0.6, "score_composed": 0.0}


@pytest.mark.parametrize(
    ("category", "kind"),
    [
        ("human.pedestrian.adult", "pedestrian"),
        ("vehicle.car", "vehicle"),
        ("movable_object.trafficcone", "layout"),
    ],
)
def test_a_collision_costs_by_its_partner(category: str, kind: str) -> None:
    inside = Other(category, np.array([60.0, -1.75, 0.0]))
    record = record_of(make_log(cruise(140.0), others=(inside,)))
    assert len(record["infractions"][f"collisions_{kind}"]) == 1
    assert record["status"] == "Completed"
    assert record["scores"]["score_composed"] == pytest.approx(100 * PENALTIES[f"collisions_{kind}"])


@pytest.mark.parametrize(("gap", "touching"), [(0.02, False), (-0.02, True)])
def test_boxes_touch_or_do_not(gap: float, touching: bool) -> None:
    beside = Other("vehicle.car", np.array([60.0, -1.75 + 0.95 + 1.0 + gap, 0.0]))
    assert bool(collisions(make_log(cruise(140.0), others=(beside,)))) is touching
    askew = np.array([[0, 0, 0], [3.0 + np.sqrt(2.0) + gap, 0, np.pi / 4]])
    assert bool(len(overlapping(askew, np.array([[3.0, 1.0], [1.0, 1.0]])))) is touching


@pytest.mark.parametrize(("speed", "counted"), [(0.09, False), (0.11, True)])
def test_a_standing_vehicle_collides_with_nobody(speed: float, counted: bool) -> None:
    other = Other("vehicle.car", np.array([12.0, -1.75, 0.0]))
    assert bool(collisions(make_log(10 + speed * 0.1 * np.arange(20), others=(other,)))) is counted


def test_a_partner_counts_again_after_five_seconds_and_five_metres() -> None:
    x = cruise(140.0, speed=4.0)
    along = np.stack([x + 2.0, np.full_like(x, -1.75), np.zeros_like(x)], axis=1)
    hits = collisions(make_log(x, others=(Other("vehicle.car", along, 4.0),)))
    assert [hit.step for hit in hits[:3]] == [0, 50, 100]
    slow = cruise(8.0, speed=0.8)
    along = np.stack([slow + 2.0, np.full_like(slow, -1.75), np.zeros_like(slow)], axis=1)
    hits = collisions(make_log(slow, others=(Other("vehicle.car", along, 0.8),)))
    assert [hit.step for hit in hits] == [0, 63]  # 5 s go by after 4 m: the metres decide


@pytest.mark.parametrize(("green", "count"), [(True, 0), (False, 1)])
def test_the_rear_end_over_the_stop_line_at_red(green: bool, count: int) -> None:
    log = make_log(cruise(200.0), green=green, goal=205.0)
    assert len(red_lights(log, LANES)) == count
    assert len(messages(log, LANES)["red_light"]) == count


SIGN = Priority((2,), stop=True)
LINE = 200.0 - 5.2 - EGO_AHEAD
"""The rear axle's x at which the vehicle's centre is on the stop line."""


def test_a_stop_sign_that_is_run_costs_a_fifth_in_the_evaluators_words() -> None:
    log = make_log(cruise(200.0), goal=205.0, priority=SIGN)
    record = record_of(log)
    # At the kerb, 0.8 m beside a road of 3.5 m; the number counts junctions and their arms.
    assert record["infractions"]["stop_infraction"] == [
        "Agent ran a stop with id=2 at (x=194.800, y=-4.300, z=0.0)"
    ]
    assert record["scores"]["score_composed"] == pytest.approx(100 * PENALTIES["stop_infraction"])
    assert (record["status"], record["infractions"]["red_light"]) == ("Completed", [])
    (run,) = stop_signs(log, LANES)
    assert went_wrong(log, LANES, "goal") == run.step


@pytest.mark.parametrize("priority", [None, Priority((2,)), Priority((0, 1), stop=True)])
def test_no_sign_stands_where_there_are_lights_or_no_stop_or_at_another_arm(
    priority: Priority | None,
) -> None:
    assert not stop_signs(make_log(cruise(200.0), goal=205.0, priority=priority), LANES)


@pytest.mark.parametrize(("before", "runs"), [(3.95, 0), (4.05, 1), (-1.15, 0), (-1.25, 1)])
def test_only_who_stands_near_the_line_has_stopped(before: float, runs: int) -> None:
    """From 4 m before it to where it leaves the sign's box."""
    to_it = np.linspace(10.0, LINE - before, 300)
    x = np.concatenate([to_it, np.full(9, to_it[-1]), LINE - before + np.linspace(0.3, 20.0, 60)])
    assert len(stop_signs(make_log(x, goal=240.0, priority=SIGN), LANES)) == runs


@pytest.mark.parametrize(("speed", "runs"), [(0.09, 0), (0.11, 1)])
def test_who_rolls_over_the_line_has_not_stopped(speed: float, runs: int) -> None:
    rolling = LINE - 2.0 + speed * 0.1 * np.arange(20)
    x = np.concatenate([np.linspace(10.0, rolling[0] - 0.3, 300), rolling, rolling[-1] + np.arange(1, 30)])
    assert len(stop_signs(make_log(x, goal=240.0, priority=SIGN), LANES)) == runs


@pytest.mark.parametrize(("beyond", "runs"), [(1.15, 0), (1.25, 1)])
def test_a_sign_is_run_when_its_box_is_left(beyond: float, runs: int) -> None:
    x = np.linspace(10.0, LINE + beyond, 300)
    assert len(stop_signs(make_log(x, goal=240.0, priority=SIGN), LANES)) == runs


@pytest.mark.parametrize(("y", "yaw", "runs"), [(0.05, 0.0, 0), (-0.05, 0.0, 1), (-1.75, np.pi, 0)])
def test_a_sign_is_for_its_lane_and_direction(y: float, yaw: float, runs: int) -> None:
    log = make_log(cruise(200.0), y, yaw=yaw, goal=240.0, priority=SIGN)
    assert len(stop_signs(log, LANES)) == runs


def test_waiting_before_or_on_the_line_is_no_offence() -> None:
    stop = 200.0 - 5.2
    for rear in (stop - FRONT - 1.0, stop + 0.5):  # before it, and with the tail still behind it
        x = np.concatenate([cruise(rear - 10.0), np.full(30, rear)])
        assert not red_lights(make_log(x, green=False), LANES)
    gone = np.concatenate([cruise(stop + 3.0 - 10.0), np.full(30, stop + 3.0)])
    assert len(red_lights(make_log(gone, green=False), LANES)) == 1


@pytest.mark.parametrize(("y", "outside"), [(-1.75 - 2.2, False), (-1.75 - 2.3, True)])
def test_the_lane_ends_half_a_metre_beyond_its_edge(y: float, outside: bool) -> None:
    log = make_log(cruise(140.0), y)
    assert outside_metres(log, LANES) == pytest.approx(140.0 if outside else 0.0)


def test_the_score_loses_the_share_driven_outside() -> None:
    x = cruise(140.0)
    y = np.where((x > 50) & (x <= 85), -1.75 - 3.0, -1.75)
    record = record_of(make_log(x, y))
    (text,) = record["infractions"]["outside_route_lanes"]
    percent = float(text.split("(")[1].split("%")[0])
    assert 20 < percent < 30
    assert record["scores"]["score_composed"] == pytest.approx(100 - percent, abs=1e-4)


@pytest.mark.parametrize(("yaw", "against"), [(0.0, True), (np.pi, False)])
def test_the_other_lane_is_outside_unless_it_leads_the_way(yaw: float, against: bool) -> None:
    log = make_log(cruise(100.0), 1.75, yaw=yaw)
    assert (outside_metres(log, LANES) > 90.0) is against


@pytest.mark.parametrize(
    ("metres", "percent"), [(139.0, 100.0), (138.5, 138.5 / 1.4), (70.0, 50.0), (0.8, 0.8 / 1.4)]
)
def test_completion(metres: float, percent: float) -> None:
    log = make_log(10.0 + np.linspace(0.0, metres, 200), goal=150.0)
    assert completion(log) == pytest.approx(percent)


def test_a_short_route_is_complete_where_its_drive_ends() -> None:
    for left, percent in ((0.24, 100.0), (0.26, 97.4)):
        log = make_log(10.0 + np.linspace(0.0, 10.0 - left, 30), goal=20.0)
        assert completion(log) == pytest.approx(percent)


def test_a_long_route_is_complete_within_its_last_ten_metres_only() -> None:
    far = make_log(10.0 + np.linspace(0.0, 1985.0, 300), goal=2010.0)
    assert completion(far) == pytest.approx(99.25)
    assert completion(make_log(10.0 + np.linspace(0.0, 1991.0, 300), goal=2010.0)) == 100.0


@pytest.mark.parametrize(
    ("ending", "kind"),
    [("deviated", "route_dev"), ("blocked", "vehicle_blocked"), ("timeout", "route_timeout")],
)
def test_endings_are_listed_and_fail(ending: str, kind: str) -> None:
    record = record_of(make_log(cruise(70.0)), ending)
    assert record["status"].startswith("Failed - ")
    assert len(record["infractions"][kind]) == 1
    assert record["scores"]["score_composed"] == pytest.approx(50.0, abs=0.6)
    assert DEVIATION == 30.0


def test_a_crashed_policy_fails_with_its_failures_named() -> None:
    record = record_of(make_log(cruise(70.0)), "crashed", {"not finite": 3})
    assert record["status"] == "Failed - Agent crashed"
    assert record["failures"] == {"not finite": 3}


@pytest.mark.parametrize(
    ("gap", "green", "waits"),
    [
        (14.0, False, True),
        (14.0, True, False),
        (16.0, False, False),
        (-2.4, False, True),
        (-2.6, False, False),
    ],
)
def test_a_red_light_ahead_excuses_standing(gap: float, green: bool, waits: bool) -> None:
    stop = 200.0 - 5.2
    log = make_log(np.full(5, stop - gap - FRONT), green=green)
    assert waits_at_red(log.scenario, float(log.s[4]), float(log.time[4])) is waits


def test_speed_is_held_against_the_traffic_around() -> None:
    x = cruise(140.0)
    beside = np.stack([x + 10, np.full_like(x, 1.75), np.full_like(x, np.pi)], axis=1)
    log = make_log(x, others=(Other("vehicle.car", beside, 16.0),))
    assert len(speed_percentages(log)) == 20
    assert speed_percentages(log) == pytest.approx([50.0] * 20, abs=0.1)
    far = beside + np.array([0.0, 60.0, 0.0])
    assert not speed_percentages(make_log(x, others=(Other("vehicle.car", far, 16.0),)))
    assert not speed_percentages(make_log(x, others=(Other("human.pedestrian.adult", beside, 1.0),)))
    for metres, count in ((49.9, 20), (50.1, 0)):
        ahead = np.stack([x + 0.65 + metres, np.full_like(x, -1.75), np.zeros_like(x)], axis=1)
        log = make_log(x, others=(Other("vehicle.car", ahead, 16.0),))
        assert len(speed_percentages(log)) == count


def test_a_stretch_counts_when_its_end_is_reached() -> None:
    x = np.concatenate([cruise(66.0), np.full(50, 76.0)])  # stretches are 7 m long, and end at 73 and 80
    beside = np.stack([x + 10, np.full_like(x, 1.75), np.full_like(x, np.pi)], axis=1)
    log = make_log(x, others=(Other("vehicle.car", beside, 16.0),))
    assert speed_percentages(log) == pytest.approx([50.0] * 9, abs=0.1)


def test_a_drive_goes_wrong_at_its_first_offence_or_at_its_end() -> None:
    x = cruise(140.0)
    wall = Other("vehicle.car", np.array([60.0, -1.75, 0.0]))
    hit = make_log(x, others=(wall,))
    (collision,) = collisions(hit)
    assert went_wrong(hit, LANES, "goal") == collision.step
    aside = np.where(x > 30.0, -1.75 - 3.0, -1.75)
    assert went_wrong(make_log(x, aside, others=(wall,)), LANES, "goal") == int(np.argmax(x > 30.0))
    assert went_wrong(make_log(x), LANES, "goal") is None
    assert went_wrong(make_log(x), LANES, "timeout") == len(x) - 1


def test_our_scorer_reads_the_files_as_they_are(tmp_path) -> None:
    other = Other("vehicle.car", np.array([60.0, -1.75, 0.0]))
    records = [record_of(make_log(cruise(140.0), others=(other,)))]
    write_json(tmp_path / "results.json", result_file(records, 1))
    results = read_results([tmp_path / "results.json"])
    scores = score_routes(results, ["7"])
    assert scores.driving_score == pytest.approx(60.0)
    assert scores.success_rate == 0.0
    assert not scores.inconsistent


def test_metric_info_is_in_carlas_axes() -> None:
    t = STEP_TIMES = 0.1 * np.arange(60)
    yaw = 0.2 * t  # turning left at 5 m/s
    x, y = 25 * np.sin(yaw), 25 * (1 - np.cos(yaw))
    info = metric_info(make_log(x + 20, y - 1.75, yaw=yaw))
    middle = info["30"]
    assert len(info) == len(STEP_TIMES)
    assert middle["angular_velocity"][2] == pytest.approx(-0.2, abs=1e-6)
    right, forward = np.array(middle["right_vector"]), np.array(middle["forward_vector"])
    assert right @ forward == pytest.approx(0.0)
    assert np.array(middle["acceleration"]) @ right == pytest.approx(-1.0, abs=0.01)  # to the left

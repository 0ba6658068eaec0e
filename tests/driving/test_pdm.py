"""Every PDM-style sub-score on hand-made drives, on both sides of its threshold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from spacedrive_jax.driving.drive_log import DriveLog, script_log
from spacedrive_jax.driving.driver import Decision, Plan
from spacedrive_jax.driving.pdm import (
    PdmScore,
    agree,
    at_fault,
    comfortable,
    extended_comfort,
    neuro_ncap,
    pdm_score,
    script_decisions,
    simulated,
)
from spacedrive_jax.world.traffic import Motion
from spacedrive_jax.world.vehicle import VehicleState
from tests.driving.hand_made import LANES, Other, cruise, make_log


def decided(*speeds: float | None, curvature: float = 0.0) -> tuple[Decision, ...]:
    """Decisions of a car at 8 m/s that goes straight on, half a second apart: the speeds planned."""
    found = []
    for number, speed in enumerate(speeds):
        along = 0.5 * (speed or 0.0) * np.arange(1, 7)
        plan = None if speed is None else Plan(np.stack([along, curvature * along * along / 2], axis=1))
        vehicle = VehicleState(10.0 + 4.0 * number, -1.75, 0.0, 8.0)
        found.append(Decision(0.5 * number, vehicle, plan))
    return tuple(found)


CALM = decided(8.0, 8.0)


def score(log, expert_metres: float = 140.0) -> PdmScore:
    return pdm_score(log, LANES, expert_metres, CALM)


def test_a_clean_drive_has_all_points() -> None:
    result = score(make_log(cruise(140.0)))
    assert result == PdmScore(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert result.pdms == result.epdms() == 1.0


def test_formulas() -> None:
    parts = PdmScore(0.5, 1.0, 0.5, 1.0, 0.8, 1.0, 0.0, 1.0, 1.0)
    assert parts.pdms == pytest.approx(0.5 * (4 + 5 + 2) / 12)
    assert parts.epdms() == pytest.approx(0.25 * (4 + 5 + 0 + 2 + 2) / 16)
    rough = dataclasses.replace(parts, extended_comfort=0.0)
    assert (rough.pdms, rough.epdms()) == (parts.pdms, pytest.approx(0.25 * (4 + 5 + 0 + 2 + 0) / 16))
    unknown = dataclasses.replace(parts, extended_comfort=None)
    assert (unknown.pdms, unknown.epdms()) == (parts.pdms, pytest.approx(0.25 * (4 + 5 + 0 + 2) / 14))


def test_the_script_is_scored_as_far_as_it_drives_to_the_goal() -> None:
    s = cruise(150.0, start=8.0)
    motion = Motion(s, np.full(len(s), 8.0), np.zeros(len(s)))
    log = script_log(dataclasses.replace(make_log(s).scenario, motions=(motion,)), 1.0, 100.0)
    assert (log.time[0], log.start, len(log.time)) == (1.0, 16.0, 106)
    assert log.s[-2] < 100.0 <= log.s[-1]
    np.testing.assert_allclose(
        log.ego[:, :4], np.stack([log.s, 0 * log.s - 1.75, 0 * log.s, 0 * log.s + 8], 1)
    )
    assert score(log, 84.0) == PdmScore(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def test_what_the_reference_fails_is_excused() -> None:
    parts = PdmScore(1.0, 0.0, 0.5, 1.0, 0.8, 0.0, 0.0, 1.0, 0.0)
    reference = PdmScore(1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0)
    assert parts.epdms() == 0.0
    # Its drivable area and its lane; the time to collision was kept, and half a point is no failure.
    assert parts.epdms(reference) == pytest.approx(0.5 * (4 + 0 + 2 + 2 + 0) / 16)
    rough = dataclasses.replace(reference, extended_comfort=0.0)
    assert parts.epdms(rough) == pytest.approx(0.5 * (4 + 0 + 2 + 2 + 2) / 16)
    unknown = dataclasses.replace(parts, extended_comfort=None)
    assert unknown.epdms(rough) == pytest.approx(0.5 * (4 + 0 + 2 + 2) / 14)


@pytest.mark.parametrize(("category", "value"), [("vehicle.car", 0.0), ("movable_object.barrier", 0.5)])
def test_at_fault_with_what_stands(category: str, value: float) -> None:
    log = make_log(cruise(140.0), others=(Other(category, np.array([60.0, -1.75, 0.0])),))
    assert score(log).no_collision == value


def test_a_hit_from_behind_is_not_the_ego_vehicles_fault_a_hit_with_the_front_is() -> None:
    x = cruise(60.0, speed=4.0)
    faster = np.stack([x - 8.0 + 0.3 * np.arange(len(x)), np.full_like(x, -1.75), np.zeros_like(x)], axis=1)
    steps = 30
    log = make_log(x[:steps], others=(Other("vehicle.car", faster[:steps], 7.0),))
    assert score(log).no_collision == 1.0
    slower = np.stack([x + 8.0 - 0.3 * np.arange(len(x)), np.full_like(x, -1.75), np.zeros_like(x)], axis=1)
    assert score(make_log(x[:steps], others=(Other("vehicle.car", slower[:steps], 1.0),))).no_collision == 0.0


@pytest.mark.parametrize(("y", "value"), [(-1.75, 1.0), (-0.8, 0.0)])
def test_a_hit_with_the_side_is_at_fault_only_outside_one_lane(y: float, value: float) -> None:
    x = cruise(40.0, speed=4.0)
    drift = np.stack([x + 0.5, np.linspace(2.5, y + 1.8, len(x)), np.zeros_like(x)], axis=1)
    log = make_log(x, y, others=(Other("vehicle.car", drift, 4.0),))
    assert score(log).no_collision == value


@pytest.mark.parametrize(("edge", "value"), [(0.28, 1.0), (0.32, 0.0)])
def test_corners_stay_on_the_road_to_within_its_tolerance(edge: float, value: float) -> None:
    log = make_log(cruise(100.0), -3.5 - edge + 0.865)
    assert score(log).drivable_area == value


@pytest.mark.parametrize(("speed", "value"), [(1.9, 1.0), (2.1, 0.5), (5.9, 0.5), (6.1, 0.0)])
def test_metres_against_traffic_within_a_second(speed: float, value: float) -> None:
    log = make_log(cruise(30.0, speed=speed), 1.75)
    assert score(log).driving_direction == value


def test_a_red_light_takes_all() -> None:
    log = make_log(cruise(200.0), green=False)
    assert score(log).traffic_light == 0.0
    assert score(log).epdms() == 0.0
    assert score(make_log(cruise(200.0))).traffic_light == 1.0


@pytest.mark.parametrize(("expert", "value"), [(140.0, 0.5), (35.0, 1.0), (4.9, 1.0)])
def test_progress_is_the_experts_share(expert: float, value: float) -> None:
    assert score(make_log(cruise(70.0)), expert).progress == pytest.approx(value, abs=0.01)


@pytest.mark.parametrize(("expert", "value"), [(4.9, 1.0), (5.1, 0.0)])
def test_where_the_expert_hardly_moves_all_progress_is_full(expert: float, value: float) -> None:
    assert score(make_log(np.full(20, 10.0)), expert).progress == value


@pytest.mark.parametrize(("partner", "value"), [(0.04, 0.0), (0.06, 1.0)])
def test_who_hits_a_stopped_partner_is_at_fault_wherever_it_hits(partner: float, value: float) -> None:
    x = cruise(40.0, speed=4.0)
    drift = np.stack([x + 0.5, np.linspace(2.5, 0.05, len(x)), np.zeros_like(x)], axis=1)
    assert score(make_log(x, others=(Other("vehicle.car", drift, partner),))).no_collision == value


@pytest.mark.parametrize(("speed", "fault"), [(0.004, False), (0.006, True)])
def test_nobody_standing_is_at_fault(speed: float, fault: bool) -> None:
    wall = Other("vehicle.car", np.array([15.0, -1.75, 0.0]))
    log = make_log(10.0 + speed * 0.1 * np.arange(20), others=(wall,))
    assert at_fault(log, 10, 1, LANES) is fault
    near = Other("vehicle.car", np.array([10.0 + 3.401 + 2.0, -1.75, 0.0]))
    log = make_log(10.0 + speed * 0.1 * np.arange(20), others=(near,))
    assert score(log).time_to_collision == float(not fault)


@pytest.mark.parametrize(("gap", "value"), [(0.9 * 8.0 + 0.3, 1.0), (0.9 * 8.0 - 0.3, 0.0)])
def test_time_to_collision(gap: float, value: float) -> None:
    x = cruise(24.0)
    ahead = Other("vehicle.car", np.array([x[-1] + 3.4 + gap + 2.0, -1.75, 0.0]))
    assert score(make_log(x, others=(ahead,))).time_to_collision == value
    passed = Other("vehicle.car", np.array([x[0] - 6.0, -1.75, 0.0]))
    assert score(make_log(x, others=(passed,))).time_to_collision == 1.0


@pytest.mark.parametrize(
    ("aside", "seconds", "value"), [(0.45, 6.0, 1.0), (0.55, 1.9, 1.0), (0.55, 2.1, 0.0)]
)
def test_lane_keeping(aside: float, seconds: float, value: float) -> None:
    x = cruise(80.0)
    away = (np.arange(len(x)) >= 20) & (np.arange(len(x)) < 20 + round(10 * seconds))
    log = make_log(x, np.where(away, -1.75 + aside, -1.75))
    assert score(log).lane_keeping == value


@pytest.mark.parametrize(("metres", "value"), [(7.0, 1.0), (10.0, 0.0)])
def test_lane_keeping_goes_on_behind_a_junction(metres: float, value: float) -> None:
    """Within it nothing counts; metres off the line before and behind it, at 8 m/s, are one run."""
    x = cruise(80.0, start=180.0)
    away = (x > 200.0 - metres) & (x < 240.0 + metres)
    assert score(make_log(x, np.where(away, -1.2, -1.75))).lane_keeping == value


@pytest.mark.parametrize(("acceleration", "calm"), [(2.3, True), (2.5, False), (-3.9, True), (-4.2, False)])
def test_comfort_has_bounds(acceleration: float, calm: bool) -> None:
    t = 0.1 * np.arange(16)
    start = 12.0 if acceleration < 0 else 3.0
    log = make_log(20 + start * t + 0.5 * acceleration * t**2)
    assert comfortable(log) is calm


@pytest.mark.parametrize(("rate", "calm"), [(0.9, True), (1.0, False)])
def test_comfort_bounds_the_yaw_rate(rate: float, calm: bool) -> None:
    yaw = rate * 0.1 * np.arange(30)
    log = make_log(20 + 2 * np.sin(yaw) / rate, 2 * (1 - np.cos(yaw)) / rate, yaw=yaw)
    assert comfortable(log) is calm


def winding(speed: float, rate: np.ndarray) -> DriveLog:
    """A drive at a speed with a yaw rate at every step, its places integrated a hundred times finer."""
    fine = np.interp(np.arange(100 * (len(rate) - 1) + 1) / 100, np.arange(len(rate)), rate)
    yaw = np.concatenate([[0.0], np.cumsum((fine[1:] + fine[:-1]) / 2)]) * 0.001
    step = speed * 0.001
    x = 20.0 + np.concatenate([[0.0], np.cumsum(np.cos((yaw[1:] + yaw[:-1]) / 2))]) * step
    y = np.concatenate([[0.0], np.cumsum(np.sin((yaw[1:] + yaw[:-1]) / 2))]) * step
    return make_log(x[::100], y[::100], yaw=yaw[::100])


@pytest.mark.parametrize(("lateral", "calm"), [(4.8, True), (5.0, False)])
def test_comfort_bounds_the_lateral_acceleration(lateral: float, calm: bool) -> None:
    assert comfortable(winding(8.0, np.full(30, lateral / 8.0))) is calm


@pytest.mark.parametrize(("jerk", "calm"), [(8.2, True), (8.6, False)])
def test_comfort_bounds_the_jerk_to_the_side(jerk: float, calm: bool) -> None:
    """Lateral acceleration from -4.3 to 4.3 m/s^2 within a second, yaw acceleration about 1 rad/s^2."""
    assert comfortable(winding(8.0, jerk / 8.0 * 0.1 * np.arange(-5, 6))) is calm


@pytest.mark.parametrize(("change", "calm"), [(1.88, True), (2.0, False)])
def test_comfort_bounds_the_yaw_acceleration(change: float, calm: bool) -> None:
    assert comfortable(winding(2.0, change * 0.1 * np.arange(-4, 5))) is calm


@pytest.mark.parametrize(("jerk", "calm"), [(4.0, True), (4.3, False), (-4.0, True), (-4.3, False)])
def test_comfort_bounds_the_jerk_along(jerk: float, calm: bool) -> None:
    """Acceleration from -2.1 to 2.1 m/s^2 within a second, or back."""
    t = 0.1 * np.arange(-5, 6)
    assert comfortable(make_log(20 + 8 * t + jerk * t**3 / 6)) is calm


SECONDS = 0.1 * np.arange(31)
"""Of a plan that is driven out."""


def driven(acceleration: np.ndarray | float = 3.0, yaw: np.ndarray | float = 0.0) -> np.ndarray:
    return np.stack(np.broadcast_arrays(acceleration, yaw, SECONDS)[:2], axis=1)


@pytest.mark.parametrize(("change", "same"), [(0.69, True), (0.71, False), (-0.69, True), (-0.71, False)])
def test_consecutive_plans_agree_in_acceleration(change: float, same: bool) -> None:
    assert agree(driven(3.0), driven(3.0 + change)) is same
    assert agree(driven(-3.0), driven(-3.0 + change)) is same
    assert agree(driven(3.0), driven(-3.0 - change)) is same  # the length is compared, as NAVSIM does


@pytest.mark.parametrize(("change", "same"), [(0.49, True), (0.51, False)])
def test_consecutive_plans_agree_in_jerk(change: float, same: bool) -> None:
    assert agree(driven(), driven(3.0 + change * (SECONDS - 1.25))) is same


@pytest.mark.parametrize(("change", "same"), [(0.099, True), (0.101, False)])
def test_consecutive_plans_agree_in_yaw_rate(change: float, same: bool) -> None:
    assert agree(driven(yaw=0.4 * SECONDS), driven(yaw=1.0 + (0.4 + change) * SECONDS)) is same


@pytest.mark.parametrize(("change", "same"), [(0.099, True), (0.101, False)])
def test_consecutive_plans_agree_in_yaw_acceleration(change: float, same: bool) -> None:
    assert agree(driven(), driven(yaw=change * (SECONDS - 1.25) ** 2 / 2)) is same


def test_plans_are_compared_where_they_overlap() -> None:
    """The first half second of the earlier one, and the last of the later one, are the other's no more."""
    braking = np.where(SECONDS < 0.45, 3.0, 1.0)
    assert agree(driven(braking), driven(1.0))
    assert not agree(driven(1.0), driven(braking))
    assert agree(driven(1.0), driven(np.where(SECONDS > 2.55, 3.0, 1.0)))


def test_a_plan_is_driven_out_past_its_last_waypoint_by_nuplans_bicycle() -> None:
    """It neither brakes where its waypoints end, nor reaches what it asks for at once."""
    steady, faster, left = (simulated(each.plan, each.vehicle) for each in (*decided(8.0, 10.0), turn()))
    np.testing.assert_allclose(steady, np.zeros((31, 2)), atol=1e-9)
    assert faster[0, 0] == 0.0
    # LQR: 10 / 11 of the 2 m/s that are missing, in a second; a third of it arrives within a step.
    np.testing.assert_allclose(faster[1, 0], 20 / 11 / 3, rtol=1e-6)
    assert 0.0 < faster[-1, 0] < 0.3 < faster[10, 0]
    assert left[-1, 1] > 0.5


def turn() -> Decision:
    (decision,) = decided(8.0, curvature=0.03)
    return decision


def test_every_two_plans_that_follow_each_other_are_compared() -> None:
    assert extended_comfort(decided(8.0, 8.0, 8.5, 8.0)) == 1.0
    assert extended_comfort(decided(8.0, 8.0, 4.0, 8.0)) == 0.0
    assert extended_comfort((*CALM, turn())) == 0.0
    # Who planned once, or never twice running, has nothing to be compared.
    assert extended_comfort(()) is None
    assert extended_comfort(decided(8.0)) is None
    assert extended_comfort(decided(8.0, None, 4.0, None)) is None
    assert extended_comfort(decided(8.0, None, 8.5, 8.0)) == 1.0


def test_the_script_decides_to_drive_as_it_then_drove() -> None:
    s = cruise(150.0, start=8.0)
    motion = Motion(s, np.full(len(s), 8.0), np.zeros(len(s)))
    log = script_log(dataclasses.replace(make_log(s).scenario, motions=(motion,)), 1.0, 150.0)
    decisions = script_decisions(log)
    # From 1 s to where the goal is, at 17.8 s; the script ends at 18.8 s, 3 s after the last.
    assert [decision.time for decision in decisions] == pytest.approx(1.0 + 0.5 * np.arange(30))
    for decision in decisions:
        assert decision.plan is not None
        np.testing.assert_allclose(decision.plan.waypoints, CALM[0].plan.waypoints, atol=1e-9)
    assert extended_comfort(decisions) == 1.0


def test_neuro_ncap_counts_what_was_braked_away() -> None:
    wall = Other("vehicle.car", np.array([60.0, -1.75, 0.0]))
    slowed = np.concatenate([cruise(24.0), cruise(60.0, speed=4.0, start=34.4)])
    assert neuro_ncap(make_log(cruise(140.0))) == 5.0
    assert neuro_ncap(make_log(cruise(140.0), others=(wall,))) == pytest.approx(0.0, abs=1e-6)
    assert neuro_ncap(make_log(slowed, others=(wall,))) == pytest.approx(2.0)


def test_neuro_ncaps_impact_is_of_the_two_and_counts_for_who_stands() -> None:
    stopped = np.concatenate([cruise(24.0), np.full(60, 34.0)])
    head_on = np.stack([90.0 - 0.6 * np.arange(91), np.full(91, -1.75), np.full(91, np.pi)], axis=1)
    log = make_log(stopped, others=(Other("vehicle.car", head_on, 6.0),))
    assert neuro_ncap(log) == pytest.approx(4 * (1 - 6 / 14))
    crossing = np.stack([np.full(91, 34.0), -40.0 + 0.6 * np.arange(91), np.full(91, np.pi / 2)], axis=1)
    log = make_log(stopped, others=(Other("vehicle.car", crossing, 6.0),))
    assert neuro_ncap(log) == pytest.approx(4 * (1 - 6 / 10))
    assert log.ego[-1, 3] == 0.0

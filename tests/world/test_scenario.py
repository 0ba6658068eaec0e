"""The expert drives competently: no collisions, bounded accelerations, different manoeuvres."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from spacedrive_jax.world import paths, traffic
from spacedrive_jax.world.paths import overlapping_pairs
from spacedrive_jax.world.scenario import MANOEUVRES, WARM_UP, Scenario, build_scenario
from spacedrive_jax.world.town import LOCATIONS, Town
from spacedrive_jax.world.traffic import Mover

DURATION = 7.0


@pytest.fixture(scope="module")
def scenarios(towns: dict[str, Town]) -> dict[str, Scenario]:
    return {
        name: build_scenario(towns[LOCATIONS[i % 2]], name, DURATION, np.random.default_rng(50 + i))
        for i, name in enumerate(MANOEUVRES)
    }


def ego_track(scenario: Scenario) -> np.ndarray:
    """Columns x, y, heading, speed, acceleration at 20 Hz."""
    rows = []
    for time in np.arange(WARM_UP, WARM_UP + DURATION, 0.05):
        s, speed, acceleration = scenario.motions[0].at(time)
        rows.append([*scenario.ego.route.pose(s), speed, acceleration])
    return np.array(rows)


def test_nobody_touches_anybody(scenarios: dict[str, Scenario]) -> None:
    for name, scenario in scenarios.items():
        cast = scenario.cast
        half = np.array([m.size[:2] for m in cast.movers] + [o.size[:2] for o in cast.obstacles]) / 2
        assert len(half) > 30
        for time in np.arange(0.0, WARM_UP + DURATION, 0.17):
            poses = []
            for mover, motion in zip(cast.movers, scenario.motions, strict=True):
                x, y, yaw = mover.route.pose(motion.at(time)[0])
                ahead = mover.reference_to_centre
                poses.append([x + ahead * np.cos(yaw), y + ahead * np.sin(yaw), yaw])
            poses += [list(item.pose) for item in cast.obstacles]
            assert not len(overlapping_pairs(np.array(poses), half)), (name, time)


def test_the_expert_stays_comfortable_and_on_the_road(scenarios: dict[str, Scenario]) -> None:
    for name, scenario in scenarios.items():
        track = ego_track(scenario)
        assert track[:, 4].max() < 2.0, name
        assert track[:, 4].min() > -4.5, name
        assert (track[:, 3] >= 0).all()
        lateral = track[:, 3] * np.gradient(np.unwrap(track[:, 2]), 0.05)
        assert np.abs(lateral).max() < 3.5, name
        half = np.array([[scenario.ego.size[1] / 2]])
        for x, y, yaw, *_ in track[::20]:
            for side in (-1, 1):
                edge = (x - side * half[0, 0] * np.sin(yaw), y + side * half[0, 0] * np.cos(yaw))
                assert scenario.town.drivable.contains(shapely.Point(edge)), name


def test_manoeuvres_do_what_their_names_say(scenarios: dict[str, Scenario]) -> None:
    tracks = {name: ego_track(scenario) for name, scenario in scenarios.items()}
    turned = {name: np.degrees(np.unwrap(t[:, 2])[-1] - np.unwrap(t[:, 2])[0]) for name, t in tracks.items()}
    assert turned["turn_left"] > 40
    assert turned["turn_right"] < -40
    assert abs(turned["bend"]) > 25
    assert tracks["stop"][0, 3] > 5
    assert tracks["stop"][-1, 3] < 1.5
    assert tracks["start"][0, 3] < 0.6
    assert tracks["start"][-1, 3] > 1.2  # under way within the 7 s
    assert tracks["follow"][20:, 3].max() < 8.0
    assert tracks["cruise"][:, 3].mean() > 5
    assert tracks["brake"][:, 3].min() < 0.6 * tracks["brake"][0, 3]
    assert tracks["pedestrian"][:, 3].min() < 2.5


def test_seeds_change_the_scene_and_repeat_it(towns: dict[str, Town]) -> None:
    town = towns[LOCATIONS[0]]
    first, again, other = (
        build_scenario(town, "cruise", 2.0, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(first.motions[0].s, again.motions[0].s)
    assert not np.array_equal(first.motions[0].s, other.motions[0].s)
    assert first.description == again.description


def test_traffic_keeps_to_its_side(towns: dict[str, Town]) -> None:
    for location, side in (("boston-seaport", -1.0), ("singapore-onenorth", 1.0)):
        town = towns[location]
        assert town.side == side
        road = town.roads[0]
        lane = town.lanes["road000-forward-0"]
        middle = len(road.centre) // 2
        offset = (lane.centre[middle] - road.centre[middle]) @ paths.left_normals(road.centre)[middle]
        assert offset * side > 1.0


def test_every_lane_leads_on_without_a_jump(towns: dict[str, Town]) -> None:
    for town in towns.values():
        for lane in town.lanes.values():
            assert lane.successors, lane.key
            for key in lane.successors:
                following = town.lanes[key].centre
                assert np.hypot(*(following[0] - lane.centre[-1])) < 1e-6
                angle = paths.headings(following)[0] - paths.headings(lane.centre)[-1]
                assert abs((angle + np.pi) % (2 * np.pi) - np.pi) < 0.35


def driver() -> Mover:
    route = traffic.free_route(np.array([[0.0, 0.0], [300.0, 0.0]]))
    return Mover("a", "vehicle.car", (4.5, 1.8, 1.5), route, 0.0, 10.0, lambda _: 10.0)


def test_idm_is_at_rest_where_it_should_be() -> None:
    mover = driver()
    speed, gap = np.array([10.0, 0.0, 0.0, 10.0]), np.array([np.inf, np.inf, mover.standstill_gap, 3.0])
    closing = np.array([0.0, 0.0, 0.0, 10.0])
    parameters = np.array([mover.idm_parameters] * 4)
    found = traffic.follow_acceleration(speed, np.full(4, 10.0), gap, closing, parameters)
    wanted = [0.0, mover.acceleration, 0.0, -traffic.HARDEST_BRAKING]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


def test_overlap_test_on_hand_made_rectangles() -> None:
    poses = np.array([[0, 0, 0], [3.9, 0, 0], [0, 2.1, 0], [2.6, 1.9, np.pi / 4], [50, 50, 1.0]], dtype=float)
    half = np.tile([2.0, 1.0], (5, 1))
    assert {tuple(pair) for pair in overlapping_pairs(poses, half).tolist()} == {
        (0, 1),
        (0, 3),
        (1, 3),
        (2, 3),
    }


def test_curvature_of_a_circle() -> None:
    angles = np.linspace(0, np.pi, 200)
    circle = 20 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert np.allclose(paths.curvatures(circle)[3:-3], 1 / 20, rtol=1e-2)
    assert np.allclose(np.hypot(*paths.offset(circle, 5.0).T), 15.0, atol=0.01)

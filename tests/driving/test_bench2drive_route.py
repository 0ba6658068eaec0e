"""GPS, compass, dead reckoning and the route, against the leaderboard's own formulas."""

import math

import numpy as np
import pytest

from spacedrive_jax.driving.bench2drive_route import (
    GNSS_X,
    REAR_AXLE,
    Localiser,
    Pose,
    Projection,
    RoutePlanner,
    find_projection,
    first_heading,
    into,
    out_of,
    relative,
    wrapped,
)

RADIUS = 6378137.0
ORIGINS = [(0.0, 0.0), (42.0, 2.0), (49.0, 8.0), (-33.7, 151.2), (64.1, -21.9)]
PLACES = [(0.0, 0.0), (120.5, -340.25), (-2500.0, 1800.0), (9000.0, 9000.0)]


def leaderboard_gps(origin, x, y):
    """`_location_to_gps` of leaderboard/utils/route_manipulation.py."""
    scale = math.cos(origin[0] * math.pi / 180.0)
    mx = scale * origin[1] * math.pi * RADIUS / 180.0 + x
    my = scale * RADIUS * math.log(math.tan((90.0 + origin[0]) * math.pi / 360.0)) - y
    longitude = mx * 180.0 / (math.pi * RADIUS * scale)
    latitude = 360.0 * math.atan(math.exp(my / (RADIUS * scale))) / math.pi - 90.0
    return latitude, longitude


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("place", PLACES)
def test_the_maps_origin_is_found(origin, place):
    projection = find_projection(*leaderboard_gps(origin, *place), *place)
    assert projection.latitude == pytest.approx(origin[0], abs=1e-9)
    assert projection.longitude == pytest.approx(origin[1], abs=1e-9)
    for x, y in PLACES:
        np.testing.assert_allclose(projection.to_world(*leaderboard_gps(origin, x, y)), [x, y], atol=1e-4)


def test_compass():
    """0 is CARLA's -y, which is left of x here; it turns clockwise."""
    localiser = Localiser(Projection(0, 0), 0.7)
    nowhere = (math.nan, math.nan)
    assert localiser.update(0.0, 0.0, math.nan, nowhere).yaw == 0.7  # as the plan begins
    for compass, yaw in ((0.0, math.pi / 2), (math.pi / 2, 0.0), (math.pi, -math.pi / 2), (4.0, None)):
        pose = localiser.update(1.0, 0.0, compass, nowhere)
        assert wrapped(pose.yaw - (math.pi / 2 - compass if yaw is None else yaw)) == pytest.approx(0)
    held = pose.yaw
    assert localiser.update(2.0, 0.0, math.nan, nowhere).yaw == held


def drive(noise, ticks=400, rate=0.3, speed=6.0, seed=0):
    """A car that drives in a circle to the left; its true origin poses and what the localiser makes of it."""
    rng = np.random.default_rng(seed)
    origin = ORIGINS[2]
    localiser = Localiser(find_projection(*leaderboard_gps(origin, 10.0, 20.0), 10.0, 20.0), 0.0)
    rear, yaw = np.array([30.0, -40.0]), 0.4
    true, found = [], []
    for tick in range(ticks):
        if tick:
            yaw += rate * 0.05
            middle = yaw - rate * 0.025
            chord = speed * 0.05 * math.sin(rate * 0.025) / (rate * 0.025)
            rear = rear + chord * np.array([math.cos(middle), math.sin(middle)])
        forward = np.array([math.cos(yaw), math.sin(yaw)])
        centre = rear + REAR_AXLE * forward
        true.append(Pose(tick * 0.05, *centre, wrapped(yaw)))
        antenna = centre + GNSS_X * forward
        gps = np.array(leaderboard_gps(origin, antenna[0], -antenna[1])) + rng.normal(0, noise, 2)
        found.append(localiser.update(tick * 0.05, speed, math.pi / 2 - yaw, gps))
    return true, found, localiser


def test_past_poses_are_dead_reckoned():
    true, found, _ = drive(noise=5e-6)
    for ticks in (10, 20):
        ours, theirs = relative(found[-1], found[-1 - ticks]), relative(true[-1], true[-1 - ticks])
        np.testing.assert_allclose(ours, theirs, atol=2e-3)  # GPS alone would be off by 0.8 m


def test_gps_noise_is_averaged_for_the_route():
    errors = []
    for seed in range(5):
        true, _, localiser = drive(noise=5e-6, seed=seed)
        errors.append(np.hypot(*(localiser.position() - [true[-1].x, true[-1].y])))
    assert np.mean(errors) < 0.15  # one fix: 0.79 m
    true, _, exact = drive(noise=0.0)
    np.testing.assert_allclose(exact.position(), [true[-1].x, true[-1].y], atol=0.01)


def test_frames_there_and_back():
    pose = Pose(0.0, 3.0, -2.0, 2.1)
    points = np.array([[1.0, 2.0], [-4.0, 0.5]])
    np.testing.assert_allclose(into(pose, out_of(pose, points)), points, atol=1e-12)
    np.testing.assert_allclose(into(pose, [[3 + math.cos(2.1), -2 + math.sin(2.1)]]), [[1, 0]], atol=1e-12)
    ahead = Pose(1.0, *out_of(pose, [[5.0, 1.0]])[0], 2.4)
    moved = relative(pose, ahead)
    np.testing.assert_allclose(moved[:2, 3], [5, 1], atol=1e-12)
    assert math.atan2(moved[1, 0], moved[0, 0]) == pytest.approx(0.3)


def test_nodes_are_passed_as_the_leaderboard_agents_do():
    points = np.array([[0.0, 0], [20, 0], [40, 0], [40, 20], [40, 60]])
    planner = RoutePlanner(points, [4, 4, 1, 1, -1], 4.0, 50.0)
    planner.advance(np.array([10.0, 0.0]))
    assert planner.node(0)[0].tolist() == [0, 0]
    assert planner.node(1)[1] == 4
    planner.advance(np.array([17.0, 0.0]))  # 3 m before the second node
    assert planner.node(0)[0].tolist() == [20, 0]
    assert planner.node(1)[1] == 1
    planner.advance(np.array([37.0, 0.0]))
    assert planner.node(1)[0].tolist() == [40, 20]
    planner.advance(np.array([40.0, 59.0]))  # the last two are kept
    assert planner.node(1)[0].tolist() == [40, 60]
    assert planner.node(1)[1] == 4  # VOID means: follow the lane
    assert planner.node(2)[0].tolist() == [40, 60]


def test_a_node_beyond_the_horizon_is_not_looked_at():
    loop = np.array([[0.0, 0], [30, 0], [30, 30], [0, 30], [0, 1]])
    planner = RoutePlanner(loop, [4] * 5, 4.0, 50.0)
    planner.advance(np.array([0.0, 0.0]))  # near the first node, and the last, 119 m ahead
    assert planner.node(0)[0].tolist() == [0, 0]


def test_first_heading():
    assert first_heading([[1.0, 1.0], [1.0, 1.0], [1.0, 3.0]]) == pytest.approx(math.pi / 2)
    assert first_heading([[1.0, 1.0]]) == 0

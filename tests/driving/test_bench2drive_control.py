"""The controllers of the Bench2Drive agent, on hand-made plans."""

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator

from spacedrive_jax.driving.bench2drive_control import (
    PRESETS,
    Controller,
    Gains,
    Pid,
    along,
    fine_path,
    path_of,
    pchip,
    target_speed,
)


def straight(speed):
    return np.stack([speed * 0.5 * np.arange(1, 7), np.zeros(6)], axis=1)


def arc(speed, curvature):
    """Waypoints and path of a car that turns left."""

    def at(s):
        return np.stack([np.sin(s * curvature), 1 - np.cos(s * curvature)], axis=1) / curvature

    return at(speed * 0.5 * np.arange(1, 7)), at(np.arange(1.0, 21.0))


def test_pid_windows():
    full = Pid(Gains(2.0, 10.0, 3.0, 4))
    assert full.step(1.0) == pytest.approx(2 + 10 / 4 + 3)
    assert full.step(0.5) == pytest.approx(1 + 10 * 1.5 / 4 - 1.5)
    empty = Pid(Gains(2.0, 10.0, 3.0, 6, prefilled=False))
    assert empty.step(1.0) == pytest.approx(2 + 10)  # no error before: no change
    assert empty.step(0.5) == pytest.approx(1 + 10 * 0.75 - 1.5)


@pytest.mark.parametrize(
    ("rule", "speed"),
    # Waypoints at 1, 3, 6, 10, 15, 21 m.
    [("segments", 20 / 5 * 2), ("middle", 2 * 1.5), ("first", 0.75 * 2 + 0.25 * 4)],
)
def test_target_speeds(rule, speed):
    waypoints = np.array([[1.0, 0], [3, 0], [6, 0], [10, 0], [15, 0], [21, 0]])
    assert target_speed(rule, waypoints) == pytest.approx(speed)


@pytest.mark.parametrize("preset", PRESETS)
def test_left_is_negative_and_right_positive(preset):
    for curvature, sign in ((0.1, -1), (-0.1, 1)):
        waypoints, path = arc(5.0, curvature)
        controls = Controller(preset).step(5.0, waypoints, path, path[9])
        assert np.sign(controls.steer) == sign
        assert -1 <= controls.steer <= 1
    assert Controller(preset).step(5.0, straight(5.0), None, np.array([30.0, 0])).steer == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_pedals(preset):
    rules = PRESETS[preset]
    slow = Controller(preset).step(3.0, straight(8.0))
    assert 0 < slow.throttle <= rules.most_throttle
    assert slow.brake == 0
    fast = Controller(preset).step(8.0, straight(7.0))
    assert (fast.throttle, fast.brake) == (0, 1)
    stand = Controller(preset).step(0.0, np.zeros((6, 2)))
    assert (stand.throttle, stand.brake) == (0, 1)
    # Both sides of each threshold.
    assert Controller(preset).step(1.0, straight(1.0 / rules.brake_ratio * 0.999)).brake == 1
    assert Controller(preset).step(1.0, straight(1.0 / rules.brake_ratio * 1.001)).brake == 0
    assert Controller(preset).step(0.0, straight(rules.brake_below * 1.001)).brake == 0
    assert Controller(preset).step(0.0, straight(rules.brake_below * 0.999)).brake == 1


def test_first_throttle_of_each_preset():
    # delta clipped, window of zeros: P d + I d / n + D d.
    for preset, delta, n, (p, i, d) in (
        ("zoo", 0.25, 40, (5, 0.5, 1)),
        ("simlingo", 1.0, 20, (1.75, 1, 2)),
        ("hip_ad", 0.25, 10, (5, 0.5, 1)),
        ("minddrive", 0.25, 40, (5, 0.5, 1)),
    ):
        wanted = min(delta * (p + i / n + d), PRESETS[preset].most_throttle)
        assert Controller(preset).step(4.0, straight(8.0)).throttle == pytest.approx(wanted)


def test_zoo_takes_the_target_point_where_that_asks_for_less():
    waypoints, _ = arc(5.0, 0.15)
    own = Controller("zoo").step(5.0, waypoints, None, np.array([20.0, 25.0])).steer
    less = Controller("zoo").step(5.0, waypoints, None, np.array([20.0, 0.5])).steer
    assert own < less < 0
    # Another direction than the last segment's, and near: the target point, though it asks for more.
    off = Controller("zoo").step(5.0, straight(5.0), None, np.array([5.0, -6.0])).steer
    far = Controller("zoo").step(5.0, straight(5.0), None, np.array([15.0, -18.0])).steer
    assert off > 0
    assert far == 0


def test_zoo_is_the_published_rule():
    """Written down again in its own axes (x right, y ahead): aim, target point, both PIDs, tick by tick."""
    rng = np.random.default_rng(0)
    ours, turn, pedal, taken = Controller("zoo"), [0.0] * 40, [0.0] * 40, 0

    def pid(window, error, gains):
        window.append(error)
        del window[0]
        return gains[0] * error + gains[1] * np.mean(window) + gains[2] * (window[-1] - window[-2])

    def angle_to(point):
        return np.degrees(np.pi / 2 - np.arctan2(point[1], point[0])) / 90

    for _ in range(300):
        ahead = np.cumsum(rng.uniform(0.1, 4, 6))
        waypoints = np.stack([ahead, np.cumsum(rng.normal(0, 1, 6))], axis=1)
        target = np.array([rng.uniform(0.1, 30), rng.normal(0, 8)])
        speed = float(rng.uniform(0, 10))
        found = ours.step(speed, waypoints, None, target)

        way, goal = waypoints[:, ::-1] * [-1, 1], target[::-1] * [-1, 1]
        middles = np.linalg.norm((way[1:] + way[:-1]) / 2, axis=1)
        angle = angle_to(way[:-1][np.argmin(np.abs(4.0 - middles))])
        last, to_goal = angle_to(way[-1] - way[-2]), angle_to(goal)
        if abs(to_goal) < abs(angle) or (abs(to_goal - last) > 0.3 and goal[1] < 10):
            angle, taken = to_goal, taken + 1
        wanted = 2 * np.mean(np.linalg.norm(np.diff(way, axis=0), axis=1))
        assert found.steer == pytest.approx(np.clip(pid(turn, angle, (0.75, 0.75, 0.3)), -1, 1), abs=1e-9)
        throttle = np.clip(pid(pedal, np.clip(wanted - speed, 0, 0.25), (5, 0.5, 1)), 0, 0.75)
        brake = wanted < 0.4 or speed / wanted > 1.1
        assert found.brake == brake
        assert found.throttle == pytest.approx(0 if brake else throttle, abs=1e-9)
    assert 50 < taken < 250


def test_minddrive_aims_at_a_path_point_or_the_middle_of_two():
    """Whichever lies nearest 3.5 m: of a straight path's the middle of the third and the fourth."""
    path = np.stack([np.arange(1.0, 21.0), np.array([0, 0, 0.3, -0.5, *np.zeros(16)])], axis=1)
    first = Controller("minddrive").step(5.0, straight(5.0), path).steer
    error = np.degrees(np.arctan2(0.1, 3.5)) / 90
    assert first == pytest.approx(error * (1.7 + 0.3 / 40 + 0.6))
    path[:, 0] += 0.5  # now a point does
    path[2] = [3.5, 0.2]
    error = -np.degrees(np.arctan2(0.2, 3.5)) / 90
    steer = Controller("minddrive").step(5.0, straight(5.0), path).steer
    assert steer == pytest.approx(error * (1.7 + 0.3 / 40 + 0.6))
    path[:, 0] = 0.01  # nothing is ahead
    assert Controller("minddrive").step(5.0, straight(5.0), path).steer == 0


def test_simlingo_looks_ahead_by_speed():
    _, path = arc(5.0, 0.05)
    steers = [Controller("simlingo").step(speed, straight(speed), path).steer for speed in (0.5, 8.0, 12.0)]
    assert steers[0] > steers[1] > steers[2]  # farther along the arc the angle is larger


def test_pchip_is_scipys():
    rng = np.random.default_rng(0)
    for count in (2, 3, 8, 21):
        x = np.cumsum(rng.uniform(0.1, 2, count))
        for y in (rng.normal(size=count), np.cumsum(rng.uniform(0, 1, count)), np.zeros(count)):
            wanted = np.linspace(x[0], x[-1], 97)
            np.testing.assert_allclose(pchip(x, y, wanted), PchipInterpolator(x, y)(wanted), atol=1e-12)


def test_fine_path_of_an_arc_stays_on_it():
    _, path = arc(5.0, 0.1)
    fine = fine_path(path)
    assert len(fine) == pytest.approx(200, abs=2)
    np.testing.assert_allclose(np.hypot(fine[:, 0], fine[:, 1] - 10), 10, atol=0.02)


def test_lines_go_on_behind_their_end():
    line = np.array([[0.0, 0], [0, 0], [3, 0], [3, 4]])
    np.testing.assert_allclose(along(line, np.array([1.0, 5.0, 9.0])), [[1, 0], [3, 2], [3, 6]])
    np.testing.assert_allclose(along(np.zeros((3, 2)), np.array([1.0, 2.0])), [[1, 0], [2, 0]])
    np.testing.assert_allclose(path_of(np.zeros((6, 2)))[:2], [[1, 0], [2, 0]])


def test_pdm_lite_throttle():
    follow = Controller("simlingo", throttle="pdm_lite")
    assert follow.step(5.0, straight(5.0 + 1.9 / 3.6)).throttle == 1
    assert follow.step(5.0, straight(5.0 / 1.0314)).brake == 1
    assert follow.step(0.0, np.zeros((6, 2))).brake == 1
    v, e = 0.18, 0.0036  # 18 km/h, 0.36 km/h too slow, in 100 km/h
    wanted = 1.1990342 * v - 0.8057603 * v**2 + 1.7108187 * 100 * e + 0.9218903 * e**2
    wanted += 1.5564975 * v * e - 0.7013480 * v**2 * e
    assert follow.step(5.0, straight(5.1)).throttle == pytest.approx(wanted, abs=1e-5)


def test_creep_and_speed_cap_are_off_unless_asked_for():
    plain, creeping = Controller("simlingo"), Controller("simlingo", creep="simlingo")
    stand = np.zeros((6, 2))
    pressed = [creeping.step(0.0, stand).throttle for _ in range(830)]
    assert [plain.step(0.0, stand).throttle for _ in range(830)] == [0.0] * 830
    assert pressed[:800] == [0.0] * 800
    assert [throttle > 0 for throttle in pressed[800:]].count(True) == 15
    fast = Controller("zoo", speed_cap=5.0)
    assert fast.step(5.1, straight(9.0)).throttle == 0
    assert Controller("zoo").step(5.1, straight(9.0)).throttle > 0


def test_unknown_names_are_refused():
    for options in ({"preset": "mine"}, {"throttle": "full"}, {"creep": "often"}):
        with pytest.raises(ValueError, match="is none of"):
            Controller(**options)

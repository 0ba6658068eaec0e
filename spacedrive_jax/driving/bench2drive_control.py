"""Controllers that follow a plan: waypoints give the speed, the path the direction, two PIDs the controls.

SpaceDrive's own gains are not published (SpaceDrive#4), so the presets are those of four published agents on
Bench2Drive, each with its rule for the target speed and for the point to aim at. Runs in Python 3.7 with
numpy alone. Plans are in the ego frame (x forward, y left, metres); steering is positive to the right, as
CARLA's.
"""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

import numpy as np

try:
    from spacedrive_jax.exact import arctan2
except ImportError:  # copied into CARLA's own Python, where no drive repeats to the last bit
    from math import atan2 as arctan2  # type: ignore[assignment]

WAYPOINT_STEP = 0.5
"""Seconds between two waypoints."""
PATH_STEP = 1.0
"""Metres between two path points."""


class Gains(NamedTuple):
    """Of a PID whose integral is a mean over a window."""

    proportional: float
    integral: float
    derivative: float
    window: int
    prefilled: bool = True
    """The window starts full of zeros."""


class Preset(NamedTuple):
    """How one published agent turns a plan into controls."""

    speed_rule: str
    """`segments`: mean over the waypoints' segments; `middle`: from 0.25 to 0.75 s; `first`: mostly the first
    half second."""
    aim_rule: str
    """`waypoint`: where a waypoint segment lies nearest `aim`; `lookahead`: on the path, by speed; `second`:
    the path point one second ahead; `midpoint`: the path point, or middle of a segment, nearest `aim`."""
    aim: float
    """Metres."""
    target_point: bool
    """Aim at the route's next target point where that asks for less steering, or for another direction."""
    brake_below: float
    """Brake when the target speed is lower, m/s."""
    brake_ratio: float
    """Brake when speed / target speed is higher."""
    throttle: Gains
    delta: float
    """Largest speed error that the throttle sees, m/s."""
    most_throttle: float
    steer: Gains


PRESETS = {
    # Bench2DriveZoo (UniAD, VAD): team_code/pid_controller.py
    "zoo": Preset(
        speed_rule="segments",
        aim_rule="waypoint",
        aim=4.0,
        target_point=True,
        brake_below=0.4,
        brake_ratio=1.1,
        throttle=Gains(5.0, 0.5, 1.0, 40),
        delta=0.25,
        most_throttle=0.75,
        steer=Gains(0.75, 0.75, 0.3, 40),
    ),
    # SimLingo: team_code/nav_planner.py and config
    "simlingo": Preset(
        speed_rule="middle",
        aim_rule="lookahead",
        aim=0.0,
        target_point=False,
        brake_below=0.4,
        brake_ratio=1.1,
        throttle=Gains(1.75, 1.0, 2.0, 20),
        delta=1.0,
        most_throttle=1.0,
        steer=Gains(3.118357247806046, 0.6406067986034124, 1.3782508892109167, 6, prefilled=False),
    ),
    # HiP-AD (its waypoints come at 5 Hz, ours at 2 Hz: the same speed)
    "hip_ad": Preset(
        speed_rule="segments",
        aim_rule="second",
        aim=0.0,
        target_point=False,
        brake_below=0.4,
        brake_ratio=1.1,
        throttle=Gains(5.0, 0.5, 1.0, 10),
        delta=0.25,
        most_throttle=0.75,
        steer=Gains(1.0, 0.75, 0.0, 10),
    ),
    # MindDrive
    "minddrive": Preset(
        speed_rule="first",
        aim_rule="midpoint",
        aim=3.5,
        target_point=False,
        brake_below=0.05,
        brake_ratio=1.1,
        throttle=Gains(5.0, 0.5, 1.0, 40),
        delta=0.25,
        most_throttle=0.75,
        steer=Gains(1.7, 0.3, 0.6, 40),
    ),
}

CREEPS = {"simlingo": (800, 15), "lead": (1100, 20)}
"""Ticks of standing still, and ticks of throttle then, as two agents do; the benchmark fails a car that has
stood for 1200 ticks."""
CREEP_SPEED = 0.1
CREEP_THROTTLE = 0.4
THROTTLES = ("pid", "pdm_lite")

# Zoo's rule when a target point replaces the aim.
_ANGLE_THRESHOLD = 0.3
_DISTANCE_THRESHOLD = 10.0
# MindDrive steers straight on when what it aims at is not ahead, metres.
_LEAST_AHEAD = 0.02
# SimLingo's look-ahead: index on a path of 0.1 m steps, linear in km/h.
_LOOKAHEAD = (0.9755321901954155, 1.9152884533402488, 24, 105)
_FINE_STEP = 0.1
# PDM-Lite's throttle, a regression over speed and error in 100 km/h.
_PDM_LITE = (1.1990342347353184, -0.8057602384167799, 1.710818710950062, 0.921890257450335)
_PDM_LITE_CROSS = (1.556497522998393, -0.7013479734904027)
_PDM_LITE_FULL = 1.89
_PDM_LITE_BRAKE = 1.031266635497984
_PDM_LITE_LEAST = 0.278


class Pid:
    """P e + I mean(last errors) + D (e - previous e)."""

    def __init__(self, gains: Gains) -> None:
        self.gains = gains
        zeros = [0.0] * gains.window if gains.prefilled else []
        self._errors = collections.deque(zeros, maxlen=gains.window)  # type: collections.deque

    def step(self, error: float) -> float:
        """Takes the next error and returns the control."""
        self._errors.append(error)
        change = self._errors[-1] - self._errors[-2] if len(self._errors) > 1 else 0.0
        mean = math.fsum(self._errors) / len(self._errors)
        return self.gains.proportional * error + self.gains.integral * mean + self.gains.derivative * change


class Controls(NamedTuple):
    """What CARLA's VehicleControl takes."""

    throttle: float
    """0..1."""
    steer: float
    """-1..1, positive to the right."""
    brake: float
    """0 or 1."""


STOP = Controls(0.0, 0.0, 1.0)


class Controller:
    """Follows plans tick by tick, with the state of its two PIDs."""

    def __init__(
        self,
        preset: str = "simlingo",
        throttle: str = "pid",
        creep: str | None = None,
        speed_cap: float | None = None,
        target_point: bool = True,
    ) -> None:
        """Prepares a controller.

        Args:
            preset: a name of `PRESETS`.
            throttle: the preset's PID, or `pdm_lite`'s regression (of the published TF++ and PDM-Lite).
            creep: a name of `CREEPS` to press the throttle when the car has stood for long; None never does.
            speed_cap: give no throttle above this speed, m/s (ORION and MindDrive: 5).
            target_point: let the `zoo` preset aim at the route's target point in the plan's stead.

        Raises:
            ValueError: there is no such preset, throttle or creep.
        """
        for value, known in ((preset, PRESETS), (throttle, THROTTLES), (creep or "lead", CREEPS)):
            if value not in known:
                raise ValueError("{!r} is none of {}".format(value, ", ".join(known)))
        self.preset = PRESETS[preset]
        if not target_point:
            self.preset = self.preset._replace(target_point=False)
        self.throttle = throttle
        self.creep = CREEPS[creep] if creep else None
        self.speed_cap = speed_cap
        self._speed_pid, self._steer_pid = Pid(self.preset.throttle), Pid(self.preset.steer)
        self._standing = self._creeping = 0

    def step(self, speed: float, waypoints: Any, path: Any = None, target_point: Any = None) -> Controls:
        """The controls of one tick (20 Hz).

        Args:
            speed: m/s.
            waypoints: (6, 2) future positions at 0.5 s steps, present ego frame, metres.
            path: (R, 2) points 1 m apart along the way, the first 1 m ahead; None takes the waypoints' line.
            target_point: (2,) next target point of the route, for the presets that look at it.
        """
        waypoints = np.asarray(waypoints, np.float64)
        path = path_of(waypoints) if path is None or len(path) == 0 else np.asarray(path, np.float64)
        wanted = target_speed(self.preset.speed_rule, waypoints)
        angle = self._angle(speed, waypoints, path, target_point)
        steer = min(max(self._steer_pid.step(angle), -1.0), 1.0)
        throttle, brake = self._pedals(speed, wanted)
        throttle = self._crept(speed, throttle)
        if throttle >= CREEP_THROTTLE and self._creeping:
            brake = False
        if self.speed_cap is not None and speed > self.speed_cap:
            throttle = 0.0
        return Controls(throttle, steer, 1.0 if brake else 0.0)

    def _angle(self, speed: float, waypoints: Any, path: Any, target_point: Any) -> float:
        """The steering error: degrees to the right over 90."""
        preset = self.preset
        if preset.aim_rule == "waypoint":
            aim = _nearest_segment(waypoints, preset.aim)
        elif preset.aim_rule == "midpoint":
            aim = _nearest_point(path, preset.aim)
            if aim[0] <= _LEAST_AHEAD:
                return 0.0
        elif preset.aim_rule == "second":
            distances = _length(path)
            aim = path[int(np.argmin(np.abs(distances - speed)))]
        else:
            scale, offset, low, high = _LOOKAHEAD
            fine = fine_path(path)
            index = min(max(scale * speed * 3.6 + offset, low), high)
            aim = fine[min(int(index), len(fine) - 1)]
        angle = _angle_to(aim)
        if not preset.target_point or target_point is None:
            return angle
        to_target, last = _angle_to(target_point), _angle_to(waypoints[-1] - waypoints[-2])
        turned_off = abs(to_target - last) > _ANGLE_THRESHOLD and target_point[0] < _DISTANCE_THRESHOLD
        return to_target if abs(to_target) < abs(angle) or turned_off else angle

    def _pedals(self, speed: float, wanted: float) -> tuple[float, bool]:
        if self.throttle == "pdm_lite":
            return _pdm_lite(speed, wanted)
        preset = self.preset
        brake = wanted < preset.brake_below or speed / wanted > preset.brake_ratio
        throttle = self._speed_pid.step(min(max(wanted - speed, 0.0), preset.delta))
        return 0.0 if brake else min(max(throttle, 0.0), preset.most_throttle), brake

    def _crept(self, speed: float, throttle: float) -> float:
        if self.creep is None:
            return throttle
        patience, ticks = self.creep
        self._standing = self._standing + 1 if speed < CREEP_SPEED else 0
        if self._standing > patience:
            self._standing, self._creeping = 0, ticks
        elif self._creeping:
            self._creeping -= 1
        return max(throttle, CREEP_THROTTLE) if self._creeping else throttle


def target_speed(rule: str, waypoints: Any) -> float:
    """The speed that waypoints ask for, m/s; see `Preset.speed_rule`."""
    if rule == "segments":
        return float(np.mean(_lengths(waypoints))) / WAYPOINT_STEP
    if rule == "middle":
        # 0.25 s and 0.75 s lie half way between waypoints; the first segment begins at the car.
        early, late = waypoints[0] / 2, (waypoints[0] + waypoints[1]) / 2
        return 2 * float(_length(late - early))
    first, second = float(_length(waypoints[0])), float(_length(waypoints[1] - waypoints[0]))
    return (0.75 * first + 0.25 * second) / WAYPOINT_STEP


def path_of(waypoints: Any, points: int = 20) -> Any:
    """The waypoints' line as path points: for plans without a path."""
    line = np.concatenate([np.zeros((1, 2)), waypoints])
    return along(line, PATH_STEP * np.arange(1, points + 1))


def along(line: Any, distances: Any) -> Any:
    """Points at distances along a polyline, straight on behind its end (ahead where it has no length)."""
    lengths = _lengths(np.asarray(line))
    kept = np.concatenate([[True], lengths > 1e-3])
    line = np.asarray(line, np.float64)[kept]
    if len(line) == 1:
        return line + np.stack([distances, np.zeros(len(distances))], axis=1)
    lengths = _lengths(line)
    at = np.concatenate([[0.0], np.cumsum(lengths)])
    points = np.stack([np.interp(distances, at, line[:, axis]) for axis in range(2)], axis=1)
    beyond = np.maximum(np.asarray(distances) - at[-1], 0.0)
    return points + beyond[:, None] * (line[-1] - line[-2]) / lengths[-1]


def fine_path(path: Any) -> Any:
    """A path every 0.1 m from the car on, by a monotone cubic (PCHIP), as SimLingo resamples its own.

    Its path's first point is the car itself, ours is 1 m ahead: the car is put in front of both.
    """
    points = np.concatenate([np.zeros((1, 2)), path])
    at = np.concatenate([[0.0], np.cumsum(_lengths(points))]) + 1e-4 * np.arange(len(points))
    wanted = np.arange(_FINE_STEP, at[-1], _FINE_STEP)
    if len(wanted) == 0:
        return points[-1:]
    return np.stack([pchip(at, points[:, axis], wanted) for axis in range(2)], axis=1)


def pchip(x: Any, y: Any, wanted: Any) -> Any:
    """Fritsch and Butland's monotone cubic interpolation, as scipy's PchipInterpolator.

    Args:
        x: (K,) increasing, at least two.
        y: (K,) values.
        wanted: where to interpolate, within `x`.
    """
    h, slopes = np.diff(x), np.diff(y) / np.diff(x)
    d = np.zeros(len(x))
    if len(x) == 2:
        d[:] = slopes[0]
    else:
        same = slopes[:-1] * slopes[1:] > 0
        w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
        safe = np.where(same[:, None], np.stack([slopes[:-1], slopes[1:]], axis=1), 1.0)
        d[1:-1] = np.where(same, (w1 + w2) / (w1 / safe[:, 0] + w2 / safe[:, 1]), 0.0)
        d[0] = _end_slope(h[0], h[1], slopes[0], slopes[1])
        d[-1] = _end_slope(h[-1], h[-2], slopes[-1], slopes[-2])
    k = np.clip(np.searchsorted(x, wanted, side="right") - 1, 0, len(h) - 1)
    t = (wanted - x[k]) / h[k]
    return (
        y[k] * (1 + 2 * t) * (1 - t) ** 2
        + h[k] * d[k] * t * (1 - t) ** 2
        + y[k + 1] * t**2 * (3 - 2 * t)
        + h[k] * d[k + 1] * t**2 * (t - 1)
    )


def _end_slope(h0: float, h1: float, m0: float, m1: float) -> float:
    slope = ((2 * h0 + h1) * m0 - h0 * m1) / (h0 + h1)
    if slope * m0 <= 0:
        return 0.0
    return 3 * m0 if m0 * m1 <= 0 and abs(slope) > 3 * abs(m0) else slope


def _lengths(points: Any) -> Any:
    return _length(np.diff(points, axis=0))


def _length(vectors: Any) -> Any:
    """Of x, y along the last axis; `np.hypot` rounds as the processor pleases."""
    return np.sqrt(vectors[..., 0] * vectors[..., 0] + vectors[..., 1] * vectors[..., 1])


def _nearest_segment(points: Any, distance: float) -> Any:
    """The first point of the segment whose middle lies nearest a distance from the car."""
    middles = (points[1:] + points[:-1]) / 2
    return points[int(np.argmin(np.abs(_length(middles) - distance)))]


def _nearest_point(points: Any, distance: float) -> Any:
    """The point, or middle between two, that lies nearest a distance from the car; the first of several."""
    middles = (points[1:] + points[:-1]) / 2
    candidates = np.stack([points[:-1], middles], axis=1).reshape(-1, 2)
    return candidates[int(np.argmin(np.abs(_length(candidates) - distance)))]


def _angle_to(point: Any) -> float:
    """Degrees to the right over 90."""
    return -math.degrees(arctan2(float(point[1]), float(point[0]))) / 90


def _pdm_lite(speed: float, wanted: float) -> tuple[float, bool]:
    if wanted < 1e-5:
        return 0.0, True
    speed, wanted = 3.6 * speed, 3.6 * max(wanted, _PDM_LITE_LEAST)
    error = wanted - speed
    if error > _PDM_LITE_FULL:
        return 1.0, False
    if speed / wanted > _PDM_LITE_BRAKE:
        return 0.0, True
    e, v = max(error, 0.0) / 100, speed / 100
    features = (v, v * v, 100 * e, e * e)
    throttle = sum(weight * feature for weight, feature in zip(_PDM_LITE, features))
    throttle += _PDM_LITE_CROSS[0] * v * e + _PDM_LITE_CROSS[1] * v * v * e
    return min(max(throttle, 0.0), 1.0), False

"""Where the car is and where its route goes, from CARLA's sensors alone, in this project's axes.

CARLA's world has y to the right of x; here y is to the left (the world's y negated) and yaw grows to the
left. Runs in Python 3.7 with numpy alone.
"""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

import numpy as np

EARTH_RADIUS = 6378137.0
GNSS_X = IMU_X = -1.4
"""Where GNSS and IMU are mounted, metres ahead of the vehicle's origin: as when the data was recorded."""
REAR_AXLE = 1.4178
"""Metres from the rear axle, which does not slip sideways, to the vehicle's origin (SimLingo's fit)."""
FOLLOW = 4
"""RoadOption LANEFOLLOW, which also stands for VOID (-1)."""
_ANCHOR_FIXES = 400
"""GPS fixes over which the offset of the dead-reckoned frame is averaged."""


class Projection(NamedTuple):
    """The leaderboard's Mercator projection around the map's origin, which no sensor tells."""

    latitude: float
    longitude: float
    """Of the map's origin, degrees."""

    def to_world(self, latitude: float, longitude: float) -> Any:
        """(2,) position in CARLA's world, metres, y to the right."""
        scale = math.cos(math.radians(self.latitude)) * EARTH_RADIUS
        x = scale * math.radians(longitude - self.longitude)
        return np.array([x, scale * (_mercator(self.latitude) - _mercator(latitude))])


def find_projection(latitude: float, longitude: float, x: float, y: float) -> Projection:
    """The map's origin, from one point of the plan that is given in both ways.

    Newton's method on s R (m(lat0) - m(lat)) = y with s = cos(lat0) and m(lat) = ln tan(pi/4 + lat/2).

    Args:
        latitude: degrees.
        longitude: degrees.
        x: metres, CARLA's world.
        y: metres, CARLA's world.
    """
    target, origin = _mercator(latitude), math.radians(latitude)
    for _ in range(50):
        difference = _mercator(math.degrees(origin)) - target
        value = EARTH_RADIUS * math.cos(origin) * difference - y
        # The derivative of m is 1 / cos.
        slope = EARTH_RADIUS * (1.0 - math.sin(origin) * difference)
        step = value / slope
        origin -= step
        if abs(step) < 1e-17:
            break
    longitude_0 = longitude - math.degrees(x / (EARTH_RADIUS * math.cos(origin)))
    return Projection(math.degrees(origin), longitude_0)


def _mercator(latitude: float) -> float:
    return math.log(math.tan(math.pi / 4 + math.radians(latitude) / 2))


class Pose(NamedTuple):
    """Of the vehicle's origin, in the dead-reckoned frame."""

    time: float
    """Seconds."""
    x: float
    y: float
    """Metres."""
    yaw: float
    """Radians."""


def wrapped(angle: float) -> float:
    """The same angle in (-pi, pi]."""
    return math.pi - (math.pi - angle) % (2 * math.pi)


def into(pose: Pose, points: Any) -> Any:
    """Points (K, 2) of the dead-reckoned frame in the vehicle's frame at a pose."""
    c, s = math.cos(pose.yaw), math.sin(pose.yaw)
    offset = np.asarray(points, np.float64).reshape(-1, 2) - [pose.x, pose.y]
    return np.stack([c * offset[:, 0] + s * offset[:, 1], c * offset[:, 1] - s * offset[:, 0]], axis=1)


def out_of(pose: Pose, points: Any) -> Any:
    """Points (K, 2) of the vehicle's frame at a pose in the dead-reckoned frame."""
    c, s = math.cos(pose.yaw), math.sin(pose.yaw)
    points = np.asarray(points, np.float64).reshape(-1, 2)
    turned = np.stack([c * points[:, 0] - s * points[:, 1], s * points[:, 0] + c * points[:, 1]], axis=1)
    return turned + np.array([pose.x, pose.y])


def relative(pose: Pose, other: Pose) -> Any:
    """(4, 4) from the vehicle's frame at another pose to that at a pose, the ground taken as flat."""
    turn = other.yaw - pose.yaw
    matrix = np.eye(4)
    matrix[:2, :2] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    matrix[:2, 3] = into(pose, [[other.x, other.y]])[0]
    return matrix


class Localiser:
    """Dead reckoning from speedometer and compass, which have no noise; GPS only anchors it to the map.

    GPS has 0.56 m of noise on each axis, so that differences of it are useless as motion.
    """

    def __init__(self, projection: Projection, yaw: float) -> None:
        """Prepares a route.

        Args:
            projection: of its map.
            yaw: heading to assume until the compass gives one, radians.
        """
        self.projection = projection
        self.pose = None  # type: Pose | None
        self._yaw = yaw
        self._offset = np.zeros(2)
        self._fixes = 0

    def update(self, time: float, speed: float, compass: float, gps: Any) -> Pose:
        """Takes the sensors of one tick.

        Args:
            time: seconds.
            speed: m/s.
            compass: radians clockwise from north (CARLA's -y); where it is nan the last heading holds.
            gps: latitude and longitude, degrees; nan where there is no fix.

        Returns:
            The pose, whose frame is the map's up to a constant offset.
        """
        before = self._yaw
        if math.isfinite(compass):
            self._yaw = wrapped(math.pi / 2 - compass)
        fix = self._fix(gps)
        if self.pose is None:
            start = np.zeros(2) if fix is None else fix
            self.pose = Pose(time, float(start[0]), float(start[1]), self._yaw)
            self._fixes = 0 if fix is None else 1
            return self.pose
        # The rear axle moves along the heading; the origin swings around it in a turn.
        middle = before + wrapped(self._yaw - before) / 2
        way = (speed if math.isfinite(speed) else 0.0) * (time - self.pose.time)
        x = self.pose.x + way * math.cos(middle) + REAR_AXLE * (math.cos(self._yaw) - math.cos(before))
        y = self.pose.y + way * math.sin(middle) + REAR_AXLE * (math.sin(self._yaw) - math.sin(before))
        self.pose = Pose(time, x, y, self._yaw)
        if fix is not None:
            self._fixes = min(self._fixes + 1, _ANCHOR_FIXES)
            self._offset += (fix - [x, y] - self._offset) / self._fixes
        return self.pose

    def position(self) -> Any:
        """(2,) where the vehicle's origin is on the map, this project's axes."""
        assert self.pose is not None
        return np.array([self.pose.x, self.pose.y]) + self._offset

    def from_map(self, points: Any) -> Any:
        """Points (K, 2) of the map (this project's axes) in the dead-reckoned frame."""
        return np.asarray(points, np.float64).reshape(-1, 2) - self._offset

    def _fix(self, gps: Any) -> Any:
        """The vehicle's origin by GPS, map axes; None without a fix."""
        if gps is None or not np.all(np.isfinite(np.asarray(gps, np.float64)[:2])):
            return None
        x, y = self.projection.to_world(float(gps[0]), float(gps[1]))
        forward = np.array([math.cos(self._yaw), math.sin(self._yaw)])
        return np.array([x, -y]) - GNSS_X * forward


class RoutePlanner:
    """Which nodes of the thinned plan come next (the leaderboard agents' rule)."""

    def __init__(self, points: Any, commands: Any, nearest: float, farthest: float) -> None:
        """Prepares a route.

        Args:
            points: (K, 2) nodes, map axes, metres.
            commands: (K,) RoadOption numbers.
            nearest: a node closer than this is passed, metres.
            farthest: nodes more than this ahead along the route are not looked at, metres.
        """
        pairs = zip(np.asarray(points, np.float64), (int(command) for command in commands))
        self._nodes = collections.deque(pairs)  # type: collections.deque
        self._nearest, self._farthest = nearest, farthest

    def advance(self, position: Any) -> None:
        """Drops the nodes that have been passed at a position (2,), map axes."""
        passed, ahead, far = 0, 0.0, -math.inf
        for index in range(1, len(self._nodes)):
            if ahead > self._farthest:
                break
            here = self._nodes[index][0]
            ahead += float(np.hypot(*(here - self._nodes[index - 1][0])))
            distance = float(np.hypot(*(here - position)))
            if distance <= self._nearest and distance > far:
                far, passed = distance, index
        for _ in range(passed):
            if len(self._nodes) > 2:
                self._nodes.popleft()

    def node(self, index: int) -> tuple[Any, int]:
        """Position and command of the node passed last (0) or a coming one; the last one behind the end."""
        point, command = self._nodes[min(index, len(self._nodes) - 1)]
        return point, FOLLOW if command < 0 else command


def first_heading(points: Any) -> float:
    """Direction of the first segment of a plan that has a length, radians; 0 without any."""
    steps = np.diff(np.asarray(points, np.float64), axis=0)
    for step in steps:
        if np.hypot(*step) > 1e-3:
            return math.atan2(float(step[1]), float(step[0]))
    return 0.0

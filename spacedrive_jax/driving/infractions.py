"""Bench2Drive's infractions on a drive (its `atomic_criteria.py`), found in the log.

A collision does not stop the vehicle: it is counted, and the drive goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from spacedrive_jax import exact
from spacedrive_jax.driving.drive_log import DriveLog, LaneMap
from spacedrive_jax.world.paths import corners, separated
from spacedrive_jax.world.scenario import Scenario
from spacedrive_jax.world.town import LANE_WIDTH, stop_sign_pose
from spacedrive_jax.world.traffic import TIME_STEP

STANDING = 0.1
"""m/s; a collision is not counted below it."""
SAME_COLLISION_S, SAME_COLLISION_M = 5.0, 5.0
"""A partner is counted again only after so many seconds and so many metres."""
OUTSIDE = LANE_WIDTH / 2 + 0.5
"""Metres from the nearest lane's centre line beyond which the vehicle's centre is outside."""
COMPLETE_SHARE, COMPLETE_METRES = 0.99, 10.0
"""A route is complete from this share of it on, and nearer than this to its end."""
AT_THE_END = 0.25
"""Metres before its end from which on the shortest routes are complete too."""
DEVIATION = 30.0
"""Metres from the route at which a drive ends."""
BLOCKED_S = 20.0
"""Seconds below `STANDING` after which a drive ends, red lights ahead not counted (Bench2Drive: 60 s)."""
LIGHT_REACH = 15.0
"""Metres before a stop line within which its red light excuses standing."""
SIGN_REACH = 4.0
"""Metres before the middle of a stop sign's box from which on the sign counts, and"""
SIGN_BOX = 1.2 * 1.0
"""metres behind it up to which it does: half the box, a fifth larger. It lies on the stop line."""
CHECKPOINTS = 20
TRAFFIC_RANGE = 50.0
"""Metres around the ego vehicle whose vehicles count as its traffic."""


@dataclasses.dataclass(frozen=True)
class Collision:
    """The beginning of an overlap with somebody."""

    step: int
    partner: int
    kind: str
    """`pedestrian`, `vehicle` or `layout` (things that are neither)."""


@dataclasses.dataclass(frozen=True)
class RedLight:
    """A stop line crossed while its arm had red."""

    step: int
    junction: int
    arm: int


@dataclasses.dataclass(frozen=True)
class StopSign:
    """A stop sign passed without a stop."""

    step: int
    """At which the vehicle had left its box."""
    junction: int
    arm: int


def collision_kind(category: str) -> str:
    """Bench2Drive's kind of a nuScenes category."""
    if category.startswith("human."):
        return "pedestrian"
    return "vehicle" if category.startswith("vehicle.") else "layout"


def touches(log: DriveLog, step: int) -> Int[np.ndarray, " M"]:
    """Everybody whose box overlaps the ego vehicle's at a step."""
    return overlapping(log.poses[step], log.half)


def overlapping(poses: Float[np.ndarray, "A 3"], half: Float[np.ndarray, "A 2"]) -> Int[np.ndarray, " M"]:
    """Which boxes overlap the first one, by the separating axis theorem."""
    reach = exact.norm(half)
    near = np.flatnonzero(exact.norm(poses[1:, :2] - poses[0, :2]) < reach[1:] + reach[0]) + 1
    if not len(near):
        return near
    own, others = corners(poses[:1], half[:1])[0], corners(poses[near], half[near])
    apart = separated(others, np.repeat(poses[:1], len(near), axis=0), np.repeat(half[:1], len(near), axis=0))
    apart |= separated(np.broadcast_to(own, others.shape), poses[near], half[near])
    return near[~apart]


def collisions(log: DriveLog) -> list[Collision]:
    """All collisions, one per partner in 5 s and 5 m, none while the ego vehicle stands."""
    found: list[Collision] = []
    last: dict[int, int] = {}
    for step in range(len(log.time)):
        if log.ego[step, 3] < STANDING:
            continue
        for partner in touches(log, step).tolist():
            if partner in last:
                since = log.time[step] - log.time[last[partner]]
                apart = log.travelled[step] - log.travelled[last[partner]]
                if since < SAME_COLLISION_S or apart < SAME_COLLISION_M:
                    continue
            last[partner] = step
            found.append(Collision(step, partner, collision_kind(log.categories[partner])))
    return found


def red_lights(log: DriveLog, lanes: LaneMap) -> list[RedLight]:
    """Stop lines that the vehicle's rear end crosses while they have red, each light once."""
    signals = log.scenario.cast.signals
    found: dict[tuple[int, int], RedLight] = {}
    if not lanes.stop_lines:
        return []
    ends = np.stack([line.ends for line in lanes.stop_lines])
    cos, sin = exact.cos_sin(log.poses[:, 0, 2])
    forward = np.stack([cos, sin], axis=1)
    length = float(log.half[0, 0])
    tail = log.poses[:, 0, :2] - 0.8 * length * forward
    end = log.poses[:, 0, :2] - (length + 1.0) * forward
    for step in range(len(log.time)):
        if log.ego[step, 3] < STANDING:
            continue
        for index in np.flatnonzero(_cross(tail[step], end[step], ends[:, 0], ends[:, 1])):
            line = lanes.stop_lines[index]
            along = ends[index, 0] - ends[index, 1]
            # Only who comes out of the line's own lane crosses it forwards.
            if forward[step, 0] * along[1] - forward[step, 1] * along[0] < 0:
                continue
            if line.arm not in signals.green_arms(line.junction, float(log.time[step])):
                found.setdefault((line.junction, line.arm), RedLight(step, line.junction, line.arm))
    return list(found.values())


def stop_signs(log: DriveLog, lanes: LaneMap) -> list[StopSign]:
    """Stop signs that the vehicle's centre passes without having been below `STANDING` once before them."""
    priorities = log.scenario.cast.signals.priorities
    centre, (cos, sin) = log.poses[:, 0, :2], exact.cos_sin(log.poses[:, 0, 2])
    before: dict[tuple[int, int], Bool[np.ndarray, " T"]] = {}
    for line in lanes.stop_lines:
        priority = priorities.get(line.junction)
        if priority is None or not priority.signed(line.arm):
            continue
        left = (line.ends[0] - line.ends[1]) / LANE_WIDTH
        offset = centre - line.ends.mean(axis=0)
        along, aside = offset[:, 0] * left[1] - offset[:, 1] * left[0], exact.dot(offset, left)
        here = (along >= -SIGN_REACH) & (along <= SIGN_BOX) & (np.abs(aside) <= LANE_WIDTH / 2)
        here &= cos * left[1] - sin * left[0] > 0
        key = line.junction, line.arm
        before[key] = before.get(key, np.zeros(len(here), bool)) | here
    found = []
    for (junction, arm), here in before.items():
        stopped = False
        for step in range(1, len(here)):
            stopped = here[step - 1] and (stopped or bool(log.ego[step - 1, 3] < STANDING))
            if here[step - 1] and not here[step] and not stopped:
                found.append(StopSign(step, junction, arm))
    return sorted(found, key=lambda sign: sign.step)


def _cross(
    a: Float[np.ndarray, "2"],
    b: Float[np.ndarray, "2"],
    c: Float[np.ndarray, "M 2"],
    d: Float[np.ndarray, "M 2"],
) -> Bool[np.ndarray, " M"]:
    """Whether the segment a-b crosses the segments c-d."""

    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        return (q[..., 0] - p[..., 0]) * (r[..., 1] - p[..., 1]) - (q[..., 1] - p[..., 1]) * (
            r[..., 0] - p[..., 0]
        )

    return (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) <= 0)


def outside_lanes(log: DriveLog, lanes: LaneMap) -> Bool[np.ndarray, " T"]:
    """Steps at which the vehicle's centre is on no lane, or on one that leads the other way."""
    centre = log.poses[:, 0, :2]
    return (lanes.off_centre(centre) > OUTSIDE) | lanes.against(centre, log.ego[:, 2])


def outside_metres(log: DriveLog, lanes: LaneMap) -> float:
    """Metres driven outside lanes."""
    steps = np.diff(log.travelled)
    return float(np.sum(steps[outside_lanes(log, lanes)[1:]]))


def completion(log: DriveLog) -> float:
    """Percent of the route."""
    length, farthest = log.goal - log.start, float(log.progress[-1])
    if is_complete(log.goal - farthest, length):
        return 100.0
    return 100.0 * min(max((farthest - log.start) / max(length, 1e-6), 0.0), 1.0)


def is_complete(left: float, length: float) -> bool:
    """Whether a route of some length is driven to its end when so much of it is left, metres."""
    return left < min(COMPLETE_METRES, max((1 - COMPLETE_SHARE) * length, AT_THE_END))


def waits_at_red(scenario: Scenario, s: float, time: float) -> bool:
    """Whether a red light on the route excuses standing.

    Args:
        scenario: the drive's.
        s: arc length of the ego vehicle on its route, metres.
        time: seconds since the start.
    """
    ego, signals = scenario.ego, scenario.cast.signals
    front = s + ego.reference_to_centre + ego.size[0] / 2
    return any(
        -2.5 < gate.stop - front < LIGHT_REACH and gate.arm not in signals.green_arms(gate.junction, time)
        for gate in ego.route.gates
    )


def speed_percentages(log: DriveLog) -> list[float]:
    """The ego vehicle's mean speed in percent of its traffic's, over each twentieth of the route.

    Stretches in which no vehicle moved nearby, and those whose end was not reached, give none.
    """
    vehicles = np.array([category.startswith("vehicle.") for category in log.categories])
    vehicles[0] = False
    vehicles[len(log.scenario.cast.movers) :] = False
    near = exact.norm(log.poses[..., :2] - log.poses[:, :1, :2]) < TRAFFIC_RANGE
    counted = near & vehicles
    length, farthest = log.goal - log.start, float(log.progress[-1])
    complete = is_complete(log.goal - farthest, length)
    marks = log.start + length * np.arange(CHECKPOINTS + 1) / CHECKPOINTS
    percentages = []
    for low, high in itertools.pairwise(marks.tolist()):
        inside = (log.progress >= low) & (log.progress < high)
        reached = complete or farthest >= high
        if not inside.any() or not reached or not counted[inside].any():
            continue
        background = float(np.mean(log.speeds[inside][counted[inside]]))
        if background > 0.0:
            percentages.append(100.0 * float(np.mean(log.ego[inside, 3])) / background)
    return percentages


def went_wrong(log: DriveLog, lanes: LaneMap, ending: str) -> int | None:
    """The step at which a drive first went wrong; None where it did not.

    Args:
        log: what happened.
        lanes: of its town.
        ending: `goal`, or why it ended before (then, at the latest, its last step).
    """
    steps = [hit.step for hit in collisions(log)] + [light.step for light in red_lights(log, lanes)]
    steps += [sign.step for sign in stop_signs(log, lanes)]
    steps += np.flatnonzero(outside_lanes(log, lanes))[:1].tolist()
    if ending != "goal":
        steps.append(len(log.time) - 1)
    return min(steps, default=None)


def messages(log: DriveLog, lanes: LaneMap) -> Mapping[str, list[str]]:
    """All infractions as Bench2Drive's evaluator words them, by its kinds."""
    result: dict[str, list[str]] = {
        "collisions_layout": [],
        "collisions_pedestrian": [],
        "collisions_vehicle": [],
        "red_light": [],
        "stop_infraction": [],
        "outside_route_lanes": [],
        "min_speed_infractions": [],
        "yield_emergency_vehicle_infractions": [],
        "scenario_timeouts": [],
        "route_dev": [],
        "vehicle_blocked": [],
        "route_timeout": [],
    }
    for hit in collisions(log):
        x, y = log.ego[hit.step, :2]
        result[f"collisions_{hit.kind}"].append(
            f"Agent collided against {log.categories[hit.partner]} {log.keys[hit.partner]} at "
            f"(x={x:.1f}, y={y:.1f}) after {log.time[hit.step] - log.time[0]:.1f} s"
        )
    for light in red_lights(log, lanes):
        x, y = log.ego[light.step, :2]
        result["red_light"].append(
            f"Agent ran a red light of junction {light.junction}, arm {light.arm} at (x={x:.1f}, y={y:.1f})"
        )
    for sign in stop_signs(log, lanes):
        x, y, _ = stop_sign_pose(lanes.town, sign.junction, sign.arm)
        result["stop_infraction"].append(
            f"Agent ran a stop with id={4 * sign.junction + sign.arm} at (x={x:.3f}, y={y:.3f}, z=0.0)"
        )
    metres = outside_metres(log, lanes)
    driven = float(log.travelled[-1])
    if metres > 0 and driven > 0:
        result["outside_route_lanes"].append(
            f"Agent went outside its route lanes for about {metres:.3f} meters "
            f"({100 * metres / driven:.2f}% of the completed route)"
        )
    result["min_speed_infractions"] = [
        f"Average speed is {percent:.2f}% of the surrounding traffic's one"
        for percent in speed_percentages(log)
    ]
    return result


STEPS_BLOCKED = round(BLOCKED_S / TIME_STEP)

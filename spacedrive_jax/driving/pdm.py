"""PDM-style scores of a whole drive: NAVSIM's sub-scores (`pdm_scorer.py`), with nuPlan's constants.

NAVSIM scores four seconds of a plan against a recording; here the whole closed-loop drive is scored. Comfort
is smoothed as Bench2Drive smooths, and its jerk is the length of the jerk's vector, which is never less than
NAVSIM's change of the acceleration's length. Extended comfort is NAVSIM's, of every two plans of the drive
that follow each other (see `extended_comfort`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_WAYPOINTS, WAYPOINT_STEP
from spacedrive_jax.driving.drive_log import DriveLog, LaneMap
from spacedrive_jax.driving.driver import LQR_HORIZON, Decision, Plan, plan_reference, to_vehicle, track
from spacedrive_jax.driving.infractions import collisions, overlapping, red_lights, touches
from spacedrive_jax.evaluation.bench2drive import (
    JERK,
    LATERAL_ACCELERATION,
    LONGITUDINAL_ACCELERATION,
    LONGITUDINAL_JERK,
    ORDER,
    WINDOW,
    YAW_ACCELERATION,
    YAW_RATE,
)
from spacedrive_jax.world.filming import KEYFRAME_PERIOD
from spacedrive_jax.world.town import LANE_WIDTH
from spacedrive_jax.world.traffic import TIME_STEP
from spacedrive_jax.world.vehicle import Control, Limits, VehicleState, actuate, moved

STOPPED = 0.05
"""m/s below which a partner counts as stopped."""
NEVER_AT_FAULT = 0.005
"""m/s below which the ego vehicle stands: nobody standing runs into anybody."""
AGAINST_FREE, AGAINST_SOME = 2.0, 6.0
"""Metres driven against traffic within a second: below the first it counts nothing, below the second half."""
TTC_S = (0.0, 0.3, 0.6, 0.9)
LANE_KEEPING, LANE_KEEPING_S = 0.5, 2.0
"""Metres from the centre line, and how long without a break, that is no lane keeping."""
SHORT_PROGRESS = 5.0
"""Metres; where the expert goes less, everybody's progress is full."""
AGREEMENT = (0.7, 0.5, 0.1, 0.1)
"""Largest root mean square of what two plans differ by in acceleration (m/s^2), jerk (m/s^3), yaw rate
(rad/s) and yaw acceleration (rad/s^2)."""
ACCELERATION_WINDOW, DERIVATIVE_WINDOW = 8, 15
"""Time steps that NAVSIM smooths accelerations over, and takes derivatives over."""
SIMULATED = Limits(steer=math.pi / 3, acceleration_lag=0.2, steer_lag=0.05)
"""The bicycle that plans are compared on: nuPlan's lags and largest steering angle (its
`batch_kinematic_bicycle`), which has no limits of acceleration and steering rate, this world's."""


@dataclasses.dataclass(frozen=True)
class PdmScore:
    """Every part, 0..1, and what they make together."""

    no_collision: float
    """NC: 1, 0.5 after an at-fault collision with a thing, 0 with a road user."""
    drivable_area: float
    """DAC: all four corners on the road throughout."""
    driving_direction: float
    """DDC: not against traffic."""
    traffic_light: float
    """TLC: no red light."""
    progress: float
    """EP: of the expert's."""
    time_to_collision: float
    """TTC: no box that goes on at its speed is met within 0.9 s."""
    lane_keeping: float
    """LK."""
    comfort: float
    """C: accelerations, jerks and yaw rates within bounds throughout."""
    extended_comfort: float | None
    """EC: every two plans that follow each other agree; None where no two do."""

    @property
    def pdms(self) -> float:
        """NAVSIM v1's PDM score."""
        weighted = 5 * self.progress + 5 * self.time_to_collision + 2 * self.comfort
        return self.no_collision * self.drivable_area * weighted / 12

    def epdms(self, reference: PdmScore | None = None) -> float:
        """NAVSIM v2's extended score; its history comfort is `comfort`, of a drive that is history itself.

        A drive without an extended comfort is scored by the other parts, its weight left out (NAVSIM's way
        with a frame that none precedes).

        Args:
            reference: the scenario's own driver's; what that fails is nobody's fault and counts as passed
                (the filter of NAVSIM's formula, extended comfort included, which its tool adds unfiltered).
                None takes every part as it is.
        """
        own = self if reference is None else self._excused(reference)
        multipliers = own.no_collision * own.drivable_area * own.driving_direction * own.traffic_light
        weighted = 5 * own.progress + 5 * own.time_to_collision + 2 * own.lane_keeping + 2 * own.comfort
        if own.extended_comfort is None:
            return multipliers * weighted / 14
        return multipliers * (weighted + 2 * own.extended_comfort) / 16

    def _excused(self, reference: PdmScore) -> PdmScore:
        own, others = dataclasses.asdict(self), dataclasses.asdict(reference)
        failed = (name for name, value in others.items() if value == 0.0 and own[name] is not None)
        return dataclasses.replace(self, **dict.fromkeys(failed, 1.0))


def pdm_score(log: DriveLog, lanes: LaneMap, expert_metres: float, decisions: Sequence[Decision]) -> PdmScore:
    """Scores a drive.

    Args:
        log: the drive.
        lanes: of its town.
        expert_metres: how far the script's driver goes along the route in the same scenario.
        decisions: what was decided on the way, every `KEYFRAME_PERIOD` seconds.
    """
    return PdmScore(
        no_collision=_no_collision(log, lanes),
        drivable_area=float(bool(lanes.on_road(log.corners).all())),
        driving_direction=_driving_direction(log, lanes),
        traffic_light=float(not red_lights(log, lanes)),
        progress=_progress(log, expert_metres),
        time_to_collision=float(not _will_collide(log).any()),
        lane_keeping=float(not _leaves_lane(log, lanes)),
        comfort=float(comfortable(log)),
        extended_comfort=extended_comfort(decisions),
    )


def at_fault(log: DriveLog, step: int, partner: int, lanes: LaneMap) -> bool:
    """Whether the ego vehicle is to blame for an overlap that begins at a step.

    A stopped partner, one met with the front, and one met with the side while the vehicle is not inside one
    lane; never while it stands.
    """
    if log.ego[step, 3] <= NEVER_AT_FAULT:
        return False
    if log.speeds[step, partner] <= STOPPED:
        return True
    x, y, yaw = log.poses[step, 0]
    length, width = log.half[0]
    cos, sin = exact.cos_sin(yaw)

    def strip(ahead: float) -> bool:
        """Whether the partner overlaps a thin strip across the vehicle at its front or rear."""
        pose = np.array([[x + ahead * cos, y + ahead * sin, yaw], log.poses[step, partner]])
        return bool(len(overlapping(pose, np.array([[0.05, width], log.half[partner]]))))

    if strip(length):
        return True
    if strip(-length):
        return False
    centre = log.poses[step : step + 1, 0, :2]
    in_one_lane = float(lanes.off_centre(centre)[0]) <= LANE_WIDTH / 2 - float(width)
    return not in_one_lane or not bool(lanes.on_road(log.corners[step : step + 1])[0])


def _no_collision(log: DriveLog, lanes: LaneMap) -> float:
    score = 1.0
    for hit in collisions(log):
        if at_fault(log, hit.step, hit.partner, lanes):
            score = min(score, 0.5 if hit.kind == "layout" else 0.0)
    return score


def _driving_direction(log: DriveLog, lanes: LaneMap) -> float:
    wrong = lanes.against(log.poses[:, 0, :2], log.ego[:, 2])
    metres = np.concatenate([[0.0], np.diff(log.travelled)]) * wrong
    window = round(1.0 / TIME_STEP)
    total = np.concatenate([[0.0], np.cumsum(metres)])
    most = float(np.max(total[window:] - total[:-window])) if len(total) > window else float(total[-1])
    return 1.0 if most < AGAINST_FREE else 0.5 if most < AGAINST_SOME else 0.0


def _progress(log: DriveLog, expert_metres: float) -> float:
    if expert_metres < SHORT_PROGRESS:
        return 1.0
    return min(max((float(log.progress[-1]) - log.start) / expert_metres, 0.0), 1.0)


def _will_collide(log: DriveLog) -> Bool[np.ndarray, " T"]:
    """Steps at which somebody ahead is met within `TTC_S` if everybody goes on as now.

    nuPlan's projection (NAVSIM holds the vehicle's against where the others then are), of everybody in the
    front half (both: within 30 degrees, and in junctions and between lanes whoever is not behind).
    """
    cos, sin = exact.cos_sin(log.poses[..., 2])
    velocity = np.stack([cos, sin], axis=-1) * log.speeds[..., None]
    velocity[:, 0] = velocity[:, 0] / np.maximum(log.speeds[:, :1], 1e-9) * log.ego[:, 3:4]
    hit = np.zeros(len(log.time), bool)
    for step in range(len(log.time)):
        if log.ego[step, 3] <= NEVER_AT_FAULT:
            continue
        already = set(touches(log, step).tolist())
        for later in TTC_S:
            poses = log.poses[step].copy()
            poses[:, :2] += later * velocity[step]
            for partner in overlapping(poses, log.half).tolist():
                x, y = log.poses[step, partner, :2] - log.poses[step, 0, :2]
                ahead = x * cos[step, 0] + y * sin[step, 0] > 0
                if ahead and (partner not in already or later == 0.0):
                    hit[step] = True
    return hit


def _leaves_lane(log: DriveLog, lanes: LaneMap) -> bool:
    centre = log.poses[:, 0, :2]
    centre = centre[~lanes.in_junction(centre)]  # a junction ends no run: NAVSIM goes on counting behind it
    run = 0
    for off in (lanes.off_centre(centre) > LANE_KEEPING).tolist():
        run = run + 1 if off else 0
        if run * TIME_STEP >= LANE_KEEPING_S - 1e-9:
            return True
    return False


def comfortable(log: DriveLog) -> bool:
    """Whether the smoothed motion stays within the bounds of comfort throughout."""
    if len(log.time) <= ORDER:
        return True
    smooth = functools.partial(exact.savitzky_golay, window=min(WINDOW, len(log.time)), step=TIME_STEP)
    along, across = log.acceleration, log.ego[:, 3] * log.yaw_rate
    longitudinal_jerk = smooth(along, deriv=1)
    checks = (
        (smooth(along), LONGITUDINAL_ACCELERATION),
        (smooth(across), LATERAL_ACCELERATION),
        (exact.hypot(longitudinal_jerk, smooth(across, deriv=1)), JERK),
        (longitudinal_jerk, LONGITUDINAL_JERK),
        (smooth(log.yaw_rate), YAW_RATE),
        (smooth(log.yaw_rate, deriv=1), YAW_ACCELERATION),
    )
    return all(bool(np.all((values > low) & (values < high))) for values, (low, high) in checks)


def extended_comfort(decisions: Sequence[Decision]) -> float | None:
    """Whether every two plans that follow each other agree, over the seconds that both plan.

    The protocol is NAVSIM v2's (`ego_is_two_frame_extended_comfort`): each plan is driven out from where it
    was made, by nuPlan's LQR tracker on its bicycle, and the two are held against each other from the second
    one's start to the first one's end. What differs:

    * A plan is three seconds long, so that two have 2.5 s in common; NAVSIM's has four, and 3.5 s.
    * NAVSIM averages over frames; here a drive has this part or not, and one jump takes it, as one moment of
      discomfort takes `comfort`.
    * The later plan begins where the drive has got to by its own controller (`drive --controller`), NAVSIM's
      in the recording; in both the tracker that compares may have got elsewhere.
    * The direction comes from the waypoints alone, also where a policy plans a path.
    * Headings come from the line through the waypoints: a plan has none.

    Args:
        decisions: every `KEYFRAME_PERIOD` seconds. One without a plan is compared with neither neighbour.

    Returns:
        1 or 0; None where no two plans follow each other.
    """
    score, before = None, None
    for decision in decisions:
        now = None if decision.plan is None else simulated(decision.plan, decision.vehicle)
        if before is not None and now is not None:
            if not agree(before, now):
                return 0.0
            score = 1.0
        before = now
    return score


def simulated(plan: Plan, vehicle: VehicleState) -> Float[np.ndarray, "31 2"]:
    """Drives a plan out to its end.

    Beyond its last waypoint a plan goes on as it last went, for the tracker looks a second ahead.

    Args:
        plan: what is driven.
        vehicle: the state it was made in.

    Returns:
        Acceleration along the vehicle, m/s^2, and the heading relative to the first, radians, every
        `TIME_STEP` from now on.
    """
    last = plan.waypoints[-1] - plan.waypoints[-2]
    beyond = plan.waypoints[-1] + last * np.arange(1, 4)[:, None]
    points = np.concatenate([np.zeros((1, 2)), plan.waypoints, beyond])
    steps, ahead = round(NUM_WAYPOINTS * WAYPOINT_STEP / TIME_STEP), LQR_HORIZON + 2
    reference = plan_reference(points, WAYPOINT_STEP, 0.0, steps + ahead)
    state = dataclasses.replace(vehicle, x=0.0, y=0.0, yaw=0.0)
    found = [(state.acceleration, state.yaw)]
    for step in range(steps):
        seen = reference[step : step + ahead]
        seen = np.column_stack([to_vehicle(seen[:, :2], state), seen[:, 2] - state.yaw])
        tracking = track(state.speed, state.steer, seen)
        control = Control(tracking.acceleration, state.steer + tracking.steer_rate * TIME_STEP)
        state = moved(actuate(state, control, TIME_STEP, SIMULATED), TIME_STEP)
        found.append((state.acceleration, state.yaw))
    return np.array(found)


def agree(before: Float[np.ndarray, "T 2"], now: Float[np.ndarray, "T 2"]) -> bool:
    """Whether two plans, driven out, differ by no more than `AGREEMENT` where they overlap.

    Args:
        before: of the earlier one, see `simulated`.
        now: of the one made `KEYFRAME_PERIOD` later.
    """
    late = round(KEYFRAME_PERIOD / TIME_STEP)
    pair = zip(_motion(before[late:]), _motion(now[: len(now) - late]), strict=True)
    differences = [first - second for first, second in pair]
    rms = (math.sqrt(float(np.mean(each * each))) for each in differences)
    return all(value <= most for value, most in zip(rms, AGREEMENT, strict=True))


def _motion(driven: Float[np.ndarray, "T 2"]) -> tuple[Float[np.ndarray, " T"], ...]:
    """Acceleration, jerk, yaw rate and yaw acceleration.

    NAVSIM takes the acceleration's length, so that speeding up and braking as hard are the same to it, and
    its bicycle has none to the side.
    """
    filtered = functools.partial(exact.savitzky_golay, step=TIME_STEP)
    acceleration = filtered(np.abs(driven[:, 0]), ACCELERATION_WINDOW)
    return (
        acceleration,
        filtered(acceleration, DERIVATIVE_WINDOW, deriv=1),
        filtered(driven[:, 1], DERIVATIVE_WINDOW, deriv=1),
        filtered(driven[:, 1], DERIVATIVE_WINDOW, deriv=2),
    )


def script_decisions(script: DriveLog) -> tuple[Decision, ...]:
    """What the script's own driver decided at every keyframe: to drive as it then drove.

    The last ones, whose three seconds the script does not hold, are left out.

    Args:
        script: its log (`drive_log.script_log`).
    """
    motion, route = script.scenario.motions[0], script.scenario.ego.route
    later = WAYPOINT_STEP * np.arange(1, NUM_WAYPOINTS + 1)
    end = TIME_STEP * (len(motion.s) - 1)
    found = []
    for step in range(0, len(script.time), round(KEYFRAME_PERIOD / TIME_STEP)):
        time = float(script.time[step])
        x, y, yaw, speed, _, steer = script.ego[step].tolist()
        # A vehicle has the acceleration that brought it there, a motion the one it goes on with.
        vehicle = VehicleState(x, y, yaw, speed, motion.at(time - TIME_STEP / 2)[2], steer)
        if time + later[-1] <= end + 1e-9:
            s = np.array([motion.at(time + after)[0] for after in later.tolist()])
            found.append(Decision(time, vehicle, Plan(to_vehicle(route.pose(s)[:, :2], vehicle))))
    return tuple(found)


def neuro_ncap(log: DriveLog) -> float:
    """NeuroNCAP's score: 5 without a collision, else 4 times the share of the impact speed that was avoided.

    The impact speed is that of the two relative to each other where they first touch, whoever ran into whom:
    to stand still is no way out. The reference is the one that they would have had, had the ego vehicle
    gone on with the velocity that it began with (NeuroNCAP: with the recorded one).
    """
    for step in range(len(log.time)):
        for partner in touches(log, step).tolist():
            impact, reference = (_closing_speed(log, at, step, partner) for at in (step, 0))
            return 4.0 * max(0.0, 1.0 - impact / max(reference, 1e-6))
    return 5.0


def _closing_speed(log: DriveLog, own: int, step: int, partner: int) -> float:
    """How fast the ego vehicle of one step and somebody of another move relative to each other, m/s."""
    velocities = []
    for speed, heading in (
        (float(log.ego[own, 3]), float(log.ego[own, 2])),
        (float(log.speeds[step, partner]), float(log.poses[step, partner, 2])),
    ):
        cos, sin = exact.cos_sin(heading)
        velocities.append((speed * cos, speed * sin))
    (own_x, own_y), (x, y) = velocities
    return float(exact.hypot(own_x - x, own_y - y))

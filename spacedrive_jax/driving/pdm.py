"""PDM-style scores of a whole drive: NAVSIM's sub-scores (`pdm_scorer.py`), with nuPlan's constants.

NAVSIM scores four seconds of a plan against a recording; here the whole closed-loop drive is scored. Comfort
is smoothed as Bench2Drive smooths, and its jerk is the length of the jerk's vector, which is never less than
NAVSIM's change of the acceleration's length.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool

from spacedrive_jax import exact
from spacedrive_jax.driving.drive_log import DriveLog, LaneMap
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
from spacedrive_jax.world.town import LANE_WIDTH
from spacedrive_jax.world.traffic import TIME_STEP

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

    @property
    def pdms(self) -> float:
        """NAVSIM v1's PDM score."""
        weighted = 5 * self.progress + 5 * self.time_to_collision + 2 * self.comfort
        return self.no_collision * self.drivable_area * weighted / 12

    def epdms(self, reference: PdmScore | None = None) -> float:
        """NAVSIM v2's extended score, without its extended comfort (the agreement of consecutive plans).

        Args:
            reference: the scenario's own driver's; what that fails is nobody's fault and counts as passed
                (NAVSIM's filter). None takes every part as it is.
        """
        own = self if reference is None else self._excused(reference)
        multipliers = own.no_collision * own.drivable_area * own.driving_direction * own.traffic_light
        weighted = 5 * own.progress + 5 * own.time_to_collision + 2 * own.lane_keeping + 2 * own.comfort
        return multipliers * weighted / 14

    def _excused(self, reference: PdmScore) -> PdmScore:
        failed = (name for name, value in dataclasses.asdict(reference).items() if value == 0.0)
        return dataclasses.replace(self, **dict.fromkeys(failed, 1.0))


def pdm_score(log: DriveLog, lanes: LaneMap, expert_metres: float) -> PdmScore:
    """Scores a drive.

    Args:
        log: the drive.
        lanes: of its town.
        expert_metres: how far the script's driver goes along the route in the same scenario.
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
    """Steps at which somebody ahead is met within `TTC_S` if everybody goes on as now."""
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
    longitudinal_jerk = smooth(along, slope=True)
    checks = (
        (smooth(along), LONGITUDINAL_ACCELERATION),
        (smooth(across), LATERAL_ACCELERATION),
        (exact.hypot(longitudinal_jerk, smooth(across, slope=True)), JERK),
        (longitudinal_jerk, LONGITUDINAL_JERK),
        (smooth(log.yaw_rate), YAW_RATE),
        (smooth(log.yaw_rate, slope=True), YAW_ACCELERATION),
    )
    return all(bool(np.all((values > low) & (values < high))) for values, (low, high) in checks)


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

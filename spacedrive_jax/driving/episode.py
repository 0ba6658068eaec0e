"""One drive from its start to its end, as a generator: it asks for a plan and is sent one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Generator
from typing import Any, Literal

import cv2
import numpy as np

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_WAYPOINTS
from spacedrive_jax.data.schema import Record
from spacedrive_jax.driving.drive_log import DriveLog, LaneMap, drive_log
from spacedrive_jax.driving.driver import Controller, Decision, Driver, Plan, PlanError, to_global
from spacedrive_jax.driving.infractions import (
    DEVIATION,
    STANDING,
    STEPS_BLOCKED,
    is_complete,
    waits_at_red,
    went_wrong,
)
from spacedrive_jax.driving.observation import Observer
from spacedrive_jax.driving.recovery import ExpertTarget, Sway, expert_target, with_target
from spacedrive_jax.driving.scenarios import KINDS, DriveSpec, build_drive
from spacedrive_jax.world.filming import KEYFRAME_PERIOD, Film, Take
from spacedrive_jax.world.scenario import WARM_UP, Scenario
from spacedrive_jax.world.traffic import TIME_STEP
from spacedrive_jax.world.vehicle import Control, Limits
from spacedrive_jax.world.world import World

MOST_FAILURES = 10
"""Answers in a row that are no plan, after which a policy counts as crashed."""
LATEST = 1.5
"""A drive is over after this many times the script's seconds (red lights and slower drivers)."""


@dataclasses.dataclass(frozen=True)
class DriveOptions:
    """How drives are driven, the same for all of a run."""

    image_size: tuple[int, int] = (198, 352)
    """Height and width of the camera images, pixels."""
    sense: Literal["images", "status", "nothing"] = "images"
    """What the record holds: all of it; all but the images; no record at all (for planners that know the
    world)."""
    depth: bool = True
    """Draw exact depth."""
    lidar: bool = False
    controller: Controller = "pure_pursuit"
    limits: Limits = dataclasses.field(default_factory=Limits)
    control_loss: bool = True
    """Disturb the controls where the scenario says so."""
    perturb: bool = False
    """Follow every plan beside its line and at another pace (see `recovery.Sway`)."""
    perturb_speed: bool = False
    """Slow down and stop for nothing too; with `perturb`."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What a drive asks a policy."""

    number: int
    """Of the drive in its set."""
    decision: int
    """Counted from 0."""
    record: Record
    world: World
    """For policies that may look behind the record."""
    expert: Plan | None = None
    """The expert's answer, where it is worked out anyway."""


@dataclasses.dataclass(frozen=True)
class DriveResult:
    """A finished drive."""

    spec: DriveSpec
    log: DriveLog
    lanes: LaneMap
    ending: str
    """`goal`, `deviated`, `blocked`, `timeout` or `crashed`."""
    expert_metres: float
    decisions: tuple[Decision, ...]
    failures: Counter[str]
    records: tuple[Record, ...]
    """Of every decision in hindsight with the expert's plan as its target, where `keep` asked for them."""
    wrong: int | None
    """Time step at which it first went wrong (`infractions.went_wrong`)."""
    views: tuple[bytes, ...]
    """The six JPEGs of the last decision before that; empty where nothing went wrong or nobody looked."""


def episode(
    spec: DriveSpec, options: DriveOptions, *, keep: bool = False
) -> Generator[Question, Plan | PlanError, DriveResult]:
    """Drives one scenario.

    Args:
        spec: which.
        options: how.
        keep: return the records too, for learning from.

    Yields:
        A question at every decision; the plan, or why there is none, is sent back.
    """
    cv2.setNumThreads(1)
    scenario, goal = build_drive(spec)
    seconds = KINDS[spec.kind].seconds
    latest = WARM_UP + LATEST * seconds
    take = _take(spec, options, latest)
    world = World(scenario, options.limits)
    world.reset(steered=False)
    for _ in range(round(WARM_UP / TIME_STEP)):
        world.step()
    world.hand_over(steered=True)
    first = len(world.states) - 1
    observer = _Eyes(take, scenario, options)
    driver = Driver(options.controller, options.limits)
    noise = np.random.default_rng([spec.world, spec.number, spec.seed, 8])
    sway = None
    if options.perturb:
        rng = np.random.default_rng([spec.world, spec.number, spec.seed, 9])
        sway = Sway(rng, slows=options.perturb_speed)
    lost = spec.kind == "ControlLoss" and options.control_loss
    decisions: list[Decision] = []
    targets: list[ExpertTarget] = []
    failures: Counter[str] = Counter()
    in_a_row = still = 0
    per_decision = round(KEYFRAME_PERIOD / TIME_STEP)
    while True:
        state = world.state
        vehicle = state.vehicle
        assert vehicle is not None
        done = len(world.states) - 1 - first
        if done % per_decision == 0:
            number = done // per_decision
            if keep:
                targets.append(expert_target(world))
            known = targets[-1].plan if keep else None
            answer = yield Question(spec.number, number, observer.look(world), world, known)
            if isinstance(answer, Plan):
                driver.follow(answer if sway is None else sway.disturb(answer), vehicle, state.time)
                decisions.append(Decision(state.time, vehicle, answer))
                in_a_row = 0
            else:
                failures[answer.kind.value] += 1
                decisions.append(Decision(state.time, vehicle, None, str(answer)))
                in_a_row += 1
        ending = _ending(world, goal, scenario, first, latest, in_a_row, still)
        if ending:
            break
        driver.target = observer.target
        control = driver.control(vehicle, state.time)
        if lost:
            control = _disturbed(control, float(state.traffic.s[0]) - scenario.ego.start, noise)
        later = world.step(control).vehicle
        assert later is not None
        excused = waits_at_red(scenario, float(world.state.traffic.s[0]), world.state.time)
        still = still + 1 if later.speed < STANDING and not excused else 0
    log, lanes = drive_log(world, world.states[first:], goal), LaneMap(scenario.town)
    wrong = went_wrong(log, lanes, ending)
    return DriveResult(
        spec=spec,
        log=log,
        lanes=lanes,
        ending=ending,
        expert_metres=goal - log.start,
        decisions=tuple(decisions),
        failures=failures,
        records=tuple(
            with_target(record, target) for record, target in zip(observer.records(), targets, strict=True)
        )
        if keep
        else (),
        wrong=wrong,
        views=() if wrong is None else observer.views(wrong // per_decision),
    )


def _take(spec: DriveSpec, options: DriveOptions, latest: float) -> Take:
    keyframes = int((latest - WARM_UP) / KEYFRAME_PERIOD) + 2
    return Take(spec.number + 1, spec.world, keyframes, options.image_size, options.depth, spec.town)


class _Eyes:
    """The observer; without images the record is not needed and none is made."""

    def __init__(self, take: Take, scenario: Scenario, options: DriveOptions) -> None:
        self._observer: Observer | None = None
        self.target: np.ndarray | None = None
        """The route's next node, global metres."""
        if options.sense != "nothing":
            # The script ends later than its goal: its whole way is drawn.
            film = Film(take, scenario, reach=float(TIME_STEP * (len(scenario.motions[0].s) - 1)))
            images = options.sense == "images"
            self._observer = Observer(film, scenario, images=images, lidar=options.lidar)

    def look(self, world: World) -> Record:
        if self._observer is None:
            return {}
        record = self._observer.look(world.recording())
        vehicle = world.state.vehicle
        if record["route_valid"] and vehicle is not None:
            self.target = to_global(record["target_points"][:1], vehicle)[0]
        return record

    def views(self, number: int) -> tuple[bytes, ...]:
        frames = [] if self._observer is None else self._observer.frames
        if not frames:
            return ()
        images = tuple(view.image for view in frames[min(number, len(frames) - 1)].views)
        return images if any(images) else ()

    def records(self) -> tuple[Record, ...]:
        if self._observer is None:
            return ()
        return tuple(self._observer.record(index) for index in range(len(self._observer.frames)))


def _ending(
    world: World, goal: float, scenario: Scenario, first: int, latest: float, in_a_row: int, still: int
) -> str:
    """Why the drive is over now; empty while it is not."""
    state = world.state
    s, start = float(state.traffic.s[0]), float(world.states[first].traffic.s[0])
    if is_complete(goal - s, goal - start):
        return "goal"
    vehicle = state.vehicle
    assert vehicle is not None
    _, aside = scenario.ego.route.project(np.array([vehicle.x, vehicle.y]), s)
    if abs(aside) > DEVIATION:
        return "deviated"
    if in_a_row >= MOST_FAILURES:
        return "crashed"
    if still >= STEPS_BLOCKED:
        return "blocked"
    return "timeout" if state.time >= latest - 1e-9 else ""


CONTROL_LOSS = ((20.0, 30.0), (45.0, 55.0))
"""Metres from the start at which the road is slippery."""


def _disturbed(control: Control, driven: float, rng: np.random.Generator) -> Control:
    """Control on a slippery stretch (srunner: throttle 0.03 +- 0.01, steer 0.055 +- 0.015 of full)."""
    push, turn = rng.normal(0.03, 0.01), rng.normal(0.055, 0.015)
    side = 1.0 if rng.random() < 0.5 else -1.0
    if not any(low < driven < high for low, high in CONTROL_LOSS):
        return control
    return Control(control.acceleration + 2.5 * push, control.steer + side * turn * 1.2)


AS_RECORDED = (0.5, 0.5)
"""Metres and m/s within which a vehicle still is where, and as fast as, the script drove (this project's)."""


def open_loop(result: DriveResult) -> tuple[float, int]:
    """How far plans are from what the script drove, where they were made in the script's own states.

    That is the open-loop L2 of the field, on the drive's own scenario. A drive begins in such a state: there
    is one decision at least, unless it brought no plan.

    Returns:
        Mean distance over the six waypoints and the decisions that count, metres (0 where none does), and how
        many decisions count.
    """
    script, route = result.log.scenario.motions[0], result.log.scenario.ego.route
    last = TIME_STEP * (len(script.s) - 1)
    errors = []
    for decision in result.decisions:
        vehicle = decision.vehicle
        s, speed, _ = script.at(decision.time)
        x, y, _ = route.pose(s).tolist()
        off = exact.hypot(vehicle.x - x, vehicle.y - y), abs(vehicle.speed - speed)
        later = decision.time + KEYFRAME_PERIOD * np.arange(1, NUM_WAYPOINTS + 1)
        if decision.plan is None or off[0] > AS_RECORDED[0] or off[1] > AS_RECORDED[1] or later[-1] > last:
            continue
        driven = route.pose(np.array([script.at(float(time))[0] for time in later]))[:, :2]
        errors.append(float(exact.norm(to_global(decision.plan.waypoints, vehicle) - driven).mean()))
    return (float(np.mean(errors)) if errors else 0.0), len(errors)


def outcome(result: DriveResult) -> dict[str, Any]:
    """The decisions as plain numbers, for the report."""
    return {
        "ending": result.ending,
        "wrong_at": None if result.wrong is None else round(result.wrong * TIME_STEP, 3),
        "decisions": [
            {
                "time": round(decision.time, 3),
                "pose": [decision.vehicle.x, decision.vehicle.y, decision.vehicle.yaw],
                "waypoints": None if decision.plan is None else decision.plan.waypoints.round(3).tolist(),
                "path": None
                if decision.plan is None or decision.plan.path is None
                else decision.plan.path.round(3).tolist(),
                "failure": decision.failure,
            }
            for decision in result.decisions
        ],
    }

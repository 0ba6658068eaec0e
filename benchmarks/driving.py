"""How fast drives go, and what a decision costs in processor time: traffic, drawing, the record, a model.

    python -m benchmarks.driving [--size 352x198] [--drives 2] [--decisions 20] [--checkpoint RUN]

Of the drawing, what pixels see (`render.cast`) and their colours (`shading.shade`) are named; the rest
is placing the quads, shadows and encoding. Its floor is what nobody can leave out who draws this way: one
z-buffer pass over the pixels of all quads that face the camera, and one pass that paints each pixel.
`benchmarks.drawing` holds the drawing against another revision's.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from spacedrive_jax.driving.bench import PlanRequest
from spacedrive_jax.driving.driver import Driver
from spacedrive_jax.driving.observation import Observer
from spacedrive_jax.driving.policies import expert, route_constant_speed
from spacedrive_jax.driving.scenarios import DriveSpec, build_drive
from spacedrive_jax.world import sensors, stage
from spacedrive_jax.world.filming import Film, Take
from spacedrive_jax.world.render import fragments, ground_depth, nearest_of
from spacedrive_jax.world.world import World

KINDS = ("turn_left", "cruise", "pedestrian", "straight")
PERIOD_MS = 500.0
"""Simulated time between two decisions."""


class Clock:
    """Processor seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, part: str, action: Callable[[], Any]) -> Any:
        """Does it and counts it."""
        started = time.process_time()
        result = action()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - started
        return result

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Counts every call of a function of a module from now on."""
        inner = getattr(owner, name)
        setattr(owner, name, lambda *values, **named: self.time(part, lambda: inner(*values, **named)))


def main() -> None:
    """Drives and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="352x198", help="width x height of the images")
    parser.add_argument("--drives", type=int, default=2)
    parser.add_argument("--decisions", type=int, default=20, help="of each drive")
    parser.add_argument("--checkpoint", help="a run whose model is asked beside")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    parts(arguments)


def parts(arguments: argparse.Namespace) -> None:
    """What each part of a decision takes."""
    clock = Clock()
    clock.watch(stage, "cast", "  of it: what pixels see")
    clock.watch(stage, "shade", "  of it: colours")
    clock.watch(stage, "_encode", "  of it: JPEG and PNG")
    ask = None
    if arguments.checkpoint:
        from spacedrive_jax.driving.batch_policies import open_policy

        ask = open_policy(arguments.checkpoint, batch_size=1, deadline=600.0, average=False, token=None).plans
    passes: list[float] = []
    for number in range(arguments.drives):
        drive(number, arguments.size, arguments.decisions, clock, ask, passes)
    decisions = arguments.drives * arguments.decisions
    staging = clock.seconds.pop("staging")
    for part, seconds in clock.seconds.items():
        print(f"{part:26} {1e3 * seconds / decisions:8.1f} ms a decision")
    drawn = clock.seconds["drawing"] / decisions
    floor = float(np.mean(passes))
    print(f"{'floor of the drawing':26} {1e3 * floor:8.1f} ms a decision: {drawn / floor:.1f} times less")
    print(f"{'staging':26} {1e3 * staging / arguments.drives:8.1f} ms a drive")
    names = ("drawing", "record", "traffic and vehicle", "model")
    shares = {name: clock.seconds[name] for name in names if name in clock.seconds}
    total = sum(shares.values())
    print("shares: " + ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in shares.items()))
    print(f"{PERIOD_MS / (1e3 * total / decisions):.2f} simulated seconds a second of one core")


def drive(
    number: int,
    size: str,
    decisions: int,
    clock: Clock,
    ask: Callable[[list[PlanRequest]], Any] | None,
    passes: list[float],
) -> None:
    """One drive of a blind driver, with cameras, the expert (and a model) asked beside."""
    spec = DriveSpec(number, KINDS[number % len(KINDS)], "boston-seaport", number)
    scenario, _ = clock.time("staging", lambda: build_drive(spec))
    take = Take(number + 1, 9000, decisions + 1, sensors.parse_image_size(size), True, spec.town)
    film = clock.time("staging", lambda: Film(take, scenario))
    observer, world, driver = Observer(film, scenario), World(scenario), Driver()
    photograph, shown = observer._photograph, []

    def timed(scenario: Any, number: int) -> Any:
        shots = clock.time("drawing", lambda: photograph(scenario, number))
        shown.append((scenario, number))
        return shots

    observer._photograph = timed  # type: ignore[method-assign]
    world.reset(steered=False)
    for _ in range(10):
        world.step()
    world.hand_over(steered=True)
    for decision in range(decisions):
        before = clock.seconds.get("drawing", 0.0)
        record = clock.time("record", lambda: observer.look(world.recording()))
        clock.seconds["record"] -= clock.seconds["drawing"] - before
        clock.time("the expert's plan", functools.partial(expert, world, record))
        if ask is not None:
            requests = [PlanRequest(number, decision, record)]
            if not passes:
                ask(requests)  # compiled
            clock.time("model", functools.partial(ask, requests))
        passes.append(floor_of(film, *shown[-1]))
        assert world.state.vehicle is not None
        driver.follow(route_constant_speed(world, record), world.state.vehicle, world.state.time)
        for _ in range(5):
            control = driver.control(world.state.vehicle, world.state.time)
            clock.time("traffic and vehicle", functools.partial(world.step, control))


def floor_of(film: Film, scenario: Any, keyframe: int) -> float:
    """Processor seconds of one z-buffer pass and one pass of paint over the six images of a keyframe."""
    total = 0.0
    for number, mount in enumerate(sensors.CAMERA_MOUNTS):
        moment = float(film.camera_times[keyframe, number])
        size = film.take.image_size
        to_global = film.ego_pose(scenario, moment) @ mount.to_ego()
        camera = stage.camera_of(mount.intrinsics(size), to_global, size)
        quads = film.quads(scenario, moment, film.people(scenario, moment), camera)
        seen, ground = fragments(quads, camera), ground_depth(camera)
        colours = (255 * np.append(quads.colours, np.ones((2, 3)), axis=0)).astype(np.uint8)
        started = time.process_time()
        colours[nearest_of(seen, ground)[1]]
        total += time.process_time() - started
    return total


if __name__ == "__main__":
    main()

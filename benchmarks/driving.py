"""How fast drives go, and what a decision costs in processor time: traffic, drawing, the record.

    python -m benchmarks.driving [--size 352x198] [--drives 2] [--decisions 20]

Of the drawing, what pixels see (`render.cast`) and their colours (`shading.shade`) are named; the rest
is placing the quads, shadows and encoding.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import cv2

from spacedrive_jax.driving.driver import Driver
from spacedrive_jax.driving.observation import Observer
from spacedrive_jax.driving.policies import expert, route_constant_speed
from spacedrive_jax.driving.scenarios import DriveSpec, build_drive
from spacedrive_jax.world import stage, views
from spacedrive_jax.world.filming import Film, Take
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
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    clock = Clock()
    clock.watch(stage, "cast", "  of it: what pixels see")
    clock.watch(stage, "shade", "  of it: colours")
    for number in range(arguments.drives):
        drive(number, arguments.size, arguments.decisions, clock)
    decisions = arguments.drives * arguments.decisions
    staging = clock.seconds.pop("staging")
    for part, seconds in clock.seconds.items():
        print(f"{part:26} {1e3 * seconds / decisions:8.1f} ms a decision")
    print(f"{'staging':26} {1e3 * staging / arguments.drives:8.1f} ms a drive")
    seen = sum(clock.seconds[part] for part in ("observation", "traffic and vehicle"))
    print(
        f"{PERIOD_MS / (1e3 * seen / decisions):.2f} simulated seconds a second of one core, without a model"
    )


def drive(number: int, size: str, decisions: int, clock: Clock) -> None:
    """One drive of a blind driver, with cameras, the expert asked beside."""
    spec = DriveSpec(number, KINDS[number % len(KINDS)], "boston-seaport", number)
    scenario, _ = clock.time("staging", lambda: build_drive(spec))
    take = Take(number + 1, 9000, decisions + 1, views.parse_image_size(size), True, spec.town)
    film = clock.time("staging", lambda: Film(take, scenario))
    observer, world, driver = Observer(film, scenario), World(scenario), Driver()
    world.reset(steered=False)
    for _ in range(10):
        world.step()
    world.hand_over(steered=True)
    for _ in range(decisions):
        record = clock.time("observation", lambda: observer.look(world.recording()))
        clock.time("the expert's plan", functools.partial(expert, world, record))
        assert world.state.vehicle is not None
        driver.follow(route_constant_speed(world, record), world.state.vehicle, world.state.time)
        for _ in range(5):
            control = driver.control(world.state.vehicle, world.state.time)
            clock.time("traffic and vehicle", functools.partial(world.step, control))


if __name__ == "__main__":
    main()

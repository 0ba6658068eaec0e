"""What the expert would do from wherever a policy has got to: targets to learn from one's own mistakes.

(DAgger, Ross, Gordon and Bagnell 2011: the states are the learner's, the labels the expert's.)

`drive --collect` writes every state that a policy reached as a record, with the expert's plan from there.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_PATH_POINTS, NUM_WAYPOINTS, WAYPOINT_STEP
from spacedrive_jax.data.ego_status import released_command
from spacedrive_jax.data.records_folder import (
    PROVENANCE,
    RecordSerializer,
    ShardMetadata,
    content_fingerprint,
    ends_sha256,
    read_provenance,
    shard_file,
    write_dataset_info,
    write_shard,
)
from spacedrive_jax.data.schema import Record
from spacedrive_jax.driving.driver import Driver, Plan, to_vehicle
from spacedrive_jax.driving.infractions import overlapping
from spacedrive_jax.driving.policies import PATH_POINTS, expert
from spacedrive_jax.errors import DataError
from spacedrive_jax.io import file_sha256, write_text
from spacedrive_jax.json_files import write_json
from spacedrive_jax.world.scenario import Scenario, UnplayableError
from spacedrive_jax.world.traffic import TIME_STEP
from spacedrive_jax.world.vehicle import actuate, moved
from spacedrive_jax.world.world import World


@dataclasses.dataclass(frozen=True)
class ExpertTarget:
    """Where the expert would be, in the present ego frame."""

    waypoints: Float[np.ndarray, "6 2"]
    yaw: Float[np.ndarray, " 6"]
    path: Float[np.ndarray, "50 2"]
    plan: Plan
    """The expert's own, along its route."""


def expert_target(world: World) -> ExpertTarget:
    """The expert's way on from the present state, driven out: back to its route where it is off it.

    The expert's plan runs along the route; the vehicle that follows it comes back as a vehicle can, and that
    drive is the target. Nothing changes in the world.
    """
    vehicle = world.state.vehicle
    assert vehicle is not None, "there is a target where somebody steers"
    plan: Plan = expert(world, {})
    driver = Driver(limits=world.limits)
    driver.follow(plan, vehicle, world.state.time)
    # The driver looks at its plan alone: nobody else needs to move.
    later, poses, per_waypoint = vehicle, [], round(WAYPOINT_STEP / TIME_STEP)
    for step in range(NUM_WAYPOINTS * per_waypoint):
        control = driver.control(later, (world.state.traffic.step + step) * TIME_STEP)
        later = moved(actuate(later, control, TIME_STEP, world.limits), TIME_STEP)
        if (step + 1) % per_waypoint == 0:
            poses.append((later.x, later.y, later.yaw - vehicle.yaw))
    places = np.array(poses)
    ahead = float(world.state.traffic.s[0]) + np.arange(1, NUM_PATH_POINTS + 1)
    path = to_vehicle(world.scenario.ego.route.pose(ahead)[:, :2], vehicle)
    # Beside the route the way to it bends in over the first metres.
    beside = np.maximum(1.0 - np.arange(1, NUM_PATH_POINTS + 1) / PATH_POINTS, 0.0)
    path[:, 1] -= beside * beside * path[0, 1]
    return ExpertTarget(to_vehicle(places[:, :2], vehicle), places[:, 2], path, plan)


SHIFT_METRES, SHIFT_DEGREES = (0.3, 1.0), (5.0, 10.0)
"""How far beside its lane, and by what angle, a shifted recording begins (SimLingo trains on such)."""
SHIFT_TRIES = 12


def shifted_recording(scenario: Scenario, start: float, end: float, rng: np.random.Generator) -> Scenario:
    """A scenario in which the ego vehicle stands beside its lane and turned, and the expert drives it back.

    Args:
        scenario: the script.
        start: when it is shifted, seconds since the start of the simulation.
        end: until when to record.
        rng: decides the shift.

    Returns:
        The scenario with what happened: its motions, and the vehicle as it was driven.

    Raises:
        UnplayableError: wherever it is put, it touches somebody.
    """
    sizes = [mover.size[:2] for mover in scenario.cast.movers]
    half = np.array(sizes + [item.size[:2] for item in scenario.cast.obstacles]) / 2
    for _ in range(SHIFT_TRIES):
        aside, degrees = (
            float(rng.choice((-1.0, 1.0)) * rng.uniform(*bounds)) for bounds in (SHIFT_METRES, SHIFT_DEGREES)
        )
        world, driver = World(scenario), Driver()
        world.reset(steered=False)
        while world.state.time < start - 1e-9:
            world.step()
        world.hand_over(steered=True, shift=(aside, math.radians(degrees)))
        touched = False
        for step in range(round((end - start) / TIME_STEP) + 1):
            vehicle = world.state.vehicle
            assert vehicle is not None
            if len(overlapping(world.poses(world.state), half)):
                touched = True
                break
            if step % round(WAYPOINT_STEP / TIME_STEP) == 0:
                driver.follow(expert(world, {}), vehicle, world.state.time)
            world.step(driver.control(vehicle, world.state.time))
        if not touched:
            return world.recording()
    raise UnplayableError("there is no room beside the lane to begin in")


SWAY_METRES, SWAY_PACE, SWAY_DECISIONS = (0.3, 1.0), (0.6, 1.3), (2, 6)
"""Beside the line, as a share of the planned speed, and for how many decisions in a row."""
SWAY_NONE = 0.25
"""Share of the stretches that are driven as planned."""
SLOW_SHARE, SLOW_PACE, SLOW_DECISIONS = 0.4, (-0.3, 0.6), (3, 8)
"""Of the other stretches, where speeds are perturbed too: how many are slow ones, their share of the planned
speed (below 0 it is a stop), and for how many decisions in a row."""


class Sway:
    """A driver who is not where the plan says: stretches beside its line and at another pace.

    Records of an expert who sways hold states that an expert never gets into, with the way back as their
    target (Laskey et al. 2017, DART); between two stretches the heading is off by 5 to 10 degrees.

    An expert drives slowly only where something is in its way, so that its own speed tells who learns from it
    how fast to go on, and a learner that has once become slow stays so. Who slows down and stops for nothing
    breaks that: then only what lies ahead tells.
    """

    def __init__(self, rng: np.random.Generator, *, slows: bool = False) -> None:
        """Args:
        rng: decides every stretch.
        slows: slow down and stop for nothing too.
        """
        self._rng, self._slows = rng, slows
        self._left = 0
        self._aside, self._pace = 0.0, 1.0

    def disturb(self, plan: Plan) -> Plan:
        """The plan that is followed in a plan's place, one call a decision."""
        if self._left == 0:
            rng = self._rng
            self._left = int(rng.integers(*SWAY_DECISIONS))
            quiet = bool(rng.random() < SWAY_NONE)
            side = 1.0 if rng.random() < 0.5 else -1.0
            self._aside = 0.0 if quiet else side * float(rng.uniform(*SWAY_METRES))
            self._pace = 1.0 if quiet else float(rng.uniform(*SWAY_PACE))
            if self._slows and not quiet and rng.random() < SLOW_SHARE:
                self._pace = max(float(rng.uniform(*SLOW_PACE)), 0.0)
                self._left = int(rng.integers(*SLOW_DECISIONS))
                if rng.random() < 0.5:
                    self._aside = 0.0
        self._left -= 1
        path = None if plan.path is None else self._beside(plan.path)
        return dataclasses.replace(plan, waypoints=self._beside(plan.waypoints * self._pace), path=path)

    def _beside(self, points: Float[np.ndarray, "K 2"]) -> Float[np.ndarray, "K 2"]:
        """Points to the left of where they are; all of it from 4 m on, so that a car that stands still does
        not turn.
        """
        share = np.clip(points[:, 0] / 4.0, 0.0, 1.0)
        return np.stack([points[:, 0], points[:, 1] + share * self._aside], axis=1)


def with_target(record: Record, target: ExpertTarget) -> Record:
    """A record whose future is the expert's."""
    x, y = (float(value) for value in target.waypoints[-1])
    yaw = float(exact.arctan2(*reversed(exact.cos_sin(float(target.yaw[-1])))))
    times = int(record["timestamp_us"]) + round(WAYPOINT_STEP * 1e6) * np.arange(1, NUM_WAYPOINTS + 1)
    return {
        **record,
        "waypoints": target.waypoints,
        "waypoint_yaw": target.yaw,
        "waypoint_mask": np.ones(NUM_WAYPOINTS, bool),
        "waypoint_timestamp_us": times.astype(np.int64),
        "path": target.path,
        "path_mask": np.ones(NUM_PATH_POINTS, bool),
        "command_released": released_command(np.array([x, y, yaw])),
    }


PARTS = "parts"
DESCRIPTION = "States that a policy reached in the synthetic world, with the expert's plans from there."


class CollectedRecords:
    """A records folder that grows drive by drive; `finish` makes it one that `train` reads."""

    def __init__(self, folder: Path) -> None:
        """Args: the folder; drives that it already holds parts of are kept (a resumed run)."""
        self.folder = folder
        self._serialize = RecordSerializer()

    def add(self, drive: str, records: Sequence[Record]) -> None:
        """Keeps the records of one drive, by its name."""
        if records:
            path = self._part(drive)
            path.parent.mkdir(parents=True, exist_ok=True)
            shard = write_shard(path, (self._serialize(record) for record in records))
            write_text(path.with_suffix(".count"), str(shard.records))

    def finish(self, drives: Sequence[str], source: Mapping[str, Any]) -> int:
        """Names the shards in the order of `drives`, writes what describes them and returns their records.

        Raises:
            DataError: there is no record.
        """
        provenance, done = self.folder / PROVENANCE, self.folder / f".{PARTS}-done"
        if provenance.is_file() and not (self.folder / PARTS).is_dir():
            shutil.rmtree(done, ignore_errors=True)
            return int(read_provenance(self.folder)["records"])  # finished by an earlier call
        parts = [self._part(drive) for drive in drives if self._part(drive).is_file()]
        if not parts:
            raise DataError(f"--collect {self.folder}: no drive left a record")
        shards = []
        for index, part in enumerate(parts):
            records = int(part.with_suffix(".count").read_text())
            final = self.folder / shard_file("train", index, len(parts))
            # Linked, not moved: what an interrupted `finish` leaves can be finished again.
            final.unlink(missing_ok=True)
            os.link(part, final)
            shards.append(
                ShardMetadata(
                    final.name, records, final.stat().st_size, file_sha256(final), ends_sha256(final)
                )
            )
        total = sum(shard.records for shard in shards)
        write_dataset_info(self.folder, {"train": shards}, DESCRIPTION)
        write_json(
            provenance,
            {
                "source": {"version": "drives", **source},
                "shards": {
                    shard.file: {
                        "keyframes": shard.records,
                        "bytes": shard.bytes,
                        "sha256": shard.sha256,
                        "ends_sha256": shard.ends_sha256,
                    }
                    for shard in shards
                },
                "fingerprint": content_fingerprint((shard.file, shard.sha256) for shard in shards),
                "records": total,
                "splits": {"train": total},
                "licence": "Synthetic: made by this project's own world.",
            },
            indent=1,
        )
        # Last: until its provenance is there, nothing else is whole. Half removed, the parts would be taken
        # for all that there are.
        (self.folder / PARTS).rename(done)
        shutil.rmtree(done)
        return total

    def _part(self, drive: str) -> Path:
        return self.folder / PARTS / f"{drive}.array_record"

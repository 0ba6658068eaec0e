"""How fast open-loop scoring is: against the published way of doing it, and over a split of 6,019 keyframes.

The published way scores a sample by drawing seven whole rasters of agents and of ego boxes, comparing whole
rasters for the drivable area, and building the collision box anew for every step and horizon. Both ways get
the same scenes and drivable rasters, and must agree on every number.

Example: python -m benchmarks.evaluation --out benchmarks/results/evaluation_cpu.md
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import tyro
from skimage.draw import polygon

from spacedrive_jax.constants import EGO_LENGTH, EGO_WIDTH
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.evaluation.collision import (
    FOOTPRINT_SIZE_M,
    Grid,
    Obstacles,
    box_corners,
    drivable_rasters,
    tangent_yaw,
    to_cells,
)
from spacedrive_jax.evaluation.evaluate import evaluate, obstacles_of
from spacedrive_jax.evaluation.metrics import HorizonScores, horizon_scores, score_steps, stack_scores
from spacedrive_jax.evaluation.prediction_files import read_predictions
from spacedrive_jax.evaluation.protocols import OMNIDRIVE, PROTOCOLS, UNIAD, VAD, Protocol, StepRule
from tests.record_factory import make_record, write_records

AGENTS = 35
"""Agents a keyframe; nuScenes has about as many annotations."""
DISTINCT = 60
"""Different keyframes in the generated split, repeated under new tokens."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    samples: int = 60
    """Scenes for the comparison."""
    split: int = 6019
    """Keyframes for the whole evaluation; 0 leaves it out."""
    workers: int = os.cpu_count() or 1
    """Processes for the whole evaluation."""
    out: Path | None = None
    """Markdown file to write the table to."""


def crowded_keyframe(rng: np.random.Generator) -> Record:
    """A curving drive on a bending road among parked and moving agents."""
    times = np.arange(1, 7) * 0.5
    speed, turn = rng.uniform(2, 12), rng.uniform(-0.1, 0.1)
    yaw = turn * times
    waypoints = np.stack([speed * times, 0.5 * speed * turn * times**2], axis=1)
    boxes = np.zeros((AGENTS, 7))
    boxes[:, :2] = rng.uniform(-40, 40, (AGENTS, 2))
    boxes[:, 3:6] = [4.5, 1.9, 1.6]
    boxes[:, 6] = rng.uniform(-np.pi, np.pi, AGENTS)
    pace = rng.uniform(0, 8, AGENTS) * (rng.random(AGENTS) < 0.5)
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], axis=1)
    grid = (np.indices((1000, 1000)) + 0.5) * 0.1 - 50.0
    middle = 0.5 * turn / max(speed, 1.0) * grid[0] ** 2
    return make_record(
        rng,
        waypoints=waypoints,
        waypoint_yaw=yaw,
        agent_token=[f"agent{index}" for index in range(AGENTS)],
        agent_category=["vehicle.car"] * AGENTS,
        agent_boxes=boxes,
        agent_velocity=pace[:, None] * heading,
        agent_future=pace[:, None, None] * times[:, None] * heading[:, None],
        agent_future_yaw=np.repeat(boxes[:, 6:], 6, axis=1),
        agent_future_mask=np.ones((AGENTS, 6), bool),
        agent_lidar_points=np.full(AGENTS, 20, np.int32),
        drivable_fine=(np.abs(grid[1] - middle) < 7).astype(np.uint8),
    )


def score_the_published_way(
    plan: np.ndarray, reference: np.ndarray, obstacles: Obstacles, drivable: np.ndarray, protocol: Protocol
) -> np.ndarray:
    """L2, collision and intersection (rows) at 1, 2, 3 s (columns) of one sample, raster by raster."""
    rule = protocol.steps
    assert isinstance(rule, StepRule)
    grid = Grid(rule.resolution)
    agents = np.zeros((7, grid.cells, grid.cells), np.uint8)
    for step in range(6):
        for agent in np.flatnonzero(obstacles.mask[:, step]):
            corners = box_corners(
                obstacles.centre[agent, step], obstacles.yaw[agent, step], obstacles.size[agent]
            )
            cv2.fillPoly(agents[step + 1], [to_cells(corners, grid)], 1)
    yaws = tangent_yaw(plan[None])[0] if rule.footprint_yaw == "tangent" else np.zeros(6)
    ego = np.zeros_like(agents)
    for step in range(7):
        centre, yaw = (np.zeros(2), 0.0) if step == 0 else (plan[step - 1], yaws[step - 1])
        corners = box_corners(centre, np.asarray(yaw), np.array(FOOTPRINT_SIZE_M))
        cv2.fillPoly(ego[step], [to_cells(corners, grid)], 1)
    table = np.zeros((3, 3))
    for column, steps in enumerate((2, 4, 6)):
        errors = [float(np.sqrt(((plan[step] - reference[step]) ** 2).sum())) for step in range(steps)]
        table[0, column] = errors[-1] if protocol.l2 == "endpoint" else sum(errors) / steps
        excused = collide_the_published_way(reference[:steps], agents, rule)
        hits = collide_the_published_way(plan[:steps], agents, rule) & ~excused
        table[1, column] = hits.any() if protocol.collision == "any" else hits.mean()
        outside_now = ((drivable[None] == 0) & (ego[:1] == 1)).sum() > 0
        outside = ((drivable[None] == 0) & (ego[1 : steps + 1] == 1)).sum(axis=(1, 2)) > 0
        if not outside_now:
            table[2, column] = outside.any() if protocol.intersection == "any" else outside.mean()
    return table


def collide_the_published_way(plan: np.ndarray, agents: np.ndarray, rule: StepRule) -> np.ndarray:
    """Which steps' collision boxes cover an agent's cell, one box at a time."""
    grid = Grid(rule.resolution)
    first, size = grid.first_centre, grid.cell_size
    hits = np.zeros(len(plan), bool)
    for step, point in enumerate(plan):
        x = rule.ego_offset + EGO_LENGTH / 2 * np.array([-1, 1, 1, -1])
        y = EGO_WIDTH / 2 * np.array([1, 1, -1, -1])
        cells = np.stack(polygon((x - first) / size, (y - first) / size), axis=-1) + np.float64(first / size)
        move = point - (plan[step - 1] if step else 0.0)
        angle = np.arctan2(move[1], move[0]) if np.hypot(*move) >= 1.0 else 0.0
        cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        turned = cells @ np.array([[cosine, sine], [-sine, cosine]])
        moved = np.round(turned - np.float64(first / size)) + point / size
        column, row = np.clip(np.trunc(moved), 0, grid.cells - 1).astype(np.int32).T
        hits[step] = agents[step + 1][row, column].any()
    return hits


def seconds_of(work: Callable[[], object], least: float = 1.0) -> float:
    """Processor seconds of one call, the best of several: the machine may be busy with other work."""
    best, spent = np.inf, 0.0
    while spent < least:
        start = time.process_time()
        work()
        best, spent = min(best, time.process_time() - start), spent + time.process_time() - start
    return best


def compare_ways(
    protocol: Protocol, records: Sequence[Record], rng: np.random.Generator
) -> tuple[float, float]:
    """Samples a second of processor time, ours and the published way; both must give the same scores."""
    rule = protocol.steps
    assert isinstance(rule, StepRule)
    grid = Grid(rule.resolution)
    scenes = []
    for record in records:
        rasters = drivable_rasters(record, [grid])
        assert rasters is not None
        plan = record["waypoints"] + np.cumsum(rng.normal(0, 0.4, (6, 2)), axis=0)
        scenes.append((plan, record["waypoints"], obstacles_of(record), np.ascontiguousarray(rasters[grid])))

    def ours() -> HorizonScores:
        # Horizons are combined for all samples at once, as `evaluate` does.
        steps = [
            score_steps(plan[None], reference, obstacles, drivable, rule)
            for plan, reference, obstacles, drivable in scenes
        ]
        return horizon_scores(stack_scores(steps), protocol)

    def published() -> list[np.ndarray]:
        return [score_the_published_way(*scene, protocol) for scene in scenes]

    fast = ours()
    table = np.stack([fast.l2, fast.collision, fast.intersection], axis=1)
    np.testing.assert_allclose(table, np.stack(published()), atol=1e-9)
    return len(scenes) / seconds_of(ours), len(scenes) / seconds_of(published, least=0.1)


class Repeated(Sequence[Record]):
    """A long split made of a few keyframes under ever new tokens."""

    def __init__(self, records: Sequence[Record], length: int) -> None:
        self.records, self.length = records, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        if index >= self.length:
            raise IndexError(index)
        scene = f"scene-{index // 40:04d}"
        return {**self.records[index % len(self.records)], "token": f"token{index}", "scene_name": scene}


def time_a_split(
    records: Sequence[Record], length: int, workers: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Wall and processor seconds of one evaluation of a whole split, all protocols, baselines included."""
    split = Repeated(records, length)
    with tempfile.TemporaryDirectory() as folder:
        directory = write_records(Path(folder) / "records", {"val": split})
        predictions = Path(folder) / "predictions.jsonl"
        with predictions.open("w", encoding="utf-8") as lines:
            for record in split:
                plan = record["waypoints"] + rng.normal(0, 0.4, (6, 2))
                lines.write(json.dumps({"token": record["token"], "waypoints": plan.tolist()}) + "\n")
        start, spent = time.perf_counter(), processor_seconds()
        results = evaluate(
            open_records(directory, "val"),
            read_predictions(predictions),
            list(PROTOCOLS.values()),
            workers=workers,
        )
        for result in results.values():
            assert result.to_json()["samples"] == length
        return time.perf_counter() - start, processor_seconds() - spent


def processor_seconds() -> float:
    """Of this process and the ones it has waited for."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main(arguments: Arguments) -> None:
    """Measures and prints the table."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    records = [crowded_keyframe(rng) for _ in range(max(arguments.samples, DISTINCT))]
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy "
        f"{np.__version__}, OpenCV {cv2.__version__}; {arguments.samples} scenes of {AGENTS} agents.",
        "",
        "| protocol | published way, samples/s | here, samples/s | ratio |",
        "|---|---:|---:|---:|",
    ]
    rates = {}
    for protocol in (OMNIDRIVE, VAD, UNIAD):
        ours, published = compare_ways(protocol, records[: arguments.samples], rng)
        rates[protocol.name] = (published, ours)
        lines.append(f"| {protocol.name} | {published:.1f} | {ours:.0f} | {ours / published:.1f} |")
    published = 1 / sum(1 / slow for slow, _ in rates.values())
    # The two coarse protocols share their steps' scores.
    ours = 1 / (1 / rates["omnidrive"][1] + 1 / rates["vad"][1])
    lines.append(f"| all three | {published:.1f} | {ours:.0f} | {ours / published:.1f} |")
    lines += ["", "Samples per second of processor time on one core; same scenes, same rasters, same scores."]
    if arguments.split:
        seconds, spent = time_a_split(records[:DISTINCT], arguments.split, arguments.workers, rng)
        load = os.getloadavg()[0]
        lines += [
            "",
            f"`evaluate` over {arguments.split} keyframes, four protocols, prediction and three baselines, "
            f"records read from disk, {arguments.workers} processes: {spent:.1f} s of processor time, "
            f"{seconds:.1f} s wall at a load average of {load:.1f}.",
        ]
    text = "\n".join(lines)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(f"# Open-loop evaluation on the processor\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

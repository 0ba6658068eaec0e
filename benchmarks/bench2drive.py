"""How a checkpoint drives in the stand-in for Bench2Drive's evaluator: served, asked by the shipped agent.

The world's pictures and LiDAR at the places of CARLA's rig, the benchmark's life cycle, SimLingo's bicycle.
The stand-in counts how far a route was driven and how far off it; collisions and lights it does not judge: a
car drives through what stands in its way, and inside it no LiDAR returns, so that the server has no depth.

    PYTHONPATH=. python benchmarks/bench2drive.py --checkpoint examples/demo/model --out standin
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

from data_prep.synthesize.bench2drive import ClipJob, script, view
from spacedrive_jax import exact
from spacedrive_jax.cli.main import main as spacedrive
from spacedrive_jax.driving.bench2drive_rig import LIDAR
from spacedrive_jax.world import sensors
from spacedrive_jax.world.filming import Film
from spacedrive_jax.world.scenario import WARM_UP
from spacedrive_jax.world.sensors import pose_matrix
from tests.driving.evaluator import DROPPED_TICKS, TICK, Car, Drive, Evaluator

LENGTH = 60.0
"""Metres of a route."""


def drive_of(number: int, seed: int, every: int, size: tuple[int, int]) -> Drive:
    """A route over the world's own script; the pictures are new when the agent asks."""
    job = ClipJob(number, seed, 40, size, Path())
    scenario = script(job)
    film = Film(job.take, scenario)
    shown: dict[str, np.ndarray] = {}

    def picture(name: str, car: Car, tick: int) -> np.ndarray:
        if name not in shown or (tick - DROPPED_TICKS - 1) % every == 0:
            x, y = car.origin
            pose = pose_matrix(x, y, car.yaw)
            seen = view(scenario, film, pose, WARM_UP + tick * TICK, name, size, tick)
            big = cv2.resize(seen[..., ::-1], (1600, 900), interpolation=cv2.INTER_LINEAR)
            shown[name] = np.dstack([big, np.full(big.shape[:2], 255, np.uint8)])
        return shown[name]

    def sweep(car: Car, tick: int) -> np.ndarray:
        time = WARM_UP + tick * TICK
        (x, y), (forward, right, up) = car.origin, LIDAR
        pose = exact.matmul(pose_matrix(x, y, car.yaw), pose_matrix(forward, -right, 0.0, up))
        quads = film.quads(scenario, time, film.people(scenario, time))
        points = sensors.lidar_sweep(quads, pose, np.random.default_rng(tick))[:, :4]
        return points * np.array([1, -1, 1, 1], np.float32)  # CARLA's y is to the right

    route, start = scenario.ego.route, float(scenario.ego.start)
    end = min(start + LENGTH, float(route.lengths[-1]) - 5)
    name = job.manoeuvre.title().replace("_", "")
    return Drive(
        number, name, route, start, end, start_speed=float(scenario.ego.speed), picture=picture, sweep=sweep
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="new folder: results.json, table.md")
    parser.add_argument("--routes", type=int, default=6)
    parser.add_argument("--seed", type=int, default=7, help="a world that nothing was trained on")
    parser.add_argument("--controller", default="simlingo")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    command = [sys.executable, "-m", "spacedrive_jax", "serve", "--checkpoint", str(arguments.checkpoint)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--batch-size", "1"], stdout=subprocess.PIPE, text=True
    )
    rows = ["| route | ended as | driven, % | farthest off the route, m |", "|---|---|---|---|"]
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        evaluator = Evaluator(f"{url}?controller={arguments.controller}")
        for number in range(arguments.routes):
            record = evaluator.run(drive_of(number, arguments.seed, 10, (198, 352)))
            score, off = record["scores"]["score_route"], evaluator.farthest
            status = record["status"].partition(": set data.")[0]
            rows.append(f"| {record['scenario_name']} | {status} | {score:.1f} | {off:.1f} |")
            print(rows[-1], flush=True)
    finally:
        process.terminate()
        process.wait(60)
    results, routes = arguments.out / "results.json", arguments.out / "routes.txt"
    evaluator.write(results)
    routes.write_text("".join(f"{number}\n" for number in range(arguments.routes)))
    (arguments.out / "table.md").write_text("\n".join(rows) + "\n")
    spacedrive(["score-bench2drive", str(results), "--routes", str(routes)])


if __name__ == "__main__":
    main()

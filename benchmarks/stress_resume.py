"""Kills a training run at random moments until it is through, and checks it against one that was left alone.

    PYTHONPATH=. python benchmarks/stress_resume.py --records demo/records --out stress_resume.md

A run is killed with SIGKILL at a random moment and resumed, again and again: every other time anywhere in
its life (mostly starting up and compiling), else while it trains and saves. The losses of every step and
the last trainables must be the same bits; a kill may cost no more steps than there are between two
checkpoints and one that was still being written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from spacedrive_jax.config import from_json
from spacedrive_jax.training import checkpoints
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import abstract_state

ROOT = Path(__file__).resolve().parents[1]
EVERY = 5
"""Steps from one checkpoint to the next."""


class Times(NamedTuple):
    """Of the run that was left alone, seconds."""

    life: float
    training: float
    """From the first logged step to the end."""


class Kill(NamedTuple):
    """What a killed run left."""

    seconds: float
    """Since it was started or resumed."""
    logged: int
    """Last step in metrics.jsonl."""
    kept: int
    """Newest whole checkpoint."""


def start(options: argparse.Namespace, run_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "spacedrive_jax", "train", options.config, "--run-dir", str(run_dir)]
    command += ["--data.records", str(options.records), "--train.steps", str(options.steps), "--resume"]
    command += ["--train.checkpoint-every", str(EVERY), "--train.log-every", "1"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def newest_step(run_dir: Path) -> int:
    return max(
        (int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit()), default=0
    )


def logged_step(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    whole = [line for line in file.read_text().split("\n")[:-1] if line] if file.is_file() else []
    return json.loads(whole[-1])["step"] if whole else 0


def values(run_dir: Path) -> dict:
    config = from_json((run_dir / "config.json").read_text())
    _, trainable, _ = abstract_state(config, make_mesh(config.mesh))
    return nnx.to_pure_dict(checkpoints.restore_trainable(run_dir, newest_step(run_dir), trainable))


def losses(run_dir: Path) -> list[tuple[int, float]]:
    entries = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(entry["step"], entry["loss"]) for entry in entries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--config", default=str(ROOT / "tests" / "tiny_config.py"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table here as well")
    options = parser.parse_args()
    options.records = options.records.resolve()
    chance = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="stress-resume-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))

    alone = time_alone(options, folder / "whole")
    kills: list[Kill] = []
    run_dir, compared = folder / "killed", 0
    while True:
        started = time.time()
        process = start(options, run_dir)
        if kill_at_random(process, run_dir, started, len(kills), options.kills, chance, alone):
            kills.append(Kill(time.time() - started, logged_step(run_dir), newest_step(run_dir)))
            print(f"kill {len(kills)}: {kills[-1]}", flush=True)
            if kills[-1].logged - kills[-1].kept > 2 * EVERY:
                sys.exit(f"more was lost than the steps of two checkpoints; see {run_dir}")
            continue
        if process.returncode:
            sys.exit(f"a resumed run failed with status {process.returncode}; see {run_dir}")
        _compare(folder)
        compared += 1
        if len(kills) >= options.kills:
            break
        shutil.rmtree(run_dir)  # It got through before its time was up: begin another.
    text = report(options, kills, alone, compared)
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    shutil.rmtree(folder)


def time_alone(options: argparse.Namespace, run_dir: Path) -> Times:
    began = time.time()
    process = start(options, run_dir)
    wait_for_training(process, run_dir, began)
    training = time.time()
    if process.wait():
        sys.exit("the run that was left alone failed")
    ended = time.time()
    return Times(ended - began, ended - training)


def wait_for_training(process: subprocess.Popen[bytes], run_dir: Path, started: float) -> None:
    """Until the run that was started then (time.time) has logged a step of its own, or ended."""
    file, kept = run_dir / "metrics.jsonl", newest_step(run_dir)

    def trains() -> bool:
        # A resumed run first rewrites the log without the steps that it will do again.
        return file.is_file() and file.stat().st_mtime > started and logged_step(run_dir) > kept

    while process.poll() is None and not trains():
        time.sleep(0.02)


def kill_at_random(
    process: subprocess.Popen[bytes],
    run_dir: Path,
    started: float,
    number: int,
    wanted: int,
    chance: random.Random,
    alone: Times,
) -> bool:
    """Kills the run at a moment drawn for the kill of this number; False where it came through."""
    if number >= wanted:
        process.wait()
        return False
    moment = chance.uniform(0.0, alone.life)
    if number % 2:
        wait_for_training(process, run_dir, started)
        moment = chance.uniform(0.0, alone.training / 2)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


def report(options: argparse.Namespace, kills: list[Kill], alone: Times, compared: int) -> str:
    head = [
        "# Kill and resume",
        "",
        f"`{Path(options.config).name}`, {options.steps} steps, a checkpoint every {EVERY}, "
        f"seed {options.seed}; {platform.machine()}, Python {platform.python_version()}, "
        f"jax {jax.__version__}. The run that was left alone took {alone.life:.0f} s, "
        f"{alone.training:.0f} s of them in training.",
        "",
        f"{len(kills)} SIGKILLs; {compared} runs came through, and of each the losses of every step and "
        "the last trainables are the same bits as those of the run that was left alone.",
        "",
        "| kill | seconds after its start | step logged last | newest checkpoint | steps to do again |",
        "|---:|---:|---:|---:|---:|",
    ]
    rows = [
        f"| {number} | {kill.seconds:.1f} | {kill.logged} | {kill.kept} | {max(kill.logged - kill.kept, 0)} |"
        for number, kill in enumerate(kills, 1)
    ]
    return "\n".join([*head, *rows, ""])


def _compare(folder: Path) -> None:
    if losses(folder / "killed") != losses(folder / "whole"):
        sys.exit(f"losses differ: see {folder}")
    jax.tree.map(np.testing.assert_array_equal, values(folder / "killed"), values(folder / "whole"))


if __name__ == "__main__":
    main()

"""Kills a training run at random moments until it is through, and checks it against one that was left alone.

    python benchmarks/stress_resume.py --records demo/records --kills 20

Every run is killed with SIGKILL after a random time (starting up, compiling, training or saving) and
resumed. The losses of every step and the last trainables must be the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from spacedrive_jax.config import from_json
from spacedrive_jax.training import checkpoints
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import abstract_state

ROOT = Path(__file__).resolve().parents[1]


def start(options: argparse.Namespace, run_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "spacedrive_jax", "train", options.config, "--run-dir", str(run_dir)]
    command += ["--data.records", str(options.records), "--train.steps", str(options.steps), "--resume"]
    command += ["--train.checkpoint-every", "5", "--train.log-every", "1"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def newest_step(run_dir: Path) -> int:
    return max(
        (int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit()), default=0
    )


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
    options = parser.parse_args()
    options.records = options.records.resolve()
    chance = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="stress-resume-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))

    began = time.monotonic()
    if start(options, folder / "whole").wait():
        sys.exit("the run that was left alone failed")
    alone = time.monotonic() - began
    killed, run_dir = 0, folder / "killed"
    while True:
        process = start(options, run_dir)
        try:
            # Spread over start-up, compiling, training and saving.
            process.wait(chance.uniform(0.0, 1.2 * alone) if killed < options.kills else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            print(f"kill {killed}: newest checkpoint {newest_step(run_dir)}", flush=True)
            continue
        if process.returncode:
            sys.exit(f"a resumed run failed with status {process.returncode}; see {run_dir}")
        if killed >= options.kills:
            break
        # It got through before its time was up: begin another.
        _compare(folder)
        shutil.rmtree(run_dir)
    _compare(folder)
    print(f"{killed} kills: losses and trainables are the same bits as those of the run that was left alone")
    shutil.rmtree(folder)


def _compare(folder: Path) -> None:
    if losses(folder / "killed") != losses(folder / "whole"):
        sys.exit(f"losses differ: see {folder}")
    jax.tree.map(np.testing.assert_array_equal, values(folder / "killed"), values(folder / "whole"))


if __name__ == "__main__":
    main()

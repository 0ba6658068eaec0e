"""How long six camera images take to draw, in this tree and in another revision's.

    python -m benchmarks.drawing [--size 352x198] [--against REVISION]

The same keyframes, in turns and in one run; processor time, the fastest round counts. Only what both
revisions call the same is imported here, so that one that is older than a change of names can be measured.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2

from spacedrive_jax.driving.scenarios import DriveSpec, build_drive
from spacedrive_jax.world.filming import Film, Take

CAMERAS = 6
KEYFRAMES = (1, 5, 10)
ROUNDS = 2
"""Of `--against`."""


def main() -> None:
    """Draws and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="352x198", help="width x height of the images")
    parser.add_argument("--against", metavar="REVISION", help="draw with another revision of this repository")
    arguments = parser.parse_args()
    if arguments.against:
        compare(arguments.size, arguments.against)
    else:
        print(f"{milliseconds(arguments.size):.1f} ms of processor time for six images")


def milliseconds(size: str) -> float:
    """Processor time of the six images of a keyframe."""
    cv2.setNumThreads(1)
    width, height = (int(part) for part in size.split("x"))
    spec = DriveSpec(0, "turn_left", "boston-seaport", 0)
    scenario, _ = build_drive(spec)
    film = Film(Take(1, 9000, 12, (height, width), True, spec.town), scenario)
    spent = []
    for _ in range(4):
        started = time.process_time()
        for keyframe in KEYFRAMES:
            for camera in range(CAMERAS):
                film.photograph(scenario, keyframe, camera)
        spent.append(1e3 * (time.process_time() - started) / len(KEYFRAMES))
    return min(spent[1:])  # the first round fills what objects look like


def compare(size: str, revision: str) -> None:
    """Draws with both trees in turns."""
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", str(tree), revision], cwd=here, check=True
        )
        try:
            fastest = {here: math.inf, tree: math.inf}
            for _ in range(ROUNDS):
                for root in fastest:
                    done = subprocess.run(
                        [sys.executable, str(Path(__file__).resolve()), "--size", size],
                        cwd=root,
                        env={**os.environ, "PYTHONPATH": str(root)},
                        stdout=subprocess.PIPE,
                        text=True,
                        check=True,
                    )
                    fastest[root] = min(fastest[root], float(done.stdout.split()[0]))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=here, check=True)
    now, then = fastest[here], fastest[tree]
    print(f"six images at {size}: {now:.1f} ms of processor time, {then:.1f} at {revision}")
    print(f"{then / now:.2f} times as fast")


if __name__ == "__main__":
    main()

"""Runs every check that needs a GPU, each in a process of its own, and writes one page of tables.

    benchmarks/gpu_check.sh OUT

A part that fails, or is not done in its time, leaves the rows it has printed and does not stop the others.
`--seconds` bounds all of them together: what no time is left for is named in the table. Writes
OUT/gpu_check.json, OUT/gpu_check.md and OUT/gpu_check.log (all that the parts said). Exit status 1 where a
part did not finish.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu13",
    "flax",
    "torch",
    "transformers",
    "numpy",
)
ROW = "ROW "
"""What the line of a result begins with; the rest is JSON."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    title: str
    arguments: tuple[str, ...]
    """Of `python -m`."""
    seconds: float
    """Longest that it may take."""


PARTS = (
    Part("attention", "Fused attention against plain", ("benchmarks.gpu.attention",), 110),
    Part("train_7b", "Training step, 7B", ("benchmarks.gpu.train_step", "--model", "7b"), 130),
    Part("planning", "Planning in one pass", ("benchmarks.gpu.planning",), 130),
    Part("planning_transformers", "Planning, transformers", ("benchmarks.gpu.planning_transformers",), 80),
    Part(
        "train_7b_int8",
        "Training step, 7B on a base of eight bits",
        ("benchmarks.gpu.train_step", "--model", "7b", "--base", "int8"),
        120,
    ),
    Part("train_3b", "Training step, 3B", ("benchmarks.gpu.train_step", "--model", "3b"), 110),
    Part("depth", "UniDepthV2, ViT-L", ("benchmarks.gpu.depth",), 60),
    Part("tests", "Tests", ("benchmarks.gpu.tests",), 120),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    part: str
    title: str
    state: str
    """`done`, or why not."""
    seconds: float
    rows: list[dict[str, Any]]


def run(part: Part, size: str, limit: float, log: Path) -> Outcome:
    """Runs one part for at most `limit` seconds."""
    # One process has the device at a time. What is left of the memory is for the libraries' workspaces.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = time.monotonic()
    with log.open("ab") as kept, tempfile.TemporaryFile() as printed:
        kept.write(f"\n==== {part.name} ====\n".encode())
        kept.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", *part.arguments, "--size", size],
            cwd=ROOT,
            env=environment,
            stdout=printed,
            stderr=kept,
            start_new_session=True,
        )
        try:
            state = "done" if process.wait(limit) == 0 else f"exit {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            state = f"stopped after {limit:.0f} s"
        printed.seek(0)
        said = printed.read()
        kept.write(said)
    lines = said.decode(errors="replace").splitlines()
    rows = [json.loads(line.removeprefix(ROW)) for line in lines if line.startswith(ROW)]
    return Outcome(part.name, part.title, state, round(time.monotonic() - started, 1), rows)


def ratios(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """How much longer transformers takes to plan than one pass, batch by batch."""
    rows = {outcome.part: outcome.rows for outcome in outcomes}
    ours = {
        row["batch"]: row["ms"]
        for row in rows.get("planning", [])
        if row["way"] == "one pass" and "ms" in row
    }
    return [
        {"batch": row["batch"], "transformers over one pass": round(row["ms"] / ours[row["batch"]], 2)}
        for row in rows.get("planning_transformers", [])
        if row["batch"] in ours and "ms" in row
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as Markdown; a column for every name that occurs."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows),
    ]


def page(facts: dict[str, Any], outcomes: list[Outcome]) -> str:
    """The tables of all parts."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    small = "" if facts["size"] == "published" else f" **Size {facts['size']}: figures mean nothing.**"
    lines = [
        "# What was measured on a GPU",
        "",
        f"`benchmarks/gpu_check.sh`; {facts['device']}; Python {facts['python']}, {versions}; "
        f"{facts['seconds']:.0f} s in all. Random weights.{small}",
    ]
    for outcome in outcomes:
        lines += ["", f"## {outcome.title}", "", f"{outcome.state}, {outcome.seconds:.0f} s", ""]
        lines += table(outcome.rows) if outcome.rows else []
    compared = ratios(outcomes)
    if compared:
        lines += ["", "## Planning, compared", "", *table(compared)]
    return "\n".join([*lines, ""])


def device() -> str:
    """The GPU's name and driver; the processor where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"no GPU, {platform.machine()}"


def versions() -> dict[str, str]:
    """Of the packages that matter, where they are installed."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def main() -> int:
    """Runs the parts one after the other; the files are written anew after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--size", choices=["published", "tiny"], default="published")
    parser.add_argument(
        "--parts", nargs="+", choices=[part.name for part in PARTS], help="all when not given"
    )
    parser.add_argument("--seconds", type=float, default=470.0, help="for all parts together")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "gpu_check.log"
    log.write_bytes(b"")
    started = time.monotonic()
    outcomes: list[Outcome] = []
    facts: dict[str, Any] = {
        "size": options.size,
        "device": device(),
        "python": platform.python_version(),
        "versions": versions(),
    }
    for part in PARTS:
        if options.parts is not None and part.name not in options.parts:
            continue
        left = options.seconds - (time.monotonic() - started)
        if left < 5:
            outcomes.append(Outcome(part.name, part.title, "not run: no time left", 0.0, []))
        else:
            outcomes.append(run(part, options.size, min(part.seconds, left), log))
        print(f"{outcomes[-1].part}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s", flush=True)
        facts["seconds"] = round(time.monotonic() - started, 1)
        whole = {**facts, "parts": [dataclasses.asdict(outcome) for outcome in outcomes]}
        (options.out / "gpu_check.json").write_text(json.dumps(whole, indent=1) + "\n")
        (options.out / "gpu_check.md").write_text(page(facts, outcomes))
    unfinished = [outcome for outcome in outcomes if outcome.state != "done"]
    if unfinished:  # its last words, so that a log that is lost is not all that tells
        print(log.read_text(errors="replace")[-3000:])
    print(page(facts, outcomes))
    return 1 if unfinished else 0


if __name__ == "__main__":
    raise SystemExit(main())

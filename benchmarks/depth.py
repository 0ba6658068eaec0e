"""Speed and memory of the depth networks on this machine's CPU, against transformers' Dinov2Model in PyTorch.

    python -m benchmarks.depth                                           # all cases; ViT-L takes minutes each
    python -m benchmarks.depth --models vits14 --images 1                # cut down
    python -m benchmarks.depth --torch-python parity/bin/python          # an interpreter that has PyTorch

Writes a table after every case (benchmarks/results/depth_cpu.md). A case that takes longer than the limit or
more memory than there is gets a row that says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.depth_case import IMAGE, NETWORK_IMAGE, Case

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"vits14": "ViT-S", "vitb14": "ViT-B", "vitl14": "ViT-L"}
Size = Literal["vits14", "vitb14", "vitl14"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Which cases."""

    models: tuple[Size, ...] = ("vits14", "vitl14")
    images: int = 6
    """Images in one call: the views of a keyframe."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    seconds: float = 10.0
    """How long each case repeats its call."""
    limit: float = 240.0
    """Seconds after which a case is stopped."""
    torch_python: str = sys.executable
    """Interpreter that has PyTorch and this project's requirements; without it the baseline is left out."""
    results: Path = Path("benchmarks/results/depth_cpu.md")


def cases(options: Options) -> Iterator[Case]:
    """All cases, the quick ones first."""
    for size in options.models:
        for dtype in options.dtypes:
            case = Case(size=size, dtype=dtype, images=options.images, seconds=options.seconds)
            yield case
            yield dataclasses.replace(case, implementation="torch")
            yield dataclasses.replace(case, part="whole")
    smallest = Case(size=options.models[0], images=options.images, seconds=options.seconds)
    yield dataclasses.replace(smallest, attention="xla")
    if options.images > 1:
        yield dataclasses.replace(smallest, images=1)


def run(case: Case, options: Options) -> dict[str, Any]:
    """Measures one case; `failed` in place of figures where it could not."""
    python = options.torch_python if case.implementation == "torch" else sys.executable
    flags = [f"--{name}={value}" for name, value in dataclasses.asdict(case).items()]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    # Compiling is part of what is shown.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    try:
        done = subprocess.run(
            [python, "-m", "benchmarks.depth_case", *flags],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=options.limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**dataclasses.asdict(case), "failed": f"not done in {options.limit:g} s"}
    if done.returncode != 0:
        error = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {**dataclasses.asdict(case), "failed": error[:80]}
    return json.loads(done.stdout.splitlines()[-1])


def row(facts: Mapping[str, Any]) -> str:
    """One line of the table."""
    part = "encoder" if facts["part"] == "encoder" else "whole network"
    if facts["implementation"] == "torch":
        part += ", transformers (PyTorch)"
    if facts["attention"] == "xla":
        part += ", all scores written out"
    start = f"| {NAMES[facts['size']]} {part} | {facts['dtype']} | {facts['images']} |"
    if "failed" in facts:
        return f"{start} {facts['failed']} | | | |"
    share = (
        ""
        if facts["encoder_flops"] is None
        else f"{100 * facts['encoder_flops'] / facts['matmul_flops']:.0f} %"
    )
    compiling = f"{facts['compile_seconds']:.0f} s" if facts["compile_seconds"] else ""
    speed = f"{facts['images_per_second']:.3g}"
    return f"{start} {speed} | {share} | {facts['peak_gib']:.1f} GiB | {compiling} |"


def findings(done: list[dict[str, Any]]) -> list[str]:
    """What the figures say, in sentences."""
    measured = {
        (
            each["size"],
            each["part"],
            each["dtype"],
            each["implementation"],
            each["attention"],
            each["images"],
        ): each
        for each in done
        if "failed" not in each
    }
    lines = []
    for (size, part, dtype, implementation, attention, images), ours in measured.items():
        if part != "encoder" or implementation != "jax" or attention != "auto":
            continue
        name, key = f"{NAMES[size]} in {dtype}", (size, part, dtype, "torch", "auto", images)
        speed = ours["images_per_second"]
        sentences = []
        if key in measured:
            ratio = speed / measured[key]["images_per_second"]
            sentences.append(f"the encoder runs at {ratio:.2f} of the speed of PyTorch's")
        whole = measured.get((size, "whole", dtype, "jax", "auto", images))
        if whole:
            share = whole["images_per_second"] / speed
            sentences.append(f"it takes {100 * share:.0f} % of the whole network's time")
        plain = measured.get((size, part, dtype, "jax", "xla", images))
        if plain:
            gain = speed / plain["images_per_second"]
            sentences.append(f"attention in blocks makes it {gain:.1f} times as fast as scores written out")
        alone = measured.get((size, part, dtype, "jax", "auto", 1))
        if alone and images > 1:
            gain = speed / alone["images_per_second"]
            sentences.append(f"{images} images together run at {gain:.2f} of the speed of one at a time")
        if sentences:
            lines.append(f"* {name}: {'; '.join(sentences)}.")
    return lines


def table(options: Options, done: list[dict[str, Any]]) -> str:
    """The results page."""
    peaks = {
        (each["implementation"], each["dtype"]): each["matmul_flops"] for each in done if "failed" not in each
    }
    threads = " or ".join(sorted({str(each["threads"]) for each in done if "failed" not in each}))
    matmuls = ", ".join(
        f"{flops / 1e9:.0f} GFLOP/s ({implementation}, {dtype})"
        for (implementation, dtype), flops in peaks.items()
    )
    intro = (
        f"Written by `benchmarks/depth.py`. {platform.machine()}, {threads} threads. UniDepthV2 with random "
        f"weights; views of {IMAGE}x{IMAGE}, which the network takes at {NETWORK_IMAGE}x{NETWORK_IMAGE}. The "
        "baseline is the encoder alone: transformers' Dinov2Model of the same width, depth and input, in "
        "PyTorch with its default (scaled dot product) attention. Every case has a process of its own; peak "
        "memory is all of that process. Compiling and a first call are not timed (a first call of more than "
        f"{options.seconds:g} s is). `of matmul` is the arithmetic of the encoder's matrix products per "
        "second, over what a plain 2048x2048 matrix product reaches in the same process: "
        f"{matmuls}."
    )
    return "\n".join(
        [
            "# Speed of the depth networks on a CPU",
            "",
            intro,
            "",
            "| | type | images a call | images/s | of matmul | peak memory | compile |",
            "|---|---|---|---|---|---|---|",
            *map(row, done),
            "",
            *findings(done),
            "",
        ]
    )


def main(options: Options) -> None:
    """Runs case after case; the table is written anew after each."""
    done: list[dict[str, Any]] = []
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for case in cases(options):
        done.append(run(case, options))
        print(row(done[-1]), file=sys.stderr, flush=True)
        options.results.write_text(table(options, done))
    print(options.results)


if __name__ == "__main__":
    main(tyro.cli(Options))

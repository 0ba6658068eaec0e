"""Compiles the 7B steps for TPU machines and writes the tables of docs/how-to/scaling.md.

    pip install -r requirements-aot.txt
    python benchmarks/aot_tables.py            # minutes per row on a few CPU cores
    python benchmarks/aot_tables.py --only v5e:4x4 --only v6e:8x8

Every finished row is added to benchmarks/results/aot_7b.json, so that an interrupted run goes on; the tables
are written anew to aot_7b.md beside it. `--again` compiles the rows it has once more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from spacedrive_jax.aot.plan import StepKind, make_plan
from spacedrive_jax.aot.search import describe_plan, parse_mesh
from spacedrive_jax.config import change, load_config
from spacedrive_jax.training.throughput import describe


@dataclasses.dataclass(frozen=True)
class Row:
    """One program to compile."""

    machine: str
    mesh: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    step: StepKind = "train"


KEPT = {"model.compute.remat": "dots_no_batch"}
ROWS = {
    "v5e:4x4": Row("v5e:4x4", "data=1,fsdp=16"),
    "v5e:16x16": Row("v5e:16x16", "data=16,fsdp=16"),
    "v5p:4x4x4": Row("v5p:4x4x4", "data=4,fsdp=16"),
    "v6e:8x8": Row("v6e:8x8", "data=8,fsdp=8"),
    "v5e:4x4 scores written out": Row("v5e:4x4", "data=1,fsdp=16", {"model.compute.attention": "xla"}),
    "v5p:4x4x4 dots_no_batch": Row("v5p:4x4x4", "data=4,fsdp=16", KEPT),
    "v5e:4x4 planning": Row("v5e:4x4", "data=1,fsdp=16", step="plan"),
    "v5e:8x8": Row("v5e:8x8", "data=8,fsdp=8"),
    "v6e:8x8 tensor 2, dots_no_batch": Row("v6e:8x8", "data=16,fsdp=2,tensor=2", KEPT),
    "v5e:16x16 tensor 2, dots_no_batch": Row("v5e:16x16", "data=32,fsdp=4,tensor=2", KEPT),
}
"""One sample per chip everywhere: weak scaling."""
COUNTER = 2
"""Of what is moved in memory: 2 counts a layer's slice of a stack as a slice in nested fusions too; what 1
counted is more than is moved."""
WEAK_SCALING = ("v5e:4x4", "v5e:8x8", "v5e:16x16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="spacedrive_plus_qwen_7b")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/aot_7b.json"))
    parser.add_argument("--only", action="append", choices=[*ROWS], help="this row; may be given again")
    parser.add_argument("--again", action="store_true", help="compile rows that are there already")
    options = parser.parse_args()
    done = json.loads(options.out.read_text()) if options.out.exists() else {"plans": {}}
    done["config"] = options.config
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "libtpu")}
    for name in options.only or ROWS:
        if name in done["plans"] and not options.again:
            continue
        row, topology = ROWS[name], describe(ROWS[name].machine)
        fields = {"mesh": parse_mesh(row.mesh), "train.batch_size": len(topology.devices)} | row.fields
        plan = make_plan(change(load_config(options.config), name, fields), topology, step=row.step)
        print(describe_plan(plan), flush=True)
        done["plans"][name] = dataclasses.asdict(plan) | {"versions": versions, "counter": COUNTER}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        _write(options.out, json.dumps(done, indent=1, sort_keys=True) + "\n")
        _write(options.out.with_suffix(".md"), tables(done["plans"]))


def tables(plans: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown, and what a chip sends as chips are added."""
    head = (
        "machine | mesh | batch | parameters + optimiser | temporaries | peak / HBM (GB) | model TFLOP | "
        "moved (GB) | collectives (GB) | step at least | MFU at most | compile | libtpu"
    )
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for name in [name for name in ROWS if name in plans]:
        plan = plans[name]
        mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
        too_much = plan.get("counter", 1) < COUNTER
        # Where arithmetic decides, the bounds do not depend on what is moved.
        by_traffic = too_much and plan["mfu_bound"] < 0.999 * _share_of_arithmetic(plan)
        cells = [
            name,
            mesh,
            plan["batch_size"],
            f"{plan['parameter_bytes'] / 1e9:.2f} + {plan['optimizer_bytes'] / 1e9:.2f}",
            f"{plan['temporary_bytes'] / 1e9:.2f}",
            f"{plan['peak_bytes'] / 1e9:.2f} / {plan['hbm_bytes'] / 1e9:.1f}",
            f"{plan['flops_per_chip'] / 1e12:.0f}",
            f"{'≤ ' if too_much else ''}{plan['moved_bytes'] / 1e9:.0f}",
            f"{_sent(plan):.1f}",
            f"{'≤ ' if by_traffic else ''}{plan['step_seconds']:.2f} s",
            f"{'≥ ' if by_traffic else ''}{plan['mfu_bound']:.0%}",
            f"{plan['compile_seconds']:.0f} s",
            plan["versions"]["libtpu"],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| v5e chips | " + " | ".join(KINDS) + " | together |", "|" + "---|" * (len(KINDS) + 2)]
    for name in [name for name in WEAK_SCALING if name in plans]:
        cells = [f"{_sent(plans[name], kind):.2f}" for kind in KINDS]
        lines.append(f"| {plans[name]['chips']} | " + " | ".join(cells) + f" | {_sent(plans[name]):.2f} GB |")
    return "\n".join(lines) + "\n"


def _share_of_arithmetic(plan: dict[str, Any]) -> float:
    """The bound of MFU where nothing but arithmetic takes time: what is worked out twice counts once."""
    return plan["flops_per_chip"] / plan["hardware_flops_per_chip"]


KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def _sent(plan: dict[str, Any], kind: str | None = None) -> float:
    return sum(each["bytes"] for each in plan["collectives"] if kind in (None, each["kind"])) / 1e9


def _write(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    os.replace(partial, file)


if __name__ == "__main__":
    main()

"""What a base needs on one chip, by precision and batch: compiled ahead of time, on a machine that has none.

    python -m benchmarks.memory_table                 # adds what is missing to benchmarks/results/memory.json
    python -m benchmarks.memory_table --only-table    # writes docs/reference/memory.md from it

Each cell is the real step of `spacedrive_plus_qwen_7b` or `base_vlm_plus_llava` (six views, adapters of rank
16, full remat), compiled by libtpu for one v5p chip (95 GB); a GPU's compiler may need some percent more or
less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spacedrive_jax.aot.plan import StepKind, make_plan
from spacedrive_jax.config import Config, MeshConfig, load_config
from spacedrive_jax.json_files import write_json
from spacedrive_jax.models.config import BaseQuantization
from spacedrive_jax.models.families.qwen2_5_vl import QwenVLConfig
from spacedrive_jax.training.throughput import describe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
QUANTISED = ROOT / "benchmarks" / "results" / "aot_quantised_7b.json"
PAGE = ROOT / "docs" / "reference" / "memory.md"
TOPOLOGY = "v5p:1x1x1"
GB = 1e9
PRECISIONS: dict[str, BaseQuantization] = {"bf16": "none", "int8": "int8", "int4": "int4"}
"""Name in the table to `model.compute.base_quantization`."""
# One of each kind, since a cell compiles for minutes: the others follow. Parameters go with the precision,
# what a sample takes does not, and the page says how much that is.
CELLS: tuple[tuple[str, str, StepKind, int], ...] = (
    ("Qwen2.5-VL-7B", "bf16", "train", 1),
    ("Qwen2.5-VL-7B", "bf16", "plan", 1),
    ("Qwen2.5-VL-3B", "bf16", "train", 1),
    ("Qwen2.5-VL-7B", "int4", "train", 1),
    ("Qwen2.5-VL-7B", "int8", "train", 1),
    ("Qwen2.5-VL-7B", "bf16", "train", 8),
    ("LLaVA-1.5-7B", "bf16", "train", 1),
)
"""Base, precision, step, batch."""


def config_of(base: str, precision: str, batch: int) -> Config:
    """The config of a cell."""
    config = load_config("base_vlm_plus_llava" if base.startswith("LLaVA") else "spacedrive_plus_qwen_7b")
    compute = dataclasses.replace(config.model.compute, base_quantization=PRECISIONS[precision], remat="full")
    model = dataclasses.replace(config.model, compute=compute)
    if base.endswith("3B"):
        model = dataclasses.replace(model, vlm=QwenVLConfig.qwen2_5_vl_3b())
    train = dataclasses.replace(config.train, batch_size=batch, grad_accum_steps=1)
    return dataclasses.replace(config, model=model, train=train, mesh=MeshConfig(data=1, fsdp=1, tensor=1))


def measure(results: dict[str, dict]) -> None:
    """Compiles what is missing and keeps it, cell by cell."""
    topology = describe(TOPOLOGY)
    for base, precision, step, batch in CELLS:
        name = f"{base} {precision} {step} {batch}"
        if name in results:
            continue
        plan = make_plan(config_of(base, precision, batch), topology, step=step)
        results[name] = {
            "fits": plan.fits,
            "reason": plan.reason,
            "peak_bytes": plan.peak_bytes,
            "parameter_bytes": plan.parameter_bytes,
            "optimizer_bytes": plan.optimizer_bytes,
            "compile_seconds": round(plan.compile_seconds),
        }
        print(f"{name}: {plan.peak_bytes / GB:.1f} GB {plan.reason}", flush=True)
        write_json(RESULTS, results, indent=1)


def with_quantised(results: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the int8 and int4 plans of 7B that benchmarks/aot_tables.py compiled for one v5e chip."""
    found = dict(results)
    for precision, plan in zip(("int8", "int4"), json.loads(QUANTISED.read_text())["plans"], strict=False):
        found.setdefault(f"Qwen2.5-VL-7B {precision} train 1", plan)
    return found


def table(results: Mapping[str, Any]) -> str:
    """The cells there are, as Markdown."""
    lines = ["| base | precision | step | samples | GB at the peak | of which parameters | compiled for |"]
    lines += ["|---|---|---|---|---|---|---|"]
    order = sorted(CELLS, key=lambda cell: (cell[2] == "plan", cell[0], cell[1], cell[3]))
    for base, precision, step, batch in order:
        found = results.get(f"{base} {precision} {step} {batch}")
        if found is None:
            continue
        peak = ("" if found["fits"] else "at least ") + f"{found['peak_bytes'] / GB:.1f}"
        parameters, chip = f"{found['parameter_bytes'] / GB:.1f}", found.get("topology", TOPOLOGY)
        lines.append(f"| {base} | {precision} | {step} | {batch} | {peak} | {parameters} | {chip} |")
    return "\n".join(lines)


def for_a_sample(results: Mapping[str, Any]) -> str:
    """What a further sample takes, from the two batches that were compiled."""
    one, eight = (results[f"Qwen2.5-VL-7B bf16 train {batch}"]["peak_bytes"] for batch in (1, 8))
    more = f"{(eight - one) / 7 / GB:.1f} GB"
    return f"\n\nA further sample takes {more} with the 7B base, at any precision; other cells follow."


INTRODUCTION = """# Memory: what a base needs on one device

The real training and planning steps (six views of 640 x 640, adapters of rank 16, full remat), compiled
ahead of time for one chip; `python -m benchmarks.memory_table` makes the table. GB are 10^9 bytes at the
peak. `fsdp` over N devices divides the parameters by N, not what a sample needs.

The compiler is libtpu's. On an H100, XLA for GPUs took 17.4 GB to plan one sample with the 7B base in bf16
and 20.3 GB for eight, and 44.4 GB to train on two samples with remat `dots_no_batch`, which keeps more than
`full` ([measured](../../benchmarks/results/gpu_h100.md)).

"""
ADVICE = """

Precision is that of the frozen base (`--model.compute.base-quantization int8|int4`); adapters, heads and
optimiser are float32 throughout. What else there is to turn is in [how to scale](../how-to/scaling.md); any
other case is one command, on any machine:

```
python -m spacedrive_jax aot spacedrive_plus_qwen_7b --topology v5p:1x1x1 --mesh data=1,fsdp=1 --batch-size 2
```
"""


def main() -> None:
    """Compiles, and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only-table", action="store_true", help="compile nothing")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if not parser.parse_args().only_table:
        measure(results)
    PAGE.write_text(INTRODUCTION + table(with_quantised(results)) + for_a_sample(results) + ADVICE)


if __name__ == "__main__":
    main()

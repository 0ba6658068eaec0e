"""Compiles the 7B training step for TPU machines and writes the tables of docs/scaling.md.

    pip install -r requirements-aot.txt
    python benchmarks/aot_tables.py            # minutes per machine on a few CPU cores

Every finished machine is added to benchmarks/results/aot_7b.json, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from spacedrive_jax.config import load_preset
from spacedrive_jax.scaling.plan import make_plan
from spacedrive_jax.scaling.search import parse_mesh
from spacedrive_jax.scaling.text import describe_plan
from spacedrive_jax.scaling.topology import describe

MACHINES = {
    "v5e:4x4": "data=1,fsdp=16",
    "v5p:4x4x4": "data=4,fsdp=16",
    "v6e:8x8": "data=8,fsdp=8",
    "v5e:16x16": "data=16,fsdp=16",
}
"""One sample per chip everywhere: weak scaling."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="spacedrive_plus_qwen_7b")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/aot_7b.json"))
    options = parser.parse_args()
    done = json.loads(options.out.read_text()) if options.out.exists() else {"plans": {}}
    done["config"] = options.config
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "libtpu")}
    for name, mesh in MACHINES.items():
        if name in done["plans"]:
            continue
        topology = describe(name)
        config = load_preset(options.config)
        train = dataclasses.replace(config.train, batch_size=len(topology.devices))
        plan = make_plan(dataclasses.replace(config, mesh=parse_mesh(mesh), train=train), topology)
        print(describe_plan(plan), flush=True)
        done["plans"][name] = dataclasses.asdict(plan) | {"versions": versions}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
        os.replace(partial, options.out)


if __name__ == "__main__":
    main()

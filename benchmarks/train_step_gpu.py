"""One training step of SpaceDrive+ on Qwen2.5-VL-3B and 7B on an accelerator, random weights.

Six views of 640 x 640, adapters of rank 16, bfloat16: tokens a second, model FLOPs utilisation (the formula
is in docs/scaling.md) and peak memory. `--shortened` keeps two layers and small images, to try the script on
any machine.

    PYTHONPATH=. python benchmarks/train_step_gpu.py --batch-size 4 --out benchmarks/results/train_step_gpu.md
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from random_batch import random_batch

from spacedrive_jax.cli.main import use_compilation_cache
from spacedrive_jax.config import Config, change, load_preset
from spacedrive_jax.models.config import QwenVLConfig
from spacedrive_jax.training.flops import DEVICE_KINDS, train_step_flops
from spacedrive_jax.training.sharding import make_mesh, place_batch, replicated
from spacedrive_jax.training.state import count, start_state
from spacedrive_jax.training.step import make_train_step

MODELS = {"3b": QwenVLConfig.qwen2_5_vl_3b, "7b": QwenVLConfig.qwen2_5_vl_7b}


class Measured(NamedTuple):
    """Of one model."""

    parameters: int
    step_seconds: float
    """Median."""
    tokens_per_second: float
    """Places of the decoder's sequences, padding (there is none here) included."""
    mfu: float | None
    """None where the device's peak rate is not known."""
    peak_bytes: int | None
    """Largest share of the device's memory in use; None where the device does not tell."""


def make_config(model: str, options: argparse.Namespace) -> Config:
    vlm, fields = MODELS[model](), {}
    if options.shortened:
        vlm = dataclasses.replace(
            vlm,
            decoder=dataclasses.replace(vlm.decoder, num_layers=2),
            vision=dataclasses.replace(vlm.vision, depth=2, full_attention_blocks=(1,)),
        )
        fields = {"data.image_size": (56, 56), "data.sequence_length": 192}
    fields |= {
        "model.vlm": vlm,
        "model.compute.remat": options.remat,
        "train.batch_size": options.batch_size,
    }
    return change(load_preset("spacedrive_plus_qwen_7b"), f"spacedrive_plus_qwen_{model}", fields)


def measure(config: Config, steps: int) -> Measured:
    mesh = make_mesh(config.mesh)
    step = make_train_step(config, mesh)
    trainable, frozen = start_state(config, mesh)
    optimizer = step.initialize_optimizer(trainable)
    batch = place_batch(random_batch(config, seed=0), mesh)
    seconds = []
    for number in range(steps + 1):  # the first compiles
        place = jax.device_put(np.int32(number), replicated(mesh))
        started = time.perf_counter()
        trainable, optimizer, metrics = step.run(trainable, optimizer, frozen, batch, place)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - started)
        if not np.isfinite(loss):
            raise SystemExit(f"step {number + 1} has loss {loss}")
    took = statistics.median(seconds[1:])
    rate = DEVICE_KINDS.get(jax.devices()[0].device_kind)
    ideal = None if rate is None else train_step_flops(config).model / rate / jax.device_count()
    memory = jax.devices()[0].memory_stats() or {}
    return Measured(
        parameters=count(trainable) + count(frozen),
        step_seconds=took,
        tokens_per_second=config.train.batch_size * config.data.sequence_length / took,
        mfu=None if ideal is None else ideal / took,
        peak_bytes=memory.get("peak_bytes_in_use"),
    )


def report(rows: dict[str, Measured], options: argparse.Namespace) -> str:
    def line(model: str, row: Measured) -> str:
        mfu = "unknown" if row.mfu is None else f"{row.mfu:.1%}"
        peak = "unknown" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.1f}"
        size = f"{row.parameters / 1e9:.2f}"
        return f"| {model} | {size} | {row.step_seconds:.3f} | {row.tokens_per_second:.0f} | {mfu} | {peak} |"

    shortened = ", SHORTENED to two layers and small images" if options.shortened else ""
    return "\n".join(
        [
            "# A training step on an accelerator",
            "",
            f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}; batch of "
            f"{options.batch_size}, remat {options.remat}, random weights{shortened}; median of "
            f"{options.steps} steps.",
            "",
            "| model | parameters, billions | step, s | tokens/s | MFU | peak memory, GB |",
            "|---|---:|---:|---:|---:|---:|",
            *(line(model, row) for model, row in rows.items()),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--remat", default="full", help="a policy of model.compute.remat")
    parser.add_argument("--shortened", action="store_true")
    parser.add_argument("--out", type=Path, help="write the table here as well")
    options = parser.parse_args()
    use_compilation_cache()
    rows = {}
    for model in options.models:
        rows[model] = measure(make_config(model, options), options.steps)
        print(model, rows[model], flush=True)
    text = report(rows, options)
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()

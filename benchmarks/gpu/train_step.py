"""One training step of SpaceDrive+ on Qwen2.5-VL: tokens a second, model FLOPs utilisation, peak memory.

Six views of 640 x 640, sequences of 3456 tokens without padding, adapters of rank 16, bfloat16. The formula
of MFU is in docs/how-to/scaling.md. Peak memory is the compiler's: what the step takes and allocates.
"""

from __future__ import annotations

import time

import jax
import numpy as np

from benchmarks.gpu.models import make_config, random_state
from benchmarks.gpu.rows import memory_of, parser, tell
from spacedrive_jax.config import Config
from spacedrive_jax.training.sharding import bytes_per_device, make_mesh, place_batch, replicated
from spacedrive_jax.training.step import fake_batch, make_train_step
from spacedrive_jax.training.throughput import DEVICE_KINDS, train_step_flops

BATCH = {"3b": 6, "7b": 4}
"""Samples of which one step's kept products fit beside the weights in 80 GB."""


def measure(config: Config, steps: int) -> dict[str, float | int | None]:
    """Compiles, takes one step that does not count, and times the others."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    step = make_train_step(config, mesh)
    _, trainable, frozen = random_state(config, mesh)
    optimizer = step.initialize_optimizer(trainable)
    batch = place_batch(fake_batch(config, seed=0), mesh)
    numbers = [jax.device_put(np.int32(number), replicated(mesh)) for number in range(steps + 1)]
    started = time.perf_counter()
    compiled = step.run.lower(trainable, optimizer, frozen, batch, numbers[0]).compile()
    compile_seconds = time.perf_counter() - started
    memory = memory_of(compiled)
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    taken = []
    for number in numbers:
        started = time.perf_counter()
        trainable, optimizer, metrics = compiled(trainable, optimizer, frozen, batch, number)
        loss = float(metrics["loss"])
        taken.append(time.perf_counter() - started)
        if not np.isfinite(loss):
            raise SystemExit(f"a step has loss {loss}")
    took = float(np.median(taken[1:]))
    rate = DEVICE_KINDS.get(jax.devices()[0].device_kind)
    flops = train_step_flops(config)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "parameters GB": bytes_per_device((trainable, frozen)) / 1e9,
        "step s": took,
        "tokens/s": config.train.batch_size * config.data.sequence_length / took,
        "MFU %": None if rate is None else 100 * flops.model / rate / took,
        "hardware FLOPs %": None if rate is None else 100 * flops.hardware / rate / took,
        "peak GB": peak / 1e9,
        "in use at most GB": stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None,
        "compile s": compile_seconds,
    }


def main() -> None:
    """One row."""
    options = parser(__doc__)
    options.add_argument("--model", choices=["3b", "7b"], default="7b")
    options.add_argument("--base", choices=["none", "int8", "int4"], default="none", help="quantisation")
    options.add_argument("--batch-size", type=int)
    options.add_argument("--remat", default="dots_no_batch", help="a policy of model.compute.remat")
    options.add_argument("--steps", type=int, default=6)
    given = options.parse_args()
    batch = given.batch_size or BATCH[given.model]
    fields = {
        "train.batch_size": batch,
        "model.compute.remat": given.remat,
        "model.compute.base_quantization": given.base,
    }
    config = make_config(given.model, given.size, fields)
    tell(
        model=given.model,
        base=config.model.compute.param_dtype if given.base == "none" else given.base,
        batch=batch,
        remat=given.remat,
        **measure(config, given.steps),
    )


if __name__ == "__main__":
    main()

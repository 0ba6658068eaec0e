"""Planning with SpaceDrive+ on Qwen2.5-VL-7B: from pixels and prompts to waypoints, in one pass.

bfloat16, six views of 640 x 640, the published prompt's length. `one pass` is the program that runs prompt
and expected answer together and checks it (`inference/one_pass.py`): what an answer costs that keeps to the
frame. `token by token` is the same answer generated a token at a time. Weights are random, so nothing is
said of what the answers are.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.gpu.models import PROMPT_LENGTH, make_config, random_state
from benchmarks.gpu.rows import each, finish, memory_of, parser, seconds, tell
from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.inference.answers import planning_frame
from spacedrive_jax.inference.generate import generate
from spacedrive_jax.inference.one_pass import run_frame
from spacedrive_jax.models.partitioning import activations_on
from spacedrive_jax.training.sharding import make_mesh, place_batch
from spacedrive_jax.training.step import fake_batch


def main() -> None:
    """A row for each way and batch."""
    options = parser(__doc__)
    options.add_argument("--ways", nargs="+", default=["one pass:1", "one pass:8", "token by token:1"])
    given = options.parse_args()
    fields = {"data.sequence_length": PROMPT_LENGTH, "model.compute.remat": "none"}
    config = make_config("7b", given.size, fields)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    tokenizer = load_tokenizer(config.data.tokenizer)
    frame = planning_frame(tokenizer)
    graph, trainable, frozen = random_state(config, mesh)

    def one_pass(trainable: nnx.State, frozen: nnx.State, batch: DrivingBatch) -> Any:
        with activations_on(mesh):
            model = nnx.merge(graph, trainable, frozen)
            progress = run_frame(model, batch, tokenizer, frame, len(frame), 1.0)
            return (progress.token_ids, progress.coordinates), jnp.full(batch.size, len(frame))

    def token_by_token(trainable: nnx.State, frozen: nnx.State, batch: DrivingBatch) -> Any:
        with activations_on(mesh):
            model = nnx.merge(graph, trainable, frozen)
            made = generate(model, batch, tokenizer, len(frame))
            return made, made.lengths

    programs = {"one pass": one_pass, "token by token": token_by_token}
    for way, samples in (words.rsplit(":", 1) for words in given.ways):
        with each(way=way, batch=int(samples)):
            train = dataclasses.replace(config.train, batch_size=int(samples))
            batch = place_batch(fake_batch(dataclasses.replace(config, train=train), seed=0), mesh)
            measure(jax.jit(programs[way]), (trainable, frozen, batch), way)
    finish()


def measure(
    program: jax.stages.Wrapped, arguments: tuple[nnx.State, nnx.State, DrivingBatch], way: str
) -> None:
    """Compiles, runs once, times; prints the row."""
    started = time.perf_counter()
    compiled = program.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - started

    def call() -> Any:
        return jax.block_until_ready(compiled(*arguments))

    answer = int(np.max(call()[1]))
    took = seconds(call, 10 if way == "one pass" else 3)
    memory, batch = memory_of(compiled), arguments[2]
    figures = {
        "ms a sample": 1e3 * took / batch.size,
        "prompt": batch.token_ids.shape[1],
        "answer": answer,
        "peak GB": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
        "compile s": compile_seconds,
    }
    tell(way=way, batch=batch.size, ms=1e3 * took, **figures)


if __name__ == "__main__":
    main()

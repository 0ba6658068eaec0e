"""One case of `benchmarks/depth.py` in a process of its own, so that peak memory is its own: a line of JSON.

    python -m benchmarks.depth_case --size vits14 --part encoder --dtype float32
    python -m benchmarks.depth_case --size vits14 --part encoder --implementation torch     # needs PyTorch

Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

IMAGE = 640
"""Side of the views, pixels: the published run's."""
NETWORK_IMAGE = 644
"""Side of the network's input: the next multiple of the patch."""
PATCH = 14
MATMUL_SIDE = 2048


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed."""

    size: Literal["vits14", "vitb14", "vitl14"] = "vits14"
    part: Literal["encoder", "whole"] = "encoder"
    """DINOv2 alone (all that the baseline has), or all of UniDepthV2's inference."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    implementation: Literal["jax", "torch"] = "jax"
    """`torch` is transformers' Dinov2Model."""
    attention: Literal["auto", "xla"] = "auto"
    """`xla` writes all scores out (jax only)."""
    images: int = 6
    """Images in one call."""
    seconds: float = 30.0
    """Calls are repeated for so long, after one that does not count. A first call that takes longer counts
    itself: after so long nothing is left to warm up."""


class Prepared(NamedTuple):
    """A case that is ready to run."""

    call: Callable[[], Any]
    """Runs the images through and waits."""
    matmul: Callable[[], Any]
    """Multiplies two square matrices of `MATMUL_SIDE` in the same type and waits."""
    compile_seconds: float
    threads: int


def main(case: Case) -> None:
    """Measures and prints."""
    prepared = torch_case(case) if case.implementation == "torch" else jax_case(case)
    seconds = [timed(prepared.call)]
    if seconds[0] < case.seconds:
        seconds = []
        while not seconds or sum(seconds) + seconds[0] < case.seconds:
            seconds.append(timed(prepared.call))
    each = float(np.median(seconds))
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # before the matrices below
    prepared.matmul()
    matmul = 2 * MATMUL_SIDE**3 / min(timed(prepared.matmul) for _ in range(5))
    facts = {
        **dataclasses.asdict(case),
        "threads": prepared.threads,
        "compile_seconds": round(prepared.compile_seconds, 1),
        "calls": len(seconds),
        "images_per_second": case.images / each,
        "matmul_flops": matmul,
        "encoder_flops": case.images * encoder_flops(case.size) / each if case.part == "encoder" else None,
        "peak_gib": peak_kib / 2**20,
    }
    print(json.dumps(facts))


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def encoder_flops(size: str) -> float:
    """Floating-point operations of DINOv2 on one image, those of its matrix products."""
    from spacedrive_jax.models.depth.backbone import SIZES

    config = SIZES[size]
    patches = (NETWORK_IMAGE // PATCH) ** 2
    tokens, width = patches + 1, config.width
    block = 2 * tokens * width**2 * (4 + 2 * config.mlp_ratio) + 4 * tokens**2 * width
    return 2 * patches * 3 * PATCH**2 * width + config.depth * block


def jax_case(case: Case) -> Prepared:
    """The network here, compiled ahead of its first call."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from spacedrive_jax.models.config import ComputeConfig
    from spacedrive_jax.models.depth.unidepth import UniDepthConfig, UniDepthV2
    from spacedrive_jax.models.partitioning import initialize

    compute = ComputeConfig(dtype=case.dtype, param_dtype=case.dtype, attention=case.attention)
    config = UniDepthConfig.named(case.size)
    graph, state = nnx.split(initialize(lambda rngs: UniDepthV2(config, compute=compute, rngs=rngs), seed=0))
    rng = np.random.default_rng(0)
    if case.part == "whole":
        images = jnp.asarray(rng.integers(0, 256, (case.images, IMAGE, IMAGE, 3), dtype=np.uint8))
        program = jax.jit(lambda state, images: nnx.merge(graph, state)(images).depth)
    else:
        images = jnp.asarray(rng.normal(size=(case.images, NETWORK_IMAGE, NETWORK_IMAGE, 3)), case.dtype)
        program = jax.jit(lambda state, images: nnx.merge(graph, state).encoder(images))
    started = time.perf_counter()
    compiled = program.lower(state, images).compile()
    compile_seconds = time.perf_counter() - started
    square = jnp.asarray(rng.normal(size=(MATMUL_SIDE, MATMUL_SIDE)), case.dtype)
    multiply = jax.jit(jnp.matmul)
    return Prepared(
        lambda: jax.block_until_ready(compiled(state, images)),
        lambda: jax.block_until_ready(multiply(square, square)),
        compile_seconds,
        os.cpu_count() or 1,
    )


def torch_case(case: Case) -> Prepared:
    """The Dinov2Model of transformers, of the same width, depth and input, without gradients, on the CPU."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    from spacedrive_jax.models.depth.backbone import SIZES

    if case.part != "encoder":
        raise SystemExit("PyTorch runs the encoder only: UniDepth's own code is not part of transformers")
    size = SIZES[case.size]
    config = Dinov2Config(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        image_size=518,
        patch_size=PATCH,
    )
    dtype = getattr(torch, case.dtype)
    model = Dinov2Model(config).eval().to(dtype)
    images = torch.randn(case.images, 3, NETWORK_IMAGE, NETWORK_IMAGE, dtype=dtype)
    square = torch.randn(MATMUL_SIDE, MATMUL_SIDE, dtype=dtype)

    def run() -> None:
        with torch.inference_mode():
            model(images)

    return Prepared(run, lambda: square @ square, 0.0, torch.get_num_threads())


if __name__ == "__main__":
    main(tyro.cli(Case))

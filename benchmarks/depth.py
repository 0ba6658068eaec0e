"""Speed of the depth networks: images a second, peak memory, against transformers' Dinov2Model in PyTorch.

    python benchmarks/depth.py --size vits14 --dtype float32          # one line of JSON
    python benchmarks/depth.py --size vits14 --baseline               # the PyTorch encoder (needs torch)

Six views of 640x640 go through together, as in one keyframe; UniDepthV2 takes them at 644x644. Weights are
random: speed does not depend on them. Each case runs in a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import tyro

VIEWS = 6
IMAGE = 640
NETWORK_IMAGE = 644


@dataclasses.dataclass(frozen=True)
class Options:
    """One case."""

    size: Literal["vits14", "vitb14", "vitl14"] = "vits14"
    dtype: Literal["float32", "bfloat16"] = "float32"
    part: Literal["encoder", "whole"] = "whole"
    """DINOv2 alone (what the baseline is), or all of UniDepthV2's inference."""
    views: int = VIEWS
    """Images in one call."""
    repeats: int = 3
    """Timed calls, after one that compiles; the median counts."""
    baseline: bool = False
    """Time transformers' Dinov2Model in PyTorch instead."""


def main(options: Options) -> None:
    run, device = torch_encoder(options) if options.baseline else jax_network(options)
    started = time.perf_counter()
    run()
    first = time.perf_counter() - started
    seconds = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    facts = {
        **dataclasses.asdict(options),
        "device": device,
        "machine": platform.processor() or platform.machine(),
        "first_call_s": round(first, 2),
        "images_per_second": round(options.views / float(np.median(seconds)), 3),
        "seconds": [round(each, 3) for each in seconds],
        "peak_host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "peak_device_gib": device_peak(),
    }
    print(json.dumps(facts))


def jax_network(options: Options) -> tuple[Callable[[], Any], str]:
    """A jitted call of the network or of its encoder."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from spacedrive_jax.depth.unidepth import UniDepthConfig, UniDepthV2
    from spacedrive_jax.vlm.config import ComputeConfig
    from spacedrive_jax.vlm.initialization import initialize

    compute = ComputeConfig(dtype=options.dtype, param_dtype=options.dtype)
    config = UniDepthConfig.named(options.size)
    graph, state = nnx.split(initialize(lambda rngs: UniDepthV2(config, compute=compute, rngs=rngs), seed=0))
    rng = np.random.default_rng(0)
    if options.part == "whole":
        images = jnp.asarray(rng.integers(0, 256, (options.views, IMAGE, IMAGE, 3), dtype=np.uint8))
        call = jax.jit(lambda state, images: nnx.merge(graph, state)(images).depth)
    else:
        shape = (options.views, NETWORK_IMAGE, NETWORK_IMAGE, 3)
        images = jnp.asarray(rng.normal(size=shape), options.dtype)
        call = jax.jit(lambda state, images: nnx.merge(graph, state).encoder(images))
    device = jax.devices()[0]
    return lambda: jax.block_until_ready(call(state, images)), f"{device.platform} {device.device_kind}"


def torch_encoder(options: Options) -> tuple[Callable[[], Any], str]:
    """Times Dinov2Model of transformers with the same width, depth and input, no gradients."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    from spacedrive_jax.depth.dinov2 import SIZES

    size = SIZES[options.size]
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=size.width,
            num_hidden_layers=size.depth,
            num_attention_heads=size.heads,
            image_size=518,
            patch_size=14,
        )
    ).eval()
    dtype = getattr(torch, options.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device, dtype)
    images = torch.randn(options.views, 3, NETWORK_IMAGE, NETWORK_IMAGE, device=device, dtype=dtype)

    def run() -> None:
        with torch.inference_mode():
            model(images)
        if device == "cuda":
            torch.cuda.synchronize()

    return run, f"torch {torch.__version__} {device}"


def device_peak() -> float | None:
    """Peak bytes on the accelerator, GiB; None on a CPU or where no JAX ran."""
    import jax

    statistics = jax.local_devices()[0].memory_stats() or {}
    peak = statistics.get("peak_bytes_in_use")
    return None if peak is None else round(peak / 2**30, 2)


if __name__ == "__main__":
    main(tyro.cli(Options))

"""UniDepthV2 with a ViT-L on the six views of a keyframe, 640 x 640, random weights."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.gpu.rows import memory_of, parser, seconds, tell
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.depth.backbone import Dinov2Config
from spacedrive_jax.models.depth.unidepth import UniDepthConfig, UniDepthV2
from spacedrive_jax.models.partitioning import initialize


def main() -> None:
    """A row for one keyframe and one for several."""
    options = parser(__doc__)
    options.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options.add_argument("--images", nargs="+", type=int, default=[6])
    given = options.parse_args()
    config, side = UniDepthConfig.named("vitl14"), 640
    if given.size == "tiny":
        encoder = Dinov2Config(width=32, depth=4, heads=2, taps=(1, 2, 3, 4), final_norm_eps=1e-5)
        side = 56
        config = UniDepthConfig(encoder=encoder, width=32, heads=2, pixel_bounds=(side**2, side**2))
    compute = ComputeConfig(dtype=given.dtype, param_dtype=given.dtype)
    graph, state = nnx.split(initialize(lambda rngs: UniDepthV2(config, compute=compute, rngs=rngs), seed=0))
    program = jax.jit(lambda state, images: nnx.merge(graph, state)(images).depth)
    for count in given.images:
        images = jax.device_put(
            np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        )
        started = time.perf_counter()
        compiled = program.lower(state, images).compile()
        compile_seconds = time.perf_counter() - started

        def call(compiled: Any = compiled, images: Any = images) -> Any:
            return jax.block_until_ready(compiled(state, images))

        if not np.isfinite(np.asarray(call())).all():
            raise SystemExit("a depth is not finite")
        took = seconds(call, 10)
        tell(
            network="UniDepthV2 ViT-L" if given.size == "published" else "tiny",
            dtype=given.dtype,
            images=count,
            ms=1e3 * took,
            **{
                "images/s": count / took,
                "temporaries GB": memory_of(compiled).temp_size_in_bytes / 1e9,
                "compile s": compile_seconds,
            },
        )


if __name__ == "__main__":
    main()

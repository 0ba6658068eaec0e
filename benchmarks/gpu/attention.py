"""The fused kernel that `auto` takes on a GPU (cuDNN) against the plain one: values, gradients and speed.

The shapes are those of one training step of the 7B model with two samples, and of the depth network on one
keyframe. Errors are relative, ‖ours − reference‖ / ‖reference‖, against plain attention in float32 with
exact products on the same bfloat16 inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.rows import each, finish, parser, seconds, tell
from spacedrive_jax.models.attention import attend, choose_kernel
from spacedrive_jax.models.config import AttentionChoice


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention of the model."""

    name: str
    rows: int
    length: int
    heads: int
    kv_heads: int
    channels: int
    causal: bool = False
    shortest: int | None = None
    """Valid keys of every other row; None where all rows are whole."""
    trains: bool = True
    """Whether a gradient passes through it."""


PUBLISHED = (
    Case("decoder", 2, 3456, 28, 4, 128, causal=True),
    Case("decoder, padded samples", 2, 3456, 28, 4, 128, causal=True, shortest=3000),
    Case("vision, whole image", 12, 2116, 16, 16, 80, trains=False),
    Case("vision, windows", 432, 64, 16, 16, 80, shortest=32, trains=False),
    Case("depth network", 6, 2117, 16, 16, 64, trains=False),
)
TINY = (
    Case("decoder", 2, 96, 4, 2, 16, causal=True, shortest=64),
    Case("vision, whole image", 2, 48, 2, 2, 16, trains=False),
)


def inputs(case: Case) -> tuple[jax.Array, ...]:
    """Queries, keys, values, and weights that make a loss of the output; bfloat16."""
    keys = jax.random.split(jax.random.key(case.length), 4)
    counts = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return tuple(
        jax.random.normal(key, (case.rows, case.length, count, case.channels), jnp.bfloat16)
        for key, count in zip(keys, counts, strict=True)
    )


def programs(case: Case, choice: AttentionChoice) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward, and forward with gradients; places behind a row's end count as zeros."""
    lengths = None
    if case.shortest is not None:
        lengths = jnp.where(jnp.arange(case.rows) % 2 == 0, case.length, case.shortest)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = attend(q, k, v, choice=choice, causal=case.causal, lengths=lengths)
        if lengths is None or not case.causal:
            return out
        valid = jnp.arange(case.length) < lengths[:, None]
        return jnp.where(valid[:, :, None, None], out, 0)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(forward(q, k, v).astype(jnp.float32) * weights.astype(jnp.float32))

    return jax.jit(forward), jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def error(found: jax.Array, expected: jax.Array) -> float:
    """Relative, in the Euclidean norm."""
    difference = found.astype(jnp.float32) - expected.astype(jnp.float32)
    return float(jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(expected.astype(jnp.float32).ravel()))


def finished(program: Callable[..., Any], *operands: jax.Array) -> Any:
    """What a program gives, waited for."""
    return jax.block_until_ready(program(*operands))


def compare(case: Case, repeats: int) -> None:
    """Prints one row."""
    *operands, weights = inputs(case)
    wide = [operand.astype(jnp.float32) for operand in operands]
    figures: dict[str, Any] = {}
    with jax.default_matmul_precision("highest"):
        forward, gradient = programs(case, "xla")
        expected = forward(*wide)
        gradients = gradient(*wide, weights) if case.trains else ()
    for label, choice in (("fused", "auto"), ("plain", "xla")):
        forward, gradient = programs(case, choice)  # type: ignore[arg-type]
        figures[f"{label} error"] = error(forward(*operands), expected)
        figures[f"{label} forward ms"] = 1e3 * seconds(
            functools.partial(finished, forward, *operands), repeats
        )
        if case.trains:
            found = gradient(*operands, weights)
            figures[f"{label} gradient error"] = max(map(error, found, gradients))
            figures[f"{label} forward and backward ms"] = 1e3 * seconds(
                functools.partial(finished, gradient, *operands, weights), repeats
            )
    kernel = choose_kernel(
        "auto",
        jax.default_backend(),
        jnp.dtype(jnp.bfloat16),
        case.length,
        case.channels,
        masked=case.causal or case.shortest is not None,
    )
    tell(attention=case.name, kernel=kernel, **{name: float(np.float32(x)) for name, x in figures.items()})


def main() -> None:
    """All cases."""
    options = parser(__doc__).parse_args()
    for case in PUBLISHED if options.size == "published" else TINY:
        with each(attention=case.name):
            compare(case, repeats=20 if options.size == "published" else 2)
    finish()


if __name__ == "__main__":
    main()

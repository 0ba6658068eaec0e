"""Loss and gradients on a quantised base against those on the bfloat16 base, on the recorded small models.

    PYTHONPATH=. python benchmarks/base_quantization.py --out benchmarks/results/base_quantization.md

Everything else is float32, so that the base's storage is all that differs. The models are a few hundred wide
with random weights: errors of single products do not average out as they do at the published widths.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spacedrive_jax.models.config import BaseQuantization
from spacedrive_jax.models.quantization import quantize
from spacedrive_jax.models.spacedrive import SpaceDrive
from spacedrive_jax.training.losses import losses
from spacedrive_jax.training.state import is_trainable
from tests.published_case import PublishedCase, load_case

CASES = ("spacedrive_train",)
BASES: tuple[BaseQuantization, ...] = ("none", "int8", "int4")


def with_base(case: PublishedCase, kind: BaseQuantization) -> SpaceDrive:
    """The case's model with its base in bfloat16, or quantised from that; other numbers as they are."""
    model = case.model
    compute = dataclasses.replace(model.config.compute, base_quantization=kind)
    config = dataclasses.replace(model.config, compute=compute)
    make = lambda: SpaceDrive(config, indicator_id=model.indicator_id, rngs=nnx.Rngs(0))  # noqa: E731
    graph, state = nnx.split(nnx.eval_shape(make))
    numbers, trains = dict(nnx.to_flat_state(nnx.state(model))), is_trainable(use_lora=True)
    filled: dict[Any, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        if path[-1] == "kernel_scale":
            continue
        value = np.asarray(numbers[path][...])
        if not trains(path, variable):
            value = np.asarray(jnp.asarray(value).astype(jnp.bfloat16).astype(jnp.float32))
        filled[path] = variable.replace(jnp.asarray(value))
        scale = (*path[:-1], "kernel_scale")
        if (scale_variable := dict(nnx.to_flat_state(state)).get(scale)) is None or path[-1] != "kernel":
            continue
        axes, stacked = 2 if path[-2] == "o" else 1, "layers" in path
        pairs = [quantize(each, kind, axes) for each in (value if stacked else [value])]  # type: ignore[arg-type]
        levels, scales = (np.stack(each) if stacked else each[0] for each in zip(*pairs, strict=True))
        filled[path] = variable.replace(jnp.asarray(levels))
        filled[scale] = scale_variable.replace(jnp.asarray(scales))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def loss_and_gradients(case: PublishedCase, model: SpaceDrive) -> tuple[float, np.ndarray, int]:
    """The training loss, the gradients of everything that trains in one row, and the base's bytes."""
    graph, trainable, frozen = nnx.split(model, is_trainable(use_lora=True), ...)

    @jax.jit
    def run(trainable: nnx.State, frozen: nnx.State) -> tuple[jax.Array, Any]:
        def loss(trainable: nnx.State) -> jax.Array:
            return losses(nnx.merge(graph, trainable, frozen), case.batch, case.training, None).total

        return jax.value_and_grad(loss)(trainable)

    value, gradients = run(trainable, frozen)
    row = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(gradients)])
    kernels = [leaf for path, leaf in nnx.to_flat_state(frozen) if str(path[-1]).startswith("kernel")]
    # The bfloat16 base is held in float32 here, rounded.
    stored = sum(leaf.size * min(leaf.dtype.itemsize, 2) for leaf in kernels)
    return float(value), row, stored


def table(name: str) -> list[str]:
    """One model's figures as Markdown."""
    case = load_case(name)
    found = {kind: loss_and_gradients(case, with_base(case, kind)) for kind in BASES}
    loss, gradients, _ = found["none"]
    lines = [
        f"## {name}",
        "",
        "| base | bytes of projections | loss | loss, relative | gradients, relative | cosine |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind, (value, row, stored) in found.items():
        apart = np.linalg.norm(row - gradients) / np.linalg.norm(gradients)
        cosine = row @ gradients / np.linalg.norm(row) / np.linalg.norm(gradients)
        label = "bfloat16" if kind == "none" else kind
        figures = f"{value:.6f} | {abs(value - loss) / loss:.1e} | {apart:.1e} | {cosine:.6f}"
        lines.append(f"| {label} | {stored:,} | {figures} |")
    return lines


def main() -> None:
    """All models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the tables here as well")
    options = parser.parse_args()
    lines = [
        "# A quantised base against bfloat16",
        "",
        f"`benchmarks/base_quantization.py`, jax {jax.__version__}, CPU. The gradient is of everything that "
        "trains, as one vector.",
    ]
    for name in CASES:
        lines += ["", *table(name)]
    text = "\n".join([*lines, ""])
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()

"""Run by test_sharding.py in a process of its own with eight fake devices: prints errors as JSON."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from spacedrive_jax.interop.hf_checkpoint import from_hf
from spacedrive_jax.models.config import LoraConfig
from spacedrive_jax.models.image_processor import flatten_patches
from spacedrive_jax.models.partitioning import activations_on, logical_to_mesh_axes

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all": (2, 2, 2)}
"""Devices along data, fsdp, tensor."""


def inputs_of(config, golden: Path, batch: int):
    """Prompts of unequal lengths with one image each."""
    generator = np.random.default_rng(0)
    with np.load(golden / "arrays.npz") as arrays:
        pixels = arrays["pixel_values"]
    if pixels.ndim == 4:
        pixels, grid = flatten_patches(pixels, config.vision.patch_size), (1, 4, 4)
    else:
        grid = (1, 6, 10)
    visual = grid[1] * grid[2] // config.vision.merge_size**2
    images = np.stack([pixels[[row % len(pixels)]] * (1 + row) for row in range(batch)])
    token_ids = generator.integers(0, 500, (batch, visual + 9)).astype(np.int32)
    token_ids[:, 3 : 3 + visual] = config.image_token_id
    lengths = visual + 9 - np.arange(batch) % 4
    return token_ids, images, grid, lengths


def parameter_sharding(names, shape, *, mesh):
    return jax.sharding.NamedSharding(mesh, logical_to_mesh_axes(names, shape, mesh))


def main(golden: Path) -> None:
    lora = LoraConfig(rank=4)
    single = from_hf(golden, lora=lora)
    token_ids, images, grid, lengths = inputs_of(single.config, golden, batch=8)
    use = {"pixel_values": images, "image_grid_thw": grid, "lengths": lengths}
    expected = np.asarray(single.logits(token_ids, **use))
    valid = np.arange(token_ids.shape[1]) < lengths[:, None]
    ids = single.generate(token_ids, max_new_tokens=3, **use)
    results: dict[str, dict[str, float | bool]] = {}
    for name, sizes in MESHES.items():
        mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
        shardings = functools.partial(parameter_sharding, mesh=mesh)
        model = from_hf(golden, lora=lora, shardings=shardings)
        with activations_on(mesh):
            logits = np.asarray(model.logits(token_ids, **use))
            ours = model.generate(token_ids, max_new_tokens=3, **use) if name == "all" else None
        leaves = jax.tree.leaves(nnx.state(model))
        results[name] = {
            "error": float(np.abs(logits - expected)[valid].max() / np.abs(expected[valid]).max()),
            "share": sum(leaf.addressable_shards[0].data.size for leaf in leaves)
            / sum(leaf.size for leaf in leaves),
        }
        if ours is not None:
            results[name]["same_ids"] = np.array_equal(ours, ids)
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Run by test_square_families.py in a process of its own with eight fake devices: prints errors as JSON."""

from __future__ import annotations

import json

import jax
import numpy as np
from flax import nnx

from spacedrive_jax.models.config import ComputeConfig, LoraConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.partitioning import activations_on, axis_names, logical_to_mesh_axes
from spacedrive_jax.models.vision_language import VisionLanguageModel
from tests.models.conftest import random_module
from tests.training.family_runs import NAMES, tiny_vlm


def spread(model: VisionLanguageModel, mesh: jax.sharding.Mesh) -> VisionLanguageModel:
    """The model with its parameters where training would have them."""
    graph, state = nnx.split(model)
    placed = []
    for path, variable in nnx.to_flat_state(state):
        spec = logical_to_mesh_axes(axis_names(variable), variable.shape, mesh)
        value = jax.device_put(variable[...], jax.sharding.NamedSharding(mesh, spec))
        placed.append((path, variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(placed))


def main() -> None:
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    generator = np.random.default_rng(0)
    results = {}
    for name in NAMES:
        config = tiny_vlm(name)
        build = family_of(config).model
        model = random_module(
            lambda: build(config, compute=ComputeConfig(), rngs=nnx.Rngs(0), lora=LoraConfig(rank=4))  # noqa: B023
        )
        token_ids = generator.integers(16, 400, (8, 12)).astype(np.int32)
        token_ids[:, 3:7] = config.image_token_id
        patches = generator.standard_normal((8, 1, 16, config.vision.patch_channels)).astype(np.float32)
        given = {"pixel_values": patches, "image_grid_thw": (1, 4, 4), "lengths": 12 - np.arange(8) % 4}
        expected = np.asarray(model.logits(token_ids, **given))
        eight = spread(model, mesh)
        with activations_on(mesh):
            logits = np.asarray(eight.logits(token_ids, **given))
        valid = np.arange(12) < given["lengths"][:, None]
        leaves = jax.tree.leaves(nnx.state(eight))
        results[name] = {
            "error": float(np.abs(logits - expected)[valid].max() / np.abs(expected[valid]).max()),
            "share": sum(leaf.addressable_shards[0].data.size for leaf in leaves)
            / sum(leaf.size for leaf in leaves),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()

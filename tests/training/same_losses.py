"""Trains on meshes of this process's eight fake devices and prints each one's losses; for test_devices."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

from spacedrive_jax.config import MeshConfig
from spacedrive_jax.data.loader import training_iterator, training_samples
from spacedrive_jax.training.sharding import make_mesh, place_batch, replicated
from spacedrive_jax.training.state import init_train_state
from spacedrive_jax.training.step import make_train_step
from tests.training.runs import tiny

MESHES = (MeshConfig(1, 1, 1), MeshConfig(1, 2, 2), MeshConfig(2, 2, 2))
"""1, 4 and 8 devices; two hosts of two train in test_devices itself."""
STEPS = 8


def losses_on(config, layout: MeshConfig, steps: int) -> tuple[list[float], int]:
    devices = jax.devices()[: layout.data * layout.fsdp * layout.tensor]
    mesh = make_mesh(layout, devices)
    step = make_train_step(config, mesh)
    trainable, frozen = init_train_state(config, mesh)
    optimizer = step.initialize_optimizer(trainable)
    iterator, losses = (
        training_iterator(
            training_samples(config.data, config.model, config.train.batch_size),
            config.data,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
        ),
        [],
    )
    for number in range(steps):
        place = jax.device_put(np.int32(number), replicated(mesh))
        trainable, optimizer, metrics = step.run(
            trainable, optimizer, frozen, place_batch(next(iterator), mesh), place
        )
        losses.append(float(metrics["loss"]))
    return losses, step.run._cache_size()


if __name__ == "__main__":
    run = tiny(Path(sys.argv[1]), Path("unused"), steps=STEPS, batch_size=8, past_motion_dropout=0.5)
    # As on a pod: adapters with dropout on a frozen base, blocks worked out again for the backward pass.
    compute = dataclasses.replace(run.model.compute, remat="full")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, use_lora=True, compute=compute))
    assert run.model.lora.dropout > 0
    print(json.dumps([losses_on(run, layout, STEPS) for layout in MESHES]))

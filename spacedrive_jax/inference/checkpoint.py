"""Opens what `--checkpoint` names: a training run, or a published checkpoint that was imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from spacedrive_jax.config import Config, from_json
from spacedrive_jax.console import UserError
from spacedrive_jax.training import checkpoints
from spacedrive_jax.training.base_fingerprint import base_fingerprint
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import abstract_state, frozen_state, start_state
from spacedrive_jax.training.step import make_train_step
from spacedrive_jax.weights.trained_parts import imported_config, is_imported


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model's numbers on their devices; `nnx.merge` puts graph and states together."""

    config: Config
    """The run that made it."""
    mesh: Mesh
    graph: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State


def open_config(checkpoint: Path) -> Config:
    """The config of what `--checkpoint` names, without its numbers.

    Raises:
        UserError: there is neither a finished checkpoint nor an imported one.
    """
    if is_imported(checkpoint):
        return imported_config(checkpoint)
    run_dir, _ = checkpoints.locate(checkpoint)
    return from_json((run_dir / "config.json").read_text())


def name_checkpoint(checkpoint: Path) -> str:
    """Which numbers `--checkpoint` stands for now: RUN/checkpoints/STEP, or the imported folder.

    Raises:
        UserError: see `open_config`.
    """
    if is_imported(checkpoint):
        return str(checkpoint.resolve())
    run_dir, step = checkpoints.locate(checkpoint)
    return str(run_dir.resolve() / "checkpoints" / str(step))


def open_trained_model(checkpoint: Path, *, average: bool = False) -> TrainedModel:
    """Loads a trained model.

    Args:
        checkpoint: a run folder (its newest checkpoint), `RUN/checkpoints/STEP`, or a weights folder that
            `import-weights --from spacedrive` wrote.
        average: take the moving average of the trainables (`train.ema_decay`) instead of the last ones.

    Raises:
        UserError: it is none of these, or damaged, holds no average, or its base is no longer the one it was
            trained on.
    """
    config = open_config(checkpoint)
    mesh = make_mesh(config.mesh)
    graph, trainable, _ = abstract_state(config, mesh)
    if is_imported(checkpoint):
        if average:
            raise UserError(f"{checkpoint} was imported and holds no moving average: leave --average out")
        return TrainedModel(config, mesh, graph, *start_state(config, mesh))
    frozen = frozen_state(config, mesh)
    run_dir, step = checkpoints.locate(checkpoint)
    base = base_fingerprint(config, frozen, mesh)
    checkpoints.check_facts(checkpoints.read_facts(run_dir, step), {"base_fingerprint": base})
    if average:
        optimizer = make_train_step(config, mesh).optimizer_state
        trainable = checkpoints.restore_average(run_dir, step, optimizer)
    else:
        trainable = checkpoints.restore_trainable(run_dir, step, trainable)
    return TrainedModel(config, mesh, graph, trainable, frozen)

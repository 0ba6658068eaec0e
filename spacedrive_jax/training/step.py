"""One optimisation step as a function of arrays alone.

`train` runs it; `aot` compiles the same function for a topology without any arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.config import Config
from spacedrive_jax.data.loader import MixedSamples, Samples
from spacedrive_jax.models.partitioning import activations_on, constrain
from spacedrive_jax.training.losses import Counted, losses, without_past_motion
from spacedrive_jax.training.run_folder import save_batch_tokens
from spacedrive_jax.training.sharding import replicated
from spacedrive_jax.training.state import abstract_state, learning_rate, make_optimizer

Metrics = dict[str, jax.Array]
DROPOUT_STREAM = 0xD409
"""Folded into a step's key, which is one that a parameter was drawn with (both are the seed's, folded)."""
PAST_MOTION_STREAM = 0x9A57
"""Folded into a step's key: what is withheld does not hang on the adapters' dropout."""


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The jitted step and the abstract arrays (shape, dtype, sharding) it takes."""

    run: jax.stages.Wrapped
    """(trainable, optimizer state, frozen, batch, step) -> (trainable, optimizer state, metrics).

    The first two are donated. Metrics: loss, loss_language, loss_position (loss_path), displacement_m,
    grad_norm, learning_rate and finite (0 where loss or gradient is not: trainables and optimiser state are
    then what they were, so the schedule stands still for that step)."""
    initialize_optimizer: Callable[[nnx.State], Any]
    """Trainables -> optimizer state, on its shardings."""
    trainable: nnx.State
    optimizer_state: Any
    frozen: nnx.State


def make_train_step(config: Config, mesh: Mesh) -> TrainStep:
    """Builds the step of a config on a mesh, real or described; nothing is computed or allocated."""
    settings = config.train
    graph, trainable, frozen = abstract_state(config, mesh)
    optimizer = make_optimizer(settings, trainable)
    # Stated shardings keep the first step's inputs and outputs alike: one compilation, not two.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    abstract_optimizer = jax.eval_shape(optimizer.init, trainable)
    optimizer_shardings = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract_optimizer,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )
    uses_dropout = config.model.use_lora and config.model.lora.dropout > 0
    uses_noise = config.model.decoder.kind == "vae"
    withholds = settings.past_motion_dropout > 0

    def loss(
        trainable: nnx.State, frozen: nnx.State, batch: DrivingBatch, key: jax.Array | None, counted: Counted
    ) -> tuple[jax.Array, Metrics]:
        if withholds:
            assert key is not None
            batch = without_past_motion(
                batch, jax.random.fold_in(key, PAST_MOTION_STREAM), settings.past_motion_dropout
            )
        dropout_key = None
        if uses_dropout or uses_noise:
            assert key is not None
            dropout_key = jax.random.fold_in(key, DROPOUT_STREAM)
        model = nnx.merge(graph, trainable, frozen)
        parts = losses(model, batch, settings, dropout_key, counted=counted)
        metrics = {
            "loss": parts.total,
            "loss_language": parts.language,
            "loss_position": parts.position,
            "displacement_m": parts.displacement,
        }
        return parts.total, metrics | ({"loss_path": parts.path} if config.model.path_points else {})

    @functools.partial(
        jax.jit,
        donate_argnums=(0, 1),
        out_shardings=(shardings, optimizer_shardings, replicated(mesh)),
    )
    def train_step(
        trainable: nnx.State, optimizer_state: Any, frozen: nnx.State, batch: DrivingBatch, step: jax.Array
    ) -> tuple[nnx.State, Any, Metrics]:
        key = None
        if uses_dropout or uses_noise or withholds:
            key = jax.random.fold_in(jax.random.key(settings.seed), step)
        with activations_on(mesh):
            pieces = settings.grad_accum_steps
            counted = Counted.of(nnx.merge(graph, trainable, frozen), batch, settings, pieces)
            gradient = functools.partial(jax.grad(loss, has_aux=True), counted=counted)
            gradients, metrics = accumulate(gradient, trainable, frozen, batch, key, pieces)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        # Of the optimiser's own count, which steps that were left out are not part of.
        count = optax.tree.get(optimizer_state, "count", filtering=_of_schedule)
        metrics["learning_rate"] = jnp.asarray(learning_rate(settings)(count), jnp.float32)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        metrics["finite"] = finite.astype(jnp.float32)
        updates, stepped = optimizer.update(gradients, optimizer_state, trainable)
        new = (optax.apply_updates(trainable, updates), stepped)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, (trainable, optimizer_state))
        return (*kept, metrics)

    return TrainStep(
        run=train_step,
        initialize_optimizer=jax.jit(optimizer.init, out_shardings=optimizer_shardings),
        trainable=trainable,
        optimizer_state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract_optimizer,
            optimizer_shardings,
        ),
        frozen=frozen,
    )


def _of_schedule(path: Any, _: Any) -> bool:
    """Whether a leaf of the optimiser's state is the schedule's (Adam has a count too)."""
    return path[-1].tuple_name == optax.ScaleByScheduleState.__name__


def accumulate(
    gradient: Callable[..., tuple[Any, Metrics]],
    trainable: Any,
    frozen: Any,
    batch: Any,
    key: jax.Array | None,
    pieces: int,
) -> tuple[Any, Metrics]:
    """Gradient and metrics of a batch, worked out in equal pieces one after the other.

    The result is the mean over pieces. It equals that of one pass, but for the order of sums, where
    `gradient` divides by what the pieces hold on average (`losses.Counted`), not by what its own holds.

    Args:
        gradient: (trainable, frozen, batch, key) -> (gradient, metrics).
        trainable: what to differentiate by.
        frozen: the rest of the model.
        batch: leaves with a leading axis B that `pieces` divides.
        key: dropout key, folded with the piece's number; None for none.
        pieces: how many.
    """
    if pieces == 1:
        return gradient(trainable, frozen, batch, key)

    def split(leaf: jax.Array) -> jax.Array:
        # Neighbouring samples go to different pieces: every piece stays spread over all devices.
        cut = jnp.moveaxis(leaf.reshape(-1, pieces, *leaf.shape[1:]), 1, 0)
        return constrain(cut, None, "batch", *(None,) * (leaf.ndim - 1))

    def add(total: Any, piece: tuple[Any, jax.Array]) -> tuple[Any, None]:
        samples, number = piece
        piece_key = None if key is None else jax.random.fold_in(key, number)
        return jax.tree.map(jnp.add, total, gradient(trainable, frozen, samples, piece_key)), None

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    parts = jax.tree.map(split, batch)
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shape = jax.eval_shape(gradient, trainable, frozen, first, key)
    total, _ = jax.lax.scan(add, zeros(shape), (parts, jnp.arange(pieces)))
    return jax.tree.map(lambda leaf: leaf / pieces, total)


class NonfiniteGuard:
    """Looks at every step once the next one is under way, so that the devices never wait for the host.

    The step itself leaves the trainables alone when it is not finite, so a late look loses nothing.
    """

    def __init__(self, run_dir: Path, samples: Samples | MixedSamples, allowed: int) -> None:
        """Tolerates `allowed` such steps."""
        self._run_dir, self._samples, self._allowed = run_dir, samples, allowed
        self._pending: tuple[int, DrivingBatch, Metrics] | None = None
        self.skipped = 0

    def watch(self, step: int, host_batch: DrivingBatch, metrics: Metrics) -> None:
        """Takes note of a step that was started, and looks at the one before.

        Raises:
            FloatingPointError: more than the allowed number of steps were not finite.
        """
        self.settle()
        self._pending = (step, host_batch, metrics)

    def settle(self) -> None:
        """Looks at the step that was started last, waiting for it.

        Raises:
            FloatingPointError: as in `watch`.
        """
        if self._pending is None:
            return
        (step, batch, metrics), self._pending = self._pending, None
        if jax.device_get(metrics["finite"]):
            return
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        tokens = [self._samples.records[int(index)]["token"] for index in batch.index]
        file = save_batch_tokens(self._run_dir, step, tokens, values)
        self.skipped += 1
        if self.skipped > self._allowed:
            raise FloatingPointError(
                f"step {step} has loss {values['loss']} and gradient norm {values['grad_norm']}; its "
                f"keyframes are in {file}. Lower train.learning_rate or look at that data; --resume "
                "--skip-nonfinite N leaves up to N such steps out"
            )

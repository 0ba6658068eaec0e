"""One optimisation step as a function of arrays alone, and the batches it takes.

`train` runs the step; `aot` compiles the same function for a topology without any arrays. Its batches come
without data too: their shapes, and random ones of those shapes for tests and benchmarks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, Sharding

from spacedrive_jax.batch import DrivingBatch, TokenType
from spacedrive_jax.config import Config, change, check_config
from spacedrive_jax.constants import NUM_CAMERAS, NUM_PAST, NUM_WAYPOINTS, STATUS_SIZE
from spacedrive_jax.data.loader import MixedSamples, Samples
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.data.transforms import EGO_TOKEN_TYPES
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.partitioning import activations_on, constrain
from spacedrive_jax.models.positions import ImageSpan
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

    The first two are donated. Metrics: loss, loss_language, loss_position (loss_path, loss_divergence),
    displacement_m, grad_norm, learning_rate and finite (0 where loss or gradient is not: trainables and
    optimiser state are then what they were, so the schedule stands still for that step)."""
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
        metrics |= {"loss_path": parts.path} if config.model.path_points else {}
        return parts.total, metrics | ({"loss_divergence": parts.divergence} if uses_noise else {})

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


def batch_spec(
    config: Config, batch_size: int | None = None, *, sharding: Sharding | None = None
) -> DrivingBatch:
    """The shapes and types of a run's batches, from its config alone.

    Args:
        config: of the run.
        batch_size: B; the config's when None.
        sharding: of every leaf, such as `batch_sharding(mesh)`; None leaves it open.

    Returns:
        A batch of `jax.ShapeDtypeStruct`: what the input pipeline makes, without the numbers.

    Raises:
        ConfigError: it is no config, or no size.
    """
    check_config(config, "batch_spec")
    if batch_size is not None:
        config = change(config, config.name, {"train.batch_size": batch_size})
    batch_size = config.train.batch_size
    data, vision = config.data, config.model.vlm.vision
    images = family_of(config.model.vlm).image_processor(vision, data.image_size)
    length, targets = data.sequence_length, data.max_targets
    points = config.model.path_points

    def array(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)

    return DrivingBatch(
        token_ids=array(np.int32, length),
        lengths=array(np.int32),
        position_ids=array(np.int32, 3, length),
        rope_delta=array(np.int32),
        token_type_ids=array(np.int32, length),
        pixel_values=array(np.uint8, NUM_CAMERAS, *data.image_size, 3),
        patch_depth=array(np.float32, NUM_CAMERAS, *images.token_grid),
        intrinsics=array(np.float32, NUM_CAMERAS, 3, 3),
        camera_to_ego=array(np.float32, NUM_CAMERAS, 4, 4),
        ego_status=array(np.float32, STATUS_SIZE),
        past_positions=array(np.float32, NUM_PAST, 3),
        coordinates=array(np.float32, data.max_coordinates, 3),
        target_indices=array(np.int32, targets),
        target_ids=array(np.int32, targets),
        target_mask=array(np.bool_, targets),
        waypoint_indices=array(np.int32, NUM_WAYPOINTS),
        waypoints=array(np.float32, NUM_WAYPOINTS, 2),
        waypoint_mask=array(np.bool_, NUM_WAYPOINTS),
        index=array(np.int32),
        path_indices=array(np.int32, points) if points else None,
        path=array(np.float32, points, 2) if points else None,
        path_mask=array(np.bool_, points) if points else None,
    )


def fake_batch(config: Config, seed: int = 0) -> DrivingBatch:
    """A training batch of random tokens, pixels and numbers, on the host.

    Sequences without padding: six images, the ego tokens, a question, an answer of six waypoints. Every
    target is used, so that no work is saved by masks.

    Args:
        config: of the run.
        seed: of everything random, from 0.

    Raises:
        ConfigError: it is no config, or data.sequence_length has no room for the images and data.max_targets.
    """
    check_config(config, "fake_batch")
    vlm, family = config.model.vlm, family_of(config.model.vlm)
    tokenizer = load_tokenizer(config.data.tokenizer, family.chat)
    generator = np.random.default_rng(seed)
    batch: DrivingBatch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), batch_spec(config))
    samples, length = batch.token_ids.shape
    _, _, rows, columns = batch.patch_depth.shape
    targets, waypoints = batch.target_indices.shape[1], batch.waypoint_indices.shape[1]

    special = [tokenizer.indicator, tokenizer.position, *tokenizer.special.values(), vlm.image_token_id]
    # Words have ids above the special tokens of every small vocabulary.
    words = np.setdiff1d(np.arange(16, vlm.decoder.vocab_size), special)
    token_ids = generator.choice(words, (samples, length)).astype(np.int32)
    visual = rows * columns
    spans = [ImageSpan(8 + camera * (visual + 8), rows, columns) for camera in range(NUM_CAMERAS)]
    for span in spans:
        token_ids[:, span.start : span.stop] = vlm.image_token_id
        batch.token_type_ids[:, span.start : span.stop] = TokenType.IMAGE
        for name, place in (("vision_start", span.start - 1), ("vision_end", span.stop)):
            if name in tokenizer.special:
                token_ids[:, place] = tokenizer.special[name]
    behind = spans[-1].stop + 1
    ego = EGO_TOKEN_TYPES[config.model.ego_status]
    batch.token_type_ids[:, behind : behind + len(ego)] = ego
    answer = length - targets
    if answer < behind + len(ego):
        raise ConfigError(f"data.sequence_length {length} is too short for the images and {targets} targets")
    indicators = answer + 2 * np.arange(waypoints)
    token_ids[:, indicators] = tokenizer.indicator
    token_ids[:, indicators + 1] = tokenizer.position
    batch.token_type_ids[:, indicators + 1] = TokenType.COORDINATE

    position_ids, rope_delta = family.position_ids(length, spans)
    batch.lengths[:], batch.position_ids[:], batch.rope_delta[:] = length, position_ids, rope_delta
    batch.token_ids[:] = token_ids
    batch.pixel_values[:] = generator.integers(0, 256, batch.pixel_values.shape)
    batch.patch_depth[:] = generator.uniform(2.0, 60.0, batch.patch_depth.shape)
    batch.intrinsics[:] = [[300.0, 0.0, 200.0], [0.0, 300.0, 100.0], [0.0, 0.0, 1.0]]
    batch.camera_to_ego[:] = np.eye(4)
    batch.target_indices[:] = np.arange(answer - 1, length - 1)
    batch.target_ids[:] = token_ids[:, answer:]
    batch.target_mask[:] = True
    batch.waypoint_indices[:] = indicators
    batch.waypoints[:] = generator.normal(0.0, 5.0, batch.waypoints.shape)
    batch.waypoint_mask[:] = True
    return batch

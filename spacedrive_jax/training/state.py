"""The model as data: which variables train, where they live, how they start, and who moves them.

The optimizer is AdamW as in the published run: groups with their own rates, warm-up into a cosine, one
global clip.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from spacedrive_jax.config import Config, TrainConfig
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.interop.hf_checkpoint import from_hf
from spacedrive_jax.interop.weights_folder import check_trained_parts, fill_trained_parts
from spacedrive_jax.io import place
from spacedrive_jax.models.attention import choose_kernel, target_platform
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.language_model import NewTokenParam
from spacedrive_jax.models.partitioning import axis_names, draw_parameters
from spacedrive_jax.models.spacedrive import SpaceDrive, new_token_rows
from spacedrive_jax.training import checkpoints
from spacedrive_jax.training.losses import check_choices
from spacedrive_jax.training.sharding import parameter_sharding
from spacedrive_jax.training.trained_folder import is_trained_folder, read_trained, trained_metadata
from spacedrive_jax.training.weights import (
    check_architecture,
    is_run,
    on_disk,
    resumable,
    run_config,
    starting_state,
)

NOT_DECAYED = ("bias", "scale", "alpha")
"""Names of vectors and scalars, which have no weight decay. (Stacked over layers they look like matrices.)"""

MOST_OCTAVES = 60.0
"""Of the `nerf` encoding; float32 holds about twice as many."""


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Base rate per step: cosine over the whole run, times a linear warm-up at its start.

    The warm-up multiplies the cosine rather than preceding it, as in the published trainer.
    """

    def schedule(step: Any) -> Any:
        progress = jnp.clip(step / config.steps, 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        decayed = config.final_fraction + (1.0 - config.final_fraction) * cosine
        warm = jnp.clip(step / config.warmup_steps, 0.0, 1.0) if config.warmup_steps else 1.0
        return config.learning_rate * decayed * (config.warmup_start + (1.0 - config.warmup_start) * warm)

    return schedule


def make_optimizer(config: TrainConfig, trainable: Any) -> optax.GradientTransformation:
    """The optimiser for a tree of trainables.

    Args:
        config: rates and decay.
        trainable: the tree (values are not read); its paths decide groups and decay.
    """

    def group(path: Any, _: Any) -> str:
        return "vlm" if _names(path)[0] == "vlm" else "heads"

    def decays(path: Any, _: Any) -> bool:
        return _names(path)[-1] not in NOT_DECAYED

    groups = jax.tree_util.tree_map_with_path(group, trainable)
    decayed = jax.tree_util.tree_map_with_path(decays, trainable)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.partition(
            {"vlm": optax.scale(config.vlm_lr_mult), "heads": optax.scale(config.head_lr_mult)}, groups
        ),
        optax.scale_by_learning_rate(learning_rate(config)),
        optax.identity() if config.ema_decay is None else moving_average(config.ema_decay),
    )


class MovingAverageState(NamedTuple):
    """The average of the trainables: their tree, types and shardings."""

    average: Any


def moving_average(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the updated trainables; passes updates on unchanged.

    It stands last in the chain, where updates are what will be added. It starts at the first trainables.

    Args:
        decay: share of the old average in the new one.
    """

    def start(trainable: Any) -> MovingAverageState:
        return MovingAverageState(jax.tree.map(jnp.array, trainable))

    def update(updates: Any, state: MovingAverageState, trainable: Any) -> tuple[Any, MovingAverageState]:
        updated = optax.apply_updates(trainable, updates)
        return updates, MovingAverageState(optax.incremental_update(updated, state.average, 1.0 - decay))

    return optax.GradientTransformation(start, update)


def _names(path: Any) -> list[str]:
    """The plain names along a key path, without the wrappers of variables."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return [name for name in names if name not in ("value", "raw_value")]


def is_trainable(use_lora: bool) -> nnx.filterlib.Filter:
    """An nnx filter: adapters, new-token rows and everything outside the VLM, or, without LoRA, all."""
    if not use_lora:
        return nnx.Param
    return nnx.All(nnx.Param, nnx.Any(nnx.LoRAParam, NewTokenParam, lambda path, _: path[0] != "vlm"))


def make_model(config: Config, rngs: nnx.Rngs) -> SpaceDrive:
    """A freshly drawn model."""
    indicator = load_tokenizer(config.data.tokenizer, family_of(config.model.vlm).chat).indicator
    return SpaceDrive(config.model, indicator_id=indicator, rngs=rngs)


def abstract_state(config: Config, mesh: Mesh | AbstractMesh) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model without its numbers: shapes, dtypes and shardings.

    Args:
        config: the run.
        mesh: where it would lie; its axes are enough.

    Returns:
        graph definition, trainable state, frozen state; `nnx.merge` puts such three together.
    """
    abstract = nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0)))
    graph, trainable, frozen = nnx.split(abstract, is_trainable(config.model.use_lora), ...)
    return graph, _placed(trainable, mesh), _placed(frozen, mesh)


def check_start(config: Config) -> None:
    """Refuses what a run of this config could not start from or would not learn with; reads no tensors.

    Raises:
        ConfigError: naming the fields; no weights are named where a base is to stay frozen, a base is to
            train that is stored in half precision, gradients would be float16, an encoding has frequencies
            that are no numbers, losses and coordinate decoder do not fit each other, or this machine lacks
            the kernel of attention that is named.
        CheckpointError: the weights are those of a run, and what it says of them is damaged.
    """
    model = config.model
    check_choices(model, config.train)
    choose_kernel(
        model.compute.attention,
        target_platform(),
        model.compute.activation_dtype,
        config.data.sequence_length,
        model.vlm.decoder.head_dim,
        masked=False,
    )
    if model.compute.dtype == "float16":
        raise ConfigError(
            "model.compute.dtype float16 is for inference: gradients of activations underflow in it without "
            "loss scaling, which is not done here. Train with --model.compute.dtype bfloat16 (or float32); a "
            "frozen base may be stored as model.compute.param_dtype float16"
        )
    if model.encoder.kind == "nerf" and model.encoder.base > MOST_OCTAVES:
        raise ConfigError(
            f"model.encoder.base {model.encoder.base:g} is in octaves for model.encoder.kind nerf, more than "
            "float32 holds: give --model.encoder.base 10, which its paper has"
        )
    if not model.use_lora and model.compute.storage_dtype.itemsize < 4:
        raise ConfigError(
            f"model.use_lora False trains the base itself, and a step of it is less than "
            f"{model.compute.param_dtype} tells apart, nor could Adam's averages grow: set "
            "model.compute.param_dtype float32 (model.compute.dtype may stay as it is)"
        )
    if model.weights is None:
        if model.use_lora and not model.random_base:
            raise ConfigError(
                f"{config.name} trains adapters on a frozen base, but names no weights: give --model.weights "
                "DIR (a transformers checkpoint, a folder of import-weights, or a run), or say "
                "--model.random-base where a base of random numbers is meant"
            )
        return
    check_architecture(config)
    tokenizer = load_tokenizer(config.data.tokenizer, family_of(model.vlm).chat)
    if is_trained_folder(model.weights):
        trained_metadata(on_disk(model.weights))
    elif is_run(model.weights):
        checkpoints.read_metadata(*checkpoints.locate(place(model.weights)))
    else:
        check_trained_parts(on_disk(model.weights), model, tokenizer.indicator)


def init_train_state(config: Config, mesh: Mesh) -> tuple[nnx.State, nnx.State]:
    """Trainable and frozen numbers at step 0, each straight into its shards.

    The base comes from `config.model.weights` where that is set, with the adapters and heads of an imported
    adapter or SpaceDrive checkpoint; everything else is drawn from the seed.
    """
    weights = config.model.weights
    everything = _draw(config, mesh, ...) if weights is None else _load(config, mesh, weights)
    trainable, frozen = nnx.split_state(everything, is_trainable(config.model.use_lora), ...)
    return trainable, frozen


def frozen_state(config: Config, mesh: Mesh) -> nnx.State:
    """The frozen base alone: what a checkpoint's trainables are merged with."""
    if not config.model.use_lora:
        return nnx.State({})
    if config.model.weights is not None:
        return init_train_state(resumable(config), mesh)[1]
    return _draw(config, mesh, nnx.Not(is_trainable(use_lora=True)))


def _draw(config: Config, mesh: Mesh, wanted: Any) -> nnx.State:
    return draw_parameters(
        functools.partial(make_model, config),
        seed=config.train.seed,
        wanted=wanted,
        shardings=functools.partial(parameter_sharding, mesh=mesh),
    )


def _load(config: Config, mesh: Mesh, weights: str) -> nnx.State:
    """The base from released safetensors, adapters and heads where the folder has them, the rest drawn."""
    model = config.model
    check_architecture(config)
    indicator = load_tokenizer(config.data.tokenizer, family_of(model.vlm).chat).indicator
    if is_run(weights):
        return _load_run(config, mesh, weights, indicator)
    shardings = functools.partial(parameter_sharding, mesh=mesh)
    vlm = from_hf(
        on_disk(weights),
        compute=model.compute,
        lora=model.lora if model.use_lora else None,
        new_tokens=new_token_rows(model, indicator),
        shardings=shardings,
        seed=config.train.seed,
    )
    outside = _draw(config, mesh, lambda path, _: path[0] != "vlm")
    inside = [(("vlm", *path), variable) for path, variable in nnx.to_flat_state(nnx.state(vlm))]
    state = dict([*nnx.to_flat_state(outside), *inside])
    fill_trained_parts(state, on_disk(weights), model, indicator, shardings)
    return nnx.from_flat_state(state)


def _load_run(config: Config, mesh: Mesh, weights: str, indicator: int) -> nnx.State:
    """What another run has learnt and stood on; what it lacks (fresh adapters, say) is drawn."""
    before = run_config(weights)
    _, trainable, _ = abstract_state(before, mesh)
    if is_trained_folder(weights):
        trainable = read_trained(on_disk(weights), trainable)
    else:
        run_dir, step = checkpoints.locate(place(weights))
        trainable = checkpoints.restore_trainable(run_dir, step, trainable)
    saved = dict(nnx.to_flat_state(trainable)) | dict(nnx.to_flat_state(frozen_state(before, mesh)))
    drawn = dict(nnx.to_flat_state(_draw(config, mesh, lambda path, _: tuple(path) not in saved)))
    return nnx.from_flat_state(starting_state(config, saved, drawn, indicator))


def _placed(state: nnx.State, mesh: Mesh | AbstractMesh) -> nnx.State:
    placed = [
        (
            path,
            variable.replace(
                jax.ShapeDtypeStruct(
                    variable.shape,
                    variable.dtype,
                    sharding=parameter_sharding(axis_names(variable), variable.shape, mesh),
                )
            ),
        )
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(placed)


def count(state: nnx.State) -> int:
    """How many numbers a state holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))

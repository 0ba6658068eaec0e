"""The model as data: which variables train, where they live, and how they start."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from spacedrive_jax.config import Config
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.interop.hf_checkpoint import from_hf
from spacedrive_jax.interop.trained_parts import check_trained_parts, fill_trained_parts
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.language_model import NewTokenParam
from spacedrive_jax.models.partitioning import axis_names, draw_parameters
from spacedrive_jax.models.spacedrive import SpaceDrive, new_token_rows
from spacedrive_jax.training.sharding import parameter_sharding


def is_trainable(use_lora: bool) -> Any:
    """An nnx filter: adapters, new-token rows and everything outside the VLM, or, without LoRA, all."""

    def chosen(path: tuple[Any, ...], variable: Any) -> bool:
        if not issubclass(variable.type if hasattr(variable, "type") else type(variable), nnx.Param):
            return False
        kind = variable.type if hasattr(variable, "type") else type(variable)
        return not use_lora or path[0] != "vlm" or issubclass(kind, (nnx.LoRAParam, NewTokenParam))

    return chosen


def make_model(config: Config, rngs: nnx.Rngs) -> SpaceDrive:
    """A freshly drawn model."""
    indicator = load_tokenizer(config.data.tokenizer, family_of(config.model.vlm).chat).indicator
    return SpaceDrive(config.model, indicator_id=indicator, rngs=rngs)


def abstract_state(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model without its numbers: shapes, dtypes and shardings.

    Returns:
        graph definition, trainable state, frozen state; `nnx.merge` puts such three together.
    """
    abstract = nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0)))
    graph, trainable, frozen = nnx.split(abstract, is_trainable(config.model.use_lora), ...)
    return graph, _placed(trainable, mesh), _placed(frozen, mesh)


def check_start(config: Config) -> None:
    """Refuses weights that a run of this config could not start from; reads no tensors.

    Raises:
        ConfigError: naming the fields.
    """
    if config.model.weights is not None:
        tokenizer = load_tokenizer(config.data.tokenizer, family_of(config.model.vlm).chat)
        check_trained_parts(Path(config.model.weights), config.model, tokenizer.indicator)


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
        return init_train_state(config, mesh)[1]
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
    indicator = load_tokenizer(config.data.tokenizer, family_of(model.vlm).chat).indicator
    shardings = functools.partial(parameter_sharding, mesh=mesh)
    vlm = from_hf(
        weights,
        compute=model.compute,
        lora=model.lora if model.use_lora else None,
        new_tokens=new_token_rows(model, indicator),
        shardings=shardings,
        seed=config.train.seed,
    )
    if vlm.config != model.vlm:
        raise ConfigError(
            f"model.weights {weights} holds {vlm.config}, but model.vlm says {model.vlm}: choose the "
            "preset of that size"
        )
    outside = _draw(config, mesh, lambda path, _: path[0] != "vlm")
    inside = [(("vlm", *path), variable) for path, variable in nnx.to_flat_state(nnx.state(vlm))]
    state = dict([*nnx.to_flat_state(outside), *inside])
    fill_trained_parts(state, Path(weights), model, indicator, shardings)
    return nnx.from_flat_state(state)


def _placed(state: nnx.State, mesh: Mesh) -> nnx.State:
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

"""The model as data: which variables train, where they live, and how they start."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from spacedrive_jax.config import Config
from spacedrive_jax.console import UserError
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.model import SpaceDrive
from spacedrive_jax.training.sharding import state_shardings
from spacedrive_jax.vlm.decoder import NewTokenParam


def is_trainable(use_lora: bool) -> Any:
    """An nnx filter: adapters, new-token rows and everything outside the VLM, or, without LoRA, all."""

    def chosen(path: tuple[Any, ...], variable: Any) -> bool:
        if not issubclass(variable.type if hasattr(variable, "type") else type(variable), nnx.Param):
            return False
        kind = variable.type if hasattr(variable, "type") else type(variable)
        return not use_lora or path[0] != "vlm" or issubclass(kind, (nnx.LoRAParam, NewTokenParam))

    return chosen


def make_model(config: Config) -> SpaceDrive:
    """A freshly drawn model; a pure function of the config (its seed included)."""
    indicator = load_tokenizer(config.data.tokenizer).indicator
    return SpaceDrive(config.model, indicator_id=indicator, rngs=nnx.Rngs(params=config.train.seed))


def abstract_state(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model without its numbers: shapes, dtypes and shardings.

    Returns:
        graph definition, trainable state, frozen state; `nnx.merge` puts such three together.
    """
    abstract = nnx.eval_shape(lambda: make_model(config))
    graph, trainable, frozen = nnx.split(abstract, is_trainable(config.model.use_lora), ...)
    return graph, _placed(trainable, mesh), _placed(frozen, mesh)


def draw_frozen(config: Config, frozen: nnx.State) -> nnx.State:
    """The frozen base straight into its shards; nothing is computed when nothing is frozen."""
    return _draw(config, 1, frozen) if jax.tree.leaves(frozen) else frozen


def draw_trainable(config: Config, trainable: nnx.State) -> nnx.State:
    """Freshly drawn trainables straight into their shards."""
    return _draw(config, 0, trainable)


def _draw(config: Config, part: int, abstract: nnx.State) -> nnx.State:
    if config.model.weights is not None:
        raise UserError(
            "model.weights: starting SpaceDrive from released safetensors is not wired up yet "
            "(see `spacedrive_jax.vlm.from_hf` for the base model alone); leave it unset to start from random"
        )

    def draw() -> nnx.State:
        _, *states = nnx.split(make_model(config), is_trainable(config.model.use_lora), ...)
        return states[part]

    return jax.jit(draw, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def _placed(state: nnx.State, mesh: Mesh) -> nnx.State:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(state, mesh),
    )


def count(state: nnx.State) -> int:
    """How many numbers a state holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))

"""Modules around recorded parameters, and what they compute on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from spacedrive_jax.interop.hf_checkpoint import TensorSource, fill
from spacedrive_jax.interop.weight_table import Rule
from spacedrive_jax.models.language_model import LanguageModel

Module = TypeVar("Module", bound=nnx.Module)


def read_module(build: Callable[[], Module], rules: Iterable[Rule], source: TensorSource) -> Module:
    """Builds a module around recorded parameters; nothing is drawn at random, which costs more than reading.

    Args:
        build: makes the module.
        rules: where each of its parameters stands in `source`.
        source: the recorded tensors.

    Raises:
        DataError: the module lacks a parameter that a rule names.
    """
    graph, abstract = nnx.split(nnx.eval_shape(build))
    state = dict(nnx.to_flat_state(abstract))
    fill(state, rules, source)
    return nnx.merge(graph, nnx.from_flat_state(state))


def hidden_states(
    decoder: LanguageModel,
    embeddings: Float[Array, "B S D"],
    position_ids: Int[Array, "3 B S"],
    *,
    lengths: Int[Array, " B"] | None = None,
    deepstack: Float[Array, "depths B S D"] | None = None,
) -> Float[Array, "states B S D"]:
    """The input and each block's output, before deepstack is added, the last one final-normed
    (transformers' `hidden_states`).
    """
    hidden, _, layers = decoder._run(
        embeddings, position_ids, lengths, None, None, deepstack, keep=lambda hidden, memory: hidden
    )
    first = embeddings.astype(hidden.dtype)[None]
    return jnp.concatenate([first, layers[:-1], decoder.final_norm(hidden)[None]])

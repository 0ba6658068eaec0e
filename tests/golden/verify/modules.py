"""Modules around recorded parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from flax import nnx

from spacedrive_jax.interop.hf_checkpoint import TensorSource, fill
from spacedrive_jax.interop.weight_table import Rule

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

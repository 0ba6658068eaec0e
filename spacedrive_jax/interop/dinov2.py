"""Tables between released PyTorch depth checkpoints and the parameters here, shared by both networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from spacedrive_jax.interop.hf_checkpoint import TensorSource, fill
from spacedrive_jax.interop.weight_table import ParameterPath, Rule, Shape
from spacedrive_jax.models.depth.dinov2 import Dinov2Config

Module = TypeVar("Module", bound=nnx.Module)

LINEAR = (1, 0)
"""PyTorch's (out, in) to (in, out)."""
CONVOLUTION = (2, 3, 1, 0)
"""(out, in, height, width) to (height, width, in, out)."""
TRANSPOSED_CONVOLUTION = (0, 2, 3, 1)
"""(in, out, height, width) to (in, height, width, out)."""


@dataclasses.dataclass(frozen=True)
class TransposedRule(Rule):
    """A rule whose tensor has its axes permuted, then reshaped."""

    axes: tuple[int, ...] = ()
    """Order of the source's axes in the parameter."""

    def load(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """Source layout to the parameter's `shape`; a view where possible."""
        return tensor.transpose(self.axes).reshape(shape)

    def export(self, parameter: np.ndarray) -> np.ndarray:
        """Inverse of `load`."""
        permuted = parameter.reshape([self.source_shape[axis] for axis in self.axes])
        return np.ascontiguousarray(permuted.transpose(np.argsort(self.axes)))


@dataclasses.dataclass(frozen=True)
class Table:
    """Writes rules of layers that lie under one name here and one there."""

    source: str
    """Prefix in the checkpoint, with its dot; `{layer}` in it where layers are stacked."""
    target: ParameterPath
    layers: int | None = None

    def under(self, source: str, *target: str | int, layers: int | None = None) -> Table:
        """A part of this one."""
        return Table(f"{self.source}{source}.", (*self.target, *target), layers or self.layers)

    def tensor(self, source: str, target: str, shape: Shape, axes: tuple[int, ...] | None = None) -> Rule:
        """One tensor, reshaped, or with its axes permuted first."""
        path = (*self.target, *target.split("."))
        if axes is None:
            return Rule(self.source + source, path, shape, layers=self.layers)
        return TransposedRule(self.source + source, path, shape, layers=self.layers, axes=axes)

    def kernel(
        self, source: str, target: str, shape: Shape, axes: tuple[int, ...] = LINEAR, *, bias: bool = True
    ) -> tuple[Rule, ...]:
        """Weight and bias of a linear layer or a convolution."""
        weight = self.tensor(f"{source}.weight", f"{target}.kernel", shape, axes)
        size = shape[axes[-1]]
        return (weight, self.tensor(f"{source}.bias", f"{target}.bias", (size,))) if bias else (weight,)

    def transposed(self, shape: Shape) -> tuple[Rule, Rule]:
        """A transposed convolution that lies right under this name: weight (in, out, k, k) and bias."""
        kernel = self.tensor("weight", "kernel", shape, TRANSPOSED_CONVOLUTION)
        return kernel, self.tensor("bias", "bias", (shape[1],))

    def norm(self, source: str, target: str, width: int) -> tuple[Rule, Rule]:
        """Gain and bias of a layer norm."""
        return (
            self.tensor(f"{source}.weight", f"{target}.scale", (width,)),
            self.tensor(f"{source}.bias", f"{target}.bias", (width,)),
        )


@dataclasses.dataclass(frozen=True)
class PositionRule(Rule):
    """One part of the checkpoint's position table, which holds the class token's entry and the grid's.

    Reading takes the part out; `export_module` puts both together again.
    """

    class_entry: bool = False
    """Take the class token's entry; else the grid's."""

    def load(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """The entries of this part."""
        return tensor[0, slice(0, 1) if self.class_entry else slice(1, None)].reshape(shape)


def position_rules(source: str, encoder: ParameterPath, config: Dinov2Config) -> tuple[Rule, Rule]:
    """The class token's position and the patches'."""
    rows, columns = config.position_grid
    shape = (1, 1 + rows * columns, config.width)
    return (
        PositionRule(source, (*encoder, "class_position"), shape, class_entry=True),
        PositionRule(source, (*encoder, "positions"), shape),
    )


def patch_embedding_rule(source: str, encoder: ParameterPath, config: Dinov2Config) -> tuple[Rule, Rule]:
    """The patch convolution, here a product with (height, width, channel) patches."""
    shape = (config.width, 3, config.patch_size, config.patch_size)
    return Table("", encoder).kernel(source, "patch_embedding", shape, CONVOLUTION)  # type: ignore[return-value]


def load_module(build: Callable[[nnx.Rngs], Module], rules: Iterable[Rule], source: TensorSource) -> Module:
    """Builds a module with the values of a checkpoint; random ones are never drawn.

    Args:
        build: Constructor from random streams.
        rules: The table; it must cover every parameter.
        source: Where the tensors are read.
    """
    graph, abstract = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    state = dict(nnx.to_flat_state(abstract))
    rules = tuple(rules)
    uncovered = state.keys() - {rule.target for rule in rules}
    if uncovered:
        raise ValueError(f"the table says nothing of {sorted(map(str, uncovered))}")
    fill(state, rules, source)
    return nnx.merge(graph, nnx.from_flat_state(state))


def export_module(module: nnx.Module, rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """Reads a table backwards: the checkpoint's tensors by name."""
    state = dict(nnx.to_flat_state(nnx.state(module)))
    tensors: dict[str, np.ndarray] = {}
    parts: dict[str, list[np.ndarray]] = {}
    for rule in rules:
        value = np.asarray(jax.device_get(state[rule.target][...]))
        if isinstance(rule, PositionRule):
            parts.setdefault(rule.source, []).append(value.reshape(1, -1, value.shape[-1]))
            continue
        for layer, name in enumerate(rule.source_names()):
            tensors[name] = rule.export(value if rule.layers is None else value[layer])
    return tensors | {name: np.concatenate(pieces, axis=1) for name, pieces in parts.items()}

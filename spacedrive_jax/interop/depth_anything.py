"""Depth Anything V2 metric checkpoints in transformers' format, and the tables of DINOv2 and of convolutions,
which UniDepthV2's checkpoints share.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from spacedrive_jax.errors import CheckpointError, SpaceDriveError
from spacedrive_jax.interop.hf_checkpoint import TensorSource, fill
from spacedrive_jax.interop.torch_file import TensorFile, open_tensors
from spacedrive_jax.interop.weight_table import ParameterPath, Rule, Shape, check_names_and_shapes
from spacedrive_jax.io import MEBIBYTE
from spacedrive_jax.json_files import read_json
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.depth.backbone import Dinov2Config
from spacedrive_jax.models.depth.depth_anything import NUM_LEVELS, DepthAnything, DepthAnythingConfig

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
        build: constructor from random streams.
        rules: the table; it must cover every parameter.
        source: where the tensors are read.
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


MODEL_TYPE = "depth_anything"
UNUSED_PREFIX = "neck.fusion_stage.layers.0.residual_layer1."
"""The deepest level has no skip to add; its unit is in the files all the same."""


def load_depth_anything(
    path: str | Path, *, image_sized_output: bool = True, compute: ComputeConfig | None = None
) -> DepthAnything:
    """Builds Depth Anything V2 with the weights of a checkpoint folder.

    Args:
        path: folder with config.json and safetensors files.
        image_sized_output: see `DepthAnythingConfig`.
        compute: dtypes, rematerialisation, attention kernel.

    Raises:
        CheckpointError: files are missing, the checkpoint predicts relative depth, or tensors are missing,
            unknown or misshapen (all named).
    """
    config = read_config(Path(path), image_sized_output=image_sized_output)
    tensors = _FusedAttention(open_tensors(path))
    rules = depth_anything_rules(config)
    shapes = tensors.shapes()
    ignored = [name for name in shapes if name.startswith(UNUSED_PREFIX)]
    check_names_and_shapes(
        rules, shapes, origin=str(path), ignore=[*ignored, "backbone.embeddings.mask_token"]
    )
    return load_module(lambda rngs: DepthAnything(config, compute=compute, rngs=rngs), rules, tensors)


def read_config(folder: Path, *, image_sized_output: bool = True) -> DepthAnythingConfig:
    """Reads transformers' config.json (and preprocessor_config.json for the input size).

    Raises:
        CheckpointError: it is missing or describes something else.
    """
    file = folder / "config.json"
    try:
        settings = read_json(file, most=16 * MEBIBYTE)
        backbone = settings["backbone_config"]
        kind = settings.get("depth_estimation_type", "relative")
        if settings.get("model_type") != MODEL_TYPE or kind != "metric":
            raise CheckpointError(
                f"{file}: model_type {settings.get('model_type')!r} of {kind} depth; this reads metric "
                f"{MODEL_TYPE} checkpoints (Depth-Anything-V2-Metric-Outdoor-*-hf)"
            )
        fixed = {
            "reassemble_factors": [4, 2, 1, 0.5],
            "head_in_index": -1,
            "patch_size": 14,
        }
        for name, value in fixed.items():
            if name in settings and settings[name] != value:
                raise CheckpointError(f"{file}: {name} {settings[name]} is not supported, only {value}")
        encoder = Dinov2Config(
            width=backbone["hidden_size"],
            depth=backbone.get("num_hidden_layers", 12),
            heads=backbone["num_attention_heads"],
            taps=tuple(backbone["out_indices"]),
            patch_size=backbone.get("patch_size", 14),
            position_grid=(backbone["image_size"] // backbone.get("patch_size", 14),) * 2,
            mlp_ratio=backbone.get("mlp_ratio", 4),
            block_norm_eps=backbone.get("layer_norm_eps", 1e-6),
            final_norm_eps=backbone.get("layer_norm_eps", 1e-6),
        )
        return DepthAnythingConfig(
            encoder=encoder,
            neck_widths=tuple(settings["neck_hidden_sizes"]),
            fusion_width=settings["fusion_hidden_size"],
            head_hidden=settings["head_hidden_size"],
            max_depth=float(settings["max_depth"]),
            input_side=_input_side(folder, default=backbone["image_size"]),
            image_sized_output=image_sized_output,
        )
    except SpaceDriveError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} does not describe a Depth Anything model: {error!r}") from error


def depth_anything_rules(config: DepthAnythingConfig) -> tuple[Rule, ...]:
    """The table of a checkpoint whose queries, keys and values were put together (`qkv`)."""
    width = config.fusion_width
    neck = Table("neck.", ())
    rules: list[Rule] = [*_encoder_rules(config.encoder)]
    for level, size in enumerate(config.neck_widths):
        reassemble = neck.under(f"reassemble_stage.layers.{level}", "reassemble", level)
        rules += reassemble.kernel("projection", "project", (size, config.encoder.width, 1, 1), CONVOLUTION)
        if level < 2:
            factor = 4 >> level
            rules += reassemble.under("resize", "resize").transposed((size, size, factor, factor))
        elif level == NUM_LEVELS - 1:
            rules += reassemble.kernel("resize", "resize", (size, size, 3, 3), CONVOLUTION)
        narrow = neck.under(f"convs.{level}", "narrow", level)
        rules.append(narrow.tensor("weight", "kernel", (width, size, 3, 3), CONVOLUTION))
        fusion = neck.under(f"fusion_stage.layers.{level}", "fusion", level)
        for number, unit in ((1, "skip"), (2, "unit")):
            if level > 0 or unit == "unit":
                inner = fusion.under(f"residual_layer{number}", unit)
                rules += inner.kernel("convolution1", "first", (width, width, 3, 3), CONVOLUTION)
                rules += inner.kernel("convolution2", "second", (width, width, 3, 3), CONVOLUTION)
        rules += fusion.kernel("projection", "project", (width, width, 1, 1), CONVOLUTION)
    head = Table("head.", ())
    rules += head.kernel("conv1", "head_low", (width // 2, width, 3, 3), CONVOLUTION)
    rules += head.kernel("conv2", "head_high", (config.head_hidden, width // 2, 3, 3), CONVOLUTION)
    rules += head.kernel("conv3", "head_out", (1, config.head_hidden, 1, 1), CONVOLUTION)
    return tuple(rules)


def _encoder_rules(config: Dinov2Config) -> tuple[Rule, ...]:
    width, inner = config.width, config.mlp_ratio * config.width
    whole = Table("backbone.", ("encoder",))
    block = whole.under("encoder.layer.{layer}", "blocks", layers=config.depth)
    embeddings = "backbone.embeddings"
    return (
        whole.tensor("embeddings.cls_token", "class_token", (1, 1, width)),
        *position_rules(f"{embeddings}.position_embeddings", ("encoder",), config),
        *patch_embedding_rule(f"{embeddings}.patch_embeddings.projection", ("encoder",), config),
        *whole.norm("layernorm", "final_norm", width),
        *block.norm("norm1", "attention_norm", width),
        *block.kernel("attention.attention.qkv", "qkv", (3 * width, width)),
        *block.kernel("attention.output.dense", "attention_out", (width, width)),
        block.tensor("layer_scale1.lambda1", "attention_scale", (width,)),
        *block.norm("norm2", "mlp_norm", width),
        *block.kernel("mlp.fc1", "mlp_in", (inner, width)),
        *block.kernel("mlp.fc2", "mlp_out", (width, inner)),
        block.tensor("layer_scale2.lambda1", "mlp_scale", (width,)),
    )


class _FusedAttention:
    """Shows the query, key and value tensors of a checkpoint as one, output channels in that order."""

    _PARTS = ("query", "key", "value")
    _NAME = re.compile(r"(attention\.attention\.)(query|key|value)\.")

    def __init__(self, source: TensorFile) -> None:
        self._source = source

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape; a fused tensor that lacks a part is left in its parts, as unknown names."""
        found = self._source.shapes()
        fused: dict[str, tuple[int, ...]] = {}
        for name, shape in found.items():
            parts = [self._NAME.sub(rf"\g<1>{part}.", name) for part in self._PARTS]
            whole = self._NAME.search(name) and all(found.get(part) == shape for part in parts)
            if whole:
                fused[self._NAME.sub(r"\g<1>qkv.", name)] = (3 * shape[0], *shape[1:])
            else:
                fused[name] = shape
        return fused

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        if ".qkv." not in name:
            return self._source.read(name)
        return np.concatenate([self._source.read(name.replace(".qkv.", f".{part}.")) for part in self._PARTS])


def _input_side(folder: Path, default: int) -> int:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return default
    size: Any = read_json(file, most=MEBIBYTE).get("size", {})
    if size.get("height") != size.get("width"):
        raise CheckpointError(f"{file}: size {size} is not square")
    return int(size.get("height", default))

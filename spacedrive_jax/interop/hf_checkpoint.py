"""Hugging Face weights in and out: `from_hf`, `to_hf`, adapters folded into the base for others to read.

Loading never builds a random base model first: the parameters are abstract until their values are read, one
stacked parameter at a time, straight into their sharding. On many hosts each reads what its devices hold.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spacedrive_jax import exact
from spacedrive_jax.console import progress
from spacedrive_jax.errors import CheckpointError
from spacedrive_jax.interop.hf_config import (
    format_of,
    read_hf_config,
    read_processor_settings,
    read_special_ids,
    write_hf_config,
)
from spacedrive_jax.interop.safetensors_folder import (
    Complete,
    PlannedTensor,
    SafetensorsFolder,
    check_folder,
    plan_shards,
    write_folder,
)
from spacedrive_jax.interop.weight_table import ParameterPath, Rule, check_names_and_shapes
from spacedrive_jax.models.config import ComputeConfig, LoraConfig, NewTokensConfig, VLConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.language_model import NewTokenParam
from spacedrive_jax.models.partitioning import ShardingOf, axis_names, draw_parameters, to_host
from spacedrive_jax.models.quantization import dequantize, kernel_shape, kind_of, quantize, scales
from spacedrive_jax.models.vision_language import VisionLanguageModel

log = logging.getLogger(__name__)

# Folds adapters and new-token rows into base weights, so that others can read a trained model.


HEAD_PATH: ParameterPath = ("decoder", "head")
EMBEDDING: ParameterPath = ("decoder", "embedding")


class MergedParameters(Mapping[ParameterPath, np.ndarray]):
    """Base parameters with what was trained beside them folded in, worked out one at a time when read.

    A projection becomes kernel + scaling * A B (Hu et al. 2021), rounded once, to the kernel's type, and the
    same bits on every processor; the tables' rows of new tokens become the trained ones. A tied head whose
    new rows differ from the embedding's is untied: see `config`.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        """Wraps a model; nothing is computed yet."""
        self._state = dict(nnx.to_flat_state(nnx.state(model)))
        self._lora, self._new_tokens = model.decoder.lora, model.decoder.new_tokens
        self._dtype = model.decoder.compute.storage_dtype
        tied = model.config.decoder.tie_word_embeddings
        self._untied = tied and self._new_tokens is not None
        self._paths = [path for path in self._state if self._is_base(path)] + [HEAD_PATH] * self._untied
        decoder = dataclasses.replace(model.config.decoder, tie_word_embeddings=tied and not self._untied)
        self.config: VLConfig = dataclasses.replace(model.config, decoder=decoder)
        """Architecture of the merged model."""

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[ParameterPath]:
        return iter(self._paths)

    def __getitem__(self, path: ParameterPath) -> np.ndarray:
        """The merged parameter, on the host, in the base's type.

        Raises:
            KeyError: there is no such base parameter.
        """
        if path not in self._paths:
            raise KeyError(path)
        value = base_value(
            self._state, EMBEDDING if self._untied and path == HEAD_PATH else path, self._dtype
        )
        if self._new_tokens is not None and path in (EMBEDDING, HEAD_PATH):
            rows = self._host(("decoder", "new_embedding" if path == EMBEDDING else "new_head"))
            value = value.copy()
            value[self._new_tokens.first_id :][: len(rows)] = rows.astype(value.dtype)
        adapter = (*path[:-1], "adapter")
        if path[-1] == "kernel" and (*adapter, "a") in self._state:
            value = self._with_adapter(value, self._host((*adapter, "a")), self._host((*adapter, "b")))
        return value

    def dtype(self, path: ParameterPath) -> Any:
        """Type of a merged parameter, without computing it."""
        stored = self._state[EMBEDDING if self._untied and path == HEAD_PATH else path]
        return self._dtype if scale_path(path) in self._state else stored.dtype

    def _with_adapter(self, kernel: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        assert self._lora is not None
        rank = self._lora.rank
        merged = np.empty_like(kernel)
        for layer in range(len(kernel)):
            product = exact.product(a[layer].reshape(-1, rank), b[layer].reshape(rank, -1))
            update = product.reshape(kernel.shape[1:]) * self._lora.scaling
            merged[layer] = kernel[layer].astype(np.float64) + update
        return merged

    def _host(self, path: ParameterPath) -> np.ndarray:
        return to_host(self._state[path][...])

    @staticmethod
    def _is_base(path: ParameterPath) -> bool:
        return "adapter" not in path and path[-1] not in ("new_embedding", "new_head", "kernel_scale")


HEAD, TABLE = "lm_head.weight", "model.language_model.embed_tokens.weight"
TRAINABLE = nnx.Any(nnx.LoRAParam, NewTokenParam)
"""Filter of the parameters that sit beside a frozen base: adapters and new-token rows."""


@runtime_checkable
class TensorSource(Protocol):
    """Anything tensors can be read from by name."""

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor."""


def from_hf(
    path: str | Path,
    *,
    compute: ComputeConfig | None = None,
    lora: LoraConfig | None = None,
    new_tokens: NewTokensConfig | None = None,
    shardings: ShardingOf | None = None,
    seed: int = 0,
) -> VisionLanguageModel:
    """Builds a model of any family with the weights of a transformers checkpoint.

    Args:
        path: folder with config.json (its `model_type` tells the family) and safetensors files, sharded or
            single, in the hub's or transformers' naming.
        compute: dtypes (the weights are cast to `param_dtype`), rematerialisation, attention kernel. None
            computes in float32 and keeps the type that the weights are stored in.
        lora: fresh adapters beside the base weights; None for none.
        new_tokens: ids that get trainable rows, copied from the checkpoint's; None for none.
        shardings: placement of each parameter; None puts them on the default device.
        seed: seed of the adapters' initial values.

    Returns:
        The model.

    Raises:
        CheckpointError: files are missing or damaged, or tensors are missing, unknown or misshapen
            (all named).
        ConfigError: config.json or preprocessor_config.json asks for what is not done here.
    """
    check_folder(Path(path))
    config = read_hf_config(path)
    form = format_of(config)
    folder = SafetensorsFolder(path, rename=form.canonical_name)
    folder.check_flavour()
    config = with_own_head(config, folder)
    compute = compute or ComputeConfig(param_dtype=folder.float_type())
    rules = form.rules(config)
    check_names_and_shapes(rules, folder.shapes(), origin=str(path), ignore=without_content(config, folder))

    def build(rngs: nnx.Rngs) -> VisionLanguageModel:
        return family_of(config).model(config, compute=compute, rngs=rngs, lora=lora, new_tokens=new_tokens)

    graph, abstract = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(seed))))
    state = dict(nnx.to_flat_state(abstract))
    if lora is not None or new_tokens is not None:
        drawn = draw_parameters(build, seed=seed, wanted=TRAINABLE, shardings=shardings)
        state.update(nnx.to_flat_state(drawn))
    fill(state, rules, folder, shardings)
    if new_tokens is not None:
        _copy_new_rows(state, new_tokens, tied=config.decoder.tie_word_embeddings)
    model = nnx.merge(graph, nnx.from_flat_state(state))
    model.processor_settings = read_processor_settings(Path(path), config)
    model.special_ids = read_special_ids(Path(path))
    return model


def fill(
    state: dict[ParameterPath, Any],
    rules: Iterable[Rule],
    source: TensorSource,
    shardings: ShardingOf | None = None,
) -> None:
    """Replaces parameters, possibly abstract, by the values a table finds in `source`.

    Args:
        state: path to variable (`dict(nnx.to_flat_state(nnx.state(model)))`); changed in place.
        rules: the table.
        source: where the tensors are read; names and shapes checked before (`check_names_and_shapes`).
        shardings: placement of each parameter; None puts them on the default device.

    Raises:
        CheckpointError: the model has no parameter that a rule asks for (adapters not built, say).
    """
    rules = tuple(rules)
    absent = [".".join(map(str, rule.target)) for rule in rules if rule.target not in state]
    if absent:
        raise CheckpointError(
            f"the model has no parameters {absent}; build it with the checkpoint's adapters"
        )
    for rule in progress(rules, desc="loading weights", unit="tensor"):
        layer_axes = int(rule.layers is not None)
        shape = kernel_shape(state[rule.target], rule.in_axes + layer_axes)
        for path, convert in _converters(rule, state).items():
            variable = state[path]
            part = functools.partial(_read_part, rule, source, shape[layer_axes:], variable, convert)
            if shardings is None:
                value = jnp.asarray(part((slice(None),) * len(variable.shape)))
            else:
                placed = shardings(axis_names(variable), variable.shape)
                value = jax.make_array_from_callback(variable.shape, placed, part)
            state[path] = variable.replace(value)


def base_value(state: Mapping[ParameterPath, Any], path: ParameterPath, dtype: Any) -> np.ndarray:
    """A parameter on the host; a quantised kernel as the weights it stands for, in `dtype`."""
    value = to_host(state[path][...])
    if scale_path(path) not in state:
        return value
    scale = to_host(state[scale_path(path)][...])
    if "layers" not in path:
        return dequantize(value, scale, dtype)
    return np.stack([dequantize(*layer, dtype) for layer in zip(value, scale, strict=True)])


def scale_path(path: ParameterPath) -> ParameterPath:
    """Where a kernel's scales stand, if it is quantised."""
    return (*path[:-1], f"{path[-1]}_scale")


def _converters(
    rule: Rule, state: Mapping[ParameterPath, Any]
) -> dict[ParameterPath, Callable[[np.ndarray], np.ndarray]]:
    """The parameters that a rule's tensors become, and how: one as it is, or integers and scales."""
    if scale_path(rule.target) not in state:
        return {rule.target: lambda kernel: kernel}
    kind = kind_of(state[rule.target])
    return {
        rule.target: lambda kernel: quantize(kernel, kind, rule.in_axes)[0],
        scale_path(rule.target): lambda kernel: scales(kernel, kind, rule.in_axes),
    }


def to_hf(
    model: VisionLanguageModel,
    path: str | Path,
    *,
    naming: Literal["hub", "transformers"] = "hub",
    merged: bool = False,
    max_shard_bytes: int = 5 * 1000**3,
    complete: Complete | None = None,
) -> VLConfig:
    """Writes the weights as a transformers checkpoint.

    Without `merged` it is the inverse of `from_hf`, bit for bit: adapters and new-token rows are left out.

    Args:
        model: the model.
        path: folder to create.
        naming: tensor names as in the hub's checkpoints or as in transformers' state dict.
        merged: fold adapters and new-token rows into the base weights (`MergedParameters`).
        max_shard_bytes: largest size of one file.
        complete: adds what else belongs into the folder, a tokenizer for instance.

    Returns:
        The architecture written (a tied head may have been untied by merging).

    Raises:
        CheckpointError: the folder exists or the architecture has no config.json.
    """
    state = dict(nnx.to_flat_state(nnx.state(model)))
    dtype = model.decoder.compute.storage_dtype
    values = MergedParameters(model) if merged else None
    config = model.config if values is None else values.config
    form = format_of(config)
    rename = form.hub_name if naming == "hub" else form.module_name
    rules = form.rules(config)

    def item_bytes(path: ParameterPath) -> int:
        if values is not None:
            return values.dtype(path).itemsize
        return (dtype if scale_path(path) in state else state[path].dtype).itemsize

    planned = [
        PlannedTensor(rename(name), math.prod(rule.source_shape) * item_bytes(rule.target))
        for rule in rules
        for name in rule.source_names()
    ]
    exported = export_tensors(state if values is None else values, rules, dtype)
    tensors = ((rename(name), tensor) for name, tensor in exported)
    shards = plan_shards(planned, max_shard_bytes)
    write_folder(path, tensors, shards, config=write_hf_config(config, model.special_ids), complete=complete)
    return config


def export_tensors(
    state: Mapping[ParameterPath, Any], rules: Iterable[Rule], dtype: Any = np.float32
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads a table backwards: checkpoint names and tensors, one stacked parameter on the host at a time.

    Args:
        state: path to parameter.
        rules: the table.
        dtype: what quantised kernels are written as.
    """
    for rule in rules:
        value = base_value(state, rule.target, dtype)
        for layer, name in enumerate(rule.source_names()):
            yield name, rule.export(value if rule.layers is None else value[layer])


def _read_part(
    rule: Rule,
    source: TensorSource,
    layout: tuple[int, ...],
    variable: Any,
    convert: Callable[[np.ndarray], np.ndarray],
    index: tuple[slice, ...],
) -> np.ndarray:
    """The slice `index` of a parameter, reading only the layers it covers.

    Args:
        rule: where it comes from.
        source: where its tensors are read.
        layout: shape that one of the rule's tensors is given.
        variable: the parameter: its shape and type.
        convert: from one layer's tensor in that layout to the parameter's.
        index: of the parameter.
    """
    names, shape, dtype = rule.source_names(), variable.shape, variable.dtype
    if rule.layers is None:
        return np.asarray(convert(rule.load(source.read(names[0]), layout))[index], dtype)
    layers = range(*index[0].indices(rule.layers))
    rest = tuple(len(range(*each.indices(size))) for each, size in zip(index[1:], shape[1:], strict=True))
    part = np.empty((len(layers), *rest), dtype)
    for row, layer in enumerate(layers):
        part[row] = convert(rule.load(source.read(names[layer]), layout))[index[1:]]
    return part


def with_own_head(config: VLConfig, folder: SafetensorsFolder) -> VLConfig:
    """The architecture as the tensors have it, where config.json ties the head to the embedding.

    Trainers that untie the two leave the old config.json behind. transformers 5 keeps the file's head then,
    and so does this, with a note; a head that only repeats the embedding is none of its own.

    Args:
        config: what config.json says.
        folder: the checkpoint, under the table's names.
    """
    head, table = folder.places.get(HEAD), folder.places.get(TABLE)
    if not config.decoder.tie_word_embeddings or head is None or table is None:
        return config
    if head.shape == table.shape and head.dtype == table.dtype:
        own, repeated = folder.read(HEAD), folder.read(TABLE)
        if np.array_equal(own.view(np.uint8), repeated.view(np.uint8)):
            return config
    log.warning(
        "%s: config.json ties the head to the embedding, but %s has values of its own; they are kept",
        folder.path,
        head.name,
    )
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, tie_word_embeddings=False))


def without_content(config: VLConfig, folder: SafetensorsFolder) -> list[str]:
    """Tensors that may be there though they carry nothing: fixed tables, the head of a tied model."""
    ignored = [name for name in folder.places if name.endswith(("inv_freq", "position_ids"))]
    return [*ignored, HEAD] if config.decoder.tie_word_embeddings else ignored


def _copy_new_rows(state: dict[ParameterPath, Any], new_tokens: NewTokensConfig, *, tied: bool) -> None:
    rows = slice(new_tokens.first_id, new_tokens.first_id + new_tokens.count)
    tables = {"new_embedding": "embedding", "new_head": "embedding" if tied else "head"}
    for new, table in tables.items():
        variable = state["decoder", new]
        value = state["decoder", table][...][rows].astype(jnp.float32)
        state["decoder", new] = variable.replace(jax.device_put(value, variable[...].sharding))

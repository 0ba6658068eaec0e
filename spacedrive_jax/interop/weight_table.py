"""Two-way tables between transformers' tensors and parameters.

A rule ties one source name (with `{layer}` for stacked blocks) to one parameter path, and a layout change
to its inverse. Loading reads the table forwards, exporting backwards; both are bit-exact. The tables of the
language model, its adapters and its new-token rows serve every family; the module of a family adds the rest.

Source names are those of transformers' state dict (`model.language_model.*`, `lm_head.*`).

A `Format` is what a family of vision-language models looks like in other people's files, as one object.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from spacedrive_jax.errors import CheckpointError
from spacedrive_jax.interop.hf_fields import Fields
from spacedrive_jax.models.config import (
    LanguageModelConfig,
    LoraConfig,
    NewTokensConfig,
    VisionConfig,
    VLConfig,
)

ParameterPath = tuple[str | int, ...]
Shape = tuple[int, ...]
Prefixes = tuple[tuple[str, str], ...]
"""(old, new) beginnings of names."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter and the tensors it is made of."""

    source: str
    """Name in the checkpoint; `{layer}` runs over the stacked blocks."""
    target: ParameterPath
    """Path in `nnx.state(model)`."""
    source_shape: Shape
    """Shape of one source tensor."""
    in_axes: int = 0
    """Leading axes of the parameter (the layer axis not counted) that flatten to the source's input axis. 0
    means that the layout is only reshaped; otherwise the source is (output, input) and is transposed as
    well."""
    layers: int | None = None
    """Number of stacked blocks; None when the parameter is not stacked."""

    def source_names(self) -> tuple[str, ...]:
        """The checkpoint names this rule reads, in layer order."""
        if self.layers is None:
            return (self.source,)
        return tuple(self.source.format(layer=layer) for layer in range(self.layers))

    def load(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """Source layout to the parameter's `shape` (one layer's); a view where possible."""
        if self.in_axes:
            tensor = tensor.reshape(tensor.shape[0], -1).T
        return tensor.reshape(shape)

    def export(self, parameter: np.ndarray) -> np.ndarray:
        """Inverse of `load`."""
        if self.in_axes:
            parameter = parameter.reshape(math.prod(parameter.shape[: self.in_axes]), -1).T
        return np.ascontiguousarray(parameter).reshape(self.source_shape)


def linear_rules(
    source: str,
    path: ParameterPath,
    sizes: tuple[int, int],
    *,
    bias: bool = True,
    in_axes: int = 1,
    layers: int | None = None,
) -> tuple[Rule, ...]:
    """The rules of a torch `nn.Linear`.

    Args:
        source: name without `.weight` or `.bias`.
        path: path of the `Projection`.
        sizes: outputs, inputs.
        bias: whether it has one.
        in_axes: see `Rule`.
        layers: see `Rule`.
    """
    weight = Rule(f"{source}.weight", (*path, "kernel"), sizes, in_axes, layers)
    return (weight, Rule(f"{source}.bias", (*path, "bias"), sizes[:1], 0, layers)) if bias else (weight,)


def norm_rules(
    source: str, path: ParameterPath, width: int, *, layers: int | None = None
) -> tuple[Rule, ...]:
    """The rules of a torch `nn.LayerNorm`; the arguments are those of `linear_rules`."""
    return (
        Rule(f"{source}.weight", (*path, "scale"), (width,), 0, layers),
        Rule(f"{source}.bias", (*path, "bias"), (width,), 0, layers),
    )


def vision_block_rules(
    block: str,
    config: VisionConfig,
    *,
    norms: tuple[str, str] = ("layer_norm1", "layer_norm2"),
    attention: str = "self_attn",
    out: str = "out_proj",
    qkv_bias: bool = True,
) -> tuple[Rule, ...]:
    """The table of a tower's `VisionBlock`s, as CLIP, SigLIP and InternViT name what is in them.

    Args:
        block: what the names of a block start with, `{layer}` in it.
        config: architecture.
        norms: names before attention and before the MLP.
        attention: name of attention.
        out: name of its output layer.
        qkv_bias: whether queries, keys and values have biases.
    """
    width, inner, depth = config.hidden_size, config.intermediate_size, config.depth
    path = ("vision", "layers")
    rules = [
        *norm_rules(f"{block}.{norms[0]}", (*path, "attention_norm"), width, layers=depth),
        *norm_rules(f"{block}.{norms[1]}", (*path, "mlp_norm"), width, layers=depth),
        *linear_rules(f"{block}.mlp.fc1", (*path, "up"), (inner, width), layers=depth),
        *linear_rules(f"{block}.mlp.fc2", (*path, "down"), (width, inner), layers=depth),
    ]
    for source, target in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), (out, "o")):
        rules += linear_rules(
            f"{block}.{attention}.{source}",
            (*path, "attention", target),
            (width, width),
            bias=qkv_bias or target == "o",
            in_axes=2 if target == "o" else 1,
            layers=depth,
        )
    return tuple(rules)


def with_prefix(name: str, prefixes: Prefixes) -> str:
    """The name with the first of the (old, new) prefixes that fits replaced; as it is where none does."""
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def reversed_prefixes(prefixes: Prefixes) -> Prefixes:
    """The way back for `with_prefix`."""
    return tuple((new, old) for old, new in prefixes)


def decoder_rules(config: LanguageModelConfig, prefix: str = "model.language_model") -> tuple[Rule, ...]:
    """The table of a Qwen2.5, Qwen3 or LLaMA language model.

    Args:
        config: architecture.
        prefix: what the source names of the decoder start with; the head is `lm_head` always.

    Returns:
        One rule per base parameter of the model's `decoder`.
    """
    width, inner = config.hidden_size, config.intermediate_size
    out_sizes = {"q": config.num_heads * config.head_dim}
    out_sizes["k"] = out_sizes["v"] = config.num_kv_heads * config.head_dim

    def block(source: str, target: str, shape: Shape, in_axes: int = 0) -> Rule:
        return Rule(
            f"{prefix}.layers.{{layer}}.{source}",
            ("decoder", "layers", *target.split(".")),
            shape,
            in_axes,
            config.num_layers,
        )

    rules = [
        Rule(f"{prefix}.embed_tokens.weight", ("decoder", "embedding"), (config.vocab_size, width)),
        Rule(f"{prefix}.norm.weight", ("decoder", "final_norm", "scale"), (width,)),
        block("input_layernorm.weight", "attention_norm.scale", (width,)),
        block("post_attention_layernorm.weight", "mlp_norm.scale", (width,)),
        block("self_attn.o_proj.weight", "attention.o.kernel", (width, out_sizes["q"]), in_axes=2),
        block("mlp.gate_proj.weight", "mlp.gate.kernel", (inner, width), in_axes=1),
        block("mlp.up_proj.weight", "mlp.up.kernel", (inner, width), in_axes=1),
        block("mlp.down_proj.weight", "mlp.down.kernel", (width, inner), in_axes=1),
    ]
    if config.qk_norm:
        normed = (config.head_dim,)
        rules.append(block("self_attn.q_norm.weight", "attention.q_norm.scale", normed))
        rules.append(block("self_attn.k_norm.weight", "attention.k_norm.scale", normed))
    for name, size in out_sizes.items():
        rules.append(
            block(f"self_attn.{name}_proj.weight", f"attention.{name}.kernel", (size, width), in_axes=1)
        )
        if config.qkv_bias:
            rules.append(block(f"self_attn.{name}_proj.bias", f"attention.{name}.bias", (size,)))
    if not config.tie_word_embeddings:
        rules.append(Rule("lm_head.weight", ("decoder", "head"), (config.vocab_size, width)))
    return tuple(rules)


def lora_rules(
    config: LanguageModelConfig, lora: LoraConfig, prefix: str = "base_model.model.model.language_model"
) -> tuple[Rule, ...]:
    """The table of the language model's adapters under PEFT's names.

    Args:
        config: what they sit in.
        lora: rank and targets.
        prefix: what PEFT's names start with, up to `layers`.

    Returns:
        Two rules (lora_A, lora_B) per target.
    """
    width, query = config.hidden_size, config.num_heads * config.head_dim
    key_value = config.num_kv_heads * config.head_dim
    inner = config.intermediate_size
    sizes = {"q": (width, query), "k": (width, key_value), "v": (width, key_value), "o": (query, width)}
    sizes |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    rules = []
    for target in lora.targets:
        fan_in, fan_out = sizes[target]
        theirs, ours = ("mlp", "mlp") if target in ("gate", "up", "down") else ("self_attn", "attention")
        source = f"{prefix}.layers.{{layer}}.{theirs}.{target}_proj"
        path = ("decoder", "layers", ours, target, "adapter")
        in_axes = 2 if target == "o" else 1
        rules += [
            Rule(f"{source}.lora_A.weight", (*path, "a"), (lora.rank, fan_in), in_axes, config.num_layers),
            Rule(f"{source}.lora_B.weight", (*path, "b"), (fan_out, lora.rank), 1, config.num_layers),
        ]
    return tuple(rules)


def new_token_rules(config: LanguageModelConfig, new_tokens: NewTokensConfig) -> tuple[Rule, ...]:
    """The table of the new tokens' rows under the names of the published SpaceDrive code."""
    shape = (new_tokens.count, config.hidden_size)
    return (
        Rule("new_embed_tokens.weight", ("decoder", "new_embedding"), shape),
        Rule("new_lm_head.weight", ("decoder", "new_head"), shape),
    )


def check_names_and_shapes(
    rules: Iterable[Rule], found: Mapping[str, Shape], *, origin: str, ignore: Iterable[str] = ()
) -> None:
    """Compares a checkpoint's tensors with the table.

    Args:
        rules: the table.
        found: canonical name to shape of every tensor in the checkpoint.
        origin: what to call the checkpoint in the message.
        ignore: canonical names that may be there or not.

    Raises:
        CheckpointError: with every missing, unknown and misshapen tensor at once.
    """
    expected = {name: rule.source_shape for rule in rules for name in rule.source_names()}
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [
        f"shape of {name} is {found[name]}, the config asks for {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    allowed = expected.keys() | set(ignore)
    problems += [f"unknown {name} {shape}" for name, shape in found.items() if name not in allowed]
    if problems:
        shown = "\n  ".join(problems[:40]) + (
            f"\n  and {len(problems) - 40} more" if len(problems) > 40 else ""
        )
        raise CheckpointError(f"{origin} does not fit the model ({len(problems)} tensors):\n  {shown}")


@dataclasses.dataclass(frozen=True)
class Published:
    """What the published SpaceDrive does otherwise on this base."""

    presets: tuple[str, str]
    """The published runs, without and with ego status."""
    trains_table_rows: bool = False
    """The new tokens' rows are rows of the full tables (gradients masked), not small tables of their own."""
    ignores: frozenset[str] = frozenset()
    """Arguments of the published constructor that this base's class does not act on."""


@dataclasses.dataclass(frozen=True)
class Format:
    """How transformers writes a family: fields of config.json, names of tensors."""

    rules: Callable[[Any], tuple[Rule, ...]]
    """From the config to the two-way table of the base weights."""
    read_config: Callable[[Fields, str], VLConfig]
    """From the parsed config.json and its name."""
    write_config: Callable[[Any], dict[str, Any]]
    prefixes: Prefixes = ()
    """What names start with in checkpoints on the hub, and in the table."""
    older_prefixes: Prefixes = ()
    """Likewise of further names that files go by."""
    module_prefixes: Prefixes = ()
    """What names start with in transformers' state dict, which PEFT has too, and in the table: nothing, but
    where transformers does not call the language model `model.language_model`."""
    text_part: str = "text_config"
    """Object of config.json that holds `vocab_size` and `tie_word_embeddings`, unless they are outermost."""
    published: Published | None = None
    """None where there is no published SpaceDrive on this base."""

    def canonical_name(self, name: str) -> str:
        """From any name a tensor goes by to the one in `rules`."""
        name = with_prefix(name, self.older_prefixes)
        known = tuple(new for _, new in self.prefixes)
        return name if name.startswith(known) else with_prefix(name, self.prefixes)

    def hub_name(self, name: str) -> str:
        """From the name in `rules` to the one in checkpoints on the hub."""
        return with_prefix(name, reversed_prefixes(self.prefixes))

    def module_name(self, name: str) -> str:
        """From the name in `rules` to the one in transformers' state dict."""
        return with_prefix(name, reversed_prefixes(self.module_prefixes))

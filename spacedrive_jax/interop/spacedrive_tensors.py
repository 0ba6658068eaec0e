"""The tensors of the published training checkpoint: the two-way table, its parts, and the way back.

Under `state_dict` the vision-language model's names start with `lm_head.base_model.model.`, the base weights
of adapted layers have `.base_layer.`, adapters have `.default.`; the modules of SpaceDrive stand beside it,
the depth network under `depth_model.`. Buffers and two more copies of the scale follow from the rest.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from spacedrive_jax.constants import NUM_WAYPOINTS, STATUS_SIZE
from spacedrive_jax.errors import CheckpointError
from spacedrive_jax.interop.hf_config import format_of
from spacedrive_jax.interop.safetensors_folder import require_finite
from spacedrive_jax.interop.weight_table import Rule, lora_rules, new_token_rules
from spacedrive_jax.models.config import NewTokensConfig
from spacedrive_jax.models.spacedrive_config import ModelConfig

# Two-way table between the published SpaceDrive tensors and this project's parameters.


def linear_rules(
    source: str, target: str, inputs: int, outputs: int, *, convolution: bool = False
) -> list[Rule]:
    """Weight and bias of a linear layer (in torch (output, input), or a convolution of width 1)."""
    path = tuple(target.split("."))
    shape = (outputs, inputs, 1) if convolution else (outputs, inputs)
    return [
        Rule(f"{source}.weight", (*path, "kernel"), shape, 1),
        Rule(f"{source}.bias", (*path, "bias"), (outputs,)),
    ]


def head_rules(config: ModelConfig, *, alpha_shape: tuple[int, ...] = ()) -> tuple[Rule, ...]:
    """Everything outside the vision-language model.

    Args:
        config: which encoder, decoder and ego status the model has.
        alpha_shape: the scale is a scalar in checkpoints, a vector of one in the recorded cases.
    """
    width = config.vlm.decoder.hidden_size
    rules: list[Rule] = []
    if config.encoder.learnable_alpha:
        rules.append(Rule("pe_scaling", ("encoder", "alpha"), alpha_shape))
    if config.encoder.kind == "mlp":
        rules += linear_rules("position_encoder_mlp.0", "encoder.hidden", 3, width)
        rules += linear_rules("position_encoder_mlp.2", "encoder.output", width, width)
    if config.ego_status in ("feature", "both"):
        rules += linear_rules("ego_status_mlp.0", "ego_encoder.hidden", STATUS_SIZE, width)
        rules += linear_rules("ego_status_mlp.2", "ego_encoder.output", width, width)
    return (*rules, *_decoder_rules(config, width))


def _decoder_rules(config: ModelConfig, width: int) -> list[Rule]:
    decoder = config.decoder
    outputs = 3 * NUM_WAYPOINTS if decoder.whole_trajectory else 3
    if decoder.kind == "linear":
        return linear_rules("mlp_output_coords", "decoder.output", width, outputs)
    if decoder.kind == "mlp":
        return [
            *linear_rules("mlp_output_coords.0", "decoder.hidden", width, width),
            *linear_rules("mlp_output_coords.2", "decoder.output", width, outputs),
        ]
    if decoder.kind == "vae":
        return vae_rules("vae_output_coords", width, decoder.latent_size, decoder.with_current)
    return []


def vae_rules(
    source: str, width: int, latent: int, with_current: bool, target: str = "decoder"
) -> list[Rule]:
    """The variational decoder's layers.

    Args:
        source: what the published names start with.
        width: D.
        latent: Z.
        with_current: see `VaeDecoder`.
        target: path of the decoder in the model; empty for the decoder alone.
    """
    prefix = f"{target}." if target else ""
    inner = latent + width * with_current
    rules = [
        *linear_rules(f"{source}.decoder.0", f"{prefix}layer1", inner, 2 * latent),
        *linear_rules(f"{source}.decoder.2", f"{prefix}layer2", 2 * latent, 4 * latent),
        *linear_rules(f"{source}.decoder.4", f"{prefix}output", 4 * latent, 2 + 2 * with_current),
    ]
    for name, size in (("present", width), ("future", width + 2)):
        sizes = (size, 2 * size, 2 * size, size // 2)
        for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes), start=1):
            rules += linear_rules(
                f"{source}.{name}_distribution.encoder.conv{number}",
                f"{prefix}{name}.layer{number}",
                inputs,
                outputs,
                convolution=True,
            )
        rules += linear_rules(
            f"{source}.{name}_distribution.last_conv.0",
            f"{prefix}{name}.output",
            size // 2,
            2 * latent,
            convolution=True,
        )
    return rules


def base_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The vision-language model's released weights, with this model's paths."""
    return inside_vlm(format_of(config.vlm).rules(config.vlm))


def adapter_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The adapters."""
    return inside_vlm(lora_rules(config.vlm.decoder, config.lora)) if config.use_lora else ()


def new_row_rules(config: ModelConfig, new_tokens: NewTokensConfig | None) -> tuple[Rule, ...]:
    """The new tokens' rows under Qwen's published names (LLaVA trains rows of its full tables)."""
    return () if new_tokens is None else inside_vlm(new_token_rules(config.vlm.decoder, new_tokens))


def inside_vlm(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The same table for a model that holds the vision-language model as `vlm`."""
    return tuple(dataclasses.replace(rule, target=("vlm", *rule.target)) for rule in rules)


VLM = "lm_head.base_model.model."
SCALE = "pe_scaling"
SCALE_COPIES = (f"position_encoder.{SCALE}", f"{VLM}position_encoder.{SCALE}")
NEW_ROWS = {
    f"{VLM}model.language_model.new_embed_tokens.weight": "new_embed_tokens.weight",
    f"{VLM}new_lm_head.weight": "new_lm_head.weight",
}
BUFFERS = (".freq", ".inv_freq", ".step")
DEPTH = "depth_model."
TOWER = "model.vision_tower."
"""transformers 5 dropped the `vision_model` behind it, which the published LLaVA has."""

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Parts:
    """A checkpoint taken apart; names are those of `spacedrive_jax.interop.spacedrive_tensors`."""

    base: Tensors
    """The vision-language model, under transformers' names."""
    adapters: Tensors
    """Under PEFT's names."""
    heads: Tensors
    """New-token rows, coordinate head, ego MLP, scale."""
    depth: Tensors
    """The depth network under its own names."""
    buffers: Tensors
    """What follows from the rest, under the published names."""
    order: tuple[str, ...]
    """All published names, in their order."""
    meta: Mapping[str, Any]
    """What the training run noted (epoch, iteration)."""


def split_checkpoint(content: Mapping[str, Any], origin: str) -> Parts:
    """Takes a checkpoint apart.

    Args:
        content: what `read_torch_file` gives.
        origin: what to call it in messages.

    Raises:
        CheckpointError: there is no `state_dict` of tensors, or the copies of the scale disagree.
    """
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, np.ndarray) for value in state.values()):
        raise CheckpointError(f"{origin} has no `state_dict` of tensors: it is not a published checkpoint")
    parts: dict[str, Tensors] = {name: {} for name in ("base", "adapters", "heads", "depth", "buffers")}
    for name, value in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{origin}: state_dict names a tensor {name!r}, which is no text")
        part, short = place(name)
        if short in parts[part]:
            raise CheckpointError(f"{origin}: state_dict has two tensors {short}, one of them as {name}")
        require_finite(value, f"{origin}: {name}")
        parts[part][short] = value
    for copy in SCALE_COPIES:
        if copy in state and not (SCALE in state and np.array_equal(state[copy], state[SCALE])):
            raise CheckpointError(f"{origin}: {copy} is {state[copy]}, but {SCALE} is {state.get(SCALE)}")
    meta = content.get("meta")
    return Parts(**parts, order=tuple(state), meta=dict(meta) if isinstance(meta, Mapping) else {})


def place(name: str) -> tuple[str, str]:
    """The part that a published tensor belongs to, and its name there."""
    if name in SCALE_COPIES or name.endswith(BUFFERS):
        return "buffers", name
    if name.startswith(DEPTH):
        return "depth", name.removeprefix(DEPTH)
    if name in NEW_ROWS:
        return "heads", NEW_ROWS[name]
    if not name.startswith(VLM):
        return "heads", name
    inner = name.removeprefix(VLM)
    if ".lora_" in inner:
        return "adapters", f"base_model.model.{inner.replace('.default.', '.')}"
    return "base", inner.replace(".base_layer.", ".")


def published_name(part: str, name: str, adapted: Collection[str] = ()) -> str:
    """The inverse of `place`.

    Args:
        part: a field of `Parts` that holds tensors.
        name: the tensor's name there; for the base as in transformers 5's state dict.
        adapted: modules of the base that have adapters, under the same names.
    """
    if part == "depth":
        return DEPTH + name
    if part == "heads":
        return next((published for published, short in NEW_ROWS.items() if short == name), name)
    if part == "adapters":
        inner = name.removeprefix("base_model.model.")
        return f"{VLM}{inner.replace('.lora_A.', '.lora_A.default.').replace('.lora_B.', '.lora_B.default.')}"
    if part == "buffers":
        return name
    module, _, leaf = name.rpartition(".")
    if name.startswith(TOWER):
        return f"{VLM}{TOWER}vision_model.{name.removeprefix(TOWER)}"
    return f"{VLM}{module}.base_layer.{leaf}" if module in adapted else VLM + name


def join_checkpoint(parts: Parts) -> dict[str, Any]:
    """The published layout again: the same names in the same order, the same bits."""
    by_part = {
        "base": parts.base,
        "adapters": parts.adapters,
        "heads": parts.heads,
        "depth": parts.depth,
        "buffers": parts.buffers,
    }
    state = {}
    for name in parts.order:
        part, short = place(name)
        state[name] = by_part[part][short]
    return {"meta": dict(parts.meta), "state_dict": state}

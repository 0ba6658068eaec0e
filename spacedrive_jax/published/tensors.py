"""Two-way table between the published SpaceDrive tensors and this project's parameters."""

from __future__ import annotations

import dataclasses
import itertools

from spacedrive_jax.config import ModelConfig
from spacedrive_jax.data.ego_status import STATUS_SIZE
from spacedrive_jax.data.records import NUM_WAYPOINTS
from spacedrive_jax.vlm.config import NewTokensConfig
from spacedrive_jax.vlm.conversion import Rule, lora_rules, new_token_rules
from spacedrive_jax.vlm.families import family_of


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
    return inside_vlm(family_of(config.vlm).rules(config.vlm))


def adapter_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The adapters."""
    return inside_vlm(lora_rules(config.vlm.decoder, config.lora)) if config.use_lora else ()


def new_row_rules(config: ModelConfig, new_tokens: NewTokensConfig | None) -> tuple[Rule, ...]:
    """The new tokens' rows under Qwen's published names (LLaVA trains rows of its full tables)."""
    return () if new_tokens is None else inside_vlm(new_token_rules(config.vlm.decoder, new_tokens))


def inside_vlm(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The same table for a model that holds the vision-language model as `vlm`."""
    return tuple(dataclasses.replace(rule, target=("vlm", *rule.target)) for rule in rules)

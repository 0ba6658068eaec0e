"""The two-way table of Qwen2.5-VL and the names its tensors go by.

Two are in use: transformers' state dict (`model.visual.*`, `model.language_model.*`), which the table has,
and checkpoints on the hub, which drop parts of those prefixes (`visual.*`, `model.*`).
"""

from __future__ import annotations

import re

from spacedrive_jax.vlm.config import QwenVisionConfig, QwenVLConfig
from spacedrive_jax.vlm.conversion import Rule, decoder_rules, linear_rules, reversed_prefixes, with_prefix

_HUB_PREFIXES = (("visual.", "model.visual."), ("model.", "model.language_model."))


def qwen_rules(config: QwenVLConfig) -> tuple[Rule, ...]:
    """The table of the base weights of Qwen2.5-VL (adapters and new-token rows are no part of it)."""
    return (*_vision_rules(config.vision), *decoder_rules(config.decoder))


def _vision_rules(config: QwenVisionConfig) -> tuple[Rule, ...]:
    width, inner = config.hidden_size, config.intermediate_size
    merged = width * config.merge_size**2
    prefix = "model.visual"

    def linear(
        source: str, target: str, sizes: tuple[int, int], *, block: bool, in_axes: int = 1
    ) -> tuple[Rule, ...]:
        source = f"{prefix}.blocks.{{layer}}.{source}" if block else f"{prefix}.{source}"
        path = ("vision", *(("layers",) if block else ()), *target.split("."))
        return linear_rules(source, path, sizes, in_axes=in_axes, layers=config.depth if block else None)

    def norm(number: int, target: str) -> Rule:
        path = ("vision", "layers", target, "scale")
        return Rule(f"{prefix}.blocks.{{layer}}.norm{number}.weight", path, (width,), 0, config.depth)

    patch = (config.temporal_patch_size, config.patch_size, config.patch_size)
    return (
        Rule(
            f"{prefix}.patch_embed.proj.weight",
            ("vision", "patch_embedding", "kernel"),
            (width, config.in_channels, *patch),
            in_axes=1,
        ),
        norm(1, "attention_norm"),
        norm(2, "mlp_norm"),
        *linear("attn.qkv", "attention.qkv", (3 * width, width), block=True),
        *linear("attn.proj", "attention.o", (width, width), block=True, in_axes=2),
        *linear("mlp.gate_proj", "mlp.gate", (inner, width), block=True),
        *linear("mlp.up_proj", "mlp.up", (inner, width), block=True),
        *linear("mlp.down_proj", "mlp.down", (width, inner), block=True),
        Rule(f"{prefix}.merger.ln_q.weight", ("vision", "merger", "norm", "scale"), (width,)),
        *linear("merger.mlp.0", "merger.hidden", (merged, merged), block=False),
        *linear("merger.mlp.2", "merger.out", (config.out_hidden_size, merged), block=False),
    )


def canonical_name(name: str) -> str:
    """Hub or transformers name to the one the table uses."""
    if re.match(r"model\.(visual|language_model)\.|lm_head\.", name):
        return name
    return with_prefix(name, _HUB_PREFIXES)


def hub_name(name: str) -> str:
    """The name a tensor has in checkpoints on the hub (inverse of `canonical_name`)."""
    return with_prefix(name, reversed_prefixes(_HUB_PREFIXES))

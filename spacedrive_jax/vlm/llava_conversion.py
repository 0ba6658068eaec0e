"""The two-way table of LLaVA-1.5 and the names its tensors go by.

Four are in use. The table has those of transformers 5's state dict: `model.language_model.*`,
`model.vision_tower.*`, `model.multi_modal_projector.*`, `lm_head.*`. transformers 4.52's has
`vision_tower.vision_model` instead of `vision_tower`. Checkpoints, on the hub and as transformers 5 saves
them, say `language_model.model.*`, `language_model.lm_head.*`, `vision_tower.*`, `multi_modal_projector.*`,
those on the hub with `vision_model` too.
"""

from __future__ import annotations

from spacedrive_jax.vlm.config import ClipVisionConfig, LlavaConfig
from spacedrive_jax.vlm.conversion import (
    ParameterPath,
    Rule,
    decoder_rules,
    linear_rules,
    reversed_prefixes,
    with_prefix,
)

_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
_HUB_PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.vision_model.", f"{_TOWER}."),
    ("multi_modal_projector.", f"{_PROJECTOR}."),
)


def llava_rules(config: LlavaConfig) -> tuple[Rule, ...]:
    """The table of the base weights of LLaVA-1.5 (adapters and new-token rows are no part of it)."""
    narrow, wide, bias = config.vision.hidden_size, config.decoder.hidden_size, config.projector_bias
    return (
        *_vision_rules(config.vision),
        *linear_rules(f"{_PROJECTOR}.linear_1", ("projector", "hidden"), (wide, narrow), bias=bias),
        *linear_rules(f"{_PROJECTOR}.linear_2", ("projector", "out"), (wide, wide), bias=bias),
        *decoder_rules(config.decoder),
    )


def canonical_name(name: str) -> str:
    """Any of the names in use to the one the table has."""
    name = name.replace("vision_tower.vision_model.", "vision_tower.")
    return with_prefix(name, (*_HUB_PREFIXES, ("vision_tower.", f"{_TOWER}.")))


def hub_name(name: str) -> str:
    """The name a tensor has in checkpoints on the hub (`canonical_name` undoes it)."""
    return with_prefix(name, reversed_prefixes(_HUB_PREFIXES))


def _norm(source: str, path: ParameterPath, width: int, *, layers: int | None = None) -> list[Rule]:
    return [
        Rule(f"{source}.weight", (*path, "scale"), (width,), 0, layers),
        Rule(f"{source}.bias", (*path, "bias"), (width,), 0, layers),
    ]


def _vision_rules(config: ClipVisionConfig) -> tuple[Rule, ...]:
    width, inner, depth = config.hidden_size, config.intermediate_size, config.depth
    block, blocks = f"{_TOWER}.encoder.layers.{{layer}}", ("vision", "layers")
    patch = (width, config.in_channels, config.patch_size, config.patch_size)
    places = config.grid_side**2 + 1
    embeddings = f"{_TOWER}.embeddings"
    rules = [
        Rule(f"{embeddings}.class_embedding", ("vision", "class_embedding"), (width,)),
        Rule(
            f"{embeddings}.patch_embedding.weight", ("vision", "patch_embedding", "kernel"), patch, in_axes=1
        ),
        Rule(f"{embeddings}.position_embedding.weight", ("vision", "position_embedding"), (places, width)),
        # transformers' own spelling.
        *_norm(f"{_TOWER}.pre_layrnorm", ("vision", "first_norm"), width),
        *_norm(f"{_TOWER}.post_layernorm", ("vision", "last_norm"), width),
        *_norm(f"{block}.layer_norm1", (*blocks, "attention_norm"), width, layers=depth),
        *_norm(f"{block}.layer_norm2", (*blocks, "mlp_norm"), width, layers=depth),
        *linear_rules(f"{block}.mlp.fc1", (*blocks, "up"), (inner, width), layers=depth),
        *linear_rules(f"{block}.mlp.fc2", (*blocks, "down"), (width, inner), layers=depth),
    ]
    for source, target in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")):
        rules += linear_rules(
            f"{block}.self_attn.{source}",
            (*blocks, "attention", target),
            (width, width),
            in_axes=2 if target == "o" else 1,
            layers=depth,
        )
    return tuple(rules)

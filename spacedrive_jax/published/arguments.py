"""The published code's constructor arguments as this project's config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from spacedrive_jax.config import ModelConfig, TrainConfig
from spacedrive_jax.console import UserError
from spacedrive_jax.data.ego_status import EgoStatusInput
from spacedrive_jax.positional.coordinates import CoordinateEncoderConfig, EncoderKind
from spacedrive_jax.positional.decoders import CoordinateDecoderConfig, DecoderKind
from spacedrive_jax.vlm.config import ComputeConfig, LlavaConfig, LoraConfig, VLConfig

ENCODERS: dict[str, EncoderKind] = {"transformer": "sincos", "nerf": "nerf", "fone": "fone"}
DECODERS: dict[str, DecoderKind] = {
    "l2_coords_mlp_2layer": "mlp",
    "l2_coords_mlp": "linear",
    "cosine": "grid_cosine",
    "l2": "grid_l2",
    "l2_coords_full_grid": "grid_full",
}
EGO_STATUS: dict[str, EgoStatusInput] = {
    "": "none",
    "feature": "feature",
    "PE": "positions",
    "feature+PE": "both",
}
NEW_TOKEN_SUFFIX = "with-new-special-tokens"
"""A checkpoint name that ends so makes the published Qwen code add rows for the new tokens."""
DEFAULT_BASE = {"transformer": 10000.0, "nerf": 10.0, "fone": 10.0}
"""Ratio of the frequencies where the arguments name none."""


def encoder_config(arguments: Mapping[str, Any]) -> CoordinateEncoderConfig:
    """The coordinate encoder of `pe_*` arguments; absent ones take the published class's defaults.

    Raises:
        UserError: an encoding that this project does not know.
    """
    kind = arguments.get("pe_type", "transformer")
    if kind not in ENCODERS:
        raise UserError(f"pe_type {kind!r} is none of {', '.join(ENCODERS)}")
    learned = bool(arguments.get("input_pe_mlp", False))
    default = CoordinateEncoderConfig()
    return CoordinateEncoderConfig(
        kind="mlp" if learned else ENCODERS[kind],
        base=float(arguments.get("pe_freq_coeff", DEFAULT_BASE[kind])),
        frequency_scaling=float(arguments.get("pe_freq_scaling", 1.0)),
        fone_width=int(arguments.get("fone_dim", default.fone_width)),
        alpha=float(arguments.get("pe_scaling", default.alpha)),
        learnable_alpha=bool(arguments.get("learnable_pe_scaling", True)),
    )


def model_config(
    arguments: Mapping[str, Any], vlm: VLConfig, lora: LoraConfig, compute: ComputeConfig
) -> ModelConfig:
    """The model of the published constructor's arguments.

    What LLaVA's published class ignores (`use_rope`, the semantic embedding) is ignored here too.

    Raises:
        UserError: an argument or a combination that this project does not know, or that the published code
            itself cannot run.
    """
    is_llava = isinstance(vlm, LlavaConfig)
    method, ego = arguments["pe_decode_method"], arguments.get("ego_status") or ""
    if method not in DECODERS:
        raise UserError(
            f"pe_decode_method {method!r} is none of {', '.join(DECODERS)} (the published code cannot run it)"
        )
    if ego not in EGO_STATUS:
        raise UserError(f"ego_status {ego!r} is none of {', '.join(map(repr, EGO_STATUS))}")
    semantic = bool(arguments.get("include_semantic_posemb", False))
    position_input = bool(arguments.get("enable_pe_input", False))
    rotary = bool(arguments.get("use_rope", False)) and not is_llava
    visual: Literal["add", "rotate"] = "rotate" if rotary else "add"
    return ModelConfig(
        vlm=vlm,
        lora=lora,
        new_token_rows=is_llava or NEW_TOKEN_SUFFIX in str(arguments.get("lm_head", NEW_TOKEN_SUFFIX)),
        encoder=encoder_config(arguments),
        decoder=CoordinateDecoderConfig(
            kind="vae" if arguments.get("use_vae_to_replace_mlp") else DECODERS[method],
            whole_trajectory=bool(arguments.get("single_token_output", False)),
            with_current=bool(arguments.get("with_cur", False)),
        ),
        visual_positions=visual if arguments.get("vis_3d_pos", True) else "none",
        ego_status=EGO_STATUS[ego],
        # LLaVA feeds the semantic embedding plus zeros, which is no position input.
        position_input=position_input and not (is_llava and semantic),
        position_input_training="zeros",
        semantic_position=semantic and not is_llava,
        compute=compute,
    )


def train_config(arguments: Mapping[str, Any]) -> TrainConfig:
    """The losses of the published constructor's arguments; everything else keeps its default."""
    method, kind = arguments["pe_decode_method"], arguments.get("loss_pos_type", "huber")
    in_embedding = {"cosine": "cosine", "l2": "embedding_l2"}
    supervision: Literal["planning", "first", "all"]
    supervision = "planning" if arguments.get("planning_only", True) else "all"
    if arguments.get("single_coords_only"):
        supervision = "first"
    return dataclasses.replace(
        TrainConfig(),
        position_loss=in_embedding.get(method, kind),
        huber_delta=float(arguments.get("huber_delta", 1.0)),
        position_weight=float(arguments.get("loss_pos_lambda", 1.0)),
        supervision=supervision,
    )

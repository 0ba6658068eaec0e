"""Fields of transformers' config.json that every family has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spacedrive_jax.console import UserError
from spacedrive_jax.vlm.config import DecoderConfig

Fields = Mapping[str, Any]


def required(fields: Fields, name: str, origin: str) -> Any:
    """The value of a field that has no default.

    Raises:
        UserError: If it is missing; `origin` names the file.
    """
    if name not in fields:
        raise UserError(f"{origin}: field {name!r} is missing")
    return fields[name]


def expect(fields: Fields, name: str, supported: Any, origin: str, *, default: Any = None) -> None:
    """Refuses a feature that this implementation does not have.

    Args:
        fields: The config, or a part of it.
        name: Field that chooses the feature.
        supported: The one value that is supported.
        origin: Names the file.
        default: What a missing field means; `supported` when None.

    Raises:
        UserError: If the field has another value.
    """
    found = fields.get(name, supported if default is None else default)
    if found != supported:
        raise UserError(f"{origin}: {name} {found!r} is not supported, only {supported!r}")


def decoder_fields(decoder: DecoderConfig) -> dict[str, Any]:
    """What both families write of the decoder."""
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm_eps,
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": decoder.tied_head,
    }


def rotary_fields(text: Fields) -> Fields:
    """The rotary embedding's settings, `rope_parameters` (transformers 5) or `rope_scaling`."""
    return text.get("rope_parameters") or text.get("rope_scaling") or {}


def rotary_theta(text: Fields, default: float) -> float:
    """Base of the rotary frequencies, wherever it stands."""
    return float(rotary_fields(text).get("rope_theta", text.get("rope_theta", default)))


def rotary_type(text: Fields) -> str:
    """Kind of rotary embedding; `default` is the plain one."""
    rope = rotary_fields(text)
    return rope.get("rope_type", rope.get("type", "default"))

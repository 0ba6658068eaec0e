"""Fields of transformers' config.json: readers that name file and field, and the tables that families share.

A table ties fields of our configs to theirs, as `weight_table` does for tensors: `read_fields` goes one way,
`write_fields` the other. What a field left out means is the family's to say.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import LanguageModelConfig

Fields = Mapping[str, Any]


def required(fields: Fields, name: str, origin: str) -> Any:
    """The value of a field that has no default.

    Raises:
        ConfigError: it is missing; `origin` names the file.
    """
    if name not in fields:
        raise ConfigError(f"{origin}: field {name!r} is missing")
    return fields[name]


MOST = 10_000_000
"""Largest size, count or id that a config may name; the largest of any released model is below a million."""
MOST_LAYERS = 10_000


def size(
    fields: Fields, name: str, origin: str, default: int | None = None, *, least: int = 1, most: int = MOST
) -> int:
    """A whole number of at least 1, or `least`.

    Args:
        fields: the config, or a part of it.
        name: field.
        origin: names the file.
        default: what a missing field, or null, means; None where it must be there.
        least: smallest value; 0 for the id of a token.
        most: largest value.

    Raises:
        ConfigError: it is missing or is no such number.
    """
    value = required(fields, name, origin) if default is None else fields.get(name)
    value = default if value is None else value
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(
            f"{origin}: {name} is {str(value)[:40]!r}, expected a whole number from {least} to {most:,}"
        )
    return value


def real(fields: Fields, name: str, origin: str, default: float) -> float:
    """A positive finite number.

    Raises:
        ConfigError: it is none; a missing field, or null, means `default`.
    """
    value = fields.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ConfigError(f"{origin}: {name} is {str(value)[:40]!r}, expected a number above 0")
    return float(value)


def ids(fields: Fields, name: str, origin: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """A list of whole numbers of at least 0.

    Raises:
        ConfigError: it is missing without a default, or is none.
    """
    value = required(fields, name, origin) if default is None else fields.get(name, default)
    if not isinstance(value, list | tuple) or not all(
        type(each) is int and 0 <= each <= MOST for each in value
    ):
        raise ConfigError(f"{origin}: {name} is {str(value)[:40]!r}, expected a list of whole numbers")
    return tuple(value)


def part(fields: Fields, name: str, origin: str) -> Fields:
    """A config within the config; empty where it is missing or null.

    Raises:
        ConfigError: it is something else.
    """
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{origin}: {name} is {str(value)[:40]!r}, expected an object")
    return value


def square_side(fields: Fields, name: str, origin: str, default: int | None = None) -> int:
    """The side of a square that is given as one number or as two equal ones.

    Raises:
        ConfigError: it is neither.
    """
    value = required(fields, name, origin) if default is None else fields.get(name)
    if isinstance(value, list | tuple):
        if len(value) != 2 or value[0] != value[1]:
            raise ConfigError(f"{origin}: {name} is {str(value)[:40]}, expected one number or two equal ones")
        value = value[0]
    return size({name: value}, name, origin, default)


def flag(fields: Fields, name: str, origin: str, default: bool) -> bool:
    """Yes or no; null is no, as transformers takes it.

    Raises:
        ConfigError: it is something else, such as the text "false", which Python would take for yes.
    """
    value = fields.get(name, default)
    if not isinstance(value, bool | None):
        raise ConfigError(f"{origin}: {name} is {str(value)[:40]!r}, expected true or false")
    return bool(value)


layers = functools.partial(size, most=MOST_LAYERS)
"""A number of blocks."""
token_id = functools.partial(size, least=0)
"""The id of a token."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config of ours and the field of config.json that says the same."""

    ours: str
    theirs: str = ""
    """Empty where it has the same name."""
    read: Callable[..., Any] = size
    """From (fields, name, file, what a missing field means) to the value."""

    @property
    def name(self) -> str:
        """Its name in config.json."""
        return self.theirs or self.ours


def read_fields(
    table: Iterable[Field], fields: Fields, origin: str, usual: Mapping[str, Any]
) -> dict[str, Any]:
    """Values by the names that they have here.

    Args:
        table: what to read.
        fields: the part of config.json that has them.
        origin: names the file.
        usual: what a field left out, or null, means, by the names here; without an entry it must be there.

    Raises:
        ConfigError: A field that must be there is missing, or one holds what it cannot.
    """
    return {each.ours: each.read(fields, each.name, origin, usual.get(each.ours)) for each in table}


def write_fields(table: Iterable[Field], config: Any) -> dict[str, Any]:
    """Values by the names of config.json."""
    values = {each.name: getattr(config, each.ours) for each in table}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


DECODER = (
    Field("vocab_size"),
    Field("hidden_size"),
    Field("intermediate_size"),
    Field("num_layers", "num_hidden_layers", layers),
    Field("num_heads", "num_attention_heads"),
    Field("num_kv_heads", "num_key_value_heads"),
    Field("norm_eps", "rms_norm_eps", real),
)
"""Sizes of a language model."""
SQUARE_TOWER = (
    Field("hidden_size"),
    Field("intermediate_size"),
    Field("depth", "num_hidden_layers", layers),
    Field("num_heads", "num_attention_heads"),
    Field("norm_eps", "layer_norm_eps", real),
    Field("patch_size", read=square_side),
    Field("in_channels", "num_channels"),
    Field("image_size", read=square_side),
)
"""A `SquareVisionConfig`, as CLIP, SigLIP and InternViT write theirs."""
QWEN_TOWER = (
    Field("hidden_size"),
    Field("intermediate_size"),
    Field("depth", read=layers),
    Field("num_heads"),
    Field("patch_size"),
    Field("temporal_patch_size"),
    Field("in_channels"),
    Field("merge_size", "spatial_merge_size"),
    Field("out_hidden_size"),
)
"""What the towers of Qwen2.5-VL and Qwen3-VL have alike."""
QWEN_TOKENS = (
    Field("image_token_id", read=token_id),
    Field("vision_start_token_id", read=token_id),
    Field("vision_end_token_id", read=token_id),
)
QWEN_TOKENS_USUAL = {
    "image_token_id": 151655,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


MEANING = ("hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "head_dim")
"""Fields that no shape of a tensor gives away when they are wrong."""


def text_fields(fields: Fields, origin: str, *, flat: bool) -> Fields:
    """The language model's fields: those of `text_config`, and where `flat` those beside it that it lacks.

    transformers wrote them flat at first, then under `text_config`, and releases have either or both.

    Raises:
        ConfigError: both have it and disagree about what no tensor tells.
    """
    text = part(fields, "text_config", origin)
    if not flat:
        return text
    unlike = [
        name
        for name in MEANING
        if name in text and name in fields and _value(text, name) != _value(fields, name)
    ]
    if unlike:
        raise ConfigError(
            f"{origin}: {', '.join(unlike)} stands there twice, with different values (under text_config and "
            "beside it): leave the right one"
        )
    return {**{name: value for name, value in fields.items() if name not in _PARTS}, **text}


_PARTS = ("text_config", "vision_config", "model_type")


def _value(fields: Fields, name: str) -> Any:
    """A field for comparison; the two names of a plain rotary embedding are one."""
    value = fields[name]
    if not isinstance(value, Mapping):
        return value
    kind = value.get("rope_type", value.get("type", "default"))
    plain = {key: each for key, each in value.items() if key not in ("type", "rope_type")}
    return plain | {"rope_type": "default" if kind == "mrope" else kind}


def expect(fields: Fields, name: str, supported: Any, origin: str, *, default: Any = None) -> None:
    """Refuses a feature that this implementation does not have.

    Args:
        fields: the config, or a part of it.
        name: field that chooses the feature.
        supported: the one value that is supported.
        origin: names the file.
        default: what a missing field means; `supported` when None.

    Raises:
        ConfigError: the field has another value.
    """
    found = fields.get(name, supported if default is None else default)
    if found != supported:
        raise ConfigError(f"{origin}: {name} {found!r} is not supported, only {supported!r}")


def decoder_fields(decoder: LanguageModelConfig) -> dict[str, Any]:
    """What all families write of the language model."""
    scaled: dict[str, Any] = {}
    if decoder.max_position_embeddings is not None:
        scaled = {
            "max_position_embeddings": decoder.max_position_embeddings,
            "rope_scaling": {"rope_type": "dynamic", "factor": decoder.dynamic_rope_factor},
        }
    return {
        **write_fields(DECODER, decoder),
        "hidden_act": "silu",
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": decoder.tie_word_embeddings,
        **scaled,
    }


def decoder_sizes(
    text: Fields, origin: str, usual: Mapping[str, Any], *, grouped: bool = True
) -> dict[str, Any]:
    """The fields of `LanguageModelConfig` that `DECODER` has.

    Args:
        text: the language model's part of config.json.
        origin: names the file.
        usual: see `read_fields`.
        grouped: whether a number of key heads left out is the usual one; null, and where not grouped a field
            left out too, is as many as queries.
    """
    heads = size(text, "num_attention_heads", origin, usual.get("num_heads"))
    if not grouped or "num_key_value_heads" in text:
        usual = {**usual, "num_kv_heads": heads}
    return read_fields(DECODER, text, origin, usual)


def expect_mrope(text: Fields, origin: str) -> None:
    """Refuses rotary embeddings that scale their angles, and sliding windows.

    Raises:
        ConfigError: the text part asks for such.
    """
    kind = rotary_type(text, origin)
    if kind not in ("default", "mrope"):
        raise ConfigError(f"{origin}: rotary embedding of type {kind!r} is not supported, only plain M-RoPE")
    expect_full_attention(text, origin)


def rotary_fields(text: Fields, origin: str) -> Fields:
    """The rotary embedding's settings: `rope_parameters` (transformers 5), `rope_scaling`, or both together.

    Raises:
        ConfigError: the two disagree, or a part of the heads is rotated only.
    """
    parameters, scaling = part(text, "rope_parameters", origin), part(text, "rope_scaling", origin)
    if set(parameters) == {"full_attention"}:  # by kind of layer, of which there is one here
        parameters = part(parameters, "full_attention", origin)
    for name in ("rope_theta", "mrope_section", "factor"):
        places = [each[name] for each in (parameters, scaling, text) if each.get(name) is not None]
        if any(each != places[0] for each in places):
            raise ConfigError(
                f"{origin}: {name} stands there with several values ({places}): leave the right one"
            )
    merged = {**scaling, **parameters}
    for fields in (merged, text):
        if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ConfigError(f"{origin}: partial_rotary_factor is not supported, only whole heads")
    return merged


def rotary_theta(text: Fields, origin: str, default: float) -> float:
    """Base of the rotary frequencies, wherever it stands."""
    rope = rotary_fields(text, origin)
    return real(rope if rope.get("rope_theta") is not None else text, "rope_theta", origin, default)


def rotary_type(text: Fields, origin: str) -> str:
    """Kind of rotary embedding; `default` is the plain one."""
    rope = rotary_fields(text, origin)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def head_size(text: Fields, origin: str, hidden: int, heads: int) -> int:
    """Width of a head: its own field, or the model's width over the number of heads.

    Raises:
        ConfigError: there is no such field and the heads do not divide the width.
    """
    if text.get("head_dim") is not None:
        return size(text, "head_dim", origin)
    if hidden % heads:
        raise ConfigError(f"{origin}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    return hidden // heads


def expect_full_attention(text: Fields, origin: str) -> None:
    """Refuses sliding windows, whichever field asks for them.

    Raises:
        ConfigError: one does.
    """
    kinds = text.get("layer_types")
    sliding = isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds)
    if text.get("use_sliding_window") or sliding:
        name = "layer_types" if sliding else "use_sliding_window"
        raise ConfigError(f"{origin}: sliding-window attention is not supported ({name})")


_PLAIN = {
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 32,
    "norm_eps": 1e-6,
}
PLAIN_DECODERS: dict[str, dict[str, Any]] = {
    "llama": {**_PLAIN, "vocab_size": 32000, "intermediate_size": 11008},
    "qwen2": {**_PLAIN, "vocab_size": 151936, "intermediate_size": 22016},
}
"""Language models with a one-dimensional rotary embedding, by `model_type`: what fields left out mean."""


def plain_decoder(
    text: Fields, origin: str, kind: str, *, tied: bool, norm_eps: float | None = None
) -> LanguageModelConfig:
    """Reads a language model of `PLAIN_DECODERS`.

    Args:
        text: its part of the config.
        origin: names the file.
        kind: the `model_type` that it must have, and has where none is given.
        tied: whether the head is the embedding table, which families say in different fields.
        norm_eps: what a missing epsilon means; None takes the kind's.

    Raises:
        ConfigError: it is of another kind, or asks for what this implementation does not have.
    """
    usual = PLAIN_DECODERS[kind]
    expect(text, "model_type", kind, origin)
    expect(text, "hidden_act", "silu", origin)
    expect(text, "attention_bias", False, origin)
    expect(text, "mlp_bias", False, origin)
    scaled = _dynamic_rotary(text, origin)
    expect_full_attention(text, origin)
    if norm_eps is not None:
        usual = {**usual, "norm_eps": norm_eps}
    sizes = decoder_sizes(text, origin, usual, grouped=kind != "llama")
    head_dim = head_size(text, origin, sizes["hidden_size"], sizes["num_heads"])
    return LanguageModelConfig(
        **sizes,
        head_dim=head_dim,
        rope_theta=rotary_theta(text, origin, 10_000.0),
        mrope_section=(head_dim // 2,),
        qkv_bias=kind == "qwen2",
        tie_word_embeddings=tied,
        **scaled,
    )


def _dynamic_rotary(text: Fields, origin: str) -> dict[str, Any]:
    """The fields of a scale that leaves all sequences of the trained length alone (InternVL3).

    Raises:
        ConfigError: the rotary embedding is scaled otherwise.
    """
    rope = rotary_type(text, origin)
    if rope == "default":
        return {}
    if rope != "dynamic":
        raise ConfigError(f"{origin}: rotary embedding of type {rope!r} is not supported")
    return {
        "max_position_embeddings": size(text, "max_position_embeddings", origin, 32768),
        "dynamic_rope_factor": real(rotary_fields(text, origin), "factor", origin, 1.0),
    }


def is_tied(fields: Fields, text: Fields, origin: str, *, default: bool) -> bool:
    """Whether config.json ties the head to the embedding: the outermost field counts, then the text's."""
    for each in (fields, text):
        if each.get("tie_word_embeddings") is not None:
            return flag(each, "tie_word_embeddings", origin, default)
    return default

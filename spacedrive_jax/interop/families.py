"""The families' files: which module knows them, and config.json of any family."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.interop.hf_fields import MOST, Fields, part
from spacedrive_jax.interop.weight_table import Format, Published
from spacedrive_jax.io import MEBIBYTE, read_json, reason
from spacedrive_jax.models.config import Ids, SpecialIds, VLConfig
from spacedrive_jax.models.families import FAMILIES, family_of


def format_named(name: str) -> Format:
    """The format of a family by transformers' `model_type`."""
    # The module's name stands with the family, so that a family is registered in one place.
    return importlib.import_module(FAMILIES[name].interop).FORMAT


def format_of(config: VLConfig) -> Format:
    """The format of the family that a config belongs to."""
    return format_named(family_of(config).name)


def published_of(config: VLConfig) -> Published:
    """The published SpaceDrive on a base.

    Raises:
        ConfigError: there is none.
    """
    published = format_of(config).published
    if published is None:
        raise ConfigError(
            f"there is no published SpaceDrive on {family_of(config).name}: import its base with --from hf"
        )
    return published


def read_hf_config(source: Mapping[str, Any] | str | Path) -> VLConfig:
    """Reads the configuration of a model of any family.

    Args:
        source: The parsed config, a config.json, or a folder that holds one.

    Returns:
        The architecture.

    Raises:
        ConfigError: If the file is unreadable, is of another model, lacks a size, or uses a feature that this
            implementation does not have (scaled rotary embeddings, sliding windows, other activations).
    """
    fields, origin = _load(source)
    names = {kind: name for name, family in FAMILIES.items() for kind in (name, *family.also)}
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in names:
        expected = " or ".join(map(repr, names))
        raise ConfigError(f"{origin}: model_type is {fields.get('model_type')!r}, expected {expected}")
    try:
        return format_named(names[kind]).read_config(fields, origin)
    except SpaceDriveError as error:
        if str(origin) in str(error):
            raise
        raise ConfigError(f"{origin}: {error}") from error  # of sizes that do not fit each other


def write_hf_config(config: VLConfig, ids: SpecialIds | None = None) -> dict[str, Any]:
    """The config.json of a model, as transformers 4.52 and 5 read it.

    Args:
        config: The architecture.
        ids: What the checkpoint that it came from said of ids.

    Raises:
        ConfigError: If transformers cannot express the architecture.
    """
    fields = format_of(config).write_config(config)
    for name, value in () if ids is None else ids.named:
        fields.get("text_config", fields)[name] = list(value) if isinstance(value, tuple) else value
    return fields


def read_special_ids(folder: Path) -> SpecialIds:
    """What the files of a checkpoint say of ids: generation_config.json and config.json.

    Raises:
        SpaceDriveError: One of them is damaged.
    """
    fields, origin = _load(folder)
    file = folder / "generation_config.json"
    generation = _load(file)[0] if file.is_file() else None
    return special_ids(fields, generation, origin if generation is None else str(file))


KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
"""Fields of the decoder's config that no number depends on, and that an export hands on."""


def special_ids(fields: Fields, generation: Fields | None, origin: str) -> SpecialIds:
    """What a checkpoint says of the ids that begin, end and fill.

    Args:
        fields: config.json.
        generation: generation_config.json; None where there is none.
        origin: Names the folder.

    Raises:
        ConfigError: If one is neither a whole number, nor a list of such, nor null.
    """
    text = part(fields, "text_config", origin)
    found = {name: _ids(text if text.get(name) is not None else fields, name, origin) for name in KEPT}
    ends = found["eos_token_id"] if generation is None else _ids(generation, "eos_token_id", origin)
    stops = () if ends is None else ends if isinstance(ends, tuple) else (ends,)
    named = tuple((name, value) for name, value in found.items() if value is not None)
    return SpecialIds(tuple(dict.fromkeys(each for each in stops if each >= 0)), named)


def _ids(fields: Fields, name: str, origin: str) -> Ids | None:
    value = fields.get(name)
    several = value if isinstance(value, list) else [] if value is None else [value]
    # -1 stands for none in older files.
    if not all(type(each) is int and -1 <= each <= MOST for each in several):
        raise ConfigError(f"{origin}: {name} is {str(value)[:40]!r}, expected an id, a list of ids or null")
    return tuple(value) if isinstance(value, list) else value


def _load(source: Mapping[str, Any] | str | Path) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, Mapping):
        return source, "the given config"
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = read_json(path, most=16 * MEBIBYTE)
    except DataError as error:
        raise ConfigError(
            f"cannot read {path}: {reason(error, path)}; give a folder with transformers' config.json"
        ) from error
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{path} holds no JSON object; give a folder with transformers' config.json")
    return fields, str(path)

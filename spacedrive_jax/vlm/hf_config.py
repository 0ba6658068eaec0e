"""Reads and writes transformers' config.json; the families' fields are in `*_hf_config.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.io import MEBIBYTE, read_json
from spacedrive_jax.vlm.config import VLConfig
from spacedrive_jax.vlm.families import FAMILIES, family_of


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
    kind = fields.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        expected = " or ".join(repr(name) for name in FAMILIES)
        raise ConfigError(f"{origin}: model_type is {fields.get('model_type')!r}, expected {expected}")
    return family.read_config(fields, origin)


def write_hf_config(config: VLConfig) -> dict[str, Any]:
    """The config.json of a model, as transformers 4.52 and 5 read it.

    Raises:
        ConfigError: If transformers cannot express the architecture.
    """
    return family_of(config).write_config(config)


def _load(source: Mapping[str, Any] | str | Path) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, Mapping):
        return source, "the given config"
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = read_json(path, most=16 * MEBIBYTE)
    except DataError as error:
        raise ConfigError(
            f"cannot read {path}: {error}; give a folder with transformers' config.json"
        ) from error
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{path} holds no JSON object; give a folder with transformers' config.json")
    return fields, str(path)

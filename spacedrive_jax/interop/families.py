"""Reads and writes transformers' config.json; the families' fields are in `*_hf_config.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.interop import llava, qwen2_5_vl
from spacedrive_jax.interop.hf_fields import Fields
from spacedrive_jax.interop.llava import read_llava_config, write_llava_config
from spacedrive_jax.interop.qwen2_5_vl import read_qwen_config, write_qwen_config
from spacedrive_jax.interop.weight_table import Rule
from spacedrive_jax.io import MEBIBYTE, read_json, reason
from spacedrive_jax.models.config import LlavaConfig, QwenVLConfig, VLConfig
from spacedrive_jax.models.families.llava import Llava
from spacedrive_jax.models.families.qwen2_5_vl import QwenVL
from spacedrive_jax.models.vision_language import VisionLanguageModel

# The families of models, and what sets each apart: its class, its tables, its names.


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table below."""

    config: type[VLConfig]
    model: Callable[..., VisionLanguageModel]
    """Constructor: (config, *, compute, rngs, lora=None, new_tokens=None)."""
    rules: Callable[[Any], tuple[Rule, ...]]
    """From the config to the conversion table of the base weights."""
    read_config: Callable[[Fields, str], VLConfig]
    """From the parsed config.json and its name."""
    write_config: Callable[[Any], dict[str, Any]]
    canonical_name: Callable[[str], str]
    """From any name a tensor goes by to the one in `rules`."""
    hub_name: Callable[[str], str]


FAMILIES = {
    "qwen2_5_vl": Family(
        config=QwenVLConfig,
        model=QwenVL,
        rules=qwen2_5_vl.qwen_rules,
        read_config=read_qwen_config,
        write_config=write_qwen_config,
        canonical_name=qwen2_5_vl.canonical_name,
        hub_name=qwen2_5_vl.hub_name,
    ),
    "llava": Family(
        config=LlavaConfig,
        model=Llava,
        rules=llava.llava_rules,
        read_config=read_llava_config,
        write_config=write_llava_config,
        canonical_name=llava.canonical_name,
        hub_name=llava.hub_name,
    ),
}
"""By transformers' `model_type`."""


def family_of(config: VLConfig) -> Family:
    """The family a config belongs to."""
    return next(family for family in FAMILIES.values() if isinstance(config, family.config))


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
    try:
        return family.read_config(fields, origin)
    except SpaceDriveError as error:
        if str(origin) in str(error):
            raise
        raise ConfigError(f"{origin}: {error}") from error  # of sizes that do not fit each other


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
            f"cannot read {path}: {reason(error, path)}; give a folder with transformers' config.json"
        ) from error
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{path} holds no JSON object; give a folder with transformers' config.json")
    return fields, str(path)

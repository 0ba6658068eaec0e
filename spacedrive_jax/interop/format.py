"""What a family of vision-language models looks like in other people's files, as one object."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from spacedrive_jax.interop.hf_fields import Fields
from spacedrive_jax.interop.weight_table import Rule
from spacedrive_jax.models.config import VLConfig


@dataclasses.dataclass(frozen=True)
class Published:
    """What the published SpaceDrive does otherwise on this base."""

    presets: tuple[str, str]
    """The published runs, without and with ego status."""
    trains_table_rows: bool = False
    """The new tokens' rows are rows of the full tables (gradients masked), not small tables of their own."""
    ignores: frozenset[str] = frozenset()
    """Arguments of the published constructor that this base's class does not act on."""


@dataclasses.dataclass(frozen=True)
class Format:
    """How transformers writes a family: fields of config.json, names of tensors."""

    rules: Callable[[Any], tuple[Rule, ...]]
    """From the config to the two-way table of the base weights."""
    read_config: Callable[[Fields, str], VLConfig]
    """From the parsed config.json and its name."""
    write_config: Callable[[Any], dict[str, Any]]
    canonical_name: Callable[[str], str]
    """From any name a tensor goes by to the one in `rules`."""
    hub_name: Callable[[str], str]
    """From the name in `rules` to the one in checkpoints on the hub."""
    text_part: str = "text_config"
    """Object of config.json that holds `vocab_size` and `tie_word_embeddings`, unless they are outermost."""
    published: Published | None = None
    """None where there is no published SpaceDrive on this base."""

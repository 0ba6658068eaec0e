"""The families of vision-language models, one file each, and their registry.

A further family is one file here, one in `interop/`, and its `FAMILY` in the list below (or `register`).
"""

from __future__ import annotations

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import VLConfig
from spacedrive_jax.models.families import llava, qwen2_5_vl
from spacedrive_jax.models.family import Family

FAMILIES: dict[str, Family] = {}
"""By transformers' `model_type`."""


def register(family: Family) -> None:
    """Makes a family known.

    Raises:
        ConfigError: another one has its name or its config class.
    """
    for other in FAMILIES.values():
        if other is not family and (other.name == family.name or other.config is family.config):
            raise ConfigError(f"the family {family.name} is registered already, as {other.name}")
    FAMILIES[family.name] = family


def family_of(config: VLConfig) -> Family:
    """The family a config belongs to.

    Raises:
        ConfigError: it is of none that is registered.
    """
    for family in FAMILIES.values():
        if type(config) is family.config:
            return family
    raise ConfigError(
        f"{type(config).__name__} is the config of no registered family ({', '.join(FAMILIES)})"
    )


for _family in (qwen2_5_vl.FAMILY, llava.FAMILY):
    register(_family)

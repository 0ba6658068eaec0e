"""The families of vision-language models, one file each, and the list of them.

A further family is one file here, one in `interop/`, and its `FAMILY` in the list below (or `register`).
"""

from __future__ import annotations

from spacedrive_jax.models.families import internvl, llava, qwen2_5_vl, qwen3_vl, smolvlm
from spacedrive_jax.models.family import FAMILIES, family_of, register

__all__ = ["FAMILIES", "family_of", "register"]

for _family in (qwen2_5_vl.FAMILY, llava.FAMILY, qwen3_vl.FAMILY, smolvlm.FAMILY, internvl.FAMILY):
    register(_family)

"""The depth that a run saw, where a network gave it: from the sidecar that its config names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax.console import UserError
from spacedrive_jax.data.records import Record, Records
from spacedrive_jax.depth.sources import (
    CACHED,
    DepthConfig,
    DepthSource,
    open_depth_cache,
    record_patch_depth,
)

CONFIG = "run_depth_config"
"""Entry of a record that `with_run_depth` adds beside the sidecar's."""


def with_run_depth(records: Records, config: Mapping[str, Any] | None, notices: list[str]) -> Records:
    """Records that carry the depth of the run's sidecar; unchanged where the run needed none.

    Args:
        records: the records to show.
        config: the run's `config.json`, if there is one.
        notices: gets a sentence where there should be a sidecar and it cannot be read.
    """
    settings = (config or {}).get("data", {}).get("depth", {})
    depth = DepthConfig(**(settings | {"sources": tuple(settings.get("sources", DepthConfig().sources))}))
    try:
        cache = open_depth_cache(records, depth)
    except UserError as error:
        notices.append(f"The depth that the run saw is not shown: {error}.")
        return records
    if cache is None:
        return records
    return dataclasses.replace(records, extra=lambda token: {CACHED: cache.read(token), CONFIG: depth})


def run_depth(record: Record) -> tuple[Float[np.ndarray, "N h w"], list[DepthSource]] | None:
    """Depth on the run's grid of visual tokens, metres, and each camera's source; None without a sidecar."""
    cached: Any = record.get(CACHED)
    config: Any = record.get(CONFIG)
    if cached is None or config is None:
        return None
    rows, columns = cached.patch_depth.shape[1:]
    return record_patch_depth(record, (rows, columns), config)

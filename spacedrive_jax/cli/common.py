"""Where compiled programs are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def use_compilation_cache(folder: Path | None = None) -> None:
    """Keeps compiled programs between runs.

    Args:
        folder: where; by default what JAX_COMPILATION_CACHE_DIR says, else `spacedrive_jax/xla` in the user's
            cache folder.
    """
    import jax

    if folder is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spacedrive_jax" / "xla"
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))

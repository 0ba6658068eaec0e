"""What several commands share: where compiled programs are kept, and advice where memory is short."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from spacedrive_jax import console
from spacedrive_jax.buckets import cache_folder
from spacedrive_jax.errors import SpaceDriveError


def use_compilation_cache(folder: Path | None = None) -> None:
    """Keeps compiled programs between runs.

    Args:
        folder: where; by default what JAX_COMPILATION_CACHE_DIR says, else `spacedrive_jax/xla` in the user's
            cache folder.
    """
    import jax

    if folder is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = cache_folder() / "xla"
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))


@contextlib.contextmanager
def advice_on_memory(advice: str | Callable[[], str]) -> Iterator[None]:
    """Says what to do where the devices have too little memory.

    Args:
        advice: what; or what finds out, for which the failed work's arrays are let go first.
    """
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not console.is_out_of_memory(error):
            raise
        said = console.first_line(error)
        traceback.clear_frames(error.__traceback__)
    else:
        return
    advice = advice if isinstance(advice, str) else advice()
    raise SpaceDriveError(f"the devices ran out of memory ({said}): {advice}")

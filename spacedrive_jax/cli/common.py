"""What several commands share: hosts that end together, devices, compiled programs, advice on memory."""

from __future__ import annotations

import contextlib
import functools
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spacedrive_jax import console
from spacedrive_jax.buckets import cache_folder
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.io import is_bucket

if TYPE_CHECKING:
    from jax.sharding import Mesh

TOKEN_VARIABLE = "SPACEDRIVE_TOKEN"

C = TypeVar("C", bound=console.Command)


def on_all_hosts(run: Callable[[C], Mapping[str, Any]]) -> Callable[[C], Mapping[str, Any]]:
    """Lets a command that several hosts run as one (`--coordinator`) end on all of them when it fails on one.

    Args:
        run: the command's own, which joins the hosts (`connect`).
    """

    @functools.wraps(run)
    def together(command: C) -> Mapping[str, Any]:
        if getattr(command, "coordinator", None) is None:
            return run(command)
        from spacedrive_jax.training.hosts import failing_together

        with failing_together():
            return run(command)

    return together


def use_compilation_cache(folder: Path | None = None) -> None:
    """Keeps compiled programs between runs.

    Args:
        folder: where; by default what JAX_COMPILATION_CACHE_DIR says, else `spacedrive_jax/xla` in the user's
            cache folder.

    Raises:
        ConfigError: it was named and cannot be written: jax would go on without, and compile at every start.
    """
    import jax

    if folder is not None and not is_bucket(folder):
        there = next(one for one in (folder.resolve(), *folder.resolve().parents) if os.path.exists(one))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"--compilation-cache {folder}: {there} is no folder that can be written to")
    if folder is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = cache_folder() / "xla"
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))


def server_token(flag: str | None) -> str | None:
    """The token of a policy server: the flag's, else the environment's; None for a server without one."""
    return flag or os.environ.get(TOKEN_VARIABLE) or None


def mesh_of(text: str | None, *, local: bool = False) -> Mesh | None:
    """The devices that `--mesh` names; None where it names none.

    Args:
        text: such as `data=4,fsdp=2`.
        local: over the devices of this host alone.

    Raises:
        ConfigError: it is no mesh, or does not fit the devices.
    """
    if text is None:
        return None
    import jax

    from spacedrive_jax.aot.search import parse_mesh
    from spacedrive_jax.training.sharding import make_mesh

    return make_mesh(parse_mesh(text), jax.local_devices() if local else None)


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

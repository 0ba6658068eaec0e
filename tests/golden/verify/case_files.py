"""The files of a case; what is missing or damaged in them is named."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spacedrive_jax.errors import ConfigError, DataError

SETTINGS_FILE = "config.json"


class Recorded(dict[str, Any]):
    """What a file of a case holds, by name; asking for what it lacks names file and array."""

    def __init__(self, origin: str, content: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        """Wraps a mapping.

        Args:
            origin: what to call it in the message.
            content: names and values.
        """
        super().__init__(content)
        self.origin = origin

    def __missing__(self, name: str) -> Any:
        raise DataError(f"{self.origin} lacks {name!r}: the case is incomplete")


def read_settings(folder: Path) -> Recorded:
    """config.json of a case, whose `kind` says what the case holds.

    Raises:
        DataError: it is missing or damaged, or no JSON object.
    """
    file = folder / SETTINGS_FILE
    try:
        settings = json.loads(
            file.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: Recorded(str(file), pairs)
        )
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder} is not a case: {error}") from error
    if not isinstance(settings, Recorded):
        raise DataError(f"{file} is no JSON object; a case's settings are")
    return settings


def read_arrays(path: Path) -> Recorded:
    """All arrays of an npz file.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is no npz file")
            return Recorded(str(path), {name: file[name] for name in file.files})
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; the case is incomplete") from error


def choose(names: Iterable[str], only: Collection[str], folder: Path) -> list[str]:
    """The settings of a case that were asked for, in the case's order; all where none were.

    Raises:
        ConfigError: a name that the case does not have.
    """
    known = list(names)
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ConfigError(f"{folder} has no {', '.join(unknown)}; --only takes {', '.join(known)}")
    return [name for name in known if not only or name in only]

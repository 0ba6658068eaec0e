"""The files of a case; what is missing or damaged in them is named."""

from __future__ import annotations

import contextlib
import contextvars
import json
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from spacedrive_jax.errors import ConfigError, DataError

SETTINGS_FILE = "config.json"


class Recorded(dict[str, Any]):
    """What a file of a case holds, by name; asking for what it lacks names file and array.

    It keeps in mind which values were asked for (by name, not by going through all of them).
    """

    def __init__(self, origin: str, content: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        """Wraps a mapping.

        Args:
            origin: what to call it in the message.
            content: names and values.
        """
        super().__init__(content)
        self.origin = origin
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """One value."""
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """One value, or `default`."""
        self.asked.add(name)
        return super().get(name, default)

    def __missing__(self, name: str) -> Any:
        raise DataError(f"{self.origin} lacks {name!r}: the case is incomplete")


_outputs: contextvars.ContextVar[list[Recorded] | None] = contextvars.ContextVar("_outputs", default=None)


@contextlib.contextmanager
def watching_outputs() -> Iterator[list[Recorded]]:
    """What is recorded to compare with, as it is opened."""
    opened: list[Recorded] = []
    token = _outputs.set(opened)
    try:
        yield opened
    finally:
        _outputs.reset(token)


def watched(outputs: Recorded) -> Recorded:
    """Recorded outputs, of which it is to be known whether all were compared."""
    opened = _outputs.get()
    if opened is not None:
        opened.append(outputs)
    return outputs


def left_out(opened: Iterable[Recorded], *, of: Path | None) -> list[str]:
    """Recorded arrays that nothing was compared with.

    Args:
        opened: from `watching_outputs`.
        of: the case, whose output files that were not opened are named too; None names none.
    """
    opened = list(opened)
    names = [
        f"{Path(outputs.origin).stem}/{name}"
        for outputs in opened
        for name in outputs
        if name not in outputs.asked
    ]
    files = [] if of is None else sorted(of.glob("outputs*.npz"))
    stems = {Path(outputs.origin).stem for outputs in opened}
    return names + [file.name for file in files if not any(fnmatch(file.stem, stem) for stem in stems)]


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
            found = Recorded(str(path), {name: file[name] for name in file.files})
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; the case is incomplete") from error
    return watched(found) if path.name.startswith("outputs") else found


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

"""Buckets: files and folders that `gs://` names, beside those of this machine.

`place` makes of a name the path that all rooms work with: a `pathlib.Path`, or a `BucketPath`, which has the
same methods (etils' epath, over gcsfs). Small files are read and written where they are; an object appears
whole or not at all. What needs a disk (memory-mapped weights, files that grow, locks) has its place in a
twin: a file of the same name below `cache_folder()`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from etils.epath.gpath import PosixGPath

from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError

SCHEME = "gs://"
MOUNT = "mount the bucket (gcsfuse, rclone mount) and give the folder, or copy it to a disk first"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_FETCHED = ".fetched.json"
"""Of a fetched folder: which generation each file is of."""


class BucketPath(PosixGPath):
    """A file or folder of a bucket, with the methods of a `pathlib.Path` that this project uses."""

    def resolve(self, strict: bool = False) -> BucketPath:
        """Itself: there are no links, and no working folder."""
        return self

    def is_symlink(self) -> bool:
        """False."""
        return False

    # Those of fsspec take whatever goes wrong, a login that is missing too, for a no.
    def exists(self) -> bool:
        """Whether there is an object of this name, or a folder."""
        return self._kind() is not None

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether there is something below this name."""
        return self._kind() == "directory"

    def _kind(self) -> str | None:
        try:
            kind: str = _about(self)["type"]
        except FileNotFoundError:
            return None
        return kind

    def rglob(self, pattern: str) -> Iterator[BucketPath]:
        """All files below whose name matches."""
        return (each for each in map(type(self), files_below(self)) if each.match(pattern))


def is_bucket(path: object) -> TypeGuard[BucketPath]:
    """Whether a path or name is of a bucket."""
    return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(SCHEME)


def place(name: str | os.PathLike[str]) -> Path:
    """The path that a name stands for, on this machine or in a bucket.

    Args:
        name: a path, or `gs://BUCKET/PATH`.

    Returns:
        A `pathlib.Path`; of a bucket a `BucketPath`, which is used like one. `~/` is the home folder: shells
        leave it alone in `--out=~/x` and Python everywhere, and a folder of that name is removed with it.

    Raises:
        ConfigError: it is no path, in a store of another kind, or gcsfs is not installed.
    """
    if not isinstance(name, str | os.PathLike):
        raise ConfigError(f"expected a path, text or pathlib's, not {type(name).__name__}")
    text = os.fspath(name)
    if isinstance(name, Path):
        if name.parts and _URL.fullmatch(name.parts[0] + "//"):
            raise ConfigError(
                f"{name} has lost a slash: a bucket's path is made with spacedrive_jax.io.place(...), "
                "not with pathlib"
            )
        return _at_home(name)
    match = _URL.fullmatch(text)
    if match is None:
        return _at_home(Path(text))
    if match[1] != "gs":
        raise ConfigError(f"{text}: only gs:// buckets are read and written directly; {MOUNT}")
    if not match[2].strip("/"):
        raise ConfigError(f"{text} names no bucket: give gs://BUCKET/PATH")
    require_gcs(text)
    path: Any = BucketPath(text)
    return path


def _at_home(path: Path) -> Path:
    if path.parts[:1] != ("~",):
        return path
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: this user has no home folder (HOME): give the whole path") from error


def require_gcs(what: str) -> None:
    """Refuses a bucket where nothing is installed that reads one.

    Raises:
        ConfigError: saying what to install.
    """
    missing = [name for name in ("gcsfs", "google.cloud.storage") if not _is_installed(name)]
    if missing:
        raise ConfigError(
            f"{what} needs {' and '.join(missing)}: pip install -r requirements-gcs.txt (the extra [gcs]); "
            f"or {MOUNT}"
        )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def file_system() -> Any:
    """gcsfs, as epath uses it, without its memory of listings: tensorstore writes beside it."""
    fsspec = importlib.import_module("fsspec")
    for protocol in ("gs", "gcs"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs", finalize_on_close=True)


@contextlib.contextmanager
def saying(path: object) -> Iterator[None]:
    """Turns what the client of a bucket raises into one line that names the object.

    Raises:
        DataError: instead of any other error.
    """
    try:
        yield
    except SpaceDriveError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except Exception as error:  # aiohttp's, google-auth's and gcsfs' own kinds
        raise _unreachable(path, error) from error


def _unreachable(path: object, error: Exception) -> DataError:
    said = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
    return DataError(
        f"{path} cannot be reached ({said}): is the bucket's name right, and are you logged in "
        "(gcloud auth application-default login)?"
    )


def _about(path: os.PathLike[str]) -> dict[str, Any]:
    """What the bucket says of a file or folder.

    Raises:
        FileNotFoundError: there is neither.
        DataError: the bucket cannot be asked.
    """
    try:
        about: dict[str, Any] = file_system().info(os.fspath(path))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise _unreachable(path, error) from error
    return about


def size_of(path: os.PathLike[str]) -> int | None:
    """Bytes of an object; None where the name is a folder's.

    Raises:
        DataError: there is neither.
    """
    with saying(path):
        about = _about(path)
    return None if about["type"] == "directory" else int(about["size"])


def read(path: os.PathLike[str], start: int | None = None, end: int | None = None) -> bytes:
    """An object's bytes, or some of them.

    Raises:
        DataError: it cannot be read.
    """
    with saying(path):
        data: bytes = file_system().cat_file(os.fspath(path), start, end)
    return data


def files_below(folder: os.PathLike[str]) -> dict[str, int]:
    """Every object below a folder, as `gs://…`, and its generation.

    Raises:
        DataError: the bucket cannot be asked.
    """
    with saying(folder):
        found = file_system().find(os.fspath(folder), detail=True)
    return {f"{SCHEME}{name}": int(about.get("generation") or 0) for name, about in sorted(found.items())}


def cache_folder() -> Path:
    """Where the project's caches lie: what SPACEDRIVE_CACHE says, else in the user's cache folder."""
    if chosen := os.environ.get("SPACEDRIVE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spacedrive_jax"


def twin(path: str | os.PathLike[str]) -> Path:
    """Where a bucket's file or folder has its place on this machine's disk; nothing is fetched."""
    return cache_folder() / "buckets" / os.fspath(path).removeprefix(SCHEME)


def local(name: str | os.PathLike[str]) -> Path:
    """A file or folder on this machine: itself, or a copy of a bucket's.

    What is copied already is not copied again, unless it is of another generation by now.

    Args:
        name: a path, or `gs://BUCKET/PATH`.

    Raises:
        DataError: it is in a bucket and there is no such file or folder, or it cannot be reached.
        ConfigError: see `place`.
    """
    path = place(name)
    return fetch(path) if is_bucket(path) else path


def fetch(path: os.PathLike[str]) -> Path:
    """Copies a file, or a folder with all that is below it, onto this machine (see `local`)."""
    wanted = files_below(path)
    if not wanted:
        raise DataError(f"{path}: there is no such file or folder")
    copy = twin(path)
    is_file = list(wanted) == [os.fspath(path)]
    note = copy.with_name(f".{copy.name}{_FETCHED}") if is_file else copy / _FETCHED
    held: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        held = json.loads(note.read_text())
    for name, generation in wanted.items():
        target = twin(name)
        if held.get(name) != generation or not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder, saying(name):
                file_system().get_file(name, os.path.join(folder, "file"))
                os.replace(os.path.join(folder, "file"), target)
    for name in held.keys() - wanted.keys():
        twin(name).unlink(missing_ok=True)
    partial = note.with_name(f"{note.name}-{os.getpid()}")
    partial.write_text(json.dumps(wanted))
    os.replace(partial, note)
    return copy


def upload(file: str | os.PathLike[str], target: os.PathLike[str]) -> None:
    """Puts a file into a bucket, where it appears whole.

    Raises:
        DataError: it cannot be written.
    """
    with saying(target):
        file_system().put_file(os.fspath(file), os.fspath(target))


def upload_folder(folder: Path, target: os.PathLike[str]) -> None:
    """Puts all files below a folder into a bucket, those by which a folder is known (*.json) last.

    Raises:
        DataError: one cannot be written.
    """
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    for file in sorted(files, key=lambda each: each.suffix == ".json"):
        upload(file, place(f"{os.fspath(target)}/{file.relative_to(folder).as_posix()}"))


def move(folder: os.PathLike[str], target: os.PathLike[str], *, first: str) -> None:
    """Gives a folder another name in its bucket: object by object, as there is no renaming.

    Args:
        folder: to move.
        target: its new name.
        first: name of the file without which the folder is none any more; it is removed before the others.

    Raises:
        DataError: an object cannot be copied or removed.
    """
    source, to = os.fspath(folder), os.fspath(target)
    with saying(folder):
        for name in files_below(folder):
            file_system().cp_file(name, to + name.removeprefix(source))
        file_system().rm_file(f"{source}/{first}")
    remove(folder)


def remove(path: os.PathLike[str]) -> None:
    """Removes an object, or a folder with all that is below it.

    Raises:
        DataError: it cannot be removed.
    """
    with saying(path):
        file_system().rm(os.fspath(path), recursive=True)

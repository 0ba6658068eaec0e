"""Files: read only what is a regular file and no larger than it may be; written whole or not at all.

Everything that the project opens or writes by itself goes through here, so that the rules hold everywhere:
a FIFO or device is refused before it is opened (it would hang), a size is checked before memory is taken,
an error names the file, and what appears under a final name is complete. A path may be of a bucket too
(`place`, see `buckets`), where a file is an object: it is uploaded when it is whole.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import glob
import hashlib
import io
import json
import math
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import GenericAlias
from typing import Any, BinaryIO, TypeVar

import msgspec

from spacedrive_jax import buckets
from spacedrive_jax.buckets import BucketPath, is_bucket, local, place, twin
from spacedrive_jax.errors import DataError, SpaceDriveError

__all__ = ("BucketPath", "is_bucket", "local", "place", "twin")

MEBIBYTE = 1 << 20
_UNFINISHED = f"unfinished-{socket.gethostname()}-"
"""Of a folder that is being made; process numbers mean something on their own machine only."""
_SAY = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: check the owner and the mode of the file and its folder",
    errno.EPERM: "permission denied: check the owner and the mode of the file and its folder",
    errno.ENOENT: "there is no such file",
    errno.EISDIR: "it is a folder",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.ELOOP: "its links go in a circle",
    errno.EEXIST: "a file, or a link to nothing, is in the way: remove it or choose another name",
}


def say(error: OSError) -> str:
    """What an operating system's error means for the user, with the way out where there is one."""
    return _SAY.get(error.errno or 0, error.strerror or str(error) or type(error).__name__)


def said_by(error: Exception, path: str | os.PathLike[str]) -> str:
    """What a library's error in writing a file means: it puts the operating system's into words of its own.

    Args:
        error: the library's.
        path: the file; a program that writes it (ffmpeg) may only say that it has ended.
    """
    codes = [code for code in _SAY if os.strerror(code) in str(error)]
    if isinstance(error, OSError) and error.errno in _SAY:
        codes.insert(0, error.errno)
    folder = place(path).parent
    if not codes and folder.is_dir() and shutil.disk_usage(folder).free < MEBIBYTE:
        codes = [errno.ENOSPC]
    return _SAY[codes[0]] if codes else (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: Exception, path: object) -> str:
    """What an error says of a file without the file's name before it, for a sentence that names it."""
    return str(error).removeprefix(str(path)).lstrip(": ").removeprefix("is ")


def require_regular(path: str | os.PathLike[str], *, most: int | None = None) -> int:
    """Size in bytes of a file that can be read without hanging.

    Args:
        path: the file; links are followed.
        most: refuse more bytes than this.

    Raises:
        DataError: there is no such file, it is a folder, FIFO, socket or device, or it is too large.
    """
    if is_bucket(path):
        found = buckets.size_of(path)
        kind, size = ("a folder", 0) if found is None else ("", found)
    else:
        try:
            status = os.stat(place(path))
        except OSError as error:
            raise DataError(f"{path}: {say(error)}") from error
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        kind, size = "" if stat.S_ISREG(status.st_mode) else kind, status.st_size
    if kind:
        raise DataError(f"{path} is {kind}, not a regular file")
    if most is not None and size > most:
        raise DataError(f"{path} has {size:,} bytes, more than the {most:,} that such a file may have")
    return size


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether an optional file is there; what stands in its place is not taken for "no".

    Raises:
        DataError: a folder, FIFO, socket or device has its name.
    """
    if not place(path).exists():
        return False
    require_regular(path)
    return True


def read_bytes(path: str | os.PathLike[str], *, most: int | None = None) -> bytes:
    """All bytes of a regular file.

    Args:
        path: the file.
        most: refuse more bytes than this.

    Raises:
        DataError: it cannot be read, or is too large.
    """
    size = require_regular(path, most=most)
    if is_bucket(path):
        return buckets.read(path)
    try:
        with open(path, "rb") as file:
            # A file that grows while it is read, or lies about its size (/proc), is cut here.
            return file.read(size if most is None else most)
    except OSError as error:
        raise DataError(f"{path}: {say(error)}") from error


def read_text(path: str | os.PathLike[str], *, most: int | None = None) -> str:
    """A regular file as UTF-8 text.

    Raises:
        DataError: it cannot be read, is too large, or is not UTF-8.
    """
    data = read_bytes(path, most=most)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): is it damaged?") from error


def parse_json(
    text: str | bytes,
    path: object,
    *,
    nan: bool = False,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """JSON by the standard: no NaN or Infinity, no key given twice, no nesting without end.

    Args:
        text: the JSON.
        path: what to call it in an error.
        nan: take NaN and Infinity, which Python's own writer leaves, as such numbers.
        pairs: makes something of an object's keys and values; by default a dictionary of keys given once.

    Raises:
        DataError: it is not that.
    """
    try:
        constant = float if nan else _refuse_constant
        return json.loads(text, parse_constant=constant, parse_int=_whole, object_pairs_hook=pairs or _unique)
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply to be a file of this project") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError among them
        raise DataError(f"{path} is not JSON ({error}): is it damaged?") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _whole(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"{digits[:20]}... has {len(digits)} digits, more than any number here")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return values


MOST_JSON = 256 * MEBIBYTE
"""Of a JSON file, or of one line of JSON Lines, where nothing less is said: as Python's objects some 3 GB."""


def read_json(path: str | os.PathLike[str], *, most: int = MOST_JSON, nan: bool = False) -> Any:
    """A JSON file (see `parse_json`).

    Raises:
        DataError: it cannot be read, is too large, or is not JSON.
    """
    return parse_json(read_text(path, most=most), path, nan=nan)


def read_json_lines(path: str | os.PathLike[str], *, nan: bool = False) -> Iterator[tuple[str, Any]]:
    """The values of a JSON Lines file, blank lines left out.

    Args:
        path: the file.
        nan: see `parse_json`.

    Yields:
        what to call the line in an error (`FILE, line 3:`), and its value.

    Raises:
        DataError: the file cannot be read, or a line is not JSON; it is named.
    """
    require_regular(path)
    try:
        with _opened(path) as lines:
            number = 0
            while line := lines.readline(MOST_JSON + 1):
                number += 1
                where = f"{path}, line {number}:"
                if len(line) > MOST_JSON:
                    raise DataError(f"{where} is longer than the {MOST_JSON:,} bytes that a line may have")
                if line.strip():
                    yield where, parse_json(line, where, nan=nan)
    except OSError as error:
        if isinstance(error, SpaceDriveError):
            raise
        raise DataError(f"{path}: {say(error)}") from error


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    return io.BytesIO(buckets.read(path)) if is_bucket(path) else open(path, "rb")


def strict(value: Any) -> Any:
    """The same value as strict JSON can say it: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value: Any, **options: Any) -> str:
    """Strict JSON text; see `strict`. `options` are those of `json.dumps`."""
    return json.dumps(strict(value), allow_nan=False, **options)


def json_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of an object's strict JSON, its own `digest` left out."""
    rest = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(to_json(rest, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that appears under its name when it is complete, and not at all when anything fails.

    It is written beside its place, flushed to the disk and renamed, with the mode that umask asks for. A
    bucket's is written to a scratch file and uploaded.

    Args:
        path: the file; its folder is made. An older file of this name is replaced.

    Raises:
        SpaceDriveError: the operating system refuses; the message names the file and the way out.
    """
    final = place(path)
    if is_bucket(final):
        with tempfile.NamedTemporaryFile(prefix="spacedrive-") as scratch:
            yield scratch  # type: ignore[misc]
            scratch.flush()
            buckets.upload(scratch.name, final)
        return
    require_replaceable(final)
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, final)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, SpaceDriveError):
            raise
        raise SpaceDriveError(f"cannot write {final}: {say(error)}") from error


def require_replaceable(path: str | os.PathLike[str]) -> None:
    """Refuses to put a file in the place of a device, a pipe or a socket (`--out /dev/null`).

    Raises:
        SpaceDriveError: it is one, or a link to one.
    """
    special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    # /dev/stdout is a link to whatever file the shell opened; the link is what would be replaced.
    if special or os.path.dirname(os.path.abspath(path)) in ("/dev", "/dev/fd", "/proc/self/fd"):
        raise SpaceDriveError(f"cannot write {os.fspath(path)}: it is a device or a pipe, name a file")


def remove_partials(folder: Path) -> None:
    """Removes what `atomic_write` of a killed process left below a folder that nobody else writes."""
    for partial in folder.rglob(".*.partial-*"):
        partial.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder of this project's own, here or in a bucket, with all that is below it, if it is there.

    Raises:
        DataError: the bucket cannot be written.
    """
    if not is_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        buckets.remove(folder)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a whole file (see `atomic_write`)."""
    with atomic_write(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a whole UTF-8 file with line feeds (see `atomic_write`)."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any, **options: Any) -> None:
    """Writes a whole file of strict JSON with a line feed at its end (see `to_json`, `atomic_write`)."""
    write_text(path, to_json(value, **options) + "\n")


def write_part(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a file inside a folder that is being made and appears as a whole (`atomic_folder`).

    Args:
        path: the file; its folder is made.
        data: bytes, or text to be written as UTF-8 with line feeds.

    Raises:
        SpaceDriveError: the operating system refuses.
    """
    final = place(path)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        final.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    except OSError as error:
        raise SpaceDriveError(f"cannot write {final}: {say(error)}") from error


def put_in_place(partial: str | os.PathLike[str], final: str | os.PathLike[str]) -> None:
    """Gives a file that is complete its name, over an older one.

    For files that another library or a long run writes, where `atomic_write` cannot be used.

    Args:
        partial: the file, on this machine.
        final: its name, here or in a bucket.

    Raises:
        SpaceDriveError: the operating system refuses.
    """
    try:
        if is_bucket(final):
            buckets.upload(partial, final)
            os.unlink(partial)
        else:
            require_replaceable(final)
            os.replace(partial, place(final))
    except OSError as error:
        raise SpaceDriveError(f"cannot write {final}: {say(error)}") from error


def put(file: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Brings a copy of a file of this machine to its place in a bucket, where it appears whole.

    Raises:
        DataError: the bucket cannot be written.
    """
    buckets.upload(file, place(target))


class LineFile:
    """A text file that grows by whole lines, each on the disk's way before `write` returns.

    A process that dies leaves at most its last line cut off, which readers of such a file leave out.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file to go on behind what it holds; its folder must be there.

        Raises:
            SpaceDriveError: the operating system refuses.
        """
        self._path = place(path)
        if is_bucket(self._path):
            raise SpaceDriveError(f"{path} grows by lines, which an object of a bucket cannot: use a disk")
        try:
            self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise SpaceDriveError(f"cannot write {path}: {say(error)}") from error

    def write(self, line: str) -> None:
        """Adds a line.

        Raises:
            SpaceDriveError: the operating system refuses.
        """
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise SpaceDriveError(f"cannot write {self._path}: {say(error)}") from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that appears under its name when it is complete, and not at all when anything fails.

    While it is made it is kept for this job (see `output_lock`). A bucket's is made on this machine and
    uploaded, those files last by which such a folder is known (*.json).

    Args:
        path: the folder, which must not exist.

    Yields:
        the folder beside it to write into.

    Raises:
        SpaceDriveError: it exists, another job makes it, or the operating system refuses.
    """
    final = place(path)
    beside = twin(final) if is_bucket(final) else final
    unfinished = beside.with_name(f".{final.name}.{_UNFINISHED}{os.getpid()}")
    try:
        with output_lock(final):
            if final.exists() or final.is_symlink():
                raise SpaceDriveError(f"{final} exists: choose another folder, or remove it first")
            unfinished.mkdir(parents=True)
            try:
                yield unfinished
                if is_bucket(final):
                    buckets.upload_folder(unfinished, final)
                else:
                    unfinished.rename(final)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        if isinstance(error, SpaceDriveError):
            raise
        raise SpaceDriveError(f"cannot write {final}: {say(error)}") from error


def remove_stale(path: str | os.PathLike[str]) -> None:
    """Removes what processes that are gone left half written beside a place (see `atomic_folder`).

    Args:
        path: the folder that was to be made.
    """
    final = twin(path) if is_bucket(path) else place(path)
    prefix = f".{final.name}.{_UNFINISHED}"
    for found in final.parent.glob(f"{glob.escape(prefix)}*"):
        number = found.name.removeprefix(prefix)
        if number.isdecimal() and not _is_alive(int(number)):
            shutil.rmtree(found, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def inside(root: str | os.PathLike[str], name: str, what: str) -> Path:
    """The file that a name from somebody's file means below a folder.

    Args:
        root: the folder.
        name: relative path, as the file has it.
        what: what names it, for the error (`sample_data 3f…: filename`).

    Raises:
        DataError: the name is absolute, goes up, or is empty: it would leave the folder.
    """
    parts = Path(name).parts
    if not name or "\0" in name or "\\" in name or Path(name).is_absolute() or ".." in parts:
        raise DataError(f"{what} {name!r} does not stay inside {root}")
    return place(root) / name


T = TypeVar("T")


def read_typed(
    path: str | os.PathLike[str],
    kind: type[T] | GenericAlias,
    *,
    most: int | None = None,
    advice: str = "is it damaged?",
) -> T:
    """A JSON file as a typed value, decoded and checked in one go (see `convert`).

    Raises:
        DataError: it cannot be read, is too large, is not JSON, or a value is not what it should be.
    """
    data = read_bytes(path, most=most)
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise DataError(f"{path}: {error}; {advice}") from error


def convert(value: Any, kind: type[T] | GenericAlias, path: object, advice: str = "is it damaged?") -> T:
    """A value that JSON gave, as the type that a file of this name has.

    Args:
        value: from `read_json`.
        kind: a `msgspec.Struct`, a dataclass or any type msgspec knows; its limits are checked.
        path: what to call it in an error.
        advice: what to do, for the error.

    Raises:
        DataError: a field is missing, of another type, or out of its limits.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError, UnicodeEncodeError, OverflowError) as error:
        raise DataError(f"{path}: {error}; {advice}") from error


class _Holder(msgspec.Struct):
    """Who holds a folder."""

    pid: int
    host: str
    since: str


LOCK = ".in-use.json"


@contextlib.contextmanager
def folder_lock(
    folder: str | os.PathLike[str], *, name: str = LOCK, take_over: bool = False
) -> Iterator[None]:
    """Keeps a folder for one job at a time; the other is told who holds it.

    The lock is a file in the folder, locked by the kernel and with the holder's name in it. A job that was
    killed leaves the file behind, and the next one on the same machine takes it over; on another machine,
    where that cannot be known, the message says which file to remove. A bucket knows no locks: of its folder
    the twin on this machine is kept, which tells jobs of one machine apart.

    Args:
        folder: is made if it does not exist.
        name: of the lock; hosts that share a folder each take one of their own.
        take_over: take a lock that a job on another machine left, unless the file system knows it held:
            for jobs that a scheduler kills and starts again elsewhere.

    Raises:
        SpaceDriveError: another job holds it, or it cannot be written to.
    """
    path = (twin(folder) if is_bucket(folder) else place(folder)) / name
    made = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(path, place(folder), take_over=take_over)
    except OSError as error:
        if isinstance(error, SpaceDriveError):
            raise
        if made:
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        raise SpaceDriveError(f"cannot write into {folder}: {say(error)}") from error
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if made:  # a job that failed at once leaves nothing behind
                with contextlib.suppress(OSError):
                    path.parent.rmdir()


@contextlib.contextmanager
def output_lock(output: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps a file or folder that is to be written for one job at a time (see `folder_lock`).

    Args:
        output: need not exist; the lock `.NAME.in-use.json` lies beside it.

    Raises:
        SpaceDriveError: another job writes it, or its folder cannot be written to.
    """
    final = place(output)
    beside = twin(final) if is_bucket(final) else final
    path = beside.with_name(f".{final.name}{LOCK}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(path, final)
    except OSError as error:
        if isinstance(error, SpaceDriveError):
            raise
        raise SpaceDriveError(f"cannot write {final}: {say(error)}") from error
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path, what: Path, *, take_over: bool = False) -> BinaryIO:
    """The lock file, held and with this job's name in it; `what` it keeps is named where another holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        file = os.fdopen(descriptor, "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                file.close()
                raise
            holder = _holder(file)
            file.close()
            who = f" by {_name(holder)}" if holder else ""
            raise SpaceDriveError(f"{what} is in use{who}: wait for that job, or end it") from None
        # Its last holder may have removed the file between opening and locking it.
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            break
        file.close()
    holder = _holder(file)
    if holder is not None and holder.host != socket.gethostname() and not take_over:
        # A file system may keep locks within one machine.
        file.close()
        raise SpaceDriveError(
            f"{what} is in use by {_name(holder)}: wait for that job, or remove {path} if it is gone"
        )
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        file.seek(0)
        file.truncate()
        file.write(to_json({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode())
        file.flush()
    except OSError:  # a full disk: what was not begun leaves no lock behind
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.close()
        raise
    return file


def _holder(file: BinaryIO) -> _Holder | None:
    try:
        return msgspec.json.decode(file.read(4096), type=_Holder)
    except (msgspec.DecodeError, UnicodeDecodeError):  # empty: its holder is just writing it
        return None


def _name(holder: _Holder) -> str:
    return f"process {holder.pid} on {holder.host} since {holder.since}"

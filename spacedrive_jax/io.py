"""Files: read only what is a regular file and no larger than it may be; written whole or not at all.

Everything that the project opens or writes by itself goes through here, so that the rules hold everywhere:
a FIFO or device is refused before it is opened (it would hang), a size is checked before memory is taken,
an error names the file, and what appears under a final name is complete. A path may be of a bucket too
(`place`, see `buckets`), where a file is an object: it is uploaded when it is whole.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from spacedrive_jax import buckets
from spacedrive_jax.buckets import BucketPath, is_bucket, local, place, twin
from spacedrive_jax.errors import DataError, SpaceDriveError

__all__ = ("BucketPath", "is_bucket", "local", "place", "twin")

MEBIBYTE = 1 << 20
PIECE = 16 * MEBIBYTE
"""Of an object in a bucket that is read piece by piece."""
BYTE_ORDER_MARK = codecs.BOM_UTF8
"""Which some editors put in front of a UTF-8 text."""
_SAY = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: check the owner and the mode of the file and its folder",
    errno.EPERM: "permission denied: check the owner and the mode of the file and its folder",
    errno.ENOENT: "there is no such file",
    errno.EISDIR: "it is a folder",
    errno.EFBIG: "it would be larger than a file may be here: raise the limit (ulimit -f), or choose a disk",
    errno.EBUSY: "it is in use, or a disk is mounted there: name a folder inside it",
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


def has_files(folder: str | os.PathLike[str], *names: str) -> bool:
    """Whether a folder holds files of all these names."""
    return all((place(folder) / name).is_file() for name in names)


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


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file of any size, in hexadecimal.

    Raises:
        DataError: it cannot be read.
    """
    size = require_regular(path)
    if is_bucket(path):
        whole = hashlib.sha256()
        for start in range(0, size, PIECE):
            whole.update(buckets.read(path, start, min(start + PIECE, size)))
        return whole.hexdigest()
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {say(error)}") from error


def read_text(path: str | os.PathLike[str], *, most: int | None = None) -> str:
    """A regular file as UTF-8 text, without the byte order mark that some editors put in front.

    Raises:
        DataError: it cannot be read, is too large, or is not UTF-8.
    """
    data = read_bytes(path, most=most)
    refuse_packed(data, path)
    try:
        return data.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): is it damaged?") from error


_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
"""First bytes of what packs files."""


def refuse_packed(start: bytes, path: object) -> None:
    """Calls a packed file (`predictions.jsonl.gz`) that, where text is read.

    Raises:
        DataError: it is one.
    """
    for magic, kind in _PACKED.items():
        if start.startswith(magic):
            raise DataError(f"{path} is packed ({kind}): unpack it, and give what was in it")


def with_a_name(path: Path) -> Path:
    """The same place by a path that ends in its name, which `.` and `..` do not.

    Raises:
        SpaceDriveError: it is the root of the file system.
    """
    if path.name not in ("", ".."):
        return path
    named = Path(os.path.abspath(path))
    if not named.name:
        raise SpaceDriveError(f"cannot write {path}: it is the root of the file system, name a place in it")
    return named


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
    final = with_a_name(final)
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


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a whole file (see `atomic_write`)."""
    with atomic_write(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a whole UTF-8 file with line feeds (see `atomic_write`)."""
    write_bytes(path, text.encode("utf-8"))


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
            # Without a buffer: what a full disk did not take would be tried, and fail, again in `close`.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise SpaceDriveError(f"cannot write {path}: {say(error)}") from error

    def write(self, line: str) -> None:
        """Adds a line, or several.

        Raises:
            SpaceDriveError: the operating system refuses.
        """
        left = memoryview(f"{line}\n".encode())
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise SpaceDriveError(f"cannot write {self._path}: {say(error)}") from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


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

"""Folders: each for one job at a time, and there when it is complete or not at all."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from spacedrive_jax import buckets
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.io import is_bucket, place, say, twin, with_a_name
from spacedrive_jax.json_files import to_json

_UNFINISHED = f"unfinished-{socket.gethostname()}-"
"""Of a folder that is being made; process numbers mean something on their own machine only."""
LOCK = ".in-use.json"


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
    final = with_a_name(place(path))
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


def remove_folder(folder: Path) -> None:
    """Removes a folder of this project's own, here or in a bucket, with all that is below it, if it is there.

    Raises:
        DataError: the bucket cannot be written.
    """
    if not is_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        buckets.remove(folder)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


class _Holder(msgspec.Struct):
    """Who holds a folder."""

    pid: int
    host: str
    since: str


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
    final = with_a_name(place(output))
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

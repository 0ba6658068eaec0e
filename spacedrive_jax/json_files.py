"""JSON: strict, bounded, as plain values or as typed ones, with errors that name the file."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from types import GenericAlias
from typing import Any, BinaryIO, TypeVar

import msgspec

from spacedrive_jax import buckets
from spacedrive_jax.errors import DataError, SpaceDriveError
from spacedrive_jax.io import (
    BYTE_ORDER_MARK,
    MEBIBYTE,
    is_bucket,
    read_bytes,
    read_text,
    refuse_packed,
    require_regular,
    say,
    write_text,
)

MOST_JSON = 256 * MEBIBYTE
"""Of a JSON file, or of one line of JSON Lines, where nothing less is said: as Python's objects some 3 GB."""


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
                if number == 1:
                    refuse_packed(line, path)
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


def write_json(path: str | os.PathLike[str], value: Any, **options: Any) -> None:
    """Writes a whole file of strict JSON with a line feed at its end (see `to_json`, `atomic_write`)."""
    write_text(path, to_json(value, **options) + "\n")


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
    data = read_bytes(path, most=most).removeprefix(BYTE_ORDER_MARK)
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

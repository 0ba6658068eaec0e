"""JSON rows as typed values, checked while they are decoded; an error names file, row and field.

The limits are those of the physical world with room to spare: no recording comes near them, and what lies
beyond makes every later step fail or lie.
"""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from spacedrive_jax.errors import DataError
from spacedrive_jax.io import BYTE_ORDER_MARK
from spacedrive_jax.json_files import parse_json

Name = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[^/\\\x00-\x1f]+$")]
"""Becomes a part of file names, so it holds no separator."""
Token = Annotated[str, Meta(min_length=1, max_length=255)]
"""A key of a table. Those of rows that are kept become parts of file names too: see `is_plain`."""
Link = Annotated[str, Meta(max_length=255)]
"""A token of another table, or empty for none."""
Text = Annotated[str, Meta(max_length=65_536)]
Microseconds = Annotated[int, Meta(ge=0, le=1 << 53)]
"""Unix time; in a float64 still exact."""
Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Pixels = Annotated[int, Meta(ge=0, le=65_500)]

Metres = Annotated[float, Meta(ge=-1e8, le=1e8)]
"""A global coordinate; UTM's reach 1e7."""
GlobalPosition = tuple[Metres, Metres, Metres]
_Mounted = Annotated[float, Meta(ge=-100, le=100)]
MountPosition = tuple[_Mounted, _Mounted, _Mounted]
"""Of a sensor on its vehicle, metres."""
_Unit = Annotated[float, Meta(ge=-1.01, le=1.01)]
Quaternion = tuple[_Unit, _Unit, _Unit, _Unit]
"""w x y z; see `unit_length`."""
_Side = Annotated[float, Meta(gt=0, le=150)]
BoxSize = tuple[_Side, _Side, _Side]
"""Width, length, height, metres."""
_Focal = Annotated[float, Meta(ge=-1e6, le=1e6)]
Intrinsics = Annotated[list[tuple[_Focal, _Focal, _Focal]], Meta(max_length=3)]
"""3 x 3, pixels; empty for what is no camera."""
_Motion = Annotated[float, Meta(ge=-1000, le=1000)]
Motion = tuple[_Motion, _Motion, _Motion]
"""m/s^2, rad/s or m/s."""

R = TypeVar("R")
_PLACE = re.compile(
    r"(?P<said>.*?)(?: - at `\$\[(?P<row>\d+)\](?:\.(?P<field>\w+))?(?P<rest>.*)`)?", re.DOTALL
)


def decode_rows(content: bytes, kind: type[R], path: Path, key: str = "token") -> list[R]:
    """The rows of a JSON file.

    Args:
        content: the file.
        kind: a `msgspec.Struct`; its fields and their limits are checked, others are passed over.
        path: of the file, for errors.
        key: field that names a row in errors.

    Raises:
        DataError: the content is no list of such rows; the message names the row and the field.
    """
    content = content.removeprefix(BYTE_ORDER_MARK)
    try:
        return msgspec.json.decode(content, type=list[kind])  # type: ignore[valid-type]
    except msgspec.ValidationError as error:
        raise DataError(_wrong_value(content, path, key, str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(_malformed(content, path, key, error)) from error


def is_plain(token: str) -> bool:
    """Whether a token holds no separator.

    No pattern of its type: twelve million of them, mostly of sweeps, would take as long to match as to read.
    """
    return _SEPARATOR.search(token) is None


_SEPARATOR = re.compile(r"[/\\\x00-\x1f]")


def unit_length(quaternion: Quaternion) -> bool:
    """Whether it can be a rotation: its length is 1, within a hundredth."""
    return abs(math.hypot(*quaternion) - 1) <= 0.01


def _wrong_value(content: bytes, path: Path, key: str, message: str) -> str:
    match = _PLACE.fullmatch(message)
    if match is None or match["row"] is None:
        return f"{path} must hold a JSON list of objects, one per row ({message})"
    try:
        # One row alone becomes Python objects, of which all those of a table would not fit in memory.
        row = parse_json(bytes(msgspec.json.decode(content, type=list[msgspec.Raw])[int(match["row"])]), path)
    except (ValueError, msgspec.DecodeError, RecursionError):  # cut behind the wrong value, a key given twice
        return f"{path} must hold a JSON list of objects, one per row ({message})"
    if not isinstance(row, dict):
        return f"{path} must hold a JSON list of objects, one per row; row {match['row']} is none"
    name = _shortened(row.get(key, f"number {match['row']}"))
    missing = re.fullmatch(r"Object missing required field `(\w+)`", match["said"])
    if missing:
        return f"{path}: row {name} has no field {missing[1]!r}"
    value = _shortened(row.get(match["field"]))
    return f"{path}: row {name}, field {match['field']!r}: {value} cannot be ({match['said']})"


def _malformed(content: bytes, path: Path, key: str, error: Exception) -> str:
    """NaN and Infinity, which Python writes and JSON does not know, are named like other wrong values."""
    found = _NO_NUMBER.search(content)
    if found is not None:
        # Rows hold no objects: the braces around it are its row's.
        start, end = content.rfind(b"{", 0, found.start()), content.find(b"}", found.end())
        with contextlib.suppress(DataError):
            row = parse_json(content[start : end + 1], path, nan=True)
            for field, value in row.items() if isinstance(row, dict) else ():
                if not _finite(value):
                    name = _shortened(row.get(key))
                    return f"{path}: row {name}, field {field!r}: {_shortened(value)} is not finite"
    return f"{path} is not valid JSON ({error}); fetch it again"


_NO_NUMBER = re.compile(rb"NaN|Infinity")


def _finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

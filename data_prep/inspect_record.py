"""A record as text, and how it is found in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_prep.conversion import locate
from spacedrive_jax.console import progress
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.schema import Record, record_features
from spacedrive_jax.errors import DataError

_SHOWN_ITEMS = 3
_SHOWN_TEXT = 70


def find_record(directory: Path, token: str | None) -> Record:
    """The record with the given token, or the middle keyframe of the first scene.

    Raises:
        DataError: no record has that token.
    """
    records = open_records(directory)
    if token is None:
        first = records[0]["scene_name"]
        count = 1
        while count < len(records) and records[count]["scene_name"] == first:
            count += 1
        return records[count // 2]
    place = locate(directory, token)
    if place is not None:
        return open_records(directory, place[0])[place[1]]
    for index in progress(range(len(records)), desc="search", unit="record"):
        record = records[index]
        if record["token"] == token:
            return record
    raise DataError(f"{directory} has no keyframe {token!r}; `inspect` without --token shows one")


def describe_record(record: Record) -> str:
    """One line per field: name, type and shape, short value."""
    lines = []
    for name in record_features():
        kind, text = _describe(record[name])
        lines.append(f"  {name:<24} {kind:<22} {text}")
    return "\n".join(lines)


def _describe(value: Any) -> tuple[str, str]:
    if isinstance(value, str):
        return "text", _shortened(value)
    if isinstance(value, bytes):
        return "bytes", _bytes_summary(value)
    if isinstance(value, list):
        items = [_bytes_summary(item) if isinstance(item, bytes) else str(item) for item in value]
        shown = ", ".join(items[:_SHOWN_ITEMS]) + (", ..." if len(items) > _SHOWN_ITEMS else "")
        return f"list of {len(items)}", _shortened(shown)
    array = np.asarray(value)
    if array.ndim == 0:
        return str(array.dtype), str(array)
    shape = f"{array.dtype} {'x'.join(str(size) for size in array.shape)}"
    if array.size == 0:
        return shape, ""
    if array.dtype == np.uint8:
        return shape, f"{np.count_nonzero(array) / array.size:.1%} set"
    flat = array.ravel()
    shown = np.array2string(
        flat[:6], precision=3, suppress_small=True, max_line_width=10_000, separator=" "
    ).strip("[]")
    return shape, _shortened(" ".join(shown.split()) + (" ..." if flat.size > 6 else ""))


def _bytes_summary(value: bytes) -> str:
    if not value:
        return "empty"
    kind = "JPEG" if value[:2] == b"\xff\xd8" else "PNG" if value[:4] == b"\x89PNG" else "data"
    return f"{kind} {len(value):,} B"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_TEXT else text[: _SHOWN_TEXT - 3] + "..."

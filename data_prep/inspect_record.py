"""A record as text, and how it is found in its folder."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.conversion import finished_scenes, locate
from spacedrive_jax.console import progress
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.schema import Record, record_features
from spacedrive_jax.errors import DataError

_FEW_SCENES = 6
_SHOWN_ITEMS = 3
_SHOWN_TEXT = 70


@dataclasses.dataclass(frozen=True)
class Listed:
    """A keyframe of a records folder.

    Attributes:
        split: `train` or `val`.
        index: its place in that split.
        scene: its scene's name.
        token: its nuScenes token.
    """

    split: str
    index: int
    scene: str
    token: str


def list_keyframes(directory: Path, scene: str | None = None) -> list[Listed]:
    """The keyframes of a records folder, split by split in the order of the records.

    What the conversion noted is read; a folder without those notes is read record by record.

    Args:
        directory: the records folder.
        scene: a scene's name; None lists all.

    Raises:
        DataError: it is no finished records folder, or has no such scene.
    """
    records = open_records(directory)
    found: list[Listed] = []
    places: Counter[str] = Counter()
    for split, name, tokens in finished_scenes(directory):
        found += [Listed(split, places[split] + place, name, token) for place, token in enumerate(tokens)]
        places[split] += len(tokens)
    if len(found) != len(records):
        found = []
        for split in ("train", "val"):
            part = open_records(directory, split)
            for index in progress(range(len(part)), desc=f"list {split}", unit="record"):
                record = part[index]
                found.append(Listed(split, index, record["scene_name"], record["token"]))
    chosen = [one for one in found if scene in (None, one.scene)]
    if not chosen:
        scenes = list(dict.fromkeys(one.scene for one in found))
        few = ", ".join(scenes[:_FEW_SCENES]) + (", …" if len(scenes) > _FEW_SCENES else "")
        raise DataError(f"{directory} has no scene {scene!r}; it has {few}")
    return chosen


def find_record(directory: Path, token: str | None, scene: str | None = None) -> Record:
    """The record with the given token, or the middle keyframe of a scene (the first by default).

    Raises:
        DataError: no record has that token, or there is no such scene.
    """
    records = open_records(directory)
    if token is None and scene is not None:
        keyframes = list_keyframes(directory, scene)
        middle = keyframes[len(keyframes) // 2]
        return open_records(directory, middle.split)[middle.index]
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
    raise DataError(f"{directory} has no keyframe {token!r}; `inspect --list` names them")


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

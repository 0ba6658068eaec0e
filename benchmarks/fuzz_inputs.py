"""Mutations of files, and what may become of them: what every kind of file that `fuzz` tries is made of."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Change = Callable[[np.random.Generator, Path], str]
"""Changes one file in place and says how."""
Read = Callable[[Path], Any]
"""Reads a folder; what it gives is compared with what the whole folder gives."""
Judge = Callable[[Any, Any], bool]
"""Whether a mutated folder's value can stand, given that of the whole folder."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of file."""

    name: str
    make: Callable[[Path], None]
    """Writes a whole folder."""
    files: str
    """Pattern of the files to mutate."""
    read: Read
    stands: Judge
    changes: Sequence[Change]


# Mutations


def flip(rng: np.random.Generator, path: Path) -> str:
    """Flips one to eight bits."""
    data = bytearray(path.read_bytes())
    for _ in range(int(rng.integers(1, 9))):
        if data:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return "bits flipped"


def cut(rng: np.random.Generator, path: Path) -> str:
    """Keeps the beginning, which may be nothing."""
    data = path.read_bytes()
    path.write_bytes(data[: int(rng.integers(len(data) + 1))])
    return "cut"


def overwrite(rng: np.random.Generator, path: Path) -> str:
    """Replaces a stretch by noise, zeros, or a stretch from elsewhere in the file."""
    data = bytearray(path.read_bytes())
    length = int(rng.integers(1, 65))
    place, other = (int(rng.integers(max(1, len(data) - length))) for _ in range(2))
    noise = (rng.bytes(length), bytes(length), b"\xff" * length, bytes(data[other : other + length]))
    data[place : place + length] = noise[int(rng.integers(4))]
    path.write_bytes(data)
    return "stretch overwritten"


def insert(rng: np.random.Generator, path: Path) -> str:
    """Inserts noise."""
    data = path.read_bytes()
    place = int(rng.integers(len(data) + 1))
    path.write_bytes(data[:place] + rng.bytes(int(rng.integers(1, 65))) + data[place:])
    return "noise inserted"


def replace(rng: np.random.Generator, path: Path) -> str:
    """Puts something else in the file's place."""
    path.unlink()
    kind = int(rng.integers(7))
    if kind == 0:
        os.mkfifo(path)
        return "a pipe"
    if kind == 1:
        path.symlink_to("/dev/zero")
        return "a link to /dev/zero"
    if kind == 2:
        path.mkdir()
        return "a folder"
    if kind == 3:
        path.symlink_to(path.name)
        return "a link to itself"
    if kind == 4:
        return "absent"
    content = (b"", b"[" * 100_000, b"\xff\xfe{\0}\0", b"null", pickle.dumps(_Boom(path.parent / "RAN")))
    path.write_bytes(content[int(rng.integers(len(content)))])
    return "another content"


class _Boom:
    """A pickle that runs code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


WEIRD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 1e12, -1e12, 1e308, float("nan"), float("inf"), -float("inf")),
    *(10**9, 2**31, 2**63, 2**64, 10**400),
    *("", "x", "<script>alert(1)</script>", "../../../etc/passwd", "/dev/zero", "a\0b", "\ud800"),
    *("x" * 70_000, [], {}, [[]], [1, 2, 3], [float("nan")] * 3, [1e30] * 3, {"token": "x"}, "evil.Text"),
)


def edit_json(rng: np.random.Generator, path: Path) -> str:
    """Changes one value of a JSON file (or of one line of JSON Lines), or takes it away; else flips bits."""
    if path.suffix not in (".json", ".jsonl"):
        return flip(rng, path)
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    place = int(rng.integers(len(lines)))
    value = json.loads(lines[place])
    holders = list(_holders(value))
    if not holders:
        return replace(rng, path)
    holder, key = holders[int(rng.integers(len(holders)))]
    action = int(rng.integers(6))
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, list):
        holder.append(holder[key])
    elif action == 2:
        other, name = holders[int(rng.integers(len(holders)))]
        if not isinstance(other[name], dict | list):
            holder[key] = other[name]
    else:
        holder[key] = WEIRD[int(rng.integers(len(WEIRD)))]
    lines[place] = json.dumps(value)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return "a JSON value"


def _holders(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from _holders(value[key])


BYTES: tuple[Change, ...] = (flip, cut, overwrite, insert, replace)
JSON: tuple[Change, ...] = (edit_json, edit_json, edit_json, edit_json, *BYTES)


# What is read


def equal(found: Any, whole: Any) -> bool:
    """The value must be the whole folder's."""
    return bool(found == whole)


def finite(found: Any, whole: Any) -> bool:
    """Other numbers may stand, where nothing says what they were, but none that is not finite."""
    return all(abs(number) < 1e308 for number in _numbers(found))


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float | int):
        yield value
    elif isinstance(value, np.ndarray):
        yield from value.ravel().tolist()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)


def anything(found: Any, whole: Any) -> bool:
    """Where nothing tells a changed value from the right one: text, bytes without a checksum."""
    return True


def plausible_scenes(found: Any, whole: Any) -> bool:
    """Scenes hold finite numbers, boxes with a volume, times in order, and names that stay inside."""
    for scene in found:
        times = [keyframe.timestamp_us for keyframe in scene.keyframes]
        frames = [frame for keyframe in scene.keyframes for frame in (*keyframe.cameras, keyframe.lidar)]
        names = [frame.filename for frame in frames] + [scene.map_mask, scene.name, scene.location]
        if (
            times != sorted(set(times))
            or any(side <= 0 for box in scene.annotations for side in box.size)
            or any(".." in Path(name).parts or Path(name).is_absolute() for name in names)
        ):
            return False
    return finite(found, whole)

"""The thirteen nuScenes tables: plain JSON, read once, checked value by value and link by link.

An error names file, row and field. Limits of values are those of the physical world with room to spare: no
recording comes near them, and what lies beyond makes every later step fail or lie.

Only keyframe `sample_data` rows are kept (sweeps outnumber them tenfold and no record needs them), and only
the `ego_pose` rows those refer to. Tables are decoded a block of rows at a time, and a token that many rows
name is kept once: those of v1.0-trainval have 2.4 GB, which as text and as Python's objects together would
take three times that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import filterfalse
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import msgspec
from msgspec import Meta

from spacedrive_jax.errors import DataError
from spacedrive_jax.io import BYTE_ORDER_MARK, MEBIBYTE, read_bytes, require_regular, say
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

Decoded = TypeVar("Decoded")
_PLACE = re.compile(
    r"(?P<said>.*?)(?: - at `\$\[(?P<row>\d+)\](?:\.(?P<field>\w+))?(?P<rest>.*)`)?", re.DOTALL
)


def decode_rows(content: bytes, kind: type[Decoded], path: Path, key: str = "token") -> list[Decoded]:
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


class Row(msgspec.Struct, frozen=True, gc=False):
    """A row of a table: the fields that the converter reads."""

    token: Token


class Attribute(Row, frozen=True, gc=False):
    """What an agent does, such as `vehicle.parked`."""

    name: Text


class CalibratedSensor(Row, frozen=True, gc=False):
    """A sensor as it was mounted in some log."""

    sensor_token: Token
    translation: MountPosition
    rotation: Quaternion
    camera_intrinsic: Intrinsics


class Category(Row, frozen=True, gc=False):
    """Kind of agent."""

    name: Text


class EgoPose(Row, frozen=True, gc=False):
    """Pose of the vehicle at a sensor's time, global frame."""

    translation: GlobalPosition
    rotation: Quaternion


class Instance(Row, frozen=True, gc=False):
    """One agent over a scene."""

    category_token: Token


class Log(Row, frozen=True, gc=False):
    """One drive of a vehicle."""

    logfile: Text
    location: Name


class Map(Row, frozen=True, gc=False):
    """A basic map mask and the logs it serves."""

    log_tokens: list[Text]
    filename: Text


class Sample(Row, frozen=True, gc=False):
    """A keyframe."""

    timestamp: Microseconds
    prev: Link
    next: Link
    scene_token: Token


class SampleAnnotation(Row, frozen=True, gc=False):
    """A box, global frame."""

    sample_token: Token
    instance_token: Token
    translation: GlobalPosition
    size: BoxSize
    rotation: Quaternion
    prev: Link
    next: Link
    num_lidar_pts: Count


class SampleData(Row, frozen=True, gc=False):
    """A sensor's file."""

    sample_token: Token
    ego_pose_token: Token
    calibrated_sensor_token: Token
    timestamp: Microseconds
    is_key_frame: bool
    filename: Text
    height: Pixels
    width: Pixels


class SceneRow(Row, frozen=True, gc=False):
    """Twenty seconds of a log."""

    log_token: Token
    nbr_samples: Count
    first_sample_token: Token
    last_sample_token: Token
    name: Name
    description: Text


class Sensor(Row, frozen=True, gc=False):
    """A sensor's name."""

    channel: Text


class Visibility(Row, frozen=True, gc=False):
    """How much of an agent is seen."""


TABLES: Mapping[str, type[Row]] = {
    "attribute": Attribute,
    "calibrated_sensor": CalibratedSensor,
    "category": Category,
    "ego_pose": EgoPose,
    "instance": Instance,
    "log": Log,
    "map": Map,
    "sample": Sample,
    "sample_annotation": SampleAnnotation,
    "sample_data": SampleData,
    "scene": SceneRow,
    "sensor": Sensor,
    "visibility": Visibility,
}
"""Table to the type of its rows."""

LINKS: Mapping[str, Mapping[str, str]] = {
    "calibrated_sensor": {"sensor_token": "sensor"},
    "instance": {"category_token": "category"},
    "sample": {"scene_token": "scene", "prev": "sample", "next": "sample"},
    "sample_annotation": {
        "sample_token": "sample",
        "instance_token": "instance",
        "prev": "sample_annotation",
        "next": "sample_annotation",
    },
    "sample_data": {
        "sample_token": "sample",
        "ego_pose_token": "ego_pose",
        "calibrated_sensor_token": "calibrated_sensor",
    },
    "scene": {"log_token": "log", "first_sample_token": "sample", "last_sample_token": "sample"},
}
"""Table to its token fields and the table each points into.

`map.log_tokens` is left out: official map tables name logs of other versions. `sample_data.prev` and
`next` run through sweeps, which are not kept.
"""

_MAY_BE_EMPTY = frozenset({"prev", "next"})
_NAME = {kind: table for table, kind in TABLES.items()}
R = TypeVar("R", bound=Row)


@dataclasses.dataclass(frozen=True)
class Tables:
    """The checked tables of one nuScenes version."""

    version: str
    rows: Mapping[str, Mapping[str, Row]]
    """Table name to rows by token, in file order."""
    digests: Mapping[str, str]
    """Table name to the SHA-256 of its file."""

    def __getitem__(self, kind: type[R]) -> Mapping[str, R]:
        """The rows of a kind by token."""
        return cast(Mapping[str, R], self.rows[_NAME[kind]])


@contextlib.contextmanager
def not_collecting() -> Iterator[None]:
    """Keeps Python's garbage collector from looking through millions of new objects."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_tables(dataroot: Path, version: str) -> Tables:
    """Reads and checks the thirteen tables of `dataroot/version`.

    Raises:
        DataError: the folder or a table is missing or is not valid JSON, a row lacks a field or holds a
            value that cannot be, a token occurs twice, or a link points nowhere. The message names the
            table, the row's token and the field.
    """
    folder = Path(dataroot) / version
    if not version or Path(version).name != version or not folder.is_dir():
        raise DataError(f"{folder} does not exist; {_versions_found(Path(dataroot))}")
    missing = [f"{table}.json" for table in TABLES if not (folder / f"{table}.json").exists()]
    if missing:
        raise DataError(
            f"{folder} lacks {', '.join(missing)}: a nuScenes version needs all of its {len(TABLES)} tables "
            f"(unpack the metadata archive there)"
        )
    rows: dict[str, dict[str, Row]] = {}
    digests: dict[str, str] = {}
    # sample_data before ego_pose, so that poses of sweeps never stay in memory.
    for table in sorted(TABLES, key=lambda name: name == "ego_pose"):
        path = folder / f"{table}.json"
        kept: Callable[[Any], bool] = _every
        if table == "sample_data":
            kept = _is_key_frame
        elif table == "ego_pose":
            kept = _named_by(rows["sample_data"].values(), "ego_pose_token")
        parsed, digests[table] = _read_table(path, TABLES[table], kept, LINKS.get(table, {}))
        rows[table] = _by_token(path, parsed)
    for table, links in LINKS.items():
        for field, target in links.items():
            _check_link(table, rows[table].values(), field, target, rows[target])
    return Tables(version, {table: rows[table] for table in TABLES}, dict(sorted(digests.items())))


def _versions_found(dataroot: Path) -> str:
    if not dataroot.is_dir():
        return "--dataroot is not a folder"
    found = sorted(path.parent.name for path in dataroot.glob("*/sample.json"))
    if not found and (dataroot / "sample.json").is_file():
        above = dataroot.absolute()
        return f"--dataroot is a folder of tables: give --dataroot {above.parent} --version {above.name}"
    return f"versions found under --dataroot: {', '.join(found) or 'none'} (choose one with --version)"


def _every(row: Any) -> bool:
    return True


def _is_key_frame(row: SampleData) -> bool:
    return row.is_key_frame


def _named_by(rows: Iterable[Row], field: str) -> Callable[[Row], bool]:
    tokens = {getattr(row, field) for row in rows}
    return lambda row: row.token in tokens


BLOCK_BYTES = 16 * MEBIBYTE
"""Of a table that is decoded at a time."""
_BETWEEN_ROWS = re.compile(rb"\}\s*,\s*(?=\{)")


def _read_table(
    path: Path, kind: type[R], kept: Callable[[R], bool], links: Iterable[str]
) -> tuple[list[R], str]:
    """The rows of a table that are kept, and the SHA-256 of its file.

    Args:
        path: of the table.
        kind: of its rows.
        kept: which to keep.
        links: fields with tokens, of which equal ones become one string.

    Raises:
        DataError: see `decode_rows`; all rows are checked, kept or not.
    """
    require_regular(path)
    decoder = msgspec.json.Decoder(list[kind])  # type: ignore[valid-type]
    rows: list[R] = []
    tokens: dict[str, str] = {}
    once, replace = tokens.setdefault, msgspec.structs.force_setattr
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for block in _blocks(file, digest):
                found = [row for row in decoder.decode(block) if kept(row)]
                for field in ("token", *links):
                    for row, value in zip(found, map(attrgetter(field), found), strict=True):
                        replace(row, field, once(value, value))
                rows += found
    except OSError as error:
        raise DataError(f"{path}: {say(error)}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # Damaged, or a text holds what looks like the end of a row: the whole file tells.
        content = read_bytes(path)
        rows = [row for row in decode_rows(content, kind, path) if kept(row)]
        return rows, hashlib.sha256(content).hexdigest()
    return rows, digest.hexdigest()


def _blocks(file: Any, digest: Any) -> Iterator[bytes]:
    """Cuts a JSON list of flat objects into several, between objects.

    Only where no text holds `},{` is every piece JSON; what is cut inside a text never is.
    """
    rest = b""
    while chunk := file.read(BLOCK_BYTES):
        digest.update(chunk)
        rest += chunk
        cuts = [*_BETWEEN_ROWS.finditer(rest, max(0, len(rest) - MEBIBYTE // 4))]
        if cuts:
            cut = cuts[-1]
            yield rest[: cut.start() + 1] + b"]"
            rest = b"[" + rest[cut.end() :]
    yield rest


def _by_token(path: Path, rows: Sequence[Any]) -> dict[str, Row]:
    by_token = {row.token: row for row in rows}
    if len(by_token) < len(rows):
        count = Counter(row.token for row in rows)
        raise DataError(f"{path}: token {max(count, key=count.__getitem__)!r} occurs twice")
    for token in filterfalse(is_plain, by_token):
        raise DataError(
            f"{path}: row {token!r}, field 'token': it becomes a part of file names, which no slash or "
            "control character can be"
        )
    if rows and hasattr(rows[0], "rotation"):
        for row in filterfalse(lambda row: unit_length(row.rotation), rows):
            raise DataError(
                f"{path}: row {row.token!r}, field 'rotation': {list(row.rotation)} is no rotation "
                "(a quaternion w x y z has length 1)"
            )
    return by_token


def _check_link(
    table: str, rows: Collection[Row], field: str, target: str, target_rows: Mapping[str, Row]
) -> None:
    # An empty one passed its own check where the table was read.
    if all(map(target_rows.__contains__, filter(None, map(attrgetter(field), rows)))):
        return
    for row in rows:
        token = getattr(row, field)
        if token in target_rows or (token == "" and field in _MAY_BE_EMPTY):
            continue
        raise DataError(
            f"broken link: {table}.json row {row.token!r}, field {field!r} names {token!r}, "
            f"which is not in {target}.json"
        )

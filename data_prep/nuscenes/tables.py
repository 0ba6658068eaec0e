"""The thirteen nuScenes tables: plain JSON, read once, checked row by row and link by link.

Only keyframe `sample_data` rows are kept (sweeps outnumber them tenfold and no record needs them), and
only the `ego_pose` rows those refer to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from spacedrive_jax.console import UserError

Row = dict[str, Any]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _numbers(length: int) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == length
            and all(isinstance(number, (int, float)) and number - number == 0 for number in value)
        )

    return check


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "text": (_text, "a text"),
    "int": (_integer, "an integer"),
    "bool": (_boolean, "true or false"),
    "texts": (_texts, "a list of texts"),
    "xyz": (_numbers(3), "three finite numbers"),
    "wxyz": (_numbers(4), "four finite numbers (a quaternion w x y z)"),
    "any": (lambda value: True, ""),
}

FIELDS: Mapping[str, Mapping[str, str]] = {
    "attribute": {"token": "text", "name": "text"},
    "calibrated_sensor": {
        "token": "text",
        "sensor_token": "text",
        "translation": "xyz",
        "rotation": "wxyz",
        "camera_intrinsic": "any",
    },
    "category": {"token": "text", "name": "text"},
    "ego_pose": {"token": "text", "translation": "xyz", "rotation": "wxyz"},
    "instance": {"token": "text", "category_token": "text"},
    "log": {"token": "text", "logfile": "text", "location": "text"},
    "map": {"token": "text", "log_tokens": "texts", "filename": "text"},
    "sample": {"token": "text", "timestamp": "int", "prev": "text", "next": "text", "scene_token": "text"},
    "sample_annotation": {
        "token": "text",
        "sample_token": "text",
        "instance_token": "text",
        "translation": "xyz",
        "size": "xyz",
        "rotation": "wxyz",
        "prev": "text",
        "next": "text",
        "num_lidar_pts": "int",
    },
    "sample_data": {
        "token": "text",
        "sample_token": "text",
        "ego_pose_token": "text",
        "calibrated_sensor_token": "text",
        "timestamp": "int",
        "is_key_frame": "bool",
        "filename": "text",
        "height": "int",
        "width": "int",
    },
    "scene": {
        "token": "text",
        "log_token": "text",
        "nbr_samples": "int",
        "first_sample_token": "text",
        "last_sample_token": "text",
        "name": "text",
        "description": "text",
    },
    "sensor": {"token": "text", "channel": "text"},
    "visibility": {"token": "text"},
}
"""Table to the fields the converter reads and the kind of value each must hold."""

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


@dataclasses.dataclass(frozen=True)
class Tables:
    """The checked tables of one nuScenes version."""

    version: str
    rows: Mapping[str, Mapping[str, Row]]
    """Table name to rows by token, in file order."""
    digests: Mapping[str, str]
    """Table name to the SHA-256 of its file."""

    def __getitem__(self, table: str) -> Mapping[str, Row]:
        return self.rows[table]


def read_tables(dataroot: Path, version: str) -> Tables:
    """Reads and checks the thirteen tables of `dataroot/version`.

    Raises:
        UserError: the folder or a table is missing or is not valid JSON, a row lacks a field or holds a
            wrong value, a token occurs twice, or a link points nowhere. The message names the table,
            the row's token and the field.
    """
    folder = Path(dataroot) / version
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; {_versions_found(Path(dataroot))}")
    missing = [f"{table}.json" for table in FIELDS if not (folder / f"{table}.json").is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: a nuScenes version needs all of its {len(FIELDS)} tables "
            f"(unpack the metadata archive there)"
        )
    rows: dict[str, dict[str, Row]] = {}
    digests: dict[str, str] = {}
    # sample_data before ego_pose, so that poses of sweeps never stay in memory.
    for table in sorted(FIELDS, key=lambda name: name == "ego_pose"):
        content = (folder / f"{table}.json").read_bytes()
        digests[table] = hashlib.sha256(content).hexdigest()
        parsed = _parse(folder / f"{table}.json", content)
        del content
        if table == "sample_data":
            parsed = [row for row in parsed if row.get("is_key_frame", True)]
        elif table == "ego_pose":
            wanted = {row["ego_pose_token"] for row in rows["sample_data"].values()}
            parsed = [row for row in parsed if row.get("token") in wanted]
        rows[table] = _check_rows(table, parsed)
    for table, links in LINKS.items():
        for field, target in links.items():
            _check_link(table, rows[table].values(), field, target, rows[target])
    return Tables(version, {table: rows[table] for table in FIELDS}, dict(sorted(digests.items())))


def _versions_found(dataroot: Path) -> str:
    if not dataroot.is_dir():
        return "--dataroot is not a folder"
    found = sorted(path.parent.name for path in dataroot.glob("*/sample.json"))
    return f"versions found under --dataroot: {', '.join(found) or 'none'} (choose one with --version)"


def _parse(path: Path, content: bytes) -> list[Row]:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(parsed, list) or not all(isinstance(row, dict) for row in parsed):
        raise UserError(f"{path} must hold a JSON list of objects, one per row")
    return parsed


def _check_rows(table: str, rows: Iterable[Row]) -> dict[str, Row]:
    """Checks fields and value kinds; returns the rows by token."""
    checks = [(field, *_CHECKS[kind]) for field, kind in FIELDS[table].items()]
    by_token: dict[str, Row] = {}
    for row in rows:
        for field, check, wanted in checks:
            if field not in row:
                raise UserError(f"{table}.json: row {row.get('token', row)!r} has no field {field!r}")
            if not check(row[field]):
                raise UserError(
                    f"{table}.json: row {row.get('token')!r}, field {field!r}: {row[field]!r} is not {wanted}"
                )
        if row["token"] in by_token:
            raise UserError(f"{table}.json: token {row['token']!r} occurs twice")
        by_token[row["token"]] = row
    return by_token


def _check_link(
    table: str, rows: Iterable[Row], field: str, target: str, target_rows: Mapping[str, Row]
) -> None:
    for row in rows:
        token = row[field]
        if token in target_rows or (token == "" and field in _MAY_BE_EMPTY):
            continue
        raise UserError(
            f"broken link: {table}.json row {row['token']!r}, field {field!r} names {token!r}, "
            f"which is not in {target}.json"
        )

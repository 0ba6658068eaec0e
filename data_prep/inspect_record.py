"""`python -m data_prep inspect`: look at one record, as text and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from data_prep.conversion import locate
from spacedrive_jax.console import Command, UserError, progress
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.records_folder import check_contents, read_provenance
from spacedrive_jax.data.schema import Record, record_features

_SHOWN_ITEMS = 3
_SHOWN_TEXT = 70


@dataclasses.dataclass(frozen=True)
class Inspect(Command):
    """Print a record of a records folder and, on request, draw it.

    Example: python -m data_prep inspect records --token ca9a282c9e77460f8360f564131a8af5 --image view.png
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECORDS")]
    """Records folder written by `python -m data_prep convert`."""
    token: str | None = None
    """Keyframe to show; default: the middle one of the first scene."""
    image: Path | None = None
    """PNG to write: the six cameras with boxes and waypoints, and a bird's-eye view."""
    points: Path | None = None
    """PLY to write: the views lifted by their depth to one coloured point cloud, the LiDAR sweep in red."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read every shard whole, compare it with its digest, and name those that are damaged."""
    depth_cache: str | None = None
    """For --points: sidecar of `add-depth --full` to use; without it the exact depth of drawn views."""

    def run(self) -> Mapping[str, Any]:
        """Prints the record; returns its token and the folder's counts."""
        if self.check:
            with progress(desc="check shards", unit="shard") as bar:
                shards = check_contents(self.directory, lambda _: bar.update())
            print(f"{self.directory}: {shards} shards are whole")
        provenance = read_provenance(self.directory)
        record = find_record(self.directory, self.token)
        print(
            f"{self.directory}: {provenance['records']} records "
            f"({', '.join(f'{split} {count}' for split, count in provenance['splits'].items())}), "
            f"fingerprint {provenance['fingerprint'][:12]}"
        )
        print(describe_record(record))
        facts: dict[str, Any] = {"token": record["token"], "records": provenance["records"]}
        if self.image is not None:
            # matplotlib takes a second to import; the text needs none of it.
            from data_prep.record_picture import draw_record

            draw_record(record, self.image)
            print(f"drew {self.image}")
            facts["image"] = str(self.image)
        if self.points is not None:
            facts["points"] = self._write_points(self.points, record, provenance["fingerprint"])
        return facts

    def _write_points(self, file: Path, record: Record, fingerprint: str) -> str:
        # These import jax, which the text and the picture can do without.
        from data_prep.point_cloud import keyframe_points, write_ply
        from spacedrive_jax.data.depth_cache import DepthCache, find_cache
        from spacedrive_jax.data.depth_sources import NETWORKS

        full = None
        if self.depth_cache is not None:
            folder = find_cache(self.directory, set(NETWORKS), self.depth_cache)
            full = DepthCache(folder, fingerprint).read(record["token"]).full
            if not full:
                raise UserError(f"{folder} keeps patch depth only; run add-depth with --full")
        points, colours = keyframe_points(record, full)
        write_ply(file, points, colours)
        print(f"wrote {len(points)} points to {file}")
        return str(file)


def find_record(directory: Path, token: str | None) -> Record:
    """The record with the given token, or the middle keyframe of the first scene.

    Raises:
        UserError: no record has that token.
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
    raise UserError(f"{directory} has no keyframe {token!r}; `inspect` without --token shows one")


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

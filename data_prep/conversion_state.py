"""What a conversion set out to do and how far it got, kept beside the shards so that it can be resumed.

    OUT/conversion/plan.json      source digests, options, the list of shards
    OUT/conversion/<shard>.json   facts of a finished shard
    OUT/conversion/units          what waits for a worker of a cluster, while one converts
    OUT/provenance.json           written last: the folder is finished

A shard counts as done when both the shard and its facts are there and its bytes are those that were written.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.nuscenes.scene_records import SceneResult
from spacedrive_jax import io
from spacedrive_jax.console import UserError, note
from spacedrive_jax.data.records_folder import file_sha256, split_of
from spacedrive_jax.errors import DataError

FOLDER = "conversion"
PROVENANCE = "provenance.json"
WAITING = "units"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is either absent, old, or whole."""
    io.write_json(path, value, indent=1, sort_keys=True)


def check_output_folder(out: Path, resume: bool) -> None:
    """Refuses to write into a folder that holds something else.

    Raises:
        UserError: `out` is a file, or not empty and either `resume` is false or it is no conversion.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    # A run killed before it wrote its plan leaves at most empty folders and a partial file.
    if not any(path.is_file() and path.suffix != ".partial" for path in out.rglob("*")):
        return
    has_plan = (out / FOLDER / "plan.json").is_file()
    if not resume:
        hint = "add --resume to continue the conversion in it, or" if has_plan else "remove it or"
        raise UserError(f"--out {out} is not empty; {hint} name another folder")
    if not has_plan:
        raise UserError(
            f"--resume: {out} holds no conversion ({FOLDER}/plan.json is missing); name another folder"
        )


def begin(out: Path, plan: Mapping[str, Any]) -> None:
    """Records the plan of a new conversion, or checks that it is the one begun in `out` before.

    Raises:
        UserError: the earlier conversion had other options or another source; the message says which.
    """
    path = out / FOLDER / "plan.json"
    if path.is_file():
        before = io.read_json(path)
        differing = differences(before, json.loads(json.dumps(plan)))
        if differing:
            raise UserError(
                f"--resume: {out} was begun with another source or other options:\n"
                + "\n".join(f"  {line}" for line in differing[:10])
                + ("\n  ..." if len(differing) > 10 else "")
                + "\nuse the same ones or convert into another folder"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)


def remove_left_overs(out: Path) -> None:
    """Removes what a conversion that was killed had not finished."""
    for half in out.glob("*.partial"):
        half.unlink()
    shutil.rmtree(out / FOLDER / WAITING, ignore_errors=True)


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Lists where two JSON values differ, as `dotted.name: before -> now`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    if before == now:
        return []
    if isinstance(before, (dict, list)) or isinstance(now, (dict, list)):
        return [f"{name}: differs"]
    return [f"{name}: {before} -> {now}"]


def finished_scene(out: Path, shard: str) -> SceneResult | None:
    """The facts of a shard finished by an earlier run, or None when it must be written."""
    path = out / FOLDER / f"{shard}.json"
    if not path.is_file() or not (out / shard).is_file():
        return None
    try:
        result = io.convert(io.read_json(path), SceneResult, path)
    except DataError:  # damaged, or of an older version: then the shard is written again
        return None
    return result if (out / shard).stat().st_size == result.shard.bytes else None


def whole_scene(out: Path, shard: str) -> SceneResult | None:
    """The facts of a shard finished by an earlier run whose bytes are still those that were written.

    Reads the whole shard: a damaged one is found here and written again, not after hours of training.
    """
    result = finished_scene(out, shard)
    if result is None or file_sha256(out / shard) == result.shard.sha256:
        return result
    note(f"{out / shard} is damaged: writing it again")
    return None


def save_finished_scene(out: Path, result: SceneResult) -> None:
    """Records that a shard is whole."""
    write_json(out / FOLDER / f"{result.shard.file}.json", dataclasses.asdict(result))


def locate(directory: Path, token: str) -> tuple[str, int] | None:
    """Where a keyframe is: its split and its index therein; None when the folder does not tell.

    Saves reading a large records folder from the start to find one token.
    """
    before: Counter[str] = Counter()
    for path in sorted((directory / FOLDER).glob("*.array_record-*.json")):
        saved = io.convert(io.read_json(path), SceneResult, path, "convert with --resume writes it again")
        split = split_of(saved.shard.file)
        if token in saved.tokens:
            return split, before[split] + saved.tokens.index(token)
        before[split] += saved.shard.records
    return None

"""What a conversion will write and what it then says about it: shards, source digests, provenance.

What it set out to do and how far it got is kept beside the shards, so that it can be resumed:

    OUT/conversion/plan.json     source digests, options, the list of shards
    OUT/conversion/SHARD.json    metadata of a finished shard
    OUT/conversion/units         what waits for a worker of a cluster, while one converts
    OUT/provenance.json          written last: the folder is finished

A shard counts as done when both the shard and its metadata are there and its bytes are those that were
written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.nuscenes.expansions import expansion_file, pose_file, route_file
from data_prep.nuscenes.scene_records import SceneResult
from data_prep.nuscenes.scenes import PackedScene
from data_prep.nuscenes.sensor_files import SceneFiles, has_all_images
from spacedrive_jax import folders, io, json_files
from spacedrive_jax.data.records_folder import ShardMetadata, content_fingerprint, shard_file, split_of
from spacedrive_jax.errors import ConfigError, DataError

log = logging.getLogger(__name__)

FOLDER = "conversion"
WAITING = "units"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is either absent, old, or whole."""
    json_files.write_json(path, value, indent=1, sort_keys=True)


def check_output_folder(out: Path, resume: bool) -> None:
    """Refuses to write into a folder that holds something else.

    Raises:
        ConfigError: `out` is a file, or not empty and either `resume` is false or it is no conversion.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    # A run killed before it wrote its plan leaves at most empty folders and a partial file.
    files = (path.name for path in out.rglob("*") if path.is_file())
    if all(".partial" in name or name == folders.LOCK for name in files):
        return
    has_plan = (out / FOLDER / "plan.json").is_file()
    if has_plan and not resume and not any(out.glob("*.array_record-*-of-?????")):
        shutil.rmtree(out / FOLDER)  # what failed before its first shard burns no folder
        return check_output_folder(out, resume)
    if not resume:
        hint = "add --resume to continue the conversion in it, or" if has_plan else "remove it or"
        raise ConfigError(f"--out {out} is not empty; {hint} name another folder")
    if not has_plan:
        raise ConfigError(
            f"--resume: {out} holds no conversion ({FOLDER}/plan.json is missing); name another folder"
        )


def begin(out: Path, plan: Mapping[str, Any]) -> None:
    """Records the plan of a new conversion, or checks that it is the one begun in `out` before.

    Raises:
        ConfigError: the earlier conversion had other options or another source; the message says which.
    """
    path = out / FOLDER / "plan.json"
    if path.is_file():
        before = json_files.read_json(path)
        differing = differences(before, json.loads(json.dumps(plan)))
        if differing:
            raise ConfigError(
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
    for half in (*out.glob("*.partial"), *out.glob(".*.partial-*"), *(out / FOLDER).glob(".*.partial-*")):
        half.unlink(missing_ok=True)
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
    if any(isinstance(each, dict) or (isinstance(each, list) and len(each) > 2) for each in (before, now)):
        return [f"{name}: differs"]
    return [f"{name}: {before} -> {now}"]


def finished_scene(out: Path, shard: str) -> SceneResult | None:
    """What a shard holds that was finished by an earlier run, or None when it must be written."""
    path = out / FOLDER / f"{shard}.json"
    if not path.is_file() or not (out / shard).is_file():
        return None
    try:
        result = json_files.convert(json_files.read_json(path), SceneResult, path)
    except DataError:  # damaged, or of an older version: then the shard is written again
        return None
    return result if (out / shard).stat().st_size == result.shard.bytes else None


def whole_scene(out: Path, shard: str) -> SceneResult | None:
    """What a shard holds that was finished by an earlier run whose bytes are still those that were written.

    Reads the whole shard: a damaged one is found here and written again, not after hours of training.
    """
    result = finished_scene(out, shard)
    if result is None or io.file_sha256(out / shard) == result.shard.sha256:
        return result
    log.warning("%s is damaged: writing it again", out / shard)
    return None


def save_finished_scene(out: Path, result: SceneResult) -> None:
    """Records that a shard is whole."""
    write_json(out / FOLDER / f"{result.shard.file}.json", dataclasses.asdict(result))


def finished_scenes(directory: Path) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Split, scene and keyframe tokens of every shard, in the order in which a split is read."""
    for path in sorted((directory / FOLDER).glob("*.array_record-*.json")):
        saved = json_files.convert(
            json_files.read_json(path), SceneResult, path, "convert with --resume writes it again"
        )
        yield split_of(saved.shard.file), saved.scene, saved.tokens


OFFICIAL_VERSIONS = ("v1.0-mini", "v1.0-trainval", "v1.0-test")
NUSCENES_LICENCE = (
    "Derived from nuScenes (c) Motional AD Inc.: CC BY-NC-SA 4.0 and the nuScenes Terms of Use, "
    "non-commercial use only (https://www.nuscenes.org/terms-of-use)."
)
OTHER_LICENCE = "Not an official nuScenes version: the licence of the source folder applies."
PACKAGES = (
    "array_record",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "scipy",
    "shapely",
    "tensorflow-datasets",
)


@dataclasses.dataclass(frozen=True)
class ShardWork:
    """One scene that gets a shard."""

    scene: PackedScene
    files: SceneFiles
    keyframes: tuple[int, ...]
    shard: str


def plan_shards(
    scenes: Sequence[PackedScene], files: Sequence[SceneFiles], splits: Mapping[str, str], skip: bool
) -> list[ShardWork]:
    """Chooses each scene's keyframes and shard name; scenes left with no keyframe get no shard."""
    kept = []
    for scene, scene_files in zip(scenes, files, strict=True):
        keyframes = tuple(range(scene.num_keyframes))
        if skip and scene_files.unusable_images:
            found = scene.unpack().keyframes
            keyframes = tuple(index for index in keyframes if has_all_images(found[index], scene_files))
        if keyframes:
            kept.append((scene, scene_files, keyframes))
    shards_in_split = Counter(splits[scene.name] for scene, _, _ in kept)
    next_index: Counter[str] = Counter()
    work = []
    for scene, scene_files, keyframes in kept:
        split = splits[scene.name]
        shard = shard_file(split, next_index[split], shards_in_split[split])
        next_index[split] += 1
        work.append(ShardWork(scene, scene_files, keyframes, shard))
    return work


def masks_needed(dataroot: Path, scenes: Sequence[PackedScene]) -> list[str]:
    """Basic map masks that exist and serve a location without a map expansion."""
    masks = {
        scene.map_mask
        for scene in scenes
        if scene.map_mask and not io.is_there(expansion_file(dataroot, scene.location))
    }
    return sorted(mask for mask in masks if io.is_there(dataroot / mask))


def source_of(
    dataroot: Path,
    version: str,
    tables: Mapping[str, str],
    scenes: Sequence[PackedScene],
    files: Sequence[SceneFiles],
) -> dict[str, Any]:
    """Identifies the source: tables by content, the many large files by name and size."""

    def digest(items: Iterable[tuple[str, Any]]) -> str:
        return hashlib.sha256(
            "\n".join(f"{name} {size}" for name, size in sorted(items)).encode()
        ).hexdigest()

    def sized(paths: set[Path]) -> Iterable[tuple[str, int]]:
        return ((path.name, path.stat().st_size) for path in paths if path.is_file())

    maps = {dataroot / scene.map_mask for scene in scenes if scene.map_mask}
    messages = {file(dataroot, scene.name) for scene in scenes for file in (pose_file, route_file)}
    expansions = {expansion_file(dataroot, scene.location) for scene in scenes}
    return {
        "version": version,
        "tables": dict(tables),
        "sensor_files": digest(item for one in files for item in one.sizes.items()),
        "unusable_images": digest(item for one in files for item in one.unusable_images.items()),
        "maps": digest(sized(maps | expansions)),
        "can_bus": digest(sized(messages)),
    }


def parse_view_size(text: str | None) -> tuple[int, int] | None:
    """Reads convert's `--image-size`: height and width, as `data.image_size` has them.

    Raises:
        ConfigError: the text is no such size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if match is None:
        raise ConfigError(
            f"--image-size {text!r}: write it as HEIGHTxWIDTH, as data.image_size has them, such as 640x640"
        )
    return int(match[1]), int(match[2])


def kept_at(result: Mapping[str, Any]) -> str:
    """For a summary: the size that views are kept at; empty where they are as they came."""
    size = result["image_size"]
    return f", kept at {size[0]}x{size[1]} (height x width)" if size else ""


def shards_by_split(results: Sequence[SceneResult]) -> dict[str, list[ShardMetadata]]:
    """The finished shards of each split, in shard order."""
    by_split: dict[str, list[ShardMetadata]] = {"train": [], "val": []}
    for result in sorted(results, key=lambda one: one.shard.file):
        by_split[split_of(result.shard.file)].append(result.shard)
    return by_split


def provenance_of(
    plan: Mapping[str, Any], results: Sequence[SceneResult], splits: Mapping[str, str], total: int
) -> dict[str, Any]:
    """The content of `provenance.json`; holds no time and no path, so that equal data gives equal files."""
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result.counts)
    records = sum(result.shard.records for result in results)
    converted = {result.scene for result in results}
    official = plan["source"]["version"] in OFFICIAL_VERSIONS
    return {
        **plan,
        "shards": {
            result.shard.file: {
                **plan["shards"][result.shard.file],
                "bytes": result.shard.bytes,
                "sha256": result.shard.sha256,
                "ends_sha256": result.shard.ends_sha256,
            }
            for result in results
        },
        "fingerprint": content_fingerprint((one.shard.file, one.shard.sha256) for one in results),
        "records": records,
        "splits": {
            split: sum(shard.records for shard in shards)
            for split, shards in shards_by_split(results).items()
        },
        "skipped_keyframes": total - records,
        "skipped_scenes": sorted(splits.keys() - converted),
        "counts": {name: count for name, count in sorted(counts.items()) if count},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "licence": NUSCENES_LICENCE if official else OTHER_LICENCE,
    }

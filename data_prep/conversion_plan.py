"""What a conversion will write and what it then says about it: shards, source digests, provenance.

Pure functions over scenes and results; files are only looked at for their sizes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.nuscenes.can_bus import pose_file
from data_prep.nuscenes.maps import expansion_file
from data_prep.nuscenes.scene_records import SceneResult
from data_prep.nuscenes.sensor_files import SceneFiles, has_all_images
from data_prep.shards import ShardFacts, shard_file
from spacedrive_jax.data.keyframe import Scene
from spacedrive_jax.data.records_folder import content_fingerprint, split_of

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

    scene: Scene
    files: SceneFiles
    keyframes: tuple[int, ...]
    shard: str


def plan_shards(
    scenes: Sequence[Scene], files: Sequence[SceneFiles], splits: Mapping[str, str], skip: bool
) -> list[ShardWork]:
    """Chooses each scene's keyframes and shard name; scenes left with no keyframe get no shard."""
    kept = []
    for scene, scene_files in zip(scenes, files, strict=True):
        keyframes = tuple(
            index
            for index, keyframe in enumerate(scene.keyframes)
            if not skip or has_all_images(keyframe, scene_files)
        )
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


def masks_needed(dataroot: Path, scenes: Sequence[Scene]) -> list[str]:
    """Basic map masks that exist and serve a location without a map expansion."""
    masks = {
        scene.map_mask
        for scene in scenes
        if scene.map_mask and not expansion_file(dataroot, scene.location).is_file()
    }
    return sorted(mask for mask in masks if (dataroot / mask).is_file())


def source_of(
    dataroot: Path,
    version: str,
    tables: Mapping[str, str],
    scenes: Sequence[Scene],
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
    expansions = {expansion_file(dataroot, scene.location) for scene in scenes}
    return {
        "version": version,
        "tables": dict(tables),
        "sensor_files": digest(item for one in files for item in one.sizes.items()),
        "unusable_images": digest(item for one in files for item in one.unusable_images.items()),
        "maps": digest(sized(maps | expansions)),
        "can_bus": digest(sized({pose_file(dataroot, scene.name) for scene in scenes})),
    }


def shards_by_split(results: Sequence[SceneResult]) -> dict[str, list[ShardFacts]]:
    """The finished shards of each split, in shard order."""
    by_split: dict[str, list[ShardFacts]] = {"train": [], "val": []}
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

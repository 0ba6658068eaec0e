"""`python -m data_prep convert --source bench2drive`: clips in, array records out, one shard a clip."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep import conversion
from data_prep.beam import Runner, convert_units
from data_prep.bench2drive.clip_records import STEP, ClipUnit, MissingImages, convert_clip
from data_prep.bench2drive.clips import Clip, clip_digest, find_clips, laz_reader, split_clips
from data_prep.nuscenes.scene_records import SceneResult
from spacedrive_jax.console import progress
from spacedrive_jax.data.records_folder import PROVENANCE, is_whole, shard_file, write_dataset_info
from spacedrive_jax.data.schema import DATASET_NAME, DATASET_VERSION
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.folders import folder_lock
from spacedrive_jax.parallel import processes

LICENCE = "Derived from a folder in Bench2Drive's layout: the licence of that folder applies."


@dataclasses.dataclass(frozen=True)
class ClipConversion:
    """One conversion of a folder of clips into array records, one shard a clip.

    The folder is finished when OUT/provenance.json exists. The records are the same, byte for byte, for any
    number of workers, on any runner and however often the conversion was interrupted, and whether a clip
    lies in a folder or in a tar file.
    """

    dataroot: Path
    """Folder with the clips."""
    out: Path
    """Records folder to write; must be empty or not exist, unless `resume`."""
    offset: int = 0
    """Frame number of each clip's first keyframe."""
    workers: int = 0
    """Processes that write shards."""
    runner: Runner = "local"
    """Processes of this one, or an Apache Beam pipeline."""
    beam_options: str = ""
    """Beam's own options in one text."""
    resume: bool = False
    """Go on with an interrupted conversion."""
    missing_images: MissingImages = "stop"
    """What to do about keyframes that lack a picture."""
    image_size: tuple[int, int] | None = None
    """Height and width that views are kept at, see `data_prep.convert.Conversion`."""
    seed: int = 0
    """Of the split of clips that are not the benchmark's."""
    lidar: bool = False
    """Keep the LiDAR sweeps (needs laspy)."""

    def run(self) -> dict[str, Any]:
        """Converts.

        Returns:
            Counts, the fingerprint and the time taken.

        Raises:
            SpaceDriveError: a clip is damaged, or `out` holds something else.
        """
        self._check_options()
        with folder_lock(self.out):
            return self._converted(time.monotonic())

    def _check_options(self) -> None:
        if not 0 <= self.offset < STEP:
            raise ConfigError(f"--keyframe-offset {self.offset} is not one of 0 to {STEP - 1}")
        if self.workers < 0:
            raise ConfigError(f"--workers {self.workers}: must be 1 or more, or 0 for all cores")
        if self.beam_options and self.runner != "beam":
            raise ConfigError("--beam-options only goes with --runner beam")
        if self.lidar:
            laz_reader()

    def _converted(self, start: float) -> dict[str, Any]:
        conversion.check_output_folder(self.out, self.resume)
        clips = find_clips(self.dataroot)
        splits, rule = split_clips(clips, self.seed)
        units = self._units(clips, splits)
        digests = {clip.name: clip_digest(clip) for clip in progress(clips, desc="check", unit="clip")}
        plan: dict[str, Any] = {
            "schema": {"name": DATASET_NAME, "version": DATASET_VERSION},
            "source": {"version": "bench2drive", "clips": digests},
            "options": {
                "missing_images": self.missing_images,
                "image_size": self.image_size,
                "offset": self.offset,
                "seed": self.seed,
                "lidar": self.lidar,
            },
            "split_rule": rule,
            "shards": {unit.shard.name: {"scene": unit.clip.name} for unit in units},
        }
        conversion.begin(self.out, plan)
        results = self._write_shards(units)
        skipped = sum(result.counts.get("keyframes_skipped", 0) for result in results)
        total = sum(result.shard.records for result in results) + skipped
        # How many keyframes a tar file has is known once it was read.
        for result in results:
            plan["shards"][result.shard.file]["keyframes"] = result.shard.records
        provenance = conversion.provenance_of(plan, results, splits, total) | {"licence": LICENCE}
        if not is_whole(self.out):
            shards = conversion.shards_by_split(results)
            write_dataset_info(self.out, shards, "Keyframes of Bench2Drive as self-contained records.")
            conversion.write_json(self.out / PROVENANCE, provenance)
        return {
            "records": provenance["records"],
            "keyframes": total,
            "clips": len(clips),
            "fingerprint": provenance["fingerprint"],
            "skipped": skipped,
            "seconds": round(time.monotonic() - start, 3),
            "splits": provenance["splits"],
            "split_rule": rule,
            "counts": provenance["counts"],
            "image_size": self.image_size,
            "out": str(self.out),
        }

    def _units(self, clips: Sequence[Clip], splits: Mapping[str, str]) -> list[ClipUnit]:
        in_split = Counter(splits[clip.name] for clip in clips)
        following: Counter[str] = Counter()
        units = []
        for clip in clips:
            split = splits[clip.name]
            shard = self.out / shard_file(split, following[split], in_split[split])
            following[split] += 1
            units.append(ClipUnit(clip, self.offset, self.missing_images, shard, self.lidar, self.image_size))
        return units

    def _write_shards(self, units: Sequence[ClipUnit]) -> list[SceneResult]:
        """Writes the shards that are not done yet; returns what each holds, in order."""
        finished = {
            unit.shard.name: conversion.whole_scene(self.out, unit.shard.name)
            for unit in progress(units, desc="check shards", unit="shard")
        }
        todo = [unit for unit in units if finished[unit.shard.name] is None]
        conversion.remove_left_overs(self.out)
        workers = processes(self.workers, len(todo))
        with progress(total=len(todo), desc="convert", unit="clip") as bar:
            if todo:
                finished |= convert_units(
                    todo,
                    convert_clip,
                    self.out,
                    runner=self.runner,
                    workers=workers,
                    beam_options=self.beam_options,
                    advance=lambda _: bar.update(),
                )
        return [result for result in finished.values() if result is not None]


def summary(result: Mapping[str, Any]) -> str:
    """What a person wants to know after a conversion."""
    counts = result["counts"]
    unknown = {name.removeprefix("unknown_"): n for name, n in counts.items() if name.startswith("unknown_")}
    lines = [
        f"{result['records']} records of {result['clips']} clips in {result['out']} "
        f"(train {result['splits']['train']}, val {result['splits']['val']}, {result['split_rule']} split; "
        f"{result['skipped']} keyframes skipped)",
        f"  images: {counts.get('images_from_files', 0)} from files, {counts.get('images_empty', 0)} empty"
        f"{conversion.kept_at(result)}; no exact depth, no drivable area: Bench2Drive has neither",
        f"  lidar: {counts.get('lidar_present', 0)} sweeps kept",
        f"  fingerprint {result['fingerprint']}",
    ]
    if counts.get("frames_missing"):
        lines.append(
            f"  note: {counts['frames_missing']} frames are missing inside clips; times are by number"
        )
    if unknown:
        listed = ", ".join(f"{name} {count}" for name, count in sorted(unknown.items()))
        lines.append(f"  note: numbers that were null or NaN: {listed}")
    return "\n".join(lines)

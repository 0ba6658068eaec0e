"""From a nuScenes folder to array records: the whole conversion, in the order in which it happens."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from data_prep import conversion
from data_prep.beam import Runner, convert_units
from data_prep.conversion import (
    ShardWork,
    masks_needed,
    plan_shards,
    provenance_of,
    shards_by_split,
    source_of,
)
from data_prep.nuscenes.expansions import prepare_masks
from data_prep.nuscenes.scene_records import SceneResult, SceneUnit, convert_scene
from data_prep.nuscenes.scenes import PackedScene, read_scenes, split_scenes
from data_prep.nuscenes.sensor_files import (
    SceneFiles,
    check_layout,
    describe_unusable_images,
    find_elsewhere,
    scan_scene,
)
from data_prep.nuscenes.tables import SceneRow, not_collecting, read_tables
from spacedrive_jax.console import progress
from spacedrive_jax.data.records_folder import PROVENANCE, is_whole, write_dataset_info
from spacedrive_jax.data.schema import DATASET_NAME, DATASET_VERSION
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.folders import folder_lock
from spacedrive_jax.parallel import processes

MissingImages = Literal["stop", "skip", "empty", "render"]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """One conversion of a nuScenes folder into array records, one shard per scene.

    The folder is finished when OUT/provenance.json exists. The records are the same, byte for byte, for any
    number of workers, on any runner and however often the conversion was interrupted.
    """

    dataroot: Path
    """nuScenes folder: the parent of the version folder, samples/, maps/ and can_bus/."""
    version: str
    """Version folder with the tables."""
    out: Path
    """Records folder to write; must be empty or not exist, unless `resume`."""
    workers: int = 0
    """Processes that write shards."""
    runner: Runner = "local"
    """Processes of this one, or an Apache Beam pipeline."""
    beam_options: str = ""
    """Beam's own options."""
    resume: bool = False
    """Go on with an interrupted conversion, or write damaged shards of a finished one again."""
    missing_images: MissingImages = "stop"
    """What becomes of keyframes whose camera images are absent or damaged."""
    render_size: str | None = None
    """WxH of rendered images; the camera's own when None."""
    image_size: tuple[int, int] | None = None
    """Height and width that views are resized to and kept at (`images.kept_view`); None leaves pictures as
    they are."""
    seed: int = 0
    """For the split of scenes that are on no official list, and for the looks of rendered images."""

    def run(self) -> dict[str, Any]:
        """Converts; returns counts, the fingerprint and the time taken.

        Raises:
            DataError: the options do not fit each other or the folder, or the folder is damaged.
        """
        render_size = self._checked_options()
        if self.out.exists() and not self.out.is_dir():
            raise DataError(f"--out {self.out} is a file; name a folder")
        with folder_lock(self.out):
            return self._convert(render_size)

    def _convert(self, render_size: tuple[int, int] | None) -> dict[str, Any]:
        start = time.monotonic()
        conversion.check_output_folder(self.out, self.resume)
        scenes, files, digests = self._read()
        if not scenes:
            raise DataError(f"{self.dataroot / self.version / 'scene.json'} holds no scene")
        check_layout(self.dataroot, scenes)
        splits, split_rule = split_scenes(self.version, [scene.name for scene in scenes], self.seed)
        if self.missing_images == "stop" and any(one.unusable_images for one in files):
            raise DataError(
                f"camera images under {self.dataroot} are missing or damaged:\n"
                f"{describe_unusable_images((scene.unpack() for scene in scenes), files)}\n"
                f"{self._images_elsewhere(files)}"
                "fetch them, or choose --missing-images skip, empty or render"
            )
        work = plan_shards(scenes, files, splits, skip=self.missing_images == "skip")
        if not work:
            raise DataError(
                f"no keyframe of {self.version} has all six images; choose --missing-images empty or render"
            )
        plan = {
            "schema": {"name": DATASET_NAME, "version": DATASET_VERSION},
            "source": source_of(self.dataroot, self.version, digests, scenes, files),
            "options": {
                "missing_images": self.missing_images,
                "render_size": render_size,
                "image_size": self.image_size,
                "seed": self.seed,
            },
            "split_rule": split_rule,
            "shards": {one.shard: {"scene": one.scene.name, "keyframes": len(one.keyframes)} for one in work},
        }
        conversion.begin(self.out, plan)
        results = self._write_shards(work, render_size)
        total = sum(scene.num_keyframes for scene in scenes)
        provenance = provenance_of(plan, results, splits, total)
        if not is_whole(self.out):
            write_dataset_info(
                self.out, shards_by_split(results), f"Keyframes of {self.version} as self-contained records."
            )
            conversion.write_json(self.out / PROVENANCE, provenance)
        return {
            "records": provenance["records"],
            "keyframes": total,
            "fingerprint": provenance["fingerprint"],
            "skipped": provenance["skipped_keyframes"],
            "seconds": round(time.monotonic() - start, 3),
            "splits": provenance["splits"],
            "split_rule": split_rule,
            "counts": provenance["counts"],
            "image_size": self.image_size,
            "out": str(self.out),
        }

    def _read(self) -> tuple[list[PackedScene], list[SceneFiles], Mapping[str, str]]:
        """The scenes, what is there of their files, and the digests of the tables."""
        # No circles are made of rows: looking for some, again and again, would take a third of the time.
        with not_collecting():
            tables = read_tables(self.dataroot, self.version)
            scenes: list[PackedScene] = []
            files: list[SceneFiles] = []
            count = len(tables[SceneRow])
            for scene in progress(read_scenes(tables), total=count, desc="check files", unit="scene"):
                scenes.append(PackedScene.pack(scene))
                files.append(scan_scene(self.dataroot, scene))
            return scenes, files, tables.digests

    def _images_elsewhere(self, files: Sequence[SceneFiles]) -> str:
        """Where the first missing image lies, if it is one folder off."""
        missing = (name for one in files for name, why in one.unusable_images.items() if why == "missing")
        name = next(missing, None)
        found = None if name is None else find_elsewhere(self.dataroot, self.dataroot / name)
        return f"({found} is there: one folder off?)\n" if found else ""

    def _checked_options(self) -> tuple[int, int] | None:
        """Checks flags that need no data; returns the render size as (height, width)."""
        if self.workers < 0:
            raise ConfigError(f"--workers {self.workers}: must be 1 or more, or 0 for all cores")
        if self.beam_options and self.runner != "beam":
            raise ConfigError("--beam-options only goes with --runner beam")
        if self.render_size is None:
            return None
        if self.missing_images != "render":
            raise ConfigError("--render-size only goes with --missing-images render")
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", self.render_size)
        if not match:
            raise ConfigError(
                f"--render-size {self.render_size!r}: write it as WIDTHxHEIGHT, such as 704x396"
            )
        return int(match[2]), int(match[1])

    def _write_shards(
        self, work: Sequence[ShardWork], render_size: tuple[int, int] | None
    ) -> list[SceneResult]:
        """Writes the shards that are not done yet; returns what each holds, in order."""
        finished = {
            one.shard: conversion.whole_scene(self.out, one.shard)
            for one in progress(work, desc="check shards", unit="shard")
        }
        todo = [one for one in work if finished[one.shard] is None]
        conversion.remove_left_overs(self.out)
        mask_folder = self.out / conversion.FOLDER / "masks"
        masks = masks_needed(self.dataroot, [one.scene for one in todo])
        if masks:
            with progress(total=len(masks), desc="unpack map masks", unit="map") as bar:
                prepare_masks(self.dataroot, masks, mask_folder, bar.update)
        units = (
            SceneUnit(
                dataroot=self.dataroot,
                scene=one.scene,
                files=one.files,
                keyframes=one.keyframes,
                shard=self.out / one.shard,
                mask_folder=mask_folder,
                render_missing=self.missing_images == "render",
                render_size=render_size,
                image_size=self.image_size,
                seed=self.seed,
            )
            for one in todo
        )
        workers = processes(self.workers, len(todo))
        with progress(total=sum(len(one.keyframes) for one in todo), desc="convert", unit="keyframe") as bar:
            if todo:
                finished |= convert_units(
                    units,
                    convert_scene,
                    self.out,
                    runner=self.runner,
                    workers=workers,
                    beam_options=self.beam_options,
                    advance=bar.update,
                )
        for mask in mask_folder.glob("*"):
            mask.unlink()
        if mask_folder.is_dir():
            mask_folder.rmdir()
        return [result for result in finished.values() if result is not None]


def summary(result: Mapping[str, Any]) -> str:
    """What a person wants to know after a conversion."""
    counts = result["counts"]

    def listed(prefix: str) -> str:
        found = {
            name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)
        }
        return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found.items())

    notes = []
    if counts.get("drivable_none"):
        notes.append(
            f"  note: maps/ has no map for {counts['drivable_none']} records; their drivable area is empty"
        )
    if counts.get("lidar_damaged"):
        notes.append(f"  note: {counts['lidar_damaged']} LiDAR sweeps are damaged and were left out")
    return "\n".join(
        [
            f"{result['records']} records in {result['out']} "
            f"(train {result['splits']['train']}, val {result['splits']['val']}, "
            f"{result['split_rule']} split; {result['skipped']} keyframes skipped)",
            f"  images: {listed('images_')}{conversion.kept_at(result)}",
            f"  lidar: {listed('lidar_')}   CAN bus: {listed('can_bus_')}",
            f"  drivable area: {listed('drivable_')}",
            f"  fingerprint {result['fingerprint']}",
            *notes,
        ]
    )

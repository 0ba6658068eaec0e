"""`python -m data_prep convert`: a nuScenes or Bench2Drive folder in, array records out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from spacedrive_jax.bounds import SEED, WORKERS, Bound, Bounds
from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Convert(Command):
    """Turn a nuScenes or Bench2Drive folder into array records, one shard per scene or clip.

    Example: python -m data_prep convert --dataroot /data/nuscenes --version v1.0-mini --out /data/records

    The folder is finished when OUT/provenance.json exists. The records are the same, byte for byte, for any
    number of workers, on any runner and however often the conversion was interrupted.
    """

    when_stopped: ClassVar[str] = "--resume goes on where it stopped"

    dataroot: Path
    """nuScenes folder: the parent of the version folder, samples/, maps/ and can_bus/. For Bench2Drive the
    folder with its clips, as tar files or unpacked."""
    out: Path
    """Records folder to write; must be empty or not exist."""
    source: Literal["nuscenes", "bench2drive"] = "nuscenes"
    """Whose folder it is: Bench2Drive's needs no --version."""
    version: str = ""
    """For nuScenes: version folder with the tables, such as v1.0-mini or v1.0-trainval."""
    keyframe_offset: int = 0
    """For Bench2Drive: frame number of a clip's first keyframe, 0 to 4; every fifth frame from there on is
    one."""
    lidar: tyro.conf.FlagCreatePairsOff[bool] = False
    """For Bench2Drive: keep the LiDAR sweeps (requirements-bench2drive.txt); nuScenes' are always kept."""
    workers: int = 0
    """Processes that write shards; 0 takes all cores (one for a few scenes)."""
    runner: Literal["local", "beam"] = "local"
    """Processes of this command, or an Apache Beam pipeline (requirements-beam.txt)."""
    beam_options: str = ""
    """Beam's own options in one argument, such as --beam-options="--runner=FlinkRunner
    --flink_master=HOST:8081"; without a runner there, Beam runs on this machine."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue an interrupted conversion in --out, or write damaged shards of a finished one again. Whole
    shards are read, compared with their digests, and left as they are."""
    missing_images: Literal["stop", "skip", "empty", "render"] = "stop"
    """When camera images are absent or damaged: stop and list them, skip their keyframes, keep the keyframe
    with empty images, or render them from the annotations and the map (marked in image_rendered)."""
    render_size: str | None = None
    """WxH of rendered images, such as 704x396; default: the camera's own size."""
    image_size: str | None = None
    """HEIGHTxWIDTH, a run's data.image_size such as 640x640: keep every view resized to it once, without
    loss, as training at that size would do each time; other sizes cannot be trained on then. Default: the
    pictures as they are."""
    seed: int = 0
    """For the split of scenes that are on no official list, and for the looks of rendered images."""

    BOUNDS: ClassVar[Bounds] = {"keyframe_offset": Bound(0, 4), "workers": WORKERS, "seed": SEED}

    def run(self) -> Mapping[str, Any]:
        """Converts; see `data_prep.convert.Conversion`."""
        from data_prep import conversion

        image_size = conversion.parse_view_size(self.image_size)
        if self.source == "bench2drive":
            return self._convert_clips(image_size)
        from data_prep.convert import Conversion, summary

        if not self.version:
            raise ConfigError("give the folder with the tables, --version, such as v1.0-mini")
        if self.keyframe_offset or self.lidar:
            raise ConfigError("--keyframe-offset and --lidar go with --source bench2drive only")
        outcome = Conversion(
            dataroot=self.dataroot,
            version=self.version.rstrip("/"),  # which a shell's completion leaves
            out=self.out,
            workers=self.workers,
            runner=self.runner,
            beam_options=self.beam_options,
            resume=self.resume,
            missing_images=self.missing_images,
            render_size=self.render_size,
            image_size=image_size,
            seed=self.seed,
        ).run()
        print(summary(outcome))
        return outcome

    def _convert_clips(self, image_size: tuple[int, int] | None) -> Mapping[str, Any]:
        from data_prep.bench2drive.convert import ClipConversion, summary

        if self.version or self.render_size or self.missing_images == "render":
            raise ConfigError("--version, --render-size and --missing-images render go with nuScenes only")
        outcome = ClipConversion(
            dataroot=self.dataroot,
            out=self.out,
            offset=self.keyframe_offset,
            workers=self.workers,
            runner=self.runner,
            beam_options=self.beam_options,
            resume=self.resume,
            missing_images=self.missing_images,
            image_size=image_size,
            seed=self.seed,
            lidar=self.lidar,
        ).run()
        print(summary(outcome))
        return outcome

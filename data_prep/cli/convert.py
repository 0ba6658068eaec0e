"""`python -m data_prep convert`: a nuScenes folder in, array records out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from spacedrive_jax.bounds import COUNT, SEED, Bounds
from spacedrive_jax.console import Command


@dataclasses.dataclass(frozen=True)
class Convert(Command):
    """Turn a nuScenes folder into array records, one shard per scene.

    Example: python -m data_prep convert --dataroot /data/nuscenes --version v1.0-mini --out /data/records

    The folder is finished when OUT/provenance.json exists. The records are the same, byte for byte, for any
    number of workers, on any runner and however often the conversion was interrupted.
    """

    when_stopped: ClassVar[str] = "--resume goes on where it stopped"

    dataroot: Path
    """nuScenes folder: the parent of the version folder, samples/, maps/ and can_bus/."""
    version: str
    """Version folder with the tables, such as v1.0-mini or v1.0-trainval."""
    out: Path
    """Records folder to write; must be empty or not exist."""
    workers: int = 1
    """Processes that write shards."""
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
    seed: int = 0
    """For the split of scenes that are on no official list, and for the looks of rendered images."""

    BOUNDS: ClassVar[Bounds] = {"workers": COUNT, "seed": SEED}

    def run(self) -> Mapping[str, Any]:
        """Converts; see `data_prep.convert.Conversion`."""
        from data_prep.convert import Conversion, summary

        facts = Conversion(
            dataroot=self.dataroot,
            version=self.version,
            out=self.out,
            workers=self.workers,
            runner=self.runner,
            beam_options=self.beam_options,
            resume=self.resume,
            missing_images=self.missing_images,
            render_size=self.render_size,
            seed=self.seed,
        ).run()
        print(summary(facts))
        return facts

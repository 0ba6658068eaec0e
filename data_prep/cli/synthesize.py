"""`python -m data_prep synthesize`: writes the synthetic world as a nuScenes v1.0 folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from spacedrive_jax.bounds import WORKERS, Bound, Bounds
from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Synthesize(Command):
    """Write a procedural driving world as a nuScenes v1.0 folder (tables, images, LiDAR, maps, CAN bus),
    or in Bench2Drive's layout.

    Example: python -m data_prep synthesize --out data/synthetic --scenes 10 --keyframes 20

    The folder is a true nuScenes folder of version `v1.0-synthetic`; the official devkit reads it. The same
    seed writes the same bytes, whatever the number of workers.
    """

    out: Path
    """Folder to write; must not exist or be empty."""
    scenes: int = 10
    """Number of scenes; manoeuvres, towns and weather change from one to the next."""
    keyframes: int = 20
    """Keyframes per scene, two a second."""
    seed: int = 0
    """Seed of the towns, the traffic and the light."""
    image_size: str = "704x396"
    """Width x height of the camera images in pixels."""
    depth: bool = True
    """Keep the exact depth of every image under samples_depth/ (16-bit PNG, metres * 256, 0 for sky)."""
    layout: Literal["nuscenes", "bench2drive"] = "nuscenes"
    """Whose layout: nuScenes', or Bench2Drive's clips of ten frames a second in CARLA's axes (no exact depth,
    no map)."""
    perturb: tyro.conf.FlagCreatePairsOff[bool] = False
    """Begin every scene 0.3 to 1 m beside the lane and turned by 5 to 10 degrees, and let the expert drive
    back: what comes after a mistake, for training in a closed loop. Scenes without room for it are left out,
    counted and named."""
    workers: int = 0
    """Processes; 0 takes one per core."""
    runner: Literal["local", "beam"] = "local"
    """Processes of this command, or an Apache Beam pipeline (requirements-beam.txt)."""
    beam_options: str = ""
    """Beam's own options in one argument, such as --beam-options="--runner=DaskRunner
    --dask_client_address=tcp://host:8786"; workers see --out under the same path."""

    BOUNDS: ClassVar[Bounds] = {
        "scenes": Bound(1, 9000),
        "keyframes": Bound(1, 200),
        "seed": Bound(0, 2**31 - 1),
        "workers": WORKERS,
    }

    def run(self) -> Mapping[str, Any]:
        """Writes the folder; see `data_prep.synthesize.folder.Synthesis`."""
        from data_prep.synthesize.folder import Synthesis
        from data_prep.synthesize.tables import VERSION

        if self.beam_options and self.runner != "beam":
            raise ConfigError("--beam-options only goes with --runner beam")
        outcome = Synthesis(
            out=self.out,
            scenes=self.scenes,
            keyframes=self.keyframes,
            seed=self.seed,
            image_size=self.image_size,
            depth=self.depth,
            workers=self.workers,
            layout=self.layout,
            perturb=self.perturb,
            beam_options=self.beam_options if self.runner == "beam" else None,
        ).run()
        what = f"version {VERSION}" if self.layout == "nuscenes" else "Bench2Drive's layout"
        print(f"wrote {outcome['scenes']} scenes, {outcome['keyframes']} keyframes to {self.out} ({what})")
        if outcome["skipped"]:
            print(f"left out {outcome['skipped']}: {', '.join(outcome['skipped_scenes'])}")
        return outcome

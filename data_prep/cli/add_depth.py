"""`python -m data_prep add-depth`: a depth network's patch depth for every keyframe, beside the records."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from spacedrive_jax.bounds import COUNT, FROM_ZERO, Bound, Bounds
from spacedrive_jax.cli.common import on_all_hosts
from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError

if TYPE_CHECKING:
    from spacedrive_jax.inference.depth_network import DepthNetworkConfig


@dataclasses.dataclass(frozen=True)
class AddDepth(Command):
    """Run a depth network over all keyframes and keep its depth beside the records.

    Training and prediction then read it (`--data.depth.sources unidepth`, or `fused` for the same fitted to
    LiDAR) and need no depth network. Images are spread over all devices; several hosts (on one file system)
    share the keyframes. Starting it again goes on where it was stopped.

    Example: python -m data_prep add-depth --records records --model unidepth-v2-vitl14
    --run spacedrive_qwen_7b
    """

    when_stopped: ClassVar[str] = "the same command goes on where it stopped"
    when_out_of_memory: ClassVar[str] = "lower --keyframes-per-step"

    records: Path
    """Records folder written by `python -m data_prep convert`."""
    model: Path
    """Checkpoint (folder or file) of UniDepthV2 or Depth Anything V2 metric, or a JSON file with `weights`
    and other fields of `spacedrive_jax.inference.depth_network.DepthNetworkConfig`."""
    run_config: Annotated[str | None, tyro.conf.arg(name="run")] = None
    """Run preset (or .py file, or a run's config.json) whose image size, channel order, pooling and token
    grid to use."""
    image_size: str | None = None
    """WIDTHxHEIGHT that every view is resized to, instead of the run's."""
    channel_order: Literal["rgb", "bgr"] | None = None
    """Order of the channels that the network gets, instead of the run's."""
    grid: str | None = None
    """ROWSxCOLUMNS of visual tokens, instead of the run's."""
    pooling: Literal["min", "median", "mean"] | None = None
    """How the depth of a visual token's pixels becomes one, instead of the run's."""
    full: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also keep the depth of every pixel as 16-bit PNGs (some 3 MB a keyframe), for any grid and pooling."""
    keyframes_per_step: int | None = None
    """Keyframes (six images each) that go through the network together; by default as few as give every
    device the same number of images."""
    runner: Literal["local", "beam"] = "local"
    """This process, or an Apache Beam pipeline (requirements-beam.txt) with a chunk of 32 keyframes a task;
    its workers see the records and the weights under the same path."""
    beam_options: str = ""
    """Beam's own options in one argument, such as --beam-options="--runner=DaskRunner
    --dask_client_address=tcp://host:8786"; by default processes of this machine."""
    workers: int = 1
    """Processes on this machine, with --runner beam."""
    coordinator: str | None = None
    """Several hosts: `auto` on SLURM, GKE and Cloud TPU, or HOST:PORT of the first host."""
    num_processes: int | None = None
    """Hosts that share the work, with --coordinator HOST:PORT."""
    process_id: int | None = None
    """This host, from 0, with --coordinator HOST:PORT."""

    BOUNDS: ClassVar[Bounds] = {
        "keyframes_per_step": COUNT,
        "workers": Bound(1, 1024),
        "num_processes": COUNT,
        "process_id": FROM_ZERO,
    }

    @on_all_hosts
    def run(self) -> Mapping[str, Any]:
        """Writes the sidecar; returns its folder, fingerprint and counts."""
        import jax

        from data_prep.add_depth import add_depth
        from spacedrive_jax.data.depth_cache import FOLDER
        from spacedrive_jax.data.records import open_records
        from spacedrive_jax.folders import folder_lock
        from spacedrive_jax.training.hosts import connect

        if self.runner != "beam" and (self.beam_options or self.workers != 1):
            raise ConfigError("--beam-options and --workers go with --runner beam only")
        if self.runner == "beam" and self.coordinator is not None:
            raise ConfigError("--runner beam and --coordinator are two ways to share the work: give one")
        started = time.monotonic()
        connect(self.coordinator, self.num_processes, self.process_id)
        records = open_records(self.records)
        # Hosts share the folder: each holds a lock of its own against a second job of the same share.
        with folder_lock(records.directory / FOLDER, name=f".in-use-{jax.process_index()}.json"):
            result = add_depth(
                records,
                self._network(),
                full=self.full,
                keyframes_per_step=self.keyframes_per_step,
                beam_options=self.beam_options if self.runner == "beam" else None,
                workers=self.workers,
            )
        print(
            f"{result.keyframes} keyframes ({result.reused} from an earlier run), {result.aligned} of "
            f"{result.cameras} cameras aligned to LiDAR: {result.folder}"
        )
        return {
            **dataclasses.asdict(result),
            "fingerprint": result.fingerprint,
            "seconds": time.monotonic() - started,
        }

    def _network(self) -> DepthNetworkConfig:
        from spacedrive_jax.inference.depth_network import DepthNetworkConfig

        if self.model.suffix == ".json":
            network = DepthNetworkConfig.from_file(self.model)
        else:
            network = DepthNetworkConfig(weights=str(self.model))
        if self.run_config is not None:
            from spacedrive_jax.config import load_config
            from spacedrive_jax.models.families import family_of

            run = load_config(self.run_config)
            processor = family_of(run.model.vlm).image_processor(run.model.vlm.vision, run.data.image_size)
            network = dataclasses.replace(
                network,
                image_size=run.data.image_size,
                channel_order=run.data.channel_order,
                pooling=run.data.depth.pooling,
                grid=processor.token_grid,
            )
        given: dict[str, Any] = {"channel_order": self.channel_order, "pooling": self.pooling}
        if self.image_size is not None:
            width, height = _sides(self.image_size, "--image-size", "640x640")
            given["image_size"] = (height, width)
        if self.grid is not None:
            given["grid"] = _sides(self.grid, "--grid", "23x23")
        return dataclasses.replace(
            network, **{name: value for name, value in given.items() if value is not None}
        )


def _sides(text: str, flag: str, example: str) -> tuple[int, int]:
    """Two whole numbers with an x between them.

    Raises:
        ConfigError: it is something else.
    """
    first, _, second = text.partition("x")
    if not (first.isdecimal() and second.isdecimal()):
        raise ConfigError(f"{flag} {text!r}: expected two numbers such as {example}")
    return int(first), int(second)

"""The command line of data preparation: synthesize, convert, add-depth, inspect.

A command checks its flags and imports what it runs only then, so that `--help` stays fast.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from spacedrive_jax import console
from spacedrive_jax.bounds import COUNT, FROM_ZERO, SEED, WORKERS, Bound, Bounds
from spacedrive_jax.cli.common import on_all_hosts
from spacedrive_jax.console import Command, progress
from spacedrive_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from spacedrive_jax.data.schema import Record
    from spacedrive_jax.inference.depth_network import DepthNetworkConfig


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

        network = DepthNetworkConfig.of(self.model)
        if self.run_config is not None:
            from spacedrive_jax.config import load_config

            network = network.for_run(load_config(self.run_config))
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


@dataclasses.dataclass(frozen=True)
class Inspect(Command):
    """Print a record of a records folder and, on request, draw it.

    Example: python -m data_prep inspect records --token ca9a282c9e77460f8360f564131a8af5 --image view.png
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECORDS")]
    """Records folder written by `python -m data_prep convert`."""
    token: str | None = None
    """Keyframe to show; default: the middle one of the scene."""
    scene: str | None = None
    """Name of a scene (scene-0103); default: the first."""
    list: tyro.conf.FlagCreatePairsOff[bool] = False
    """List split, scene and token of every keyframe (of --scene, if given) instead of showing one."""
    image: Path | None = None
    """Picture to write (.png, .pdf, .svg or .jpg): the six cameras with boxes and waypoints, and a bird's-eye
    view."""
    film: Path | None = None
    """MP4 to write of a whole --scene: that picture for every keyframe, two a second. Needs the extra `video`
    (imageio-ffmpeg)."""
    rerun: Path | None = None
    """Rerun recording (.rrd) to write of a --scene: cameras, depth points, boxes and the recorded way in 3D.
    Needs the extra `rerun` (rerun-sdk); `rerun FILE.rrd` shows it."""
    keyframes: str | None = None
    """FIRST:END, for --rerun: keyframes of the scene, counted from 0; END itself is left out."""
    points: Path | None = None
    """PLY to write: the views lifted by their depth to one coloured point cloud, the LiDAR sweep in red."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read every shard whole, compare it with its digest, and name those that are damaged."""
    check_images: tyro.conf.FlagCreatePairsOff[bool] = False
    """Decode every picture too, and name those that were damaged before they were converted."""
    depth_cache: str | None = None
    """For --points: sidecar of `add-depth --full` to use; without it the exact depth of drawn views."""

    WRITES: ClassVar[tuple[str, ...]] = ("image", "film", "rerun", "points")
    BUCKETS: ClassVar[tuple[str, ...]] = ("directory",)

    def run(self) -> Mapping[str, Any]:
        """Prints the record; returns its token and the folder's counts."""
        if self.depth_cache is not None and self.points is None:
            raise ConfigError("--depth-cache says whose depth --points lifts: give both")
        if self.points is not None and self.points.suffix.lower() != ".ply":
            raise ConfigError(f"--points {self.points}: point clouds are written as .ply")
        from data_prep.inspect_record import check_pictures, describe_record, find_record
        from spacedrive_jax.data.records_folder import check_contents, read_provenance

        if self.check:
            with progress(desc="check shards", unit="shard") as bar:
                shards = check_contents(self.directory, lambda _: bar.update())
            print(f"{self.directory}: {shards} shards are whole")
        if self.check_images:
            print(f"{self.directory}: {check_pictures(self.directory)} pictures are whole")
        provenance = read_provenance(self.directory)
        if self.token is not None and self.scene is not None:
            raise ConfigError("--token names a keyframe and --scene a scene: give one of them")
        if self.image is not None:
            # matplotlib takes a second to import; the text needs none of it.
            from spacedrive_jax.reporting.figures import check_picture

            check_picture(self.image)
        print(
            f"{self.directory}: {provenance['records']} records "
            f"({', '.join(f'{split} {count}' for split, count in provenance['splits'].items())}), "
            f"fingerprint {provenance['fingerprint'][:12]}"
        )
        if self.keyframes is not None and self.rerun is None:
            raise ConfigError("--keyframes says what --rerun shows: give both")
        if self.film is not None:
            return self._film(self.film, provenance["records"])
        if self.rerun is not None:
            return self._rerun(self.rerun, provenance["records"])
        if self.list:
            return self._list(provenance["records"])
        record = find_record(self.directory, self.token, self.scene)
        print(describe_record(record))
        outcome: dict[str, Any] = {"token": record["token"], "records": provenance["records"]}
        if self.image is not None:
            from data_prep.inspect_record import draw_record

            draw_record(record, self.image)
            print(f"drew {self.image}")
            outcome["image"] = str(self.image)
        if self.points is not None:
            outcome["points"] = self._write_points(self.points, record, provenance["fingerprint"])
        return outcome

    def _film(self, film: Path, count: int) -> Mapping[str, Any]:
        from data_prep.inspect_record import film_scene

        if self.scene is None:
            raise ConfigError("--film shows a whole scene: name it with --scene (--list names them)")
        if self.rerun or self.list or self.image is not None or self.points is not None:
            raise ConfigError("--film goes without --rerun, --list, --image and --points")
        shown = film_scene(self.directory, self.scene, film)
        print(f"filmed {shown} keyframes of {self.scene}: {film}")
        return {"records": count, "scene": self.scene, "keyframes": shown, "film": str(film)}

    def _rerun(self, file: Path, count: int) -> Mapping[str, Any]:
        from data_prep.inspect_record import record_scene

        if self.scene is None:
            raise ConfigError("--rerun shows a scene: name it with --scene (--list names them)")
        if self.list or self.image is not None or self.points is not None:
            raise ConfigError("--rerun goes without --list, --image and --points")
        shown = record_scene(self.directory, self.scene, self._range(), file)
        print(f"recorded {shown} keyframes of {self.scene}: {file}")
        return {"records": count, "scene": self.scene, "keyframes": shown, "rerun": str(file)}

    def _range(self) -> tuple[int, int] | None:
        if self.keyframes is None:
            return None
        parts = self.keyframes.split(":")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts) or int(parts[0]) >= int(parts[1]):
            raise ConfigError(f"--keyframes {self.keyframes!r} is not FIRST:END, for example 0:10")
        return int(parts[0]), int(parts[1])

    def _list(self, count: int) -> Mapping[str, Any]:
        from data_prep.inspect_record import list_keyframes

        if self.token is not None or self.image is not None or self.points is not None:
            raise ConfigError("--list shows no keyframe: leave --token, --image and --points out")
        keyframes = list_keyframes(self.directory, self.scene)
        width = max(len(each.scene) for each in keyframes)
        for each in keyframes:
            print(f"{each.split:5} {each.scene:{width}} {each.token}")
        return {"records": count, "keyframes": [dataclasses.asdict(each) for each in keyframes]}

    def _write_points(self, file: Path, record: Record, fingerprint: str) -> str:
        # These import jax, which the text and the picture can do without.
        from data_prep.inspect_record import write_ply
        from spacedrive_jax.data.depth_cache import DepthCache, find_cache
        from spacedrive_jax.data.depth_sources import NETWORKS
        from spacedrive_jax.reporting.cameras import keyframe_points

        full = None
        if self.depth_cache is not None:
            folder = find_cache(self.directory, set(NETWORKS), self.depth_cache)
            full = DepthCache(folder, fingerprint).read(record["token"]).full
            if not full:
                raise DataError(f"{folder} keeps patch depth only; run add-depth with --full")
        points, colours = keyframe_points(record, full)
        write_ply(file, points, colours)
        print(f"wrote {len(points)} points to {file}")
        return str(file)


PROGRAM = "python -m data_prep"
COMMANDS: dict[str, type[Command]] = {
    "synthesize": Synthesize,
    "convert": Convert,
    "add-depth": AddDepth,
    "inspect": Inspect,
}
DESCRIPTION = """Offline data preparation: nuScenes folders, real or synthetic, in; array records out.

Example:
  python -m data_prep synthesize --out world
  python -m data_prep convert --dataroot world --version v1.0-synthetic --out records
  python -m data_prep add-depth --records records --model unidepth-v2-vitl14
  python -m data_prep inspect records --image view.png
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    given = sys.argv[1:] if argv is None else argv
    return console.until_the_reader_leaves(lambda: console.main(PROGRAM, DESCRIPTION, COMMANDS, given))

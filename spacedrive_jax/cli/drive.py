"""`python -m spacedrive_jax drive`: a closed loop in the embedded world."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tyro

from spacedrive_jax.bounds import COUNT, FROM_ZERO, WORKERS, Bound, Bounds
from spacedrive_jax.cli.common import (
    advice_on_memory,
    mesh_of,
    on_all_hosts,
    server_token,
    use_compilation_cache,
)
from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.folders import output_lock
from spacedrive_jax.io import place

if TYPE_CHECKING:
    from spacedrive_jax.driving.bench import Finished, WorldPolicy
    from spacedrive_jax.driving.drive import Show
    from spacedrive_jax.driving.episode import DriveOptions
    from spacedrive_jax.driving.recovery import CollectedRecords
    from spacedrive_jax.driving.scenarios import DriveSpec
    from spacedrive_jax.training.hosts import Hosts


@dataclasses.dataclass(frozen=True)
class Drive(Command):
    """Drive in the synthetic world with a model, a policy server, the expert or a baseline, and score it.

    Writes results.json (Bench2Drive's format, for score-bench2drive --routes OUT/routes.json), metric_info/
    (its comfort logs), summary.json (driving score, success rate, PDM scores with every part) and a folder
    per drive. A drive's bytes do not depend on the number of workers; an interrupted run goes on with
    --resume.

    Example: python -m spacedrive_jax drive --checkpoint runs/demo --scenarios small --out runs/demo/drives
    """

    when_stopped: ClassVar[str] = "--resume goes on where it stopped"

    checkpoint: str | None = None
    """Run folder (its newest checkpoint), RUN/checkpoints/STEP, or ws://host:port of `serve`."""
    policy: (
        Literal[
            "expert",
            "constant_velocity",
            "constant_yaw_rate",
            "route_constant_speed",
            "standing_still",
            "recorded",
            "mean_trajectory",
            "ego_mlp",
        ]
        | None
    ) = None
    """Drive with this instead of a model; the last two learn from --records."""
    scenarios: str = "small"
    """full, unseen (a town of other geometry), medium (the kinds of `train` once in each of the three towns),
    small, tiny, train and train_more (other towns than those that scores are taken in: to collect in), or a
    JSON file: [{"kind", "town", "seed"}], some with a "world"."""
    out: Path | None = None
    """Folder to write, here or gs://…; drives/ in the run folder, or drives-POLICY, by default."""
    records: Path | None = None
    """Records folder that mean_trajectory and ego_mlp learn from."""
    workers: int = 0
    """Processes that move the world and draw; 0 takes one per core."""
    batch_size: int = 8
    """Drives under way together, and questions that go through the model together."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with an interrupted run in --out (or start, when there is none)."""
    controller: Literal["pure_pursuit", "lqr", "zoo", "simlingo", "hip_ad", "minddrive"] = "pure_pursuit"
    """Who turns plans into steering and pedals."""
    image_size: str = "352x198"
    """Width x height of the camera images in pixels."""
    lidar: tyro.conf.FlagCreatePairsOff[bool] = False
    """Give the policy LiDAR sweeps too."""
    collect: Path | None = None
    """Write every visited state as a record, with the expert's plan from there, into this new folder: `train`
    goes on from a model's own mistakes (DAgger)."""
    perturb: tyro.conf.FlagCreatePairsOff[bool] = False
    """Follow every plan 0.3 to 1 m beside its line and at 0.6 to 1.3 times its pace, for a second or two at a
    time: with --policy expert --collect, states that an expert never gets into, with its way back."""
    perturb_speed: tyro.conf.FlagCreatePairsOff[bool] = False
    """With --perturb: slow down and stop for nothing too, so that a slow car alone is no reason to stay
    slow."""
    video: Path | None = None
    """MP4 to write of one drive: at every decision the front view and the view from above, with the plan and
    the expert's, two pictures a second. Needs the extra `video` (imageio-ffmpeg)."""
    rerun: Path | None = None
    """Rerun recording (.rrd) to write of one drive: cameras, depth points, boxes and plans in 3D. Needs the
    extra `rerun` (rerun-sdk); `rerun FILE.rrd` shows it."""
    show: int = 0
    """Number of the drive, in its set, that --video and --rerun show."""
    against: tuple[Path, ...] = ()
    """Runs of drives on the same scenarios to hold this one against on its page (drives.html)."""
    deadline: float = 60.0
    """Seconds within which a policy server's answer counts."""
    token: str | None = None
    """Of the policy server; by default what SPACEDRIVE_TOKEN says."""
    average: tyro.conf.FlagCreatePairsOff[bool] = False
    """Drive with the moving average of the weights that `--train.ema-decay` keeps."""
    mesh: str | None = None
    """Devices of a host along each axis, such as data=4,fsdp=2 (one may be -1). By default the run's where it
    fits them, else all of them along fsdp."""
    coordinator: str | None = None
    """Several hosts: `auto` on SLURM, GKE and Cloud TPU, or HOST:PORT of the first host. Each drives its
    share with a model of its own, the first one writes the result; --out need not be on a shared disk."""
    num_processes: int | None = None
    """Hosts, with --coordinator HOST:PORT."""
    process_id: int | None = None
    """This host, from 0, with --coordinator HOST:PORT."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs between runs; by default JAX_COMPILATION_CACHE_DIR, else the user's
    cache folder."""

    BUCKETS: ClassVar[tuple[str, ...]] = ("out", "records", "compilation_cache")
    WRITES: ClassVar[tuple[str, ...]] = ("video", "rerun", "collect")
    BOUNDS: ClassVar[Bounds] = {
        "workers": WORKERS,
        "batch_size": Bound(1, 4096),
        "show": Bound(0, 1 << 31),
        "deadline": Bound(0.001, 3600),
        "num_processes": COUNT,
        "process_id": FROM_ZERO,
    }

    @on_all_hosts
    def run(self) -> Mapping[str, Any]:
        """Drives; see `spacedrive_jax.driving.drive.drive_all`."""
        if (self.checkpoint is None) == (self.policy is None):
            raise ConfigError("give --checkpoint PATH|ws://… or --policy NAME, one of the two")
        self._check_flags()
        hosts = self._hosts()
        from spacedrive_jax.driving.episode import DriveOptions
        from spacedrive_jax.driving.scenarios import drive_set
        from spacedrive_jax.world.sensors import parse_image_size

        folder = self._folder()
        if hosts is None or hosts.is_first:  # which writes the page
            self._check_against(folder)
        specs = drive_set(self.scenarios)
        looks = self.policy is None or self.collect is not None
        sense: Literal["nothing", "status", "images"] = (
            "images" if looks else "status" if self.policy == "ego_mlp" else "nothing"
        )
        options = DriveOptions(
            image_size=parse_image_size(self.image_size),
            sense=sense,
            lidar=self.lidar,
            controller=self.controller,
            perturb=self.perturb,
            perturb_speed=self.perturb_speed,
        )
        metadata = {
            "scenarios": self.scenarios,
            "drives": [spec.name for spec in specs],
            "policy": self.policy,
            "checkpoint": self._checkpoint_name(),
            "average": self.average,
            "records": self._records_fingerprint(),
            "options": {**dataclasses.asdict(options)},
            "batch_size": self.batch_size,
            "collect": None if self.collect is None else str(self.collect.resolve()),
        }
        first = hosts is None or hosts.is_first
        with contextlib.ExitStack() as kept:
            # Two jobs would each remove what the other is writing.
            for written in (folder, self.collect) if first else ():
                if written is not None:
                    kept.enter_context(output_lock(written))
            return self._drive(specs, folder, options, metadata, hosts)

    def _hosts(self) -> Hosts | None:
        """The hosts of this run; None for this one alone, which need not wait for JAX."""
        if (self.coordinator, self.num_processes, self.process_id) == (None, None, None):
            return None
        from spacedrive_jax.training.hosts import connect, hosts_of_run

        if self.collect is not None:
            raise ConfigError("--collect writes one folder: collect on one host, without --coordinator")
        connect(self.coordinator, self.num_processes, self.process_id)
        return hosts_of_run()

    def _drive(
        self,
        specs: Sequence[DriveSpec],
        folder: Path,
        options: DriveOptions,
        metadata: Mapping[str, Any],
        hosts: Hosts | None,
    ) -> Mapping[str, Any]:
        from spacedrive_jax.driving.batch_policies import open_policy
        from spacedrive_jax.driving.drive import RESULTS, drive_all

        collected = self._collected(folder)
        policy, world_policy = None, self._world_policy()
        if self.checkpoint is not None:
            use_compilation_cache(self.compilation_cache)
            with advice_on_memory("lower --batch-size"):
                policy = open_policy(
                    self.checkpoint,
                    batch_size=self.batch_size,
                    deadline=self.deadline,
                    average=self.average,
                    token=server_token(self.token),
                    mesh=mesh_of(self.mesh, local=True),
                )
        try:
            run = drive_all(
                specs,
                folder,
                options,
                metadata=metadata,
                policy=policy,
                world_policy=world_policy,
                workers=self.workers or os.cpu_count() or 1,
                at_a_time=self.batch_size,
                resume=self.resume,
                collect=None if collected is None else collected.add,
                show=self._show(),
                hosts=hosts,
            )
        finally:
            if policy is not None:
                policy.close()
        from spacedrive_jax.reporting.drives import run_rows, score_table, write_page

        summary = run.summary
        if collected is not None:
            kept = collected.finish(
                [spec.name for spec in specs], {"policy": self.policy, "drives": len(specs)}
            )
            print(f"collected      {kept} records in {self.collect}")
        first = hosts is None or hosts.is_first
        page = write_page(folder, self.against) if summary["drives"] and first else None
        print(_text(summary, folder))
        if page is not None and self.against:
            print(score_table(run_rows(folder, self.against)))
        if page is not None:
            print(f"page           {page}")
        return {
            "file": str(folder / RESULTS),
            "drives": summary["drives"],
            "driving_score": summary.get("driving_score"),
            "success_rate": summary.get("success_rate"),
            "pdm_score": summary.get("pdm_score"),
            "seconds": round(run.seconds, 3),
            "page": None if page is None else str(page),
            "failures": summary.get("failures", {}),
            "without_place": summary["without_place"],
        }

    def _collected(self, folder: Path) -> CollectedRecords | None:
        if self.collect is None:
            return None
        from spacedrive_jax.driving.drive import is_collecting
        from spacedrive_jax.driving.recovery import CollectedRecords

        if self.collect.exists() and not self.collect.is_dir():
            raise ConfigError(f"--collect {self.collect} is a file; name a folder")
        if self.collect.exists() and any(self.collect.iterdir()):
            if not self.resume:
                raise ConfigError(f"--collect {self.collect} is not empty: choose another folder")
            if not is_collecting(folder, self.collect):
                raise ConfigError(
                    f"--resume: --collect {self.collect} is not empty, and not what the drives of {folder} "
                    "are collected in: choose another folder"
                )
        return CollectedRecords(self.collect)

    def _show(self) -> Show | None:
        if self.video is None and self.rerun is None:
            return None
        from spacedrive_jax.driving.drive import Show

        return Show(self.show, self._write_shown)

    def _write_shown(self, drive: Finished) -> None:
        from spacedrive_jax.reporting.recordings import drive_figure, shown_drive, write_film, write_rerun

        shown = shown_drive(drive.records, drive.trace["decisions"])
        if self.video is not None:
            title = drive.record["save_name"]
            write_film(self.video, (drive_figure(each, title) for each in shown), "--video")
            print(f"film           {self.video}")
        if self.rerun is not None:
            write_rerun(self.rerun, shown, "--rerun")
            print(f"recording      {self.rerun}")

    def _check_flags(self) -> None:
        if self.video is not None or self.rerun is not None:
            from spacedrive_jax.reporting.recordings import check_film, check_rerun

            if self.video is not None:
                check_film(self.video, "--video")
            if self.rerun is not None:
                check_rerun(self.rerun, "--rerun")
        elif self.show:
            raise ConfigError("--show chooses the drive that --video or --rerun shows: give one of them")
        if self.mesh is not None and (self.checkpoint is None or _is_server(self.checkpoint)):
            raise ConfigError("--mesh lays out a model in this process: it goes with --checkpoint PATH")
        if self.policy in ("mean_trajectory", "ego_mlp") and self.records is None:
            raise ConfigError(f"--policy {self.policy} learns from records: give --records DIR")
        if self.perturb_speed and not self.perturb:
            raise ConfigError("--perturb-speed perturbs more of what --perturb does: give both")

    def _check_against(self, folder: Path) -> None:
        """Refuses, before anything is driven, runs that this one cannot be held against."""
        from spacedrive_jax.driving.drive import read_summary

        for other in self.against:
            if other.resolve() == place(folder).resolve():
                raise ConfigError(f"--against {other}: that is this run's own folder")
            read_summary(other)

    def _folder(self) -> Path:
        if self.out is not None:
            return self.out
        if self.policy is not None:
            return Path(f"drives-{self.policy}")
        if self.checkpoint is not None and _is_server(self.checkpoint):
            raise ConfigError("a policy server is no run folder to write to: give --out DIR")
        from spacedrive_jax.training.checkpoints import locate
        from spacedrive_jax.training.trained_folder import is_trained_folder

        if self.checkpoint is not None and is_trained_folder(self.checkpoint):
            raise ConfigError(f"{self.checkpoint} is no run folder to write to: give --out DIR")
        return locate(place(self.checkpoint or ""))[0] / "drives"

    def _checkpoint_name(self) -> Any:
        if self.checkpoint is None:
            return None
        if _is_server(self.checkpoint):
            from spacedrive_jax.driving.batch_policies import name_server

            return name_server(self.checkpoint, server_token(self.token))
        from spacedrive_jax.inference.open_model import name_checkpoint

        return name_checkpoint(place(self.checkpoint))

    def _records_fingerprint(self) -> str | None:
        if self.policy not in ("mean_trajectory", "ego_mlp"):
            return None
        from spacedrive_jax.data.records import open_records

        assert self.records is not None
        return open_records(self.records, "train").fingerprint

    def _world_policy(self) -> WorldPolicy | None:
        if self.policy is None:
            return None
        from spacedrive_jax.data.records import open_records
        from spacedrive_jax.driving.policies import policy_named

        records = None if self.records is None else open_records(self.records, "train")
        return policy_named(self.policy, records)


def _is_server(checkpoint: str) -> bool:
    return checkpoint.startswith(("ws://", "wss://"))


def _text(summary: Mapping[str, Any], folder: Path) -> str:
    if not summary["drives"]:
        return f"no drive could be staged: {folder}"

    def with_interval(name: str) -> str:
        between = summary[f"{name}_interval"]
        return f"{summary[name]:.2f}" + (f" [{between[0]:.1f}, {between[1]:.1f}]" if between else "")

    lines = [
        f"driving score  {with_interval('driving_score')}",
        f"success rate   {summary['success_rate']:.1f} %",
        f"PDM score      {with_interval('pdm_score')}",
        "parts          "
        + ", ".join(
            f"{name} {'-' if value is None else f'{value:.2f}'}"
            for name, value in summary["pdm_parts"].items()
        ),
        f"drives         {summary['drives']}: "
        + ", ".join(f"{count} {status}" for status, count in summary["statuses"].items()),
    ]
    if summary["failures"]:
        failed = ", ".join(f"{count} {kind}" for kind, count in summary["failures"].items())
        lines.append(f"no plan        {failed}")
    return "\n".join([*lines, f"written to     {folder}"])

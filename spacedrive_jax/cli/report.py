"""Commands that draw: `report`, a page about a run or about several, and `show`, the plan of a keyframe."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from spacedrive_jax.bounds import WORKERS, Bound, Bounds
from spacedrive_jax.cli.common import advice_on_memory, use_compilation_cache
from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError

if TYPE_CHECKING:
    from spacedrive_jax.data.frame import Frame
    from spacedrive_jax.data.schema import Record
    from spacedrive_jax.reporting.show import Planner


@dataclasses.dataclass(frozen=True)
class Report(Command):
    """Write one page about a run: scores, keyframes, training curves, configuration and provenance.

    Of several runs, the page compares them: scores with paired intervals against the first, curves, and the
    fields of the configuration that differ. The page is one file that needs no network. Records and
    predictions are found through RUN_DIR/run.json; what is missing is named on the page.

    Example: python -m spacedrive_jax report runs/base
    """

    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR …")]
    """Folders that `train` wrote; the others are held against the first."""
    records: Path | None = None
    """Records folder; those that were predicted on by default, as run.json has them."""
    predictions: Path | None = None
    """Of one run: prediction file, its scores beside it; the newest of the run by default."""
    split: str | None = None
    """Split to show; the one that was predicted by default, else val."""
    highlight: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOKEN …")] = ()
    """Of one run: tokens of keyframes to show besides the best, median and worst."""
    protocol: Literal["omnidrive", "vad", "uniad", "corrected"] = "omnidrive"
    """Of several runs: how they are scored."""
    workers: int = 0
    """Of several runs: processes that share the keyframes; 0 takes all cores."""
    out: Path | None = None
    """The page to write; RUN_DIR/report.html by default, of several runs compare.html in the first."""

    BUCKETS: ClassVar[tuple[str, ...]] = ("run_dirs", "records", "predictions", "out")
    WRITES: ClassVar[tuple[str, ...]] = ("out",)
    BOUNDS: ClassVar[Bounds] = {"workers": WORKERS}

    def run(self) -> Mapping[str, Any]:
        """Writes the page.

        Raises:
            SpaceDriveError: a directory is no run, a file in it is damaged, a path given as a flag does not
                exist, or flags do not go together.
        """
        if not self.run_dirs:
            raise ConfigError("name the folder of a run, or several to compare")
        if self.out is not None and self.out.suffix.lower() not in (".html", ".htm"):
            raise ConfigError(f"--out {self.out}: the page is HTML, name it .html")
        # Here, not above: figures and records take a second to import, which --help need not wait for.
        if len(self.run_dirs) > 1:
            if self.highlight or self.predictions is not None:
                raise ConfigError("--highlight and --predictions go with one run")
            from spacedrive_jax.reporting.build import write_comparison

            result = write_comparison(
                self.run_dirs,
                records=self.records,
                split=self.split,
                out=self.out,
                protocol=self.protocol,
                workers=self.workers or os.cpu_count() or 1,
            )
        else:
            if self.protocol != "omnidrive" or self.workers:
                raise ConfigError(
                    "--protocol and --workers go with several runs: `evaluate` scores one, the page shows it"
                )
            from spacedrive_jax.reporting.build import write_report

            result = write_report(
                self.run_dirs[0],
                records=self.records,
                predictions=self.predictions,
                split=self.split,
                highlights=self.highlight,
                out=self.out,
            )
        print(f"report written to {result.file}")
        for notice in result.notices:
            print(f"note: {notice}")
        return {"file": str(result.file), "notices": list(result.notices)}


@dataclasses.dataclass(frozen=True)
class Show(Command):
    """Plan one keyframe and draw it: the plan in the front view and from above, depth, question and answer.

    The keyframe is one of a records folder, or six images of your own with their calibration
    (docs/how-to/own_data.md shows the file). The last line names the picture.

    Example: python -m spacedrive_jax show examples/demo/model --records examples/demo/records
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Run folder (its newest checkpoint), RUN/checkpoints/STEP, a folder of export-weights --to
    safetensors or of import-weights --from spacedrive."""
    records: Path | None = None
    """Records folder written by `python -m data_prep convert`."""
    token: str | None = None
    """Keyframe of --records; by default the first of the split."""
    split: Literal["train", "val", "all"] = "val"
    """Where the first keyframe is taken from, without --token."""
    images: Path | None = None
    """Instead of --records: a folder with six pictures (CAM_FRONT.jpg, ...)."""
    calibration: Path | None = None
    """For --images: JSON with the cameras' intrinsics and poses, and what else is known."""
    speed: float | None = None
    """For --images: m/s; by default the calibration file's."""
    depth_model: Path | None = None
    """Weights (or add-depth's JSON file) of the depth network, where the model's depth comes from one and no
    sidecar holds it."""
    average: tyro.conf.FlagCreatePairsOff[bool] = False
    """Plan with the moving average of the weights that `--train.ema-decay` keeps."""
    image: Path | None = None
    """Picture to write (.png, .pdf, .svg or .jpg); by default KEYFRAME.png here."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs between runs; by default JAX_COMPILATION_CACHE_DIR, else the user's
    cache folder."""

    BUCKETS: ClassVar[tuple[str, ...]] = ("checkpoint", "records", "image", "compilation_cache")
    WRITES: ClassVar[tuple[str, ...]] = ("image",)
    BOUNDS: ClassVar[Bounds] = {"speed": Bound(-100, 100)}

    def run(self) -> Mapping[str, Any]:
        """Plans and draws; see `spacedrive_jax.reporting.show`."""
        if (self.records is None) == (self.images is None):
            raise ConfigError("give --records DIR, or --images DIR with --calibration FILE.json")
        if (self.images is None) != (self.calibration is None):
            raise ConfigError("--images DIR and --calibration FILE.json go together")
        if self.speed is not None and self.images is None:
            raise ConfigError("--speed goes with --images: records say how fast the car was")
        if self.token is not None and self.records is None:
            raise ConfigError("--token names a keyframe of --records")
        if self.images and self.image and self.image.parent.resolve() == self.images.resolve():
            raise ConfigError(f"--image {self.image} lies among the pictures of --images: write it elsewhere")
        from spacedrive_jax.reporting.figures import check_picture, save_figure

        if self.image is not None:
            check_picture(self.image)
        use_compilation_cache(self.compilation_cache)
        from spacedrive_jax.reporting.show import Planner, waypoint_table

        frame = self._frame()
        with advice_on_memory("a smaller model, or more devices"):
            planner = Planner.load(self.checkpoint, average=self.average, depth_model=self.depth_model)
            plan = planner.plan(self._record(planner) if frame is None else frame)
        token = plan.record["token"]
        # A record of somebody else's may be called like a file elsewhere.
        image = self.image or Path(re.sub(r"[^\w.-]", "_", token) + ".png")
        save_figure(plan.figure(), image)
        print(f"keyframe {token}\nasked    {plan.question}\nanswered {plan.text}")
        if plan.status == "ok":
            print(waypoint_table(plan.waypoints))
        else:
            print("unparsed: the answer holds no trajectory")
        if plan.error is not None:
            print(f"  {plan.error:.2f} m off the recorded drive on average")
        print(image)
        return {
            "file": str(image),
            "token": token,
            "question": plan.question,
            "text": plan.text,
            "status": plan.status,
            "waypoints": plan.waypoints.tolist(),
            "path": plan.path.tolist(),
            "error": plan.error,
        }

    def _frame(self) -> Frame | None:
        if self.images is None:
            return None
        from spacedrive_jax.data.frame import read_frame

        assert self.calibration is not None
        return read_frame(self.images, self.calibration, self.speed)

    def _record(self, planner: Planner) -> Record:
        assert self.records is not None
        if self.token is None:
            return planner.records(self.records, self.split)[0]
        from spacedrive_jax.data.records import keyframe_index

        records = planner.records(self.records, "all")
        return records[keyframe_index(records, self.token)]

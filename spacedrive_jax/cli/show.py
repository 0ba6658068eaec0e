"""`python -m spacedrive_jax show`: a checkpoint's plan for one keyframe, as a picture and in words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from spacedrive_jax.bounds import Bound, Bounds
from spacedrive_jax.cli.common import advice_on_memory, use_compilation_cache
from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError

if TYPE_CHECKING:
    from spacedrive_jax.data.frame import Frame
    from spacedrive_jax.data.schema import Record
    from spacedrive_jax.reporting.show import Planner


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
        places = (self.images, None if self.image is None else self.image.parent)
        if None not in places and len({each.resolve() for each in places if each is not None}) == 1:
            raise ConfigError(f"--image {self.image} lies among the pictures of --images: write it elsewhere")
        from spacedrive_jax.reporting.style import check_picture, save_figure

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

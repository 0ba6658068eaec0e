"""Looking at one thing: a checkpoint's plan for one keyframe, with its question, its answer and a picture.

planner = Planner.load("runs/demo")
plan = planner.plan(open_records("data/records", "val")[0])
print(plan.waypoints, plan.text)
plan.figure().savefig("plan.png")
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spacedrive_jax import exact
from spacedrive_jax.config import Config, depth_advice
from spacedrive_jax.data.depth_cache import CachedDepth, DepthCache
from spacedrive_jax.data.depth_sources import record_patch_depth
from spacedrive_jax.data.frame import Frame
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.schema import Record, own_record
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.driving.model_policy import DepthNetwork, check_depth, open_depth_network
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.inference.open_model import TrainedModel, check_trained, open_trained_model
from spacedrive_jax.inference.open_planner import planner_of
from spacedrive_jax.inference.planner import BatchPlanner, Plan, longest_prompt
from spacedrive_jax.io import local, place
from spacedrive_jax.models.partitioning import BATCH_AXES
from spacedrive_jax.reporting.birds_eye import draw_birds_eye
from spacedrive_jax.reporting.cameras import camera_strip, depth_source, draw_depth_scale, front_overlay
from spacedrive_jax.reporting.cases import DEPTH_TEXTS, asked, explained
from spacedrive_jax.reporting.figures import INK, MUTED, PREDICTION, styled
from spacedrive_jax.reporting.run_files import SeenDepth

WRAP = 220
"""Letters in a line of the question and the answer."""


@dataclasses.dataclass(frozen=True, eq=False)
class KeyframePlan(Plan):
    """What a model says about one keyframe, and the keyframe."""

    record: Record = dataclasses.field(repr=False)
    question: str
    """What the model was asked: its coordinates in metres, the images in one word."""
    model: str
    """Name of the run."""
    depth: SeenDepth | None = dataclasses.field(default=None, repr=False)
    """What a network gave the model to see; None where its depth is the record's own."""

    def figure(self) -> Figure:
        """The plan in the front view and from above, the six views with their depth, question and answer.

        Returns:
            A matplotlib figure; notebooks show it, `savefig` writes it.
        """
        return draw_plan(self)

    @property
    def error(self) -> float | None:
        """Mean distance to the recorded waypoints, metres; None where there is no plan or no whole future."""
        if self.status != "ok" or not np.all(self.record["waypoint_mask"]):
            return None
        return float(exact.norm(self.waypoints - self.record["waypoints"]).mean())


class Planner:
    """A trained model that plans one keyframe after the other; the first call compiles."""

    def __init__(self, trained: TrainedModel, network: DepthNetwork | None = None) -> None:
        """Holds a model that is open already; `Planner.load` opens one.

        Args:
            trained: from `open_model`.
            network: for keyframes without depth, where the model's depth comes from a network.

        Raises:
            ConfigError: it is no such model, or the network is not the one that the model's depth comes from.
        """
        check_trained(trained, "Planner")
        self.config: Config = trained.config
        self._trained, self._network = trained, network
        self._builder = SampleBuilder(self.config.data, self.config.model, answer=False)
        self._batches: BatchPlanner | None = None
        self._cache: DepthCache | None = None
        if network is not None:
            check_depth(self.config, network)

    @classmethod
    def load(
        cls, path: str | Path, *, average: bool = False, depth_model: str | Path | None = None
    ) -> Planner:
        """Opens a checkpoint.

        Args:
            path: a training run (its newest checkpoint), `RUN/checkpoints/STEP`, a folder of
                `export-weights --to safetensors`, or an imported SpaceDrive.
            average: take the moving average of the weights, where the run kept one.
            depth_model: weights of the depth network (or add-depth's JSON file), for keyframes whose depth is
                in no sidecar.

        Raises:
            SpaceDriveError: it is none of these, or damaged; or the network is not the model's.
        """
        trained = open_trained_model(place(path), average=average)
        network = None if depth_model is None else open_depth_network(local(depth_model), trained.config)
        return cls(trained, network)

    def records(self, folder: str | Path, split: str = "val") -> Records:
        """Opens a records folder, and its sidecar where this model's depth comes from one.

        Args:
            folder: written by `python -m data_prep convert`.
            split: `train`, `val` or `all`.

        Raises:
            SpaceDriveError: it cannot be read, or its sidecar is not for this model.
        """
        records = open_records(folder, split)
        if self._network is None and self.config.model.visual_positions != "none":
            self._cache = self._builder.open_depth(records, advice=depth_advice(self.config))
        return records

    def plan(self, keyframe: Record | Frame) -> KeyframePlan:
        """Plans one keyframe.

        Args:
            keyframe: of `records` (or `open_records`), or one of your own.

        Raises:
            SpaceDriveError: it is neither, is not of the record's shapes and types, or lacks something that
                the model needs.
        """
        record = keyframe.record() if isinstance(keyframe, Frame) else keyframe
        if not isinstance(record, Mapping):
            raise DataError(
                "plan takes one keyframe, a record (planner.records(FOLDER)[0]) or a frame (read_frame), not "
                f"{type(record).__name__}"
            )
        record = own_record(record)
        cached = self._network_depth(record)
        planner = self._planner(record)
        plan = planner.plan([planner.sample(record, cached)])[0]
        grid, depth = self._builder.images.token_grid, self.config.data.depth
        return KeyframePlan(
            plan.waypoints,
            plan.path,
            plan.text,
            plan.status,
            record=record,
            question=self._question(record),
            model=self.config.name,
            depth=None if cached is None else record_patch_depth(record, grid, depth, cached),
        )

    def _planner(self, record: Record) -> BatchPlanner:
        """The compiled planner, anew where a prompt may be longer than it takes."""
        planner = self._batches
        if planner is None or longest_prompt(self._builder, record) > planner.length:
            ways = math.prod(self._trained.mesh.shape[axis] for axis in BATCH_AXES)
            planner = self._batches = planner_of(self._trained, record, most=ways)
        return planner

    def _question(self, record: Record) -> str:
        data, in_words = self.config.data, self.config.model.ego_status == "language"
        return asked(
            record,
            data.command,
            ego_in_words=in_words,
            target_points=data.target_points,
            reasons=data.conversation.tasks == "think_before_planning",
        )

    def _network_depth(self, record: Record) -> CachedDepth | None:
        """A network's depth of a keyframe, from the network itself or the sidecar of its records."""
        if self.config.model.visual_positions == "none":
            return None
        if self._network is not None:
            return self._network.run([record])[0]
        if self._cache is not None:
            return self._cache.read(record["token"])
        try:
            check_depth(self.config, None)
        except ConfigError as error:
            raise DataError(
                f"keyframe {record['token']} comes without depth ({error}): open its folder with "
                "`planner.records(FOLDER)`, which finds the sidecar of add-depth, or load the planner with "
                "the depth network's weights (depth_model, --depth-model)"
            ) from error
        return None


@styled
def draw_plan(plan: KeyframePlan) -> Figure:
    """One keyframe on one sheet.

    Args:
        plan: the keyframe with its plan.

    Returns:
        The figure, 20 x 8.2 inches.
    """
    record = plan.record
    waypoints = plan.waypoints if plan.status == "ok" else None
    figure = Figure(figsize=(20, 8.2), layout="constrained", facecolor="white")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.75, 6.45))
    text, pictures = halves
    _write(text, plan)
    left, middle, right = pictures.subfigures(1, 3, width_ratios=(8.2, 4.0, 7.6))
    front, above = left.subplots(), middle.subplots()
    _picture(front, front_overlay(record, waypoints), "The front camera has no pixels.")
    front.set_title("front: predicted blue, recorded orange, on the ground and as wide as the car")
    draw_birds_eye(above, record, waypoints)
    if len(plan.path):
        way = np.concatenate([np.zeros((1, 2)), plan.path])
        above.plot(way[:, 1], way[:, 0], color=PREDICTION, linewidth=1.0, linestyle="--", alpha=0.7)
    above.set_title("from above")
    views, scale = right.subplots(2, 1, height_ratios=(6.0, 0.16))
    _picture(views, camera_strip(record, plan.depth), "No camera has pixels.")
    source = depth_source(record, plan.depth)
    views.set_title(DEPTH_TEXTS[source])
    if source == "none" or not any(record["images"]):
        scale.set_axis_off()
    else:
        draw_depth_scale(scale)
    return figure


def _picture(axes: Axes, image: Any, absent: str) -> None:
    if image is None:
        axes.text(0.5, 0.5, absent, ha="center", va="center", color=MUTED, transform=axes.transAxes)
    else:
        axes.imshow(image, interpolation="bilinear")
    axes.set_axis_off()


def _write(part: Any, plan: KeyframePlan) -> None:
    record = plan.record
    title = f"{plan.model}  ·  {record['scene_name'] or 'keyframe'}, frame {int(record['frame_index'])}"
    part.text(0.006, 0.95, title, fontsize=15, fontweight="bold", color=INK, va="top")
    notes = [f"keyframe {record['token']}"]
    if record["can_bus_valid"]:
        notes.append(f"{float(record['can_bus'][10]):.1f} m/s")
    notes.append("unparsed: the answer holds no trajectory" if plan.status != "ok" else "answer read")
    if plan.error is not None:
        notes.append(f"{plan.error:.2f} m off the recorded drive on average")
    part.text(0.006, 0.72, "   |   ".join(notes), fontsize=10, color=MUTED, va="top")
    # $ would begin a formula in matplotlib.
    lines = [
        textwrap.fill(f"{name}: {said}".replace("$", r"\$"), WRAP)
        for name, said in (("asked", plan.question), ("answered", plan.text))
    ]
    lines.append(explained(plan.question + plan.text))
    part.text(0.006, 0.52, "\n".join(lines), fontsize=10, color=INK, va="top", linespacing=1.4)


def waypoint_table(waypoints: Float[np.ndarray, "T 2"]) -> str:
    """Waypoints as lines of text: seconds, metres ahead, metres to the left."""
    return "\n".join(
        f"  {number / 2:.1f} s  {x:7.2f} m ahead  {abs(y):6.2f} m {'left' if y >= 0 else 'right'}"
        for number, (x, y) in enumerate(waypoints.tolist(), start=1)
    )

"""Depth on held-out synthetic scenes: network, LiDAR, and both, also under a deliberately mis-scaled network.

    python -m benchmarks.depth_accuracy --records records --run runs/depth_synthetic

RUN is a folder of `benchmarks/train_depth.py`. Writes a table and a picture (benchmarks/results/).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from benchmarks.train_depth import (
    FARTHEST,
    IMAGE_SIZE,
    METADATA_FILE,
    WEIGHTS,
    Views,
    load_views,
    record_views,
)
from spacedrive_jax.console import progress
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data import lidar
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.inference.depth_network import camera_alignments
from spacedrive_jax.interop.unidepth import load_unidepth
from spacedrive_jax.models.depth.unidepth import UniDepthV2

MIS_SCALE, MIS_SHIFT = 1.3, 1.5
"""The deliberately wrong network's depth is 1.3 d + 1.5 m."""
NETWORK, MIS_SCALED = "network", "mis-scaled network"
LIDAR_ONLY = "LiDAR alone, densified"
CONSTANT, PIXEL_MEAN, PIXEL_MEDIAN = "one depth for all", "mean of the pixel", "median of the pixel"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    records: Path
    """Records folder with `exact_depth` and LiDAR: `train` for the baselines, `val` to measure on."""
    run: Path
    """Folder that `train_depth.py` wrote."""
    results: Path = Path("benchmarks/results/depth_accuracy.md")
    """The table; a picture of the same name lies beside it."""
    pictured: int = 4
    """Views in the picture."""


class Scores:
    """Running depth errors over all measured pixels."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = np.zeros(3)

    def add(self, predicted: Float[np.ndarray, "..."], exact: Float[np.ndarray, "..."]) -> None:
        """Counts predicted depth where the exact one is nearer than `FARTHEST`, metres."""
        measured = exact < FARTHEST
        ours, true = (np.maximum(each[measured], 0.1).astype(np.float64) for each in (predicted, exact))
        within = np.maximum(ours / true, true / ours) < 1.25
        self.sums += [np.sum(np.abs(ours - true) / true), np.sum(within), np.sum((ours - true) ** 2)]
        self.count += int(measured.sum())

    def row(self) -> dict[str, float]:
        """Mean relative error, fraction within a factor 1.25, root mean squared error in metres."""
        absolute, within, squared = self.sums / self.count
        return {"abs_rel": absolute, "delta": within, "rmse": float(np.sqrt(squared))}


def baselines(train: Views) -> dict[str, Float[np.ndarray, "N H W"]]:
    """Depth without looking: of the training views, all together or each pixel of each camera by itself."""
    depth = np.where(train.depth < FARTHEST, train.depth, np.nan).reshape(-1, len(CAMERAS), *IMAGE_SIZE)
    always_far = np.all(np.isnan(depth), axis=0)
    depth[:, always_far] = FARTHEST
    return {
        CONSTANT: np.full(depth.shape[1:], np.nanmedian(depth)),
        PIXEL_MEAN: np.nanmean(depth, axis=0),
        PIXEL_MEDIAN: np.nanmedian(depth, axis=0),
    }


class KeyframeDepths(NamedTuple):
    """Depth of a keyframe's views by every method."""

    views: Views
    depth: dict[str, Float[np.ndarray, "N H W"]]
    """nan where a method has none."""
    aligned: dict[str, int]
    """Cameras that had LiDAR returns enough, by network."""


class Methods:
    """Every way to a keyframe's depth that is measured."""

    def __init__(self, model: UniDepthV2, fixed: Mapping[str, Float[np.ndarray, "N H W"]]) -> None:
        graph, self._parameters = nnx.split(model)
        self._infer = jax.jit(lambda parameters, images: nnx.merge(graph, parameters)(images).depth)
        self._fixed = fixed

    def __call__(self, record: Record) -> KeyframeDepths:
        """Depth of one keyframe."""
        views = record_views(record)
        network = np.asarray(self._infer(self._parameters, views.images))
        depth = {**self._fixed, LIDAR_ONLY: lidar_depth(record, views)}
        aligned = {}
        for name, each in ((NETWORK, network), (MIS_SCALED, MIS_SCALE * network + MIS_SHIFT)):
            alignments = camera_alignments(record, each)
            aligned[name] = sum(alignment.points > 0 for alignment in alignments)
            depth[name] = each
            depth[fused(name)] = np.stack(
                [lidar.apply(view, alignment) for view, alignment in zip(each, alignments, strict=True)]
            )
        return KeyframeDepths(views, depth, aligned)


def fused(name: str) -> str:
    """What the network of this name is called after its fusion with LiDAR."""
    return f"{name} + LiDAR"


def lidar_depth(record: Record, views: Views) -> Float[np.ndarray, "N H W"]:
    """The nearest return of every pixel, pixels without one filled from the nearest that has one."""
    maps = []
    for points, camera in zip(lidar.points_in_cameras(record), views.intrinsics, strict=True):
        filled = lidar.densify(lidar.sparse_patch_depth(points, camera, IMAGE_SIZE, IMAGE_SIZE))
        maps.append(np.full(IMAGE_SIZE, FARTHEST) if filled is None else filled)
    return np.stack(maps)


def measure(methods: Methods, records: Records) -> tuple[dict[str, dict[str, float]], float]:
    """Scores of every method, and the fraction of cameras that fusion aligned."""
    scores: dict[str, Scores] = {}
    aligned = cameras = 0
    for index in progress(range(len(records)), desc="measure"):
        keyframe = methods(records[index])
        for name, depth in keyframe.depth.items():
            scores.setdefault(name, Scores()).add(depth, keyframe.views.depth)
        aligned += sum(keyframe.aligned.values())
        cameras += len(keyframe.aligned) * len(CAMERAS)
    return {name: each.row() for name, each in scores.items()}, aligned / cameras


def draw(methods: Methods, records: Records, file: Path, count: int) -> None:
    """Views of held-out scenes beside their depth, near to far on a logarithmic scale."""
    columns = (NETWORK, MIS_SCALED, fused(MIS_SCALED), LIDAR_ONLY)
    figure = Figure(figsize=(2.1 * (len(columns) + 2), 1.22 * count + 0.35), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, len(columns) + 2, squeeze=False)
    norm = LogNorm(2, FARTHEST)
    for row, index in enumerate(np.linspace(0, len(records) - 1, count).astype(int)):
        camera = (0, 1, 3, 2, 4, 5)[row % len(CAMERAS)]
        keyframe = methods(records[index])
        shown = [keyframe.views.depth[camera], *(keyframe.depth[name][camera] for name in columns)]
        axes[row, 0].imshow(keyframe.views.images[camera])
        axes[row, 0].set_ylabel(CAMERAS[camera].removeprefix("CAM_").lower().replace("_", " "), fontsize=8)
        for column, depth in enumerate(shown, start=1):
            mesh = axes[row, column].imshow(np.clip(depth, 2, FARTHEST), cmap="viridis_r", norm=norm)
    for axis, title in zip(axes[0], ("image", "exact", *columns), strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    bar = figure.colorbar(mesh, ax=axes, fraction=0.015, pad=0.01, ticks=[2, 5, 10, 20, 40, 80])
    bar.minorticks_off()
    bar.ax.set_yticklabels([f"{tick:g}" for tick in bar.get_ticks()], fontsize=7)
    bar.set_label("depth, m", fontsize=8)
    figure.savefig(file, format="png")


def table(options: Options, rows: Mapping[str, Mapping[str, float]], aligned: float, held_out: int) -> str:
    """The results page."""
    facts: dict[str, Any] = json.loads((options.run / METADATA_FILE).read_text())
    training = (
        f"{facts['steps']} steps of {facts['batch_size']} images of {IMAGE_SIZE[0]}x{IMAGE_SIZE[1]} from "
        f"{facts['keyframes']} keyframes, {facts['seconds'] / 60:.0f} min on two shared cores"
    )
    rules = [
        f"| {name} | {row['abs_rel']:.3f} | {100 * row['delta']:.1f} % | {row['rmse']:.2f} |"
        for name, row in rows.items()
    ]
    return "\n".join(
        [
            "# Depth on held-out synthetic scenes",
            "",
            f"A UniDepthV2 of {facts['parameters']:,} parameters, trained from nothing by "
            f"`benchmarks/train_depth.py` ({training}), measured by `benchmarks/depth_accuracy.py` on "
            f"{held_out} keyframes of scenes that training did not see. Depth comes through the released "
            "`infer`; cameras are predicted, not given. Every pixel nearer than 80 m counts.",
            "",
            "| depth | abs-rel | δ < 1.25 | RMSE, m |",
            "|---|---|---|---|",
            *rules,
            "",
            f"The first three do not look at the image: `{CONSTANT}` is the median of all training pixels; "
            "the other two are taken for each pixel of each camera, which is strong where cameras stand "
            f"fixed over flat ground. The mis-scaled network's depth is {MIS_SCALE} d + {MIS_SHIFT} m. "
            "`+ LiDAR` is the scale and shift per camera of `depth/fusion.py`; "
            f"{100 * aligned:.1f} % of the cameras had returns enough. `{LIDAR_ONLY}` takes the nearest "
            "return of every pixel and fills the rest from the nearest pixel that has one; the synthetic "
            "LiDAR is nearly free of noise, so that it does better here than on a vehicle.",
            "",
            f"![Views of held-out scenes and their depth]({options.results.stem}.png)",
            "",
        ]
    )


def main(options: Options) -> None:
    """Measures, and writes table and picture."""
    train, held_out = (open_records(options.records, split) for split in ("train", "val"))
    methods = Methods(load_unidepth(options.run / WEIGHTS), baselines(load_views(train)))
    rows, aligned = measure(methods, held_out)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(table(options, rows, aligned, len(held_out)))
    draw(methods, held_out, options.results.with_suffix(".png"), options.pictured)
    print(json.dumps({"scores": rows, "aligned": aligned}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))

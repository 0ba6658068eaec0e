"""Trains a small UniDepthV2 on the synthetic world and measures depth on held-out scenes.

    python benchmarks/train_depth.py --records records --out runs/depth_synthetic

Writes the weights (for `data_prep add-depth --model OUT/weights`) and benchmarks/results/depth_accuracy.md:
the network, the same deliberately mis-scaled, both fused with LiDAR, and two baselines that use no network.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array, Float, UInt8

from data_prep.add_depth import camera_alignments
from spacedrive_jax.console import progress
from spacedrive_jax.data.images import scaled_intrinsics
from spacedrive_jax.data.records import Record, Records, open_records
from spacedrive_jax.depth import fusion, lidar
from spacedrive_jax.depth.dinov2 import Dinov2Config
from spacedrive_jax.depth.sources import decode_exact_depth
from spacedrive_jax.depth.unidepth import UniDepthConfig, UniDepthV2
from spacedrive_jax.depth.unidepth_camera import to_network
from spacedrive_jax.depth.unidepth_weights import save_unidepth
from spacedrive_jax.vlm.initialization import initialize

IMAGE_SIZE = (84, 140)
"""Height and width of the training images, pixels: 6 x 10 patches."""
FARTHEST = 80.0
"""Depth beyond it is neither trained on nor measured, metres."""
NETWORK = UniDepthConfig(
    encoder=Dinov2Config(
        width=96, depth=6, heads=3, taps=(2, 3, 4, 6), position_grid=(6, 10), final_norm_eps=1e-5
    ),
    width=64,
    heads=4,
    expansion=2,
    units=(1, 1, 1),
    pixel_bounds=(IMAGE_SIZE[0] * IMAGE_SIZE[1],) * 2,
)
MIS_SCALE, MIS_SHIFT = 0.6, 1.5
"""The deliberately wrong network's depth is 0.6 d + 1.5 m."""

UNDERTRAINED = (
    "So short a training leaves the network behind the typical depth in abs-rel: the rows with LiDAR say "
    "what fusion does to a poor network, the row without says nothing of UniDepthV2."
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train on and how long."""

    records: Path
    """Records folder with `exact_depth` and LiDAR."""
    out: Path
    """Folder for the weights and the measurements."""
    steps: int = 1500
    batch_size: int = 6
    """Images a step."""
    learning_rate: float = 1e-3
    seed: int = 0
    results: Path = Path("benchmarks/results/depth_accuracy.md")


class Views(NamedTuple):
    """Camera images of a split with their depth; cameras of a keyframe next to each other."""

    images: UInt8[np.ndarray, "M H W 3"]
    depth: Float[np.ndarray, "M H W"]
    """Exact, metres; 0 where unknown or farther than `FARTHEST`."""
    intrinsics: Float[np.ndarray, "M 3 3"]


def load_views(records: Records) -> Views:
    parts = [record_views(records[index]) for index in progress(range(len(records)), desc="read")]
    return Views(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def record_views(record: Record) -> Views:
    height, width = IMAGE_SIZE
    images, depths = [], []
    for jpeg, png in zip(record["images"], record["exact_depth"], strict=True):
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        images.append(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))
        depth = cv2.resize(decode_exact_depth(png), (width, height), interpolation=cv2.INTER_NEAREST)
        depths.append(np.where(depth < FARTHEST, depth, 0))
    intrinsics = scaled_intrinsics(record, IMAGE_SIZE).astype(np.float32)
    return Views(np.stack(images), np.stack(depths), intrinsics)


def loss(model: UniDepthV2, batch: Views) -> Float[Array, ""]:
    """Error of log depth, of the predicted camera, and of the predicted error (as UniDepth's confidence)."""
    size = model.config.inference_size(IMAGE_SIZE)
    output = model.network(model.prepare(batch.images, size))
    valid = batch.depth > 0
    predicted = jnp.log(output.radius * output.rays[..., 2])
    error = jnp.abs(predicted - jnp.log(jnp.where(valid, batch.depth, 1.0)))
    unsure = jnp.abs(output.confidence - jax.lax.stop_gradient(error))
    depth_loss = jnp.sum((error + 0.1 * unsure) * valid) / jnp.sum(valid)
    camera = jnp.log(output.camera / to_network(batch.intrinsics, size))
    return depth_loss + 0.2 * jnp.mean(jnp.abs(camera))


def train(options: Options, views: Views) -> tuple[UniDepthV2, list[float]]:
    model = initialize(lambda rngs: UniDepthV2(NETWORK, rngs=rngs), seed=options.seed)
    graph, parameters = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, options.steps // 20 + 1, options.steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2))

    @jax.jit
    def step(parameters: nnx.State, state: optax.OptState, batch: Views) -> tuple:
        value, gradient = jax.value_and_grad(lambda p: loss(nnx.merge(graph, p), batch))(parameters)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    rng = np.random.default_rng(options.seed)
    state, losses = optimizer.init(parameters), []
    with progress(range(options.steps), desc="train") as bar:
        for _ in bar:
            rows = rng.integers(0, len(views.images), options.batch_size)
            parameters, state, value = step(parameters, state, Views(*(array[rows] for array in views)))
            losses.append(float(value))
            if len(losses) % 50 == 0:
                print(f"step {len(losses)}: loss {np.mean(losses[-50:]):.4f}", flush=True)
    return nnx.merge(graph, parameters), losses


class Scores:
    """Running depth errors over all measured pixels."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = np.zeros(3)

    def add(self, predicted: Float[np.ndarray, "..."], exact: Float[np.ndarray, "..."]) -> None:
        """Counts predicted depth where the exact one is known, metres."""
        valid = exact > 0
        ours, true = np.maximum(predicted[valid], 0.1).astype(np.float64), exact[valid].astype(np.float64)
        within = np.maximum(ours / true, true / ours) < 1.25
        self.sums += [np.sum(np.abs(ours - true) / true), np.sum(within), np.sum((ours - true) ** 2)]
        self.count += int(valid.sum())

    def row(self) -> dict[str, float]:
        """Mean relative error, fraction within a factor 1.25, root mean squared error in metres."""
        absolute, within, squared = self.sums / self.count
        return {"abs_rel": absolute, "delta_1.25": within, "rmse_m": float(np.sqrt(squared))}


def measure(model: UniDepthV2, typical: Float[np.ndarray, "N H W"], records: Records) -> dict[str, dict]:
    graph, parameters = nnx.split(model)
    infer = jax.jit(lambda parameters, images: nnx.merge(graph, parameters)(images).depth)
    names = ("typical depth", "LiDAR, nearest return", "network", "network + LiDAR", "mis-scaled network")
    scores = {name: Scores() for name in (*names, "mis-scaled network + LiDAR")}
    aligned = 0
    for index in progress(range(len(records)), desc="measure"):
        record = records[index]
        views = record_views(record)
        network = np.asarray(infer(parameters, views.images))
        wrong = MIS_SCALE * network + MIS_SHIFT
        sparse = [
            lidar.sparse_patch_depth(points, camera, IMAGE_SIZE, IMAGE_SIZE)
            for points, camera in zip(lidar.points_in_cameras(record), views.intrinsics, strict=True)
        ]
        dense = [lidar.densify(each) for each in sparse]
        scores["typical depth"].add(typical, views.depth)
        for camera, filled in enumerate(dense):
            if filled is not None:
                scores["LiDAR, nearest return"].add(filled, views.depth[camera])
        for name, depth in (("network", network), ("mis-scaled network", wrong)):
            scores[name].add(depth, views.depth)
            alignments = camera_alignments(record, depth)
            aligned += sum(each.points > 0 for each in alignments)
            fused = [fusion.apply(view, each) for view, each in zip(depth, alignments, strict=True)]
            scores[f"{name} + LiDAR"].add(np.stack(fused), views.depth)
    facts = {name: each.row() for name, each in scores.items()}
    facts["aligned cameras"] = {"fraction": aligned / (2 * 6 * len(records))}
    return facts


def write_table(options: Options, facts: dict, counts: tuple[int, int], seconds: float) -> None:
    parameters = UniDepthV2(NETWORK, rngs=nnx.Rngs(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(parameters)))
    lines = [
        "# Depth on held-out synthetic scenes",
        "",
        "Written by `benchmarks/train_depth.py`; every pixel nearer than 80 m counts.",
        f"A UniDepthV2 of {size:,} parameters, {options.steps} steps of {options.batch_size} images of "
        f"{IMAGE_SIZE[0]}x{IMAGE_SIZE[1]} from {counts[0]} keyframes, {seconds / 60:.0f} min on the CPU of a "
        f"shared machine with two cores; measured on {counts[1]} keyframes of other scenes. The cameras' "
        "intrinsics are predicted, not given.",
        "",
        "| depth | abs-rel | δ < 1.25 | RMSE, m |",
        "|---|---|---|---|",
    ]
    for name, row in facts.items():
        if "abs_rel" in row:
            lines.append(
                f"| {name} | {row['abs_rel']:.3f} | {100 * row['delta_1.25']:.1f} % | {row['rmse_m']:.2f} |"
            )
    lines += [
        "",
        "`typical depth` is each camera's per-pixel median over the training scenes. The mis-scaled "
        f"network's depth is {MIS_SCALE} d + {MIS_SHIFT} m. `+ LiDAR` is the scale and shift per camera of "
        f"`depth/fusion.py`; {100 * facts['aligned cameras']['fraction']:.1f} % of the cameras had returns "
        "enough.",
        "",
    ]
    if facts["network"]["abs_rel"] > facts["typical depth"]["abs_rel"]:
        lines += [UNDERTRAINED, ""]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text("\n".join(lines))


def main(options: Options) -> None:
    train_records, held_out = open_records(options.records, "train"), open_records(options.records, "val")
    views = load_views(train_records)
    started = time.monotonic()
    model, losses = train(options, views)
    seconds = time.monotonic() - started
    known = np.where(views.depth > 0, views.depth, np.nan).reshape(-1, 6, *IMAGE_SIZE)
    typical = np.nan_to_num(np.nanmedian(known, axis=0), nan=FARTHEST)
    facts = measure(model, typical, held_out)
    options.out.mkdir(parents=True, exist_ok=True)
    save_unidepth(model, options.out / "weights")
    settings = {name: str(value) for name, value in dataclasses.asdict(options).items()}
    report = {"options": settings, "seconds": seconds, "loss": losses[-1], "scores": facts}
    (options.out / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")
    write_table(options, facts, (len(train_records), len(held_out)), seconds)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))

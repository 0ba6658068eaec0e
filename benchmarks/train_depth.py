"""Trains a small UniDepthV2 on the synthetic world.

    python -m benchmarks.train_depth --records records --out runs/depth_synthetic
    python -m benchmarks.depth_accuracy --records records --run runs/depth_synthetic

It can be stopped (`--minutes`, or killed): the same command goes on, and ends with the same weights.
OUT/weights is a checkpoint in the released layout, for `data_prep add-depth --model OUT/weights` too.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array, Float, UInt8
from safetensors import safe_open
from safetensors.numpy import save_file

from spacedrive_jax.console import configure_logging, progress
from spacedrive_jax.data.images import decode_depth, scaled_intrinsics
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import DataError
from spacedrive_jax.inference.depth_network import keyframe_views
from spacedrive_jax.interop.unidepth import save_unidepth
from spacedrive_jax.models.depth.backbone import Dinov2Config
from spacedrive_jax.models.depth.unidepth import UniDepthConfig, UniDepthV2, to_network
from spacedrive_jax.models.depth.unidepth_decoder import LOG_RADIUS_OFFSET
from spacedrive_jax.models.partitioning import initialize

log = logging.getLogger("spacedrive_jax.benchmarks")

IMAGE_SIZE = (84, 140)
"""Height and width of the images, pixels: 6 x 10 patches; that of the preset `demo_published`."""
FARTHEST = 80.0
"""Depth beyond it is not measured; the network only learns that it is far, metres."""
NETWORK = UniDepthConfig(
    encoder=Dinov2Config(
        width=128, depth=6, heads=4, taps=(2, 3, 5, 6), position_grid=(6, 10), final_norm_eps=1e-5
    ),
    width=64,
    heads=4,
    expansion=2,
    units=(1, 1, 1),
    head_hidden=16,
    pixel_bounds=(IMAGE_SIZE[0] * IMAGE_SIZE[1],) * 2,
)
SCALE_INVARIANT_WEIGHT, CONFIDENCE_WEIGHT, CAMERA_WEIGHT = 0.5, 0.1, 0.2
STATE_FILE, METADATA_FILE, WEIGHTS = "state.safetensors", "training.json", "weights"
REPORT_EVERY = 50


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train on and how long."""

    records: Path
    """Records folder with `exact_depth`; the split `train` is used."""
    out: Path
    """Folder for the state and, at the end, the weights."""
    steps: int = 6000
    batch_size: int = 8
    """Images a step."""
    learning_rate: float = 1e-3
    seed: int = 0
    minutes: float | None = None
    """Stop after so long; the same command goes on."""
    save_every: int = 200
    """Steps between saved states."""


class Views(NamedTuple):
    """Camera images with their depth; cameras of a keyframe next to each other."""

    images: UInt8[Any, "M H W 3"]
    depth: Float[Any, "M H W"]
    """Exact, metres; `FARTHEST` for everything at least so far, sky included."""
    intrinsics: Float[Any, "M 3 3"]


def load_views(records: Records) -> Views:
    """All views of a split."""
    parts = [record_views(records[index]) for index in progress(range(len(records)), desc="read")]
    return Views(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def record_views(record: Record) -> Views:
    """The views of a keyframe at `IMAGE_SIZE`, read as `add-depth` reads them.

    Raises:
        DataError: the record has no exact depth.
    """
    if not all(record["exact_depth"]):
        raise DataError(f"keyframe {record['token']} has no exact depth: synthesize the world with --depth")
    height, width = IMAGE_SIZE
    depths = []
    for png in record["exact_depth"]:
        depth = cv2.resize(
            decode_depth(png, f"keyframe {record['token']}"), (width, height), interpolation=cv2.INTER_NEAREST
        )
        depths.append(np.where(depth > 0, np.minimum(depth, FARTHEST), np.float32(FARTHEST)))
    intrinsics = scaled_intrinsics(record, IMAGE_SIZE).astype(np.float32)
    return Views(keyframe_views(record, IMAGE_SIZE), np.stack(depths), intrinsics)


def augmented(views: Views, rng: np.random.Generator) -> Views:
    """Half of the images mirrored, all with another brightness, contrast and colour."""
    mirrored = rng.random(len(views.images)) < 0.5
    images = np.where(mirrored[:, None, None, None], views.images[:, :, ::-1], views.images)
    depth = np.where(mirrored[:, None, None], views.depth[:, :, ::-1], views.depth)
    intrinsics = views.intrinsics.copy()
    intrinsics[mirrored, 0, 2] = IMAGE_SIZE[1] - intrinsics[mirrored, 0, 2]
    gain = np.exp(rng.normal(0, 0.15, (len(images), 1, 1, 1)) + rng.normal(0, 0.05, (len(images), 1, 1, 3)))
    changed = images * gain + rng.normal(0, 8, (len(images), 1, 1, 1))
    return Views(np.clip(changed, 0, 255).astype(np.uint8), depth, intrinsics)


def loss(model: UniDepthV2, batch: Views) -> Float[Array, ""]:
    """Error of log depth (mean, and scale-invariant), of the camera, and of the confidence."""
    size = model.config.inference_size(IMAGE_SIZE)
    output = model.network(model.prepare(batch.images, size))
    measured = batch.depth < FARTHEST
    difference = jnp.log(output.radius * output.rays[..., 2]) - jnp.log(batch.depth)
    # Where nothing is nearer than FARTHEST, any depth beyond it is right.
    error = jnp.where(measured, jnp.abs(difference), jax.nn.relu(-difference))
    unsure = jnp.abs(output.confidence - jax.lax.stop_gradient(error))
    camera = jnp.log(output.camera / to_network(batch.intrinsics, size))
    return (
        jnp.mean(error)
        + SCALE_INVARIANT_WEIGHT * jnp.mean(deviation(difference, measured))
        + CONFIDENCE_WEIGHT * jnp.mean(unsure)
        + CAMERA_WEIGHT * jnp.mean(jnp.abs(camera))
    )


def deviation(difference: Float[Array, "B H W"], measured: Any) -> Float[Array, "B"]:
    """Standard deviation per image, over the measured pixels (Eigen et al. 2014, scale-invariant error)."""
    count = jnp.maximum(jnp.sum(measured, axis=(1, 2)), 1)
    mean = jnp.sum(difference * measured, axis=(1, 2)) / count
    centred = (difference - mean[:, None, None]) * measured
    return jnp.sqrt(jnp.sum(centred**2, axis=(1, 2)) / count + 1e-6)


def fresh_network(views: Views, seed: int) -> UniDepthV2:
    """A drawn network whose first guess is the views' typical depth everywhere."""
    model = initialize(lambda rngs: UniDepthV2(NETWORK, rngs=rngs), seed=seed)
    typical = np.mean(np.log(views.depth[:: max(1, len(views.depth) // 500)]))
    bias = model.decoder.depth_head.out.bias
    assert bias is not None
    bias[...] = jnp.full_like(bias[...], typical - LOG_RADIUS_OFFSET)
    return model


class Progress(NamedTuple):
    """Where training stands."""

    step: int
    seconds: float
    """Spent on steps so far, those of earlier runs included."""
    losses: list[float]
    """Means over `REPORT_EVERY` steps."""


def save_state(file: Path, state: Any, done: Progress) -> None:
    """Writes the state; it appears under its name only when whole."""
    leaves = {f"{index:04d}": np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(state))}
    partial = file.with_name(file.name + ".partial")
    save_file(leaves, partial, metadata={"progress": json.dumps(done)})
    os.replace(partial, file)


def restore_state(file: Path, like: Any) -> tuple[Any, Progress]:
    """Reads what `save_state` wrote, in the structure of `like`."""
    with safe_open(file, framework="np") as tensors:
        leaves = [jnp.asarray(tensors.get_tensor(name)) for name in sorted(tensors.keys())]
        step, seconds, losses = json.loads(tensors.metadata()["progress"])
    return jax.tree.unflatten(jax.tree.structure(like), leaves), Progress(step, seconds, losses)


def train(options: Options, views: Views, *, until: float) -> tuple[UniDepthV2, Progress]:
    """Trains to the last step, or to the first saved state after `until` (monotonic clock, seconds).

    It goes on from the state that an earlier run saved.
    """
    graph, parameters = nnx.split(fresh_network(views, options.seed))
    warmup = options.steps // 20 + 1
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, warmup, options.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2))

    @jax.jit
    def update(parameters: nnx.State, state: optax.OptState, batch: Views) -> tuple:
        value, gradient = jax.value_and_grad(lambda p: loss(nnx.merge(graph, p), batch))(parameters)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    file = options.out / STATE_FILE
    state, done = (parameters, optimizer.init(parameters)), Progress(0, 0.0, [])
    if file.is_file():
        state, done = restore_state(file, state)
        log.info("goes on at step %d", done.step)
    recent: list[float] = []
    started = time.monotonic()
    with progress(total=options.steps, initial=done.step, desc="train", logged=False) as bar:
        while done.step < options.steps:
            # The step alone decides what it draws, so that stopping changes nothing.
            rng = np.random.default_rng([options.seed, done.step])
            rows = rng.integers(0, len(views.images), options.batch_size)
            batch = augmented(Views(*(array[rows] for array in views)), rng)
            *state, value = update(*state, batch)
            recent.append(float(value))
            now = time.monotonic()
            done = Progress(done.step + 1, done.seconds + now - started, done.losses)
            started = now
            bar.update()
            if done.step % REPORT_EVERY == 0:
                done.losses.append(round(float(np.mean(recent)), 4))
                recent.clear()
                log.info("step %d: loss %.4f, %.0f s", done.step, done.losses[-1], done.seconds)
            if done.step % options.save_every == 0 or done.step == options.steps:
                save_state(file, tuple(state), done)
                if now > until:
                    break
    return nnx.merge(graph, state[0]), done


def main(options: Options) -> None:
    """Trains, and writes weights and facts when the last step is done."""
    until = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
    records = open_records(options.records, "train")
    options.out.mkdir(parents=True, exist_ok=True)
    model, done = train(options, load_views(records), until=until)
    if done.step < options.steps:
        print(f"{done.step} of {options.steps} steps: run the same command again to go on")
        return
    facts: dict[str, Any] = {name: str(value) for name, value in dataclasses.asdict(options).items()}
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    facts |= {"keyframes": len(records), "parameters": parameters}
    facts |= {"seconds": done.seconds, "losses": done.losses}
    save_unidepth(model, options.out / WEIGHTS)
    (options.out / METADATA_FILE).write_text(json.dumps(facts, indent=1) + "\n")
    print(f"loss {done.losses[-1]}; {options.out / WEIGHTS}")


if __name__ == "__main__":
    configure_logging()
    main(tyro.cli(Options))

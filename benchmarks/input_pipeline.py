"""What a sample costs at the published sizes: as transformers' image processor makes it, and here.

Records' views are drawn up to nuScenes' 1600 x 900 and encoded anew; the pipeline then reads, decodes,
squashes them to 640 x 640, moves the LiDAR sweep and lays out tokens. Before, transformers' processor cut the
patches on the host, the same frame twice, and `predict` made one sample after the other; now the device does
both, with the same bits, which is checked first, and `predict` reads ahead. The two take turns. Compare with
the samples a second that a host's devices take (docs/how-to/scaling.md).

    PYTHONPATH=. python benchmarks/input_pipeline.py --records demo/records --out input_pipeline.md
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import time
from pathlib import Path

import cv2
import jax
import numpy as np
from transformers import Qwen2VLImageProcessorPil

from spacedrive_jax.config import change, load_config
from spacedrive_jax.data.config import DataConfig
from spacedrive_jax.data.depth_sources import DepthConfig
from spacedrive_jax.data.images import ViewProcessor, decode_photo
from spacedrive_jax.data.loader import Samples, evaluation_batches, training_iterator
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.data.transforms import SampleBuilder

NATIVE = (900, 1600)
KEYFRAMES = 16
BATCH = 4


@dataclasses.dataclass(frozen=True)
class Enlarged(Records):
    """Records whose views have nuScenes' size, made beforehand."""

    made: tuple[Record, ...] = ()

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        # Reading and parsing the record is part of the work; its views are then those of the larger one.
        return super().__getitem__(index) | self.made[index]


def enlarged(records: Records) -> Enlarged:
    def views(record: Record) -> Record:
        height, width = NATIVE
        images = []
        for encoded in record["images"]:
            image = decode_photo(encoded, "a view")[..., ::-1]
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
            images.append(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
        scale = np.array(NATIVE)[None] / record["image_size"]
        stretch = np.stack([scale[:, 1], scale[:, 0], np.ones(len(scale))], axis=1)
        intrinsics = record["camera_intrinsics"] * stretch[:, :, None]
        return {
            "images": images,
            "image_size": np.array([NATIVE] * len(images)),
            "camera_intrinsics": intrinsics,
        }

    made = tuple(views(records[index]) for index in range(min(KEYFRAMES, len(records))))
    return Enlarged(records.directory, records.split, records.source, records.fingerprint, made=made)


class Before(ViewProcessor):
    """Patches by transformers' processor, on one thread."""

    def __init__(self, views: ViewProcessor) -> None:
        super().__init__(views.processor, channel_order=views.channel_order)
        self.theirs = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16384)

    def __call__(self, record: Record) -> np.ndarray:
        """(cameras, patches, values)."""
        height, width = self.processor.image_size
        views = [
            cv2.resize(decode_photo(encoded, "a view"), (width, height), interpolation=cv2.INTER_LINEAR)
            for encoded in record["images"]
        ]
        if self.channel_order == "bgr":
            views = [view[..., ::-1] for view in views]
        made = self.theirs(images=views, do_rescale=False, do_normalize=False, return_tensors="np")
        return made["pixel_values"].astype(np.uint8).reshape(len(views), -1, made["pixel_values"].shape[-1])


def check(before: SampleBuilder, now: SampleBuilder, record: Record) -> tuple[int, int]:
    """Refuses other bits; bytes of the pixels of a sample, before and now."""
    theirs, ours = before(record, 0).pixel_values, now(record, 0).pixel_values
    cut = jax.jit(now.images.processor.view_patches)(ours)
    if not np.array_equal(cut, theirs):
        raise SystemExit("the device's patches are not those of transformers")
    return theirs.nbytes, ours.nbytes


def training_rate(records: Records, builder: SampleBuilder, threads: int, seconds: float) -> np.ndarray:
    """Seconds and processor seconds of so many samples of a training iterator, and how many."""
    data = dataclasses.replace(builder.data, read_threads=threads, prefetch_batches=max(threads, 2))
    samples = Samples(records, builder, list(range(len(records))))
    iterator = training_iterator(samples, data, batch_size=BATCH, seed=0)
    # What was prefetched before the clock started does not count.
    for _ in range(data.prefetch_batches + 1):
        next(iterator)
    started, used, batches = time.monotonic(), time.process_time(), 0
    while time.monotonic() - started < seconds:
        next(iterator)
        batches += 1
    found = np.array([time.monotonic() - started, time.process_time() - used, batches * BATCH])
    iterator.close()
    return found


def predict_rate(records: Records, builder: SampleBuilder, data: DataConfig | None) -> np.ndarray:
    """The same of all samples as `predict` prepares them; without `data` one after the other."""
    samples = Samples(records, builder, list(range(len(records))))
    started, used = time.monotonic(), time.process_time()
    made = sum(count for _, count in evaluation_batches(samples, BATCH, data=data))
    return np.array([time.monotonic() - started, time.process_time() - used, made])


def main() -> None:
    """Checks, measures by turns, prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of threads, at least")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the table here as well")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    config = change(
        load_config("spacedrive_plus_qwen_7b"),
        "input_pipeline",
        {"train.batch_size": BATCH, "data.depth": DepthConfig(sources=("lidar",))},
    )
    load = os.getloadavg()[0]
    records = enlarged(open_records(options.records, "train"))
    now, before = (SampleBuilder(config.data, config.model) for _ in range(2))
    before.images = Before(now.images)
    pixels = check(before, now, records[0])
    builders = {"before": before, "now": now}
    training = {(name, threads): np.zeros(3) for threads in options.threads for name in builders}
    predicting = {name: np.zeros(3) for name in builders}
    data = {"before": None, "now": dataclasses.replace(config.data, read_threads=2)}
    for _ in range(options.turns):
        for (name, threads), total in training.items():
            total += training_rate(records, builders[name], threads, options.seconds / options.turns)
        for name, total in predicting.items():
            total += predict_rate(records, builders[name], data[name])
    cost = {name: predicting[name][1] / predicting[name][2] for name in builders}
    wall = {name: predicting[name][0] / predicting[name][2] for name in builders}
    text = "\n".join(
        [
            "# The input pipeline",
            "",
            f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python "
            f"{platform.python_version()}; six views of {NATIVE[1]} x {NATIVE[0]} to "
            f"{config.data.image_size[1]} x {config.data.image_size[0]}, LiDAR depth, batches of {BATCH}. "
            f"Pixels of a sample: {pixels[0] / 1e6:.1f} MB before, {pixels[1] / 1e6:.1f} MB now, the same "
            "patches behind the device.",
            "",
            "Training:",
            "",
            "| read threads | samples/s before | now | processor, ms a sample before | now | ratio |",
            "|---:|---:|---:|---:|---:|---:|",
            *(
                _row(threads, training["before", threads], training["now", threads])
                for threads in options.threads
            ),
            "",
            f"`predict`: {1e3 * wall['before']:.0f} ms a sample before (one after the other), "
            f"{1e3 * wall['now']:.0f} now (2 threads), {wall['before'] / wall['now']:.1f}x; of the processor "
            f"{1e3 * cost['before']:.0f} and {1e3 * cost['now']:.0f}, {cost['before'] / cost['now']:.1f} x.",
            "",
            f"Load average {load:.1f} before, {os.getloadavg()[0]:.1f} after.",
            "",
        ]
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text)


def _row(threads: int, before: np.ndarray, now: np.ndarray) -> str:
    costs = [1e3 * each[1] / each[2] for each in (before, now)]
    return (
        f"| {threads} | {before[2] / before[0]:.1f} | {now[2] / now[0]:.1f} | {costs[0]:.0f} "
        f"| {costs[1]:.0f} | {costs[0] / costs[1]:.1f} |"
    )


if __name__ == "__main__":
    main()

"""How many samples a second the input pipeline makes at the published sizes, by read threads.

Records' views are drawn up to nuScenes' 1600 x 900 and encoded anew; the pipeline then reads, decodes,
squashes them to 640 x 640, cuts patches, moves the LiDAR sweep and lays out tokens, in batches, as in
training. Compare with the samples a second that a host's devices take (docs/how-to/scaling.md).

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
import numpy as np

from spacedrive_jax.config import Config, change, load_config
from spacedrive_jax.data.depth_sources import DepthConfig
from spacedrive_jax.data.images import decode_photo
from spacedrive_jax.data.loader import Samples, training_iterator
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


def rate(config: Config, records: Records, threads: int, seconds: float) -> tuple[float, float]:
    """Samples a second over at least that many seconds, and processor seconds a sample."""
    config = change(
        config, config.name, {"data.read_threads": threads, "data.prefetch_batches": max(threads, 2)}
    )
    samples = Samples(records, SampleBuilder(config.data, config.model), list(range(len(records))))
    iterator = training_iterator(
        samples, config.data, batch_size=config.train.batch_size, seed=config.train.seed
    )
    # What was prefetched before the clock started does not count.
    for _ in range(config.data.prefetch_batches + 1):
        next(iterator)
    started, used, batches = time.monotonic(), time.process_time(), 0
    while time.monotonic() - started < seconds:
        next(iterator)
        batches += 1
    made = batches * config.train.batch_size
    return made / (time.monotonic() - started), (time.process_time() - used) / made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of threads, at least")
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
    rates = {threads: rate(config, records, threads, options.seconds) for threads in options.threads}
    text = "\n".join(
        [
            "# The input pipeline",
            "",
            f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python "
            f"{platform.python_version()}; six views of {NATIVE[1]} x {NATIVE[0]} to "
            f"{config.data.image_size[1]} x {config.data.image_size[0]}, LiDAR depth, batches of {BATCH}.",
            "",
            "| read threads | samples/s | processor, ms a sample |",
            "|---:|---:|---:|",
            *(f"| {threads} | {found:.1f} | {1e3 * cost:.0f} |" for threads, (found, cost) in rates.items()),
            "",
            f"Load average {load:.1f} before, {os.getloadavg()[0]:.1f} after.",
            "",
        ]
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()

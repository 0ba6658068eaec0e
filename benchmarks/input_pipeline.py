"""What a sample costs at the published sizes: as transformers' image processor makes it, and here.

Records' views are drawn up to nuScenes' 1600 x 900 and encoded anew; the pipeline then reads, decodes,
resizes them to 640 x 640, moves the LiDAR sweep and lays out tokens. Before, transformers' processor cut the
patches on the host, the same frame twice, and `predict` made one sample after the other; now the device does
both, with the same bits, which is checked first, and `predict` reads ahead. The two take turns. Compare with
the samples a second that a host's devices take (docs/how-to/scaling.md).

    PYTHONPATH=. python benchmarks/input_pipeline.py --records demo/records --out input_pipeline.md

With --photos, a folder of photographs (nuScenes' samples/), instead: what a view costs that `convert
--image-size` keeps, against the photograph decoded and resized each time, and kept in other ways.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from spacedrive_jax.config import change, load_config
from spacedrive_jax.data.depth_sources import DepthConfig
from spacedrive_jax.data.images import ViewProcessor, decode_photo, kept_view
from spacedrive_jax.data.loader import Samples, evaluation_batches, training_iterator
from spacedrive_jax.data.records import Records, open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.data.transforms import DataConfig, SampleBuilder

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
    for _ in range(data.prefetch_batches + 1):
        next(iterator)
    # Samples that were made in that time, not those handed out: some were made ahead of it.
    samples.clock.take()
    started, used = time.monotonic(), time.process_time()
    while time.monotonic() - started < seconds:
        next(iterator)
    found = np.array([time.monotonic() - started, time.process_time() - used, samples.clock.take()[1]])
    iterator.close()
    return found


def predict_rate(records: Records, builder: SampleBuilder, data: DataConfig | None) -> np.ndarray:
    """The same of all samples as `predict` prepares them; without `data` one after the other."""
    samples = Samples(records, builder, list(range(len(records))))
    started, used = time.monotonic(), time.process_time()
    made = sum(count for _, count in evaluation_batches(samples, BATCH, data=data))
    return np.array([time.monotonic() - started, time.process_time() - used, made])


def resized(photo: bytes, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(decode_photo(photo, "a photo"), size[::-1], interpolation=cv2.INTER_LINEAR)


def _pillow(view: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(view).save(file, **options)
    return file.getvalue()


def _webp(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded), formats=("WEBP",)))


def kept_views(folder: Path, sizes: Sequence[tuple[int, int]]) -> str:
    """Bytes and processor time of a view kept without loss, by size and format; every one is checked."""
    photos = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:6]]
    if not photos:
        raise SystemExit(f"{folder} holds no .jpg")

    def png(options: list[int]) -> Callable[[np.ndarray], bytes]:
        return lambda view: cv2.imencode(".png", view[..., ::-1], options)[1].tobytes()

    def decoded(encoded: bytes) -> np.ndarray:
        return decode_photo(encoded, "a view")

    level, strategy = cv2.IMWRITE_PNG_COMPRESSION, cv2.IMWRITE_PNG_STRATEGY
    lines = []
    for size in sizes:
        views = [resized(photo, size) for photo in photos]
        mine = "PNG, left filter, run lengths: `convert --image-size`"
        ways: dict[str, tuple[Callable[[np.ndarray], bytes], Callable[[bytes], np.ndarray]]] = {
            mine: (png([strategy, cv2.IMWRITE_PNG_STRATEGY_RLE]), decoded),
            "PNG, stored": (png([level, 0]), decoded),
            "PNG, all filters, run lengths": (
                png([level, 1, strategy, cv2.IMWRITE_PNG_STRATEGY_RLE]),
                decoded,
            ),
            "PNG, all filters, level 6": (png([level, 6]), decoded),
            "WebP, effort 0": (
                lambda view: _pillow(view, format="WEBP", lossless=True, method=0, quality=0),
                _webp,
            ),
            "WebP, effort 1": (
                lambda view: _pillow(view, format="WEBP", lossless=True, method=1, quality=20),
                _webp,
            ),
        }
        if [ways[mine][0](view) for view in views] != [kept_view(photo, size, "") for photo in photos]:
            raise SystemExit("the table's PNG is not the converter's")
        each = float(np.mean([len(photo) for photo in photos]))
        cost = _least(functools.partial(resized, size=size), photos)
        lines.append(
            f"| {size[0]} x {size[1]} | JPEG as it is, resized each time | {each:,.0f} | {cost:.1f} | |"
        )
        for name, (encode, decode) in ways.items():
            kept = [encode(view) for view in views]
            for one, view in zip(kept, views, strict=True):
                if not np.array_equal(decode(one), view):
                    raise SystemExit(f"{name} loses something")
            each = float(np.mean([len(one) for one in kept]))
            lines.append(
                f"| | {name} | {each:,.0f} | {_least(decode, kept):.1f} | {_least(encode, views):.1f} |"
            )
    return "\n".join(
        [
            "| height x width | kept as | bytes | reading, ms | writing, ms |",
            "|---:|---|---:|---:|---:|",
            *lines,
            "",
        ]
    )


def _least(work: Callable[[Any], object], items: Sequence[Any], times: int = 5) -> float:
    """Processor milliseconds for one of them, the least of several turns."""
    found = []
    for _ in range(times):
        started = time.process_time()
        for item in items:
            work(item)
        found.append(1e3 * (time.process_time() - started) / len(items))
    return min(found)


def main() -> None:
    """Checks, measures by turns, prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--records", type=Path)
    given.add_argument("--photos", type=Path, help="prints the table of kept views instead")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of threads, at least")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the table here as well")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.photos is not None:
        text = kept_views(options.photos, [(640, 640), (448, 448), (336, 336)])
        print(text)
        if options.out is not None:
            options.out.write_text(text)
        return
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

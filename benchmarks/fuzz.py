"""Mutates the files that somebody else may hand over, reads them, and counts what comes of it.

    python -m benchmarks.fuzz --inputs 10000 --seed 0 --out benchmarks/results/fuzz.md

Each input is one mutation of one file that this script makes (tables, sensor files, records folders, depth
sidecars, predictions, result files, weights), read in this process through the functions that the commands
call. A reader may give the right thing or one clear error (`SpaceDriveError`). Everything else counts against
the project: another exception, more than `SECONDS`, more than `MOST_BYTES`, a value that is silently wrong,
and code of the file that runs. A reader that is to be tried too is one entry in `targets`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pickle
import resource
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from safetensors.numpy import save_file

from data_prep.nuscenes.can_bus import read_pose_messages
from data_prep.nuscenes.maps import open_expansion
from data_prep.nuscenes.mask_png import cache_mask_bits
from data_prep.nuscenes.scenes import read_scenes
from data_prep.nuscenes.sensor_files import check_image, check_lidar
from data_prep.nuscenes.tables import read_tables
from spacedrive_jax.data.images import decode_depth, decode_photo
from spacedrive_jax.data.language_data import LanguageData
from spacedrive_jax.data.records import open_records
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.evaluation.prediction_files import read_predictions
from spacedrive_jax.interop.safetensors_folder import SafetensorsFolder
from spacedrive_jax.interop.torch_file import read_torch_file, write_torch_file
from spacedrive_jax.io import read_bytes
from tests.data_prep.tiny_nuscenes import VERSION, TinyNuScenes, road_expansion
from tests.record_factory import encode_jpeg, encode_png, make_record, write_records

SECONDS = 10.0
MOST_BYTES = 4 << 30
OUTCOMES = ("right", "clear error", "traceback", "hang", "over 4 GB", "silently wrong", "code executed")
BAD = OUTCOMES[2:]

Change = Callable[[np.random.Generator, Path], str]
"""Changes one file in place and says how."""
Read = Callable[[Path], Any]
"""Reads a folder; what it gives is compared with what the whole folder gives."""
Judge = Callable[[Any, Any], bool]
"""Whether a mutated folder's value can stand, given that of the whole folder."""


class Hang(BaseException):
    """A reader took too long; no `except Exception` may swallow it."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of file."""

    name: str
    make: Callable[[Path], None]
    """Writes a whole folder."""
    files: str
    """Pattern of the files to mutate."""
    read: Read
    stands: Judge
    changes: Sequence[Change]


# Mutations


def flip(rng: np.random.Generator, path: Path) -> str:
    """Flips one to eight bits."""
    data = bytearray(path.read_bytes())
    for _ in range(int(rng.integers(1, 9))):
        if data:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return "bits flipped"


def cut(rng: np.random.Generator, path: Path) -> str:
    """Keeps the beginning, which may be nothing."""
    data = path.read_bytes()
    path.write_bytes(data[: int(rng.integers(len(data) + 1))])
    return "cut"


def overwrite(rng: np.random.Generator, path: Path) -> str:
    """Replaces a stretch by noise, zeros, or a stretch from elsewhere in the file."""
    data = bytearray(path.read_bytes())
    length = int(rng.integers(1, 65))
    place, other = (int(rng.integers(max(1, len(data) - length))) for _ in range(2))
    noise = (rng.bytes(length), bytes(length), b"\xff" * length, bytes(data[other : other + length]))
    data[place : place + length] = noise[int(rng.integers(4))]
    path.write_bytes(data)
    return "stretch overwritten"


def insert(rng: np.random.Generator, path: Path) -> str:
    """Inserts noise."""
    data = path.read_bytes()
    place = int(rng.integers(len(data) + 1))
    path.write_bytes(data[:place] + rng.bytes(int(rng.integers(1, 65))) + data[place:])
    return "noise inserted"


def replace(rng: np.random.Generator, path: Path) -> str:
    """Puts something else in the file's place."""
    path.unlink()
    kind = int(rng.integers(7))
    if kind == 0:
        os.mkfifo(path)
        return "a pipe"
    if kind == 1:
        path.symlink_to("/dev/zero")
        return "a link to /dev/zero"
    if kind == 2:
        path.mkdir()
        return "a folder"
    if kind == 3:
        path.symlink_to(path.name)
        return "a link to itself"
    if kind == 4:
        return "absent"
    content = (b"", b"[" * 100_000, b"\xff\xfe{\0}\0", b"null", pickle.dumps(_Boom(path.parent / "RAN")))
    path.write_bytes(content[int(rng.integers(len(content)))])
    return "another content"


class _Boom:
    """A pickle that runs code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


WEIRD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 1e12, -1e12, 1e308, float("nan"), float("inf"), -float("inf")),
    *(10**9, 2**31, 2**63, 2**64, 10**400, "", "x", "../../../etc/passwd", "/dev/zero", "a\0b", "\ud800"),
    *("x" * 70_000, [], {}, [[]], [1, 2, 3], [float("nan")] * 3, [1e30] * 3, {"token": "x"}, "evil.Text"),
)


def edit_json(rng: np.random.Generator, path: Path) -> str:
    """Changes one value of a JSON file (or of one line of JSON Lines), or takes it away."""
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    place = int(rng.integers(len(lines)))
    value = json.loads(lines[place])
    holders = list(_holders(value))
    if not holders:
        return replace(rng, path)
    holder, key = holders[int(rng.integers(len(holders)))]
    action = int(rng.integers(6))
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, list):
        holder.append(holder[key])
    elif action == 2:
        other, name = holders[int(rng.integers(len(holders)))]
        if not isinstance(other[name], dict | list):
            holder[key] = other[name]
    else:
        holder[key] = WEIRD[int(rng.integers(len(WEIRD)))]
    lines[place] = json.dumps(value)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return "a JSON value"


def _holders(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from _holders(value[key])


BYTES: tuple[Change, ...] = (flip, cut, overwrite, insert, replace)
JSON: tuple[Change, ...] = (edit_json, edit_json, edit_json, edit_json, *BYTES)


# What is read


def equal(found: Any, whole: Any) -> bool:
    """The value must be the whole folder's."""
    return bool(found == whole)


def finite(found: Any, whole: Any) -> bool:
    """Other numbers may stand, where nothing says what they were, but none that is not finite."""
    return all(math.isfinite(number) for number in _numbers(found))


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float | int):
        yield value
    elif isinstance(value, np.ndarray):
        yield from value.ravel().tolist()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)


def plausible_scenes(found: Any, whole: Any) -> bool:
    """Scenes hold finite numbers, boxes with a volume, times in order, and names that stay inside."""
    for scene in found:
        times = [keyframe.timestamp_us for keyframe in scene.keyframes]
        frames = [frame for keyframe in scene.keyframes for frame in (*keyframe.cameras, keyframe.lidar)]
        names = [frame.filename for frame in frames] + [scene.map_mask, scene.name, scene.location]
        if (
            times != sorted(set(times))
            or any(side <= 0 for box in scene.annotations for side in box.size)
            or any(".." in Path(name).parts or Path(name).is_absolute() for name in names)
        ):
            return False
    return finite(found, whole)


def records_of(folder: Path) -> Any:
    """All records of a folder as something that compares."""
    records = open_records(folder / "r")
    return [
        {
            name: value.tobytes() if isinstance(value, np.ndarray) else value
            for name, value in records[index].items()
        }
        for index in range(len(records))
    ]


def targets() -> list[Target]:
    """Every kind of file that is tried."""
    rng = np.random.default_rng(0)
    photo = encode_jpeg(rng.integers(0, 255, (36, 64, 3), dtype=np.uint8))
    depth = encode_png(rng.integers(0, 60_000, (36, 64), dtype=np.uint16))

    def one(name: str, content: bytes) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            (folder / name).write_bytes(content)

        return write

    def tables(folder: Path) -> None:
        tiny = TinyNuScenes(2, 4)
        tiny.files = {}
        tiny.write(folder)

    def records(folder: Path) -> None:
        maker = np.random.default_rng(1)
        splits = {"train": [make_record(maker) for _ in range(2)], "val": [make_record(maker)]}
        write_records(folder / "r", splits)

    def mask(folder: Path) -> None:
        image = cv2.GaussianBlur(np.random.default_rng(2).random((60, 80), np.float32), (0, 0), 3) > 0.5
        (folder / "m.png").write_bytes(encode_png(image.astype(np.uint8) * 255))

    def mask_bits(folder: Path) -> bytes:
        cache_mask_bits(folder / "m.png", folder / "m.npy")
        return (folder / "m.npy").read_bytes()

    def expansion(folder: Path) -> Any:
        open_expansion.cache_clear()
        return open_expansion(folder / "town.json").raster(np.array([100.0, 100.0]), 0.0, 50.0, 200)

    def can_bus(folder: Path) -> None:
        (folder / "can_bus").mkdir()
        text = json.dumps(TinyNuScenes(1, 2).can_messages())
        (folder / "can_bus/scene_pose.json").write_text(text)

    def sensor_files(folder: Path) -> None:
        (folder / "a.jpg").write_bytes(photo)
        (folder / "b.bin").write_bytes(bytes(400))

    def questions(folder: Path) -> Any:
        return LanguageData(folder).counterfactual_questions("t")

    def planned(name: str) -> Read:
        return lambda folder: read_predictions(folder / name).waypoints

    def sensors(folder: Path) -> Any:
        return check_image(folder / "a.jpg", 64, 36) is None, check_lidar(folder / "b.bin") is None

    def language(folder: Path) -> None:
        (folder / "vqa/train").mkdir(parents=True)
        pairs = [{"question": f"q{index}", "answer": "a"} for index in range(4)]
        (folder / "vqa/train/t.json").write_text(json.dumps(pairs))

    def predictions(folder: Path) -> None:
        lines = [
            {
                "token": f"t{index}",
                "waypoints": [[2.5 * step, 0.0] for step in range(1, 7)],
                "text": "",
                "status": "ok",
            }
            for index in range(3)
        ]
        (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def pickled(folder: Path) -> None:
        planned = {"t": np.ones((6, 2), np.float32), "u": [[1.0, 2.0]] * 6}
        (folder / "p.pkl").write_bytes(pickle.dumps(planned))

    def torch_file(folder: Path) -> None:
        write_torch_file(
            folder / "w.pth", {"state_dict": {"a.weight": np.ones((3, 4), np.float32)}, "meta": {"iter": 7}}
        )

    def safetensors(folder: Path) -> None:
        save_file({"a": np.ones((3, 4), np.float32)}, folder / "model.safetensors")

    def tensors(folder: Path) -> Any:
        opened = SafetensorsFolder(folder)
        return {name: opened.read(name) for name in opened.shapes()}

    def anything(found: Any, whole: Any) -> bool:
        """Where nothing tells a changed value from the right one: text, bytes without a checksum."""
        return True

    def scenes(folder: Path) -> Any:
        return list(read_scenes(read_tables(folder, VERSION)))

    def picture(folder: Path) -> Any:
        return decode_photo(read_bytes(folder / "a.jpg", most=1 << 28), "a.jpg", (36, 64))

    def depth_of(folder: Path) -> Any:
        return decode_depth(read_bytes(folder / "d.png", most=1 << 28), "d.png").tobytes()

    town = json.dumps(road_expansion()).encode()
    return [
        Target("tables", tables, f"{VERSION}/*.json", scenes, plausible_scenes, JSON),
        Target("CAN bus", can_bus, "can_bus/*", lambda f: read_pose_messages(f, "scene"), finite, JSON),
        Target("map expansion", one("town.json", town), "town.json", expansion, finite, JSON),
        Target("map mask", mask, "m.png", mask_bits, equal, BYTES),
        Target("photograph", one("a.jpg", photo), "a.jpg", picture, finite, BYTES),
        Target("depth picture", one("d.png", depth), "d.png", depth_of, equal, BYTES),
        Target("sensor files", sensor_files, "*.*", sensors, anything, BYTES),
        Target("records: shards", records, "r/*array_record*", records_of, equal, BYTES),
        Target("records: JSON", records, "r/*.json", records_of, equal, JSON),
        Target("language data", language, "vqa/train/*", questions, anything, JSON),
        Target("predictions", predictions, "p.jsonl", planned("p.jsonl"), finite, JSON),
        Target("pickled predictions", pickled, "p.pkl", planned("p.pkl"), finite, BYTES),
        Target("torch file", torch_file, "w.pth", lambda f: read_torch_file(f / "w.pth"), finite, BYTES),
        Target("safetensors", safetensors, "*.safetensors", tensors, anything, BYTES),
    ]


# Running


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends what takes longer than `SECONDS`, and refuses memory beyond `MOST_BYTES` of what is in use."""

    def expired(*_: Any) -> None:
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MOST_BYTES, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def outcome(target: Target, folder: Path, whole: Any) -> tuple[str, str]:
    """What reading a mutated folder came to, and the words."""
    try:
        with limited():
            value = target.read(folder)
    except SpaceDriveError as error:
        result = "clear error", str(error)
    except Hang:
        result = "hang", ""
    except MemoryError:
        result = "over 4 GB", ""
    except Exception as error:
        result = "traceback", f"{type(error).__name__}: {error}"
    else:
        result = ("right", "") if target.stands(value, whole) else ("silently wrong", "")
    return ("code executed", "") if any(folder.rglob("RAN")) else result


def fuzz(
    inputs: int, seed: int, found: Sequence[Target] | None = None
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Tries mutations, the same for the same seed.

    Args:
        inputs: how many, shared evenly by the targets.
        seed: of the mutations.
        found: what to mutate; all by default.

    Returns:
        Target to counts of outcomes, and a line on every input that went wrong.
    """
    counts: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    found = targets() if found is None else found
    for number, target in enumerate(found):
        counts[target.name] = Counter()
        with tempfile.TemporaryDirectory() as name:
            origin, copy = Path(name) / "whole", Path(name) / "copy"
            origin.mkdir()
            target.make(origin)
            pristine = Path(name) / "pristine"
            shutil.copytree(origin, pristine)
            whole = target.read(pristine)
            files = sorted(path.relative_to(origin) for path in origin.glob(target.files))
            for trial in range(-(-inputs // len(found))):
                rng = np.random.default_rng([seed, number, trial])
                shutil.copytree(origin, copy)
                file = files[int(rng.integers(len(files)))]
                how = target.changes[int(rng.integers(len(target.changes)))](rng, copy / file)
                result, words = outcome(target, copy, whole)
                counts[target.name][result] += 1
                if result in BAD:
                    wrong.append(f"{target.name}, input {trial} ({file}: {how}): {result} {words[:200]}")
                shutil.rmtree(copy)
    return counts, wrong


def table(counts: dict[str, Counter[str]], seed: int) -> str:
    """The counts as Markdown."""
    total: Counter[str] = Counter()
    for each in counts.values():
        total.update(each)
    rows = [*counts.items(), ("**all**", total)]
    lines = [
        f"# Mutated inputs (seed {seed})",
        "",
        "`python -m benchmarks.fuzz`; see there for what is mutated. The last five columns must be 0.",
        "",
        "| file | inputs | " + " | ".join(OUTCOMES) + " |",
        "|---|" + "---:|" * (len(OUTCOMES) + 1),
    ]
    lines += [
        f"| {name} | {sum(each.values())} | " + " | ".join(str(each[kind]) for kind in OUTCOMES) + " |"
        for name, each in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Prints the table and every input that went wrong; 1 if there is one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a target by name")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    chosen = [target for target in targets() if arguments.only in (None, target.name)]
    counts, wrong = fuzz(arguments.inputs, arguments.seed, chosen)
    print(table(counts, arguments.seed))
    print("\n".join(wrong))
    if arguments.out:
        arguments.out.write_text(table(counts, arguments.seed))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())

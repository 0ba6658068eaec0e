"""Data that somebody else may hand over, to be mutated: tables, sensor files, records, predictions."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from safetensors.numpy import save_file

from benchmarks.fuzz_inputs import BYTES, JSON, Read, Target, anything, equal, finite, plausible_scenes
from data_prep.nuscenes.expansions import cache_mask_bits, open_expansion, read_pose_messages
from data_prep.nuscenes.scenes import read_scenes
from data_prep.nuscenes.sensor_files import check_image, check_lidar
from data_prep.nuscenes.tables import read_tables
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.frame import read_frame
from spacedrive_jax.data.images import decode_depth, decode_photo
from spacedrive_jax.data.language_data import LanguageData
from spacedrive_jax.data.records import open_records
from spacedrive_jax.evaluation.prediction_files import read_predictions
from spacedrive_jax.interop.safetensors_folder import SafetensorsFolder
from spacedrive_jax.interop.torch_file import read_torch_file, write_torch_file
from spacedrive_jax.io import read_bytes
from tests.data_prep.tiny_nuscenes import VERSION, TinyNuScenes, road_expansion
from tests.record_factory import encode_jpeg, encode_png, make_record, write_records


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


def data_targets() -> list[Target]:
    """Data sets, records, predictions and plain files of tensors."""
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

    def own_images(folder: Path) -> None:
        maker = make_record(np.random.default_rng(5))
        cameras = {
            name: {"intrinsics": intrinsics.tolist(), "camera_to_ego": pose.tolist()}
            for name, intrinsics, pose in zip(
                CAMERAS, maker["camera_intrinsics"], maker["camera_to_ego"], strict=True
            )
        }
        (folder / "images").mkdir()
        for name in CAMERAS:
            (folder / "images" / f"{name}.jpg").write_bytes(photo)
        facts = {"speed": 5.0, "yaw_rate": 0.1, "command": "left", "target_points": [[9.0, 1.0], [40.0, 9.0]]}
        (folder / "calibration.json").write_text(json.dumps({"cameras": cameras, **facts}))

    def own_record(folder: Path) -> Any:
        record = read_frame(folder / "images", folder / "calibration.json").record()
        return {name: value for name, value in record.items() if name != "agent_velocity"}

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
        Target("own calibration", own_images, "*.json", own_record, finite, JSON),
        Target("own images", own_images, "images/*", own_record, finite, BYTES),
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

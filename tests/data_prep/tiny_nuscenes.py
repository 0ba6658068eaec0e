"""A minimal nuScenes folder for tests: short scenes, thumbnails, one map, CAN data for one scene."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from spacedrive_jax.constants import CAMERAS

VERSION = "v1.0-tiny"
LOCATION = "tiny-town"
WIDTH, HEIGHT = 32, 18
INTRINSICS = [[25.0, 0.0, 16.0], [0.0, 25.0, 9.0], [0.0, 0.0, 1.0]]
KEYFRAMES = 8
START_US = 1_600_000_000_000_000
STEP_US = 500_000
SPEED = 6.0
TURN_RATE = 0.2
"""Radians per second, to the left."""
START = np.array([100.0, 80.0])
MAP_METRES = 200
ROAD_X = (90.0, 110.0)
"""The road of the map mask: a strip along y."""


def token(*parts: object) -> str:
    return hashlib.md5("/".join(map(str, parts)).encode()).hexdigest()


def ego_at(seconds: float) -> tuple[np.ndarray, float]:
    """Position (x, y) and heading on an arc that starts along +y."""
    radius = SPEED / TURN_RATE
    heading = np.pi / 2 + TURN_RATE * seconds
    x = START[0] + radius * (np.sin(heading) - 1.0)
    y = START[1] - radius * np.cos(heading)
    return np.array([x, y]), heading


def quaternion(yaw: float) -> list[float]:
    return [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))]


def jpeg(seed: int, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    image = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


class TinyNuScenes:
    """Builds the tables in memory, lets a test spoil them, and writes the folder."""

    def __init__(self, scenes: int = 3, keyframes: int = KEYFRAMES) -> None:
        self.scene_names = [f"scene-{index + 2001}" for index in range(scenes)]
        self.keyframes = keyframes
        names = ["attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map"]
        names += ["sample", "sample_annotation", "sample_data", "scene", "sensor", "visibility"]
        self.tables: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        self.files: dict[str, bytes] = {}
        self._add_sensors()
        self._add_map()
        for index, name in enumerate(self.scene_names):
            self._add_scene(index, name)

    def write(self, root: Path) -> Path:
        folder = root / VERSION
        folder.mkdir(parents=True)
        for name, rows in self.tables.items():
            (folder / f"{name}.json").write_text(json.dumps(rows))
        for name, content in self.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return root

    def image(self, scene: int, keyframe: int, channel: str) -> str:
        return f"samples/{channel}/{self.scene_names[scene]}__{channel}__{keyframe}.jpg"

    def _add_sensors(self) -> None:
        for name in ("vehicle.car", "human.pedestrian.adult"):
            self.tables["category"].append({"token": token(name), "name": name, "description": ""})
        self.tables["attribute"].append({"token": token("moving"), "name": "vehicle.moving"})
        self.tables["visibility"].append({"token": "4", "level": "v80-100", "description": ""})
        for index, channel in enumerate((*CAMERAS, "LIDAR_TOP")):
            camera = channel != "LIDAR_TOP"
            self.tables["sensor"].append(
                {"token": token(channel), "channel": channel, "modality": "camera" if camera else "lidar"}
            )
            # A camera looking along the ego x axis: x right, y down, z forward.
            self.tables["calibrated_sensor"].append(
                {
                    "token": token("calibration", channel),
                    "sensor_token": token(channel),
                    "translation": [1.5, 0.1 * index, 1.6],
                    "rotation": [0.5, -0.5, 0.5, -0.5] if camera else [1.0, 0.0, 0.0, 0.0],
                    "camera_intrinsic": INTRINSICS if camera else [],
                }
            )

    def _add_map(self) -> None:
        side = MAP_METRES * 10
        mask = np.zeros((side, side), np.uint8)
        mask[:, int(ROAD_X[0] * 10) : int(ROAD_X[1] * 10)] = 255
        self.files["maps/tiny.png"] = cv2.imencode(".png", mask)[1].tobytes()
        self.tables["log"].append(
            {
                "token": token("log"),
                "logfile": "tiny-log",
                "vehicle": "",
                "date_captured": "",
                "location": LOCATION,
            }
        )
        self.tables["map"].append(
            {"token": token("map"), "log_tokens": [token("log")], "filename": "maps/tiny.png", "category": ""}
        )

    def _add_scene(self, scene: int, name: str) -> None:
        samples = [token(name, k) for k in range(self.keyframes)]
        self.tables["scene"].append(
            {
                "token": token(name),
                "log_token": token("log"),
                "nbr_samples": self.keyframes,
                "first_sample_token": samples[0],
                "last_sample_token": samples[-1],
                "name": name,
                "description": "Turn left, parked car",
            }
        )
        for k, sample in enumerate(samples):
            time = START_US + scene * 60_000_000 + k * STEP_US
            self.tables["sample"].append(
                {
                    "token": sample,
                    "timestamp": time,
                    "prev": samples[k - 1] if k else "",
                    "next": samples[k + 1] if k + 1 < len(samples) else "",
                    "scene_token": token(name),
                }
            )
            self._add_sensor_data(scene, name, k, sample, time)
        for instance, category in (("car", "vehicle.car"), ("walker", "human.pedestrian.adult")):
            self._add_instance(name, samples, instance, category)
        if scene == 0:
            self.files[f"can_bus/{name}_pose.json"] = json.dumps(self.can_messages()).encode()

    def _add_sensor_data(self, scene: int, name: str, k: int, sample: str, time: int) -> None:
        for index, channel in enumerate((*CAMERAS, "LIDAR_TOP")):
            camera = channel != "LIDAR_TOP"
            stamp = time - 10_000 * (index + 1) if camera else time
            xy, heading = ego_at((stamp - START_US - scene * 60_000_000) * 1e-6)
            row = token(name, k, channel)
            filename = self.image(scene, k, channel) if camera else f"samples/LIDAR_TOP/{name}__{k}.pcd.bin"
            self.tables["ego_pose"].append(
                {
                    "token": row,
                    "timestamp": stamp,
                    "rotation": quaternion(heading),
                    "translation": [float(xy[0]), float(xy[1]), 0.0],
                }
            )
            self.tables["sample_data"].append(
                {
                    "token": row,
                    "sample_token": sample,
                    "ego_pose_token": row,
                    "calibrated_sensor_token": token("calibration", channel),
                    "timestamp": stamp,
                    "fileformat": "jpg" if camera else "pcd",
                    "is_key_frame": True,
                    "height": HEIGHT if camera else 0,
                    "width": WIDTH if camera else 0,
                    "filename": filename,
                    "prev": "",
                    "next": "",
                }
            )
            if camera:
                self.files[filename] = jpeg(1000 * scene + 10 * k + index)
            else:
                points = np.random.default_rng(k).normal(0, 10, (40, 5)).astype(np.float32)
                self.files[filename] = points.tobytes()

    def _add_instance(self, name: str, samples: list[str], instance: str, category: str) -> None:
        # The car stands 20 m ahead of the start; the walker crosses at 1 m/s and is unseen at keyframe 4.
        seen = [k for k in range(self.keyframes) if instance == "car" or k != 4]
        rows = [token(name, instance, k) for k in seen]
        for position, k in enumerate(seen):
            x = START[0] + (2.0 if instance == "car" else -3.0 + 0.5 * k)
            self.tables["sample_annotation"].append(
                {
                    "token": rows[position],
                    "sample_token": samples[k],
                    "instance_token": token(name, instance),
                    "visibility_token": "4",
                    "attribute_tokens": [],
                    "translation": [float(x), float(START[1] + 20.0), 0.8],
                    "size": [1.9, 4.5, 1.6] if instance == "car" else [0.6, 0.7, 1.7],
                    "rotation": quaternion(np.pi / 2 if instance == "car" else 0.0),
                    "prev": rows[position - 1] if position else "",
                    "next": rows[position + 1] if position + 1 < len(rows) else "",
                    "num_lidar_pts": 3 + k,
                    "num_radar_pts": 0,
                }
            )
        self.tables["instance"].append(
            {
                "token": token(name, instance),
                "category_token": token(category),
                "nbr_annotations": len(rows),
                "first_annotation_token": rows[0],
                "last_annotation_token": rows[-1],
            }
        )

    def can_messages(self) -> list[dict[str, Any]]:
        """Pose messages every 200 ms, each numbered by its fields."""
        return [
            {
                "accel": [index + 0.1, 0.0, 9.8],
                "orientation": quaternion(0.01 * index),
                "pos": [0.0, 0.0, 0.0],
                "rotation_rate": [0.0, 0.0, index + 0.2],
                "utime": START_US - 100_000 + 200_000 * index,
                "vel": [index + 0.3, 0.0, 0.0],
            }
            for index in range(20)
        ]


def road_expansion() -> dict[str, Any]:
    """A map expansion of the same road with a traffic island (a hole) and a side road on its left."""
    corners = {
        "road": [(90, 0), (110, 0), (110, 200), (90, 200)],
        "island": [(98, 95), (102, 95), (102, 105), (98, 105)],
        "side": [(60, 110), (90, 110), (90, 116), (60, 116)],
    }
    nodes = [
        {"token": f"{name}{index}", "x": float(x), "y": float(y)}
        for name, ring in corners.items()
        for index, (x, y) in enumerate(ring)
    ]
    rings = {name: [f"{name}{index}" for index in range(4)] for name in corners}
    polygons = [
        {"token": name, "exterior_node_tokens": rings[name], "holes": holes}
        for name, holes in (("road", [{"node_tokens": rings["island"]}]), ("side", []))
    ]
    areas = [{"token": "area", "polygon_tokens": ["road", "side"]}]
    return {"version": "1.3", "node": nodes, "polygon": polygons, "drivable_area": areas}

"""The 13 nuScenes v1.0 tables: the fixed ones written out here, the others gathered from the scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spacedrive_jax.io import write_text
from spacedrive_jax.json_files import to_json
from spacedrive_jax.world import views
from spacedrive_jax.world.scenario import make_token

VERSION = "v1.0-synthetic"
Row = dict[str, Any]

TABLES = (
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "log",
    "map",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
    "visibility",
)

CATEGORIES = (
    "human.pedestrian.adult",
    "human.pedestrian.child",
    "human.pedestrian.wheelchair",
    "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer",
    "human.pedestrian.construction_worker",
    "animal",
    "vehicle.car",
    "vehicle.motorcycle",
    "vehicle.bicycle",
    "vehicle.bus.bendy",
    "vehicle.bus.rigid",
    "vehicle.truck",
    "vehicle.construction",
    "vehicle.emergency.ambulance",
    "vehicle.emergency.police",
    "vehicle.trailer",
    "movable_object.barrier",
    "movable_object.trafficcone",
    "movable_object.pushable_pullable",
    "movable_object.debris",
    "static_object.bicycle_rack",
)
"""The 23 official names in the order of the official table."""

ATTRIBUTES = {
    "vehicle.moving": "Vehicle is moving.",
    "vehicle.stopped": "Vehicle, with a driver/rider in/on it, is stationary but has an intent to move.",
    "vehicle.parked": "Vehicle is stationary with no immediate intent to move.",
    "cycle.with_rider": "There is a rider on the bicycle or motorcycle.",
    "cycle.without_rider": "There is no rider on the bicycle or motorcycle.",
    "pedestrian.sitting_lying_down": "The human is sitting or lying down.",
    "pedestrian.standing": "The human is standing.",
    "pedestrian.moving": "The human is moving.",
}

_VISIBILITY = (("1", 0, 40), ("2", 40, 60), ("3", 60, 80), ("4", 80, 100))


def fixed_tables(seed: int, image_size: tuple[int, int]) -> dict[str, list[Row]]:
    """Category, attribute, visibility, sensor and calibrated_sensor.

    Args:
        seed: of the whole data set; part of every token.
        image_size: height and width of the images, pixels; the intrinsics refer to it.
    """
    sensors: list[Row] = []
    calibrations: list[Row] = []
    poses = [(mount.channel, mount.to_ego(), mount.intrinsics(image_size)) for mount in views.CAMERA_MOUNTS]
    for channel, to_ego, intrinsics in poses:
        sensors.append(
            {"token": make_token(seed, "sensor", channel), "channel": channel, "modality": "camera"}
        )
        calibrations.append(_calibration(seed, channel, to_ego, intrinsics.tolist()))
    sensors.append(
        {"token": make_token(seed, "sensor", "LIDAR_TOP"), "channel": "LIDAR_TOP", "modality": "lidar"}
    )
    calibrations.append(_calibration(seed, "LIDAR_TOP", views.lidar_to_ego(), []))
    return {
        "category": [
            {"token": make_token(seed, "category", name), "name": name, "description": f"{name} (synthetic)."}
            for name in CATEGORIES
        ],
        "attribute": [
            {"token": make_token(seed, "attribute", name), "name": name, "description": text}
            for name, text in ATTRIBUTES.items()
        ],
        "visibility": [
            {
                "description": f"visibility of whole object is between {low} and {high}%",
                "token": token,
                "level": f"v{low}-{high}",
            }
            for token, low, high in _VISIBILITY
        ],
        "sensor": sensors,
        "calibrated_sensor": calibrations,
    }


def _calibration(seed: int, channel: str, to_ego: Any, intrinsics: list) -> Row:
    return {
        "token": make_token(seed, "calibrated_sensor", channel),
        "sensor_token": make_token(seed, "sensor", channel),
        "translation": [float(value) for value in to_ego[:3, 3]],
        "rotation": views.quaternion(to_ego),
        "camera_intrinsic": intrinsics,
    }


def visibility_token(visible: int, covered: int) -> str:
    """The level of `visible` pixels out of `covered` that the object would fill in all six images."""
    fraction = visible / covered if covered else 0.0
    return next(token for token, _, high in _VISIBILITY if fraction <= high / 100 or high == 100)


def link(rows: list[Row]) -> None:
    """Fills `prev` and `next` of rows in time order, in place."""
    for row, previous, following in zip(rows, [None, *rows], [*rows[1:], None], strict=False):
        row["prev"] = previous["token"] if previous else ""
        row["next"] = following["token"] if following else ""


def write_tables(root: Path, tables: dict[str, list[Row]]) -> None:
    """Writes all 13 tables as JSON under `root / VERSION`."""
    folder = root / VERSION
    for name in TABLES:
        write_text(folder / f"{name}.json", to_json(tables[name], indent=0))

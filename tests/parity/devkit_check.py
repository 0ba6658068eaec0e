"""Checks a synthesized folder with the official nuScenes devkit.

Not collected by pytest, because the devkit needs numpy < 2. Run it in an environment of its own:

    python -m venv devkit_env && devkit_env/bin/pip install nuscenes-devkit "numpy<2"
    devkit_env/bin/python tests/parity/devkit_check.py DIR [--version v1.0-synthetic] [--picture OUT.jpg]

It loads the tables, walks every chain, reads images, sweeps, maps and CAN bus, compares projected boxes with
the images' bounds and exits non-zero on the first thing that does not fit.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
from nuscenes.can_bus.can_bus_api import NuScenesCanBus
from nuscenes.map_expansion.map_api import NuScenesMap
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import BoxVisibility, box_in_image, points_in_box


def main() -> None:
    """Runs all checks and prints one figure per check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataroot", type=Path)
    parser.add_argument("--version", default="v1.0-synthetic")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    nusc = NuScenes(arguments.version, str(arguments.dataroot), verbose=False)
    nusc.list_scenes()
    check_chains(nusc)
    check_boxes(nusc)
    check_maps(nusc, arguments.dataroot)
    check_can_bus(nusc, arguments.dataroot)
    if arguments.picture:
        token = nusc.sample[len(nusc.sample) // 2]["data"]["CAM_FRONT"]
        nusc.render_sample_data(token, out_path=str(arguments.picture), verbose=False)
    print("devkit check passed")


def check_chains(nusc: NuScenes) -> None:
    """Every scene's samples, every channel's data and every instance's annotations form whole chains."""
    for scene in nusc.scene:
        token, count = scene["first_sample_token"], 0
        while token:
            sample = nusc.get("sample", token)
            assert len(sample["data"]) == 7, f"{token}: {sorted(sample['data'])}"
            count, last, token = count + 1, token, sample["next"]
        assert (count, last) == (scene["nbr_samples"], scene["last_sample_token"]), scene["name"]
    for instance in nusc.instance:
        token, count = instance["first_annotation_token"], 0
        while token:
            annotation = nusc.get("sample_annotation", token)
            assert annotation["instance_token"] == instance["token"]
            count, last, token = count + 1, token, annotation["next"]
        assert (count, last) == (instance["nbr_annotations"], instance["last_annotation_token"])
    print(f"chains: {len(nusc.sample)} samples, {len(nusc.instance)} instances")


def check_boxes(nusc: NuScenes) -> None:
    """LiDAR counts agree with the devkit's own box test; well visible boxes project into an image."""
    counted = projected = 0
    for sample in nusc.sample[:: max(1, len(nusc.sample) // 10)]:
        path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        cloud = LidarPointCloud.from_file(path)
        for box in boxes:
            wanted = nusc.get("sample_annotation", box.token)["num_lidar_pts"]
            found = int(points_in_box(box, cloud.points[:3]).sum())
            assert abs(found - wanted) <= max(2, 0.02 * wanted), f"{box.token}: {found} points, not {wanted}"
            counted += 1
        in_images: set[str] = set()
        for channel, token in sample["data"].items():
            if channel == "LIDAR_TOP":
                continue
            _, boxes, intrinsics = nusc.get_sample_data(token)
            data = nusc.get("sample_data", token)
            size = (data["width"], data["height"])
            in_images |= {b.token for b in boxes if box_in_image(b, intrinsics, size, BoxVisibility.ANY)}
        for token in sample["anns"]:
            if nusc.get("sample_annotation", token)["visibility_token"] in "34":
                assert token in in_images, f"{token} is well visible but projects into no image"
                projected += 1
    print(f"boxes: {counted} point counts agree, {projected} visible boxes project into images")


def check_maps(nusc: NuScenes, dataroot: Path) -> None:
    """The ego path is drivable in the expansion and in the basic mask, and both agree."""
    locations = {log["token"]: log["location"] for log in nusc.log}
    vector = {name: NuScenesMap(str(dataroot), name) for name in set(locations.values())}
    for name, town in vector.items():
        lines = town.discretize_centerlines(1.0)
        print(f"map {name}: {len(town.lane)} lanes, {len(lines)} centre lines")
    agreements = []
    for scene in nusc.scene:
        name = locations[scene["log_token"]]
        mask = next(row["mask"] for row in nusc.map if scene["log_token"] in row["log_tokens"])
        sample = nusc.get("sample", scene["first_sample_token"])
        data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
        x, y, _ = nusc.get("ego_pose", data["ego_pose_token"])["translation"]
        patch = vector[name].get_map_mask((x, y, 60.0, 60.0), 0.0, ["drivable_area"], (600, 600))[0]
        assert patch[300, 300] == 1, f"{scene['name']} starts off the drivable area"
        assert vector[name].layers_on_point(x, y)["drivable_area"], scene["name"]
        assert mask.is_on_mask(x, y), f"{scene['name']} starts off the basic mask"
        steps = np.arange(-29.95, 30.0, 0.5)
        grid_x, grid_y = np.meshgrid(x + steps, y + steps)
        basic = mask.is_on_mask(grid_x.ravel(), grid_y.ravel()).reshape(grid_x.shape)
        agreements.append(float((basic == patch[::5, ::5].astype(bool)[: len(steps), : len(steps)]).mean()))
    print(f"maps: basic mask and expansion agree on {100 * min(agreements):.2f} % of cells or more")
    assert min(agreements) > 0.98


def check_can_bus(nusc: NuScenes, dataroot: Path) -> None:
    """CAN poses follow the ego poses."""
    bus = NuScenesCanBus(str(dataroot))
    worst = 0.0
    for scene in nusc.scene:
        for name in (
            "ms_imu",
            "steeranglefeedback",
            "vehicle_monitor",
            "zoesensors",
            "zoe_veh_info",
            "meta",
            "route",
        ):
            assert bus.get_messages(scene["name"], name), f"{scene['name']}: no {name}"
        messages = bus.get_messages(scene["name"], "pose")
        times = np.array([message["utime"] for message in messages])
        places = np.array([message["pos"][:2] for message in messages])
        token = scene["first_sample_token"]
        while token:
            sample = nusc.get("sample", token)
            data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
            pose = nusc.get("ego_pose", data["ego_pose_token"])["translation"]
            there = [np.interp(pose_time(data), times, places[:, axis]) for axis in range(2)]
            worst = max(worst, float(np.hypot(there[0] - pose[0], there[1] - pose[1])))
            token = sample["next"]
    print(f"can bus: largest distance to the ego pose {worst:.4f} m")
    assert worst < 0.05


def pose_time(data: dict) -> float:
    """Microseconds of a sample_data row."""
    return float(data["timestamp"])


if __name__ == "__main__":
    main()

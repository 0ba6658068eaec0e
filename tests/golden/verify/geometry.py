"""Depth pooling, patch centres and unprojection against recorded numbers: kind `geometry`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from spacedrive_jax.data.images import scaled_intrinsics
from spacedrive_jax.interop.spacedrive_config import encoder_config
from spacedrive_jax.models.coordinate_encoder import CoordinateEncoder
from spacedrive_jax.models.unprojection import (
    Pooling,
    ego_to_image,
    patch_centres,
    pool_depth,
    unproject,
    windows,
)
from tests.golden.verify.case_files import read_arrays
from tests.golden.verify.check import Check, compare
from tests.golden.verify.spacedrive_case import Arrays, Case

POOLINGS: dict[str, Pooling] = {"min": "min", "median": "median", "avg": "mean"}
EQUAL = {"atol": 0.0, "rtol": 0.0}
METRES = {"atol": 2e-4, "rtol": 1e-5}
NATIVE_SIZE = (900, 1600)
"""Height and width of a nuScenes view, which `resize` scales."""


def verify_geometry(folder: Path) -> list[Check]:
    """Checks whatever of these a folder records."""
    case, expected = Case.open(folder), read_arrays(folder / "outputs.npz")
    checks = [*_pooling(case.inputs, expected), *_window_edges(expected)]
    for name, scene in case.settings.get("cases", {}).items():
        if f"{name}/lidar2img" in case.inputs:  # a folder may hold some of the scenes
            checks += _scene(name, scene, case.inputs, expected)
    return checks + _resize(case.inputs, expected)


def _pooling(inputs: Arrays, expected: Arrays) -> list[Check]:
    checks = []
    for name in expected:
        kind, _, rest = name.partition("/")
        if kind == "pool":
            theirs = expected[name]
            case, pooling = rest.split("/")
            depth = jnp.asarray(inputs[f"pool/{case}/depth"])
            ours = pool_depth(depth, theirs.shape[-2:], POOLINGS[pooling])
            checks.append(compare(name, ours, theirs, rtol=1e-6 if pooling == "avg" else 0.0))
    return checks


def _window_edges(expected: Arrays) -> list[Check]:
    checks = []
    for name in expected:
        if name.startswith("pool_bounds/"):
            theirs = expected[name]
            size, cells = map(int, name.split("/")[1].split("to"))
            indices, valid = windows(size, cells)
            ours = np.stack([indices[:, 0], indices[:, 0] + valid.sum(-1)], axis=1)
            checks.append(compare(name, ours, theirs, **EQUAL))
    return checks


def _scene(name: str, scene: Mapping[str, Any], inputs: Arrays, expected: Arrays) -> list[Check]:
    """Six cameras: pooled depth, centres, projection, points, encodings."""
    merge, stride = scene["merge"], scene["stride"]
    grid = (scene["grid"][0] // merge, scene["grid"][1] // merge)
    centres = patch_centres(grid, stride * merge)
    image = np.array([scene["grid"][1], scene["grid"][0]]) * stride
    depth = pool_depth(jnp.asarray(_depth(name, inputs)), grid)
    points = unproject(depth, jnp.asarray(centres), jnp.asarray(inputs[f"{name}/lidar2img"]))
    points = points.reshape(scene["B"], -1, 3)
    config = encoder_config({"pe_freq_coeff": scene["freq_coeff"], "pe_scaling": scene["pe_scaling"]})
    encoder = CoordinateEncoder(config, scene["hidden"])
    results = {
        "location": (patch_centres(tuple(scene["grid"]), stride) / image, {"atol": 1e-6}),
        "location_merged": (centres / image, {"atol": 1e-6}),
        "pixel_uv": (centres, {"atol": 1e-4}),
        "depth_min_pooled": (np.asarray(depth).reshape(-1, 1, *grid), EQUAL),
        "img2lidar": (jnp.linalg.inv(jnp.asarray(inputs[f"{name}/lidar2img"])), METRES),
        "coords3d": (points, METRES),
        "pe": (encoder(points), {"atol": 5e-5}),
    }
    if f"{name}/pe_first64_tokens_per_cam" in expected:
        first = points.reshape(scene["B"], -1, grid[0] * grid[1], 3)[:, :, :64]
        results["pe_first64_tokens_per_cam"] = (encoder(first), {"atol": 5e-5})
    checks = []
    if f"{name}/extrinsics" in inputs:  # they take the ego (LiDAR) frame to the camera's
        intrinsics = jnp.asarray(inputs[f"{name}/intrinsics"][..., :3, :3])
        projection = ego_to_image(intrinsics, jnp.linalg.inv(jnp.asarray(inputs[f"{name}/extrinsics"])))
        checks.append(compare(f"{name}/lidar2img", projection, inputs[f"{name}/lidar2img"], **METRES))
    return checks + [
        compare(f"{name}/{key}", ours, expected[f"{name}/{key}"], **tolerance)
        for key, (ours, tolerance) in results.items()
        if f"{name}/{key}" in expected
    ]


def _depth(name: str, inputs: Arrays) -> np.ndarray:
    """Metres; large scenes are stored in sixteenths."""
    sixteenths = inputs.get(f"{name}/depth_u16_div16")
    return inputs[f"{name}/depth"] if sixteenths is None else sixteenths.astype(np.float32) / 16


def _resize(inputs: Arrays, expected: Arrays) -> list[Check]:
    """Intrinsics of resized views, and the projection that follows."""
    checks = []
    for name in expected:
        found = re.fullmatch(r"resize/intrinsics_(\d+)", name)
        if found is None:
            continue
        side = int(found[1])
        native = inputs["resize/intrinsics_1600x900"]
        views = {"image_size": np.tile(NATIVE_SIZE, (len(native), 1)), "camera_intrinsics": native[:, :3, :3]}
        intrinsics = native.copy()
        intrinsics[:, :3, :3] = scaled_intrinsics(views, (side, side))
        checks.append(compare(name, intrinsics, expected[name], rtol=1e-6))
        if "resize/scale_factor" in expected and side == 640:  # of x, y, x, y
            scale = scaled_intrinsics(
                views | {"camera_intrinsics": np.tile(np.eye(3), (len(native), 1, 1))}, (side, side)
            )
            factors = scale[:, [0, 1, 0, 1], [0, 1, 0, 1]]
            checks.append(compare("resize/scale_factor", factors, expected["resize/scale_factor"], rtol=1e-6))
        if f"resize/lidar2img_{side}" in expected:
            projection = intrinsics @ inputs["resize/extrinsics"].astype(np.float64)
            theirs = expected[f"resize/lidar2img_{side}"]
            checks.append(compare(f"resize/lidar2img_{side}", projection, theirs, rtol=1e-6))
    return checks

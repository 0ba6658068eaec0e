import json

import jax.numpy as jnp
import numpy as np
import pytest

from spacedrive_jax.models.unprojection import ego_to_image, patch_centres, pool_depth, unproject


@pytest.mark.parametrize("case", ["qwen_small_B2", "qwen_nonsq_B1"])
def test_points_equal_published(golden, case):
    inputs = np.load(golden / "geometry" / "inputs.npz")
    expected = np.load(golden / "geometry" / "outputs.npz")
    case_config = json.loads((golden / "geometry" / "config.json").read_text())["cases"][case]
    grid = tuple(side // case_config["merge"] for side in case_config["grid"])
    depth = pool_depth(jnp.asarray(inputs[f"{case}/depth_u16_div16"].astype(np.float32) / 16), grid)
    centres = patch_centres(grid, 14 * case_config["merge"])
    np.testing.assert_allclose(centres, expected[f"{case}/pixel_uv"], atol=1e-4)
    projection = ego_to_image(
        jnp.asarray(inputs[f"{case}/intrinsics"][..., :3, :3]),
        jnp.linalg.inv(jnp.asarray(inputs[f"{case}/extrinsics"])),
    )
    np.testing.assert_allclose(projection, inputs[f"{case}/lidar2img"], atol=2e-4)
    points = unproject(depth, jnp.asarray(centres), jnp.asarray(inputs[f"{case}/lidar2img"]))
    np.testing.assert_allclose(
        points.reshape(expected[f"{case}/coords3d"].shape), expected[f"{case}/coords3d"], atol=2e-4
    )


def test_a_forward_camera_sees_forward():
    # Camera 1.5 m above the ground looking along ego x: OpenCV axes right, down, forward.
    camera_to_ego = np.eye(4, dtype=np.float32)
    camera_to_ego[:3, :3] = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    camera_to_ego[:3, 3] = [1.0, 0.0, 1.5]
    intrinsics = np.array([[100, 0, 50], [0, 100, 50], [0, 0, 1]], np.float32)
    projection = ego_to_image(jnp.asarray(intrinsics), jnp.asarray(camera_to_ego))
    points = unproject(jnp.full((1, 1), 10.0), jnp.array([[[50.0, 50.0]]]), projection)
    np.testing.assert_allclose(points[0, 0], [11.0, 0.0, 1.5], atol=1e-4)

"""What an unrecorded case is made of, and its random inputs in the layout of the recorded ones."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

STRIDE = 14
NAMES = ("video_pad", "pad", "im_start", "im_end", "vision_start", "vision_end", "image_pad")
IGNORE = -100


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a case is made of."""

    family: Literal["qwen", "llava"] = "qwen"
    width: int = 80
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 512
    grid: tuple[int, int] = (4, 6)
    views: int = 6
    batch: int = 1
    rank: int = 4
    times: tuple[float, ...] = (50.0, 50.5)
    """Seconds; one frame each, the outputs are the last one's."""
    without_future: tuple[int, ...] = ()
    """Rows of the batch whose waypoints are not complete."""
    reply_points: int = 1
    """Coordinates in the answer of the second round."""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the published constructor, over the defaults below."""

    @property
    def merge(self) -> int:
        return 2 if self.family == "qwen" else 1

    @property
    def ids(self) -> dict[str, int]:
        names = (*NAMES, "pos_indicator", "pos_embedding")
        return {name: self.vocabulary - len(names) + index for index, name in enumerate(names)}

    @property
    def all_arguments(self) -> dict[str, Any]:
        defaults = {
            "lm_head": "ckpts/tiny-with-new-special-tokens",
            "use_lora": True,
            "frozen": False,
            "vis_3d_pos": True,
            "io_3d_pos": True,
            "loss_pos_lambda": 1,
            "pe_decode_method": "l2_coords_mlp_2layer",
            "loss_pos_type": "huber",
            "pe_type": "transformer",
            "pe_freq_coeff": 20000,
            "pe_freq_scaling": 1,
            "fone_dim": 24,
            "pe_scaling": 0.1,
            "learnable_pe_scaling": True,
            "planning_only": True,
            "ego_status": "feature+PE",
            "ego_status_len": 2,
            "llm_lora_rank": self.rank,
        }
        return defaults | self.arguments


def draw_inputs(setting: Setting, random: np.random.Generator) -> dict[str, Any]:
    """All frames' poses and CAN values, the last one's cameras, images, depth and texts."""
    size, views = setting.batch, setting.views
    rows, columns = setting.grid
    height, width = rows * STRIDE, columns * STRIDE
    data, position = [], np.zeros((size, 3))
    for time in setting.times:
        position += random.uniform(0.5, 4.0, (size, 3)) * (1, 0.2, 0.02)
        pose = np.tile(np.eye(4), (size, 1, 1))
        for row, yaw in enumerate(random.uniform(-1, 1, size)):
            pose[row, :2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
        pose[:, :3, 3] = position + np.array([400, 900, 0])
        data.append(
            {
                "timestamp": np.full(size, time),
                "ego_pose": pose.astype(np.float32),
                "command": random.integers(0, 8, size),
                "can_bus": random.standard_normal((size, 13)).astype(np.float32),
            }
        )
    intrinsics = np.tile(np.eye(4, dtype=np.float32), (size, views, 1, 1))
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = random.uniform(0.8, 1.2, (size, views)) * width
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = width / 2, height / 2
    ego_to_camera = np.tile(np.eye(4, dtype=np.float32), (size, views, 1, 1))
    ego_to_camera[..., :3, :3] = np.linalg.qr(random.standard_normal((size, views, 3, 3)))[0]
    ego_to_camera[..., :3, 3] = random.uniform(-2, 2, (size, views, 3))
    data[-1] |= {
        "intrinsics": intrinsics,
        "lidar2img": intrinsics @ ego_to_camera,
        "has_gt_planning": ~np.isin(np.arange(size), setting.without_future),
    }
    shape = (
        (size, views * rows * columns, 1176) if setting.family == "qwen" else (size, views, 3, height, width)
    )
    texts = [
        draw_text(setting, random, row not in setting.without_future, 3 + 5 * row) for row in range(size)
    ]
    return {
        "data": data,
        "pixel_values": random.standard_normal(shape).astype(np.float32),
        "depth": random.uniform(1, 60, (size, views, height, width)).astype(np.float32),
        "input_ids": [text[0] for text in texts],
        "labels": [text[1] for text in texts],
        "coords_pos": [text[2] for text in texts],
    }


def draw_text(
    setting: Setting, random: np.random.Generator, has_answer: bool, words: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A question, the planning answer, and a second round with coordinates on both sides."""
    ids = setting.ids
    visual = setting.grid[0] * setting.grid[1] // setting.merge**2
    image = [ids["image_pad"]] * visual
    if setting.family == "qwen":
        image = [ids["vision_start"], *image, ids["vision_end"]]

    def text(count: int) -> list[int]:
        return random.integers(0, setting.vocabulary - 10, count).tolist()

    coordinate = [ids["pos_indicator"], ids["pos_embedding"]]
    prompt = [ids["im_start"], *text(3), *image * setting.views, *text(words), ids["im_end"]]
    if not has_answer:
        tokens = np.array(prompt)
        return tokens, np.full(len(tokens), IGNORE), np.zeros((0, 2), np.float32)
    answer = [*text(4), *(each for _ in range(6) for each in [*coordinate, *text(1)]), ids["im_end"]]
    question = [*text(3), *coordinate, *text(2)]
    reply = [*text(2), *coordinate * setting.reply_points, ids["im_end"]]
    tokens = np.array([*prompt, *answer, *question, *reply])
    labels = np.array([IGNORE] * len(prompt) + answer + [IGNORE] * len(question) + reply)
    return tokens, labels, random.uniform(-20, 40, (7 + setting.reply_points, 2)).astype(np.float32)

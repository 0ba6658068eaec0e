"""SpaceDrive in plain torch around transformers' models.

Written from what the release was seen to do, it shares no code with the project, so that widths, batch sizes,
clocks and options nobody recorded can be compared as well.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tests.parity.spacedrive.setting import IGNORE, STRIDE, Setting
from tests.parity.spacedrive.torch_model import Adapted, vision_language_model, waves


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A frame as the language model gets it; rows are padded on the right."""

    token_ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    position_ids: torch.Tensor
    """(3, B, S)"""
    sequence: torch.Tensor
    """Embeddings (B, S, D)."""
    visual: torch.Tensor
    """Visual tokens without positions."""
    encodings: torch.Tensor
    ego_slots: torch.Tensor
    past_poses: np.ndarray
    past_values: np.ndarray


class TorchSpaceDrive:
    """The model of a setting with random weights, and what it makes of a frame."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.arguments = setting, setting.all_arguments
        self.random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.vlm = vision_language_model(setting)
        self.base = {name: value.clone() for name, value in self.vlm.state_dict().items()}
        llava = setting.family == "llava"
        self.adapters: dict[str, nn.Parameter] = {}
        for index, layer in enumerate(self.vlm.model.language_model.layers):
            for name in ("k_proj", "v_proj", "o_proj") if llava else ("q_proj", "k_proj", "v_proj", "o_proj"):
                factor = 1.0 if llava else 16 / setting.rank
                adapted = Adapted(getattr(layer.self_attn, name), setting.rank, factor)
                setattr(layer.self_attn, name, adapted)
                where = f"base_model.model.model.language_model.layers.{index}.self_attn.{name}"
                self.adapters |= {
                    f"{where}.lora_A.weight": adapted.lora_A,
                    f"{where}.lora_B.weight": adapted.lora_B,
                }
        self.heads = self._heads()
        # LLaVA trains two rows of its full tables.
        self.table, self.head = (
            self.base[name].clone().requires_grad_(llava)
            for name in ("model.language_model.embed_tokens.weight", "lm_head.weight")
        )

    def _heads(self) -> dict[str, torch.Tensor]:
        width, arguments = self.setting.width, self.arguments
        shapes: dict[str, tuple[int, ...]] = {}
        if self.setting.family == "qwen":
            shapes |= {"new_embed_tokens.weight": (2, width), "new_lm_head.weight": (2, width)}
        if arguments["ego_status"] in ("feature", "feature+PE"):
            shapes |= {
                "ego_status_mlp.0.weight": (width, 74),
                "ego_status_mlp.0.bias": (width,),
                "ego_status_mlp.2.weight": (width, width),
                "ego_status_mlp.2.bias": (width,),
            }
        if arguments["pe_decode_method"] == "l2_coords_mlp_2layer":
            shapes |= {
                "mlp_output_coords.0.weight": (width, width),
                "mlp_output_coords.0.bias": (width,),
                "mlp_output_coords.2.weight": (3, width),
                "mlp_output_coords.2.bias": (3,),
            }
        elif arguments["pe_decode_method"] == "l2_coords_mlp":
            shapes |= {"mlp_output_coords.weight": (3, width), "mlp_output_coords.bias": (3,)}
        heads = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
        if arguments["learnable_pe_scaling"]:
            heads["pe_scaling"] = torch.tensor([float(arguments["pe_scaling"])])
        return {name: value.requires_grad_() for name, value in heads.items()}

    def encode(self, points: torch.Tensor) -> torch.Tensor:
        alpha = self.heads.get("pe_scaling", self.arguments["pe_scaling"])
        return alpha * waves(self.arguments, points, self.setting.width)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table; Qwen's two new tokens have rows of their own."""
        embedded = functional.embedding(token_ids.clone(), self.table)
        if self.setting.family == "qwen":
            for index, name in enumerate(("pos_indicator", "pos_embedding")):
                is_new = (token_ids == self.setting.ids[name])[..., None]
                embedded = torch.where(is_new, self.heads["new_embed_tokens.weight"][index], embedded)
        return embedded

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = hidden @ self.head.T
        if self.setting.family == "llava":
            return scores
        columns = [self.setting.ids[name] for name in ("pos_indicator", "pos_embedding")]
        return scores.index_copy(-1, torch.tensor(columns), hidden @ self.heads["new_lm_head.weight"].T)

    def decode(self, at: torch.Tensor) -> torch.Tensor:
        """Metres from hidden states."""
        heads = self.heads
        if self.arguments["pe_decode_method"] == "l2_coords_mlp":
            return functional.linear(at, heads["mlp_output_coords.weight"], heads["mlp_output_coords.bias"])
        inner = functional.linear(at, heads["mlp_output_coords.0.weight"], heads["mlp_output_coords.0.bias"])
        return functional.linear(
            inner.relu(), heads["mlp_output_coords.2.weight"], heads["mlp_output_coords.2.bias"]
        )

    def language_model(self, sequence: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """transformers' decoder; LLaVA counts positions itself."""
        return self.vlm.model.language_model(
            inputs_embeds=sequence,
            position_ids=position_ids if self.setting.family == "qwen" else None,
            attention_mask=mask,
            output_hidden_states=True,
            use_cache=False,
        )

    def prepare(self, inputs: dict[str, Any]) -> Prepared:
        """The last frame, with the memory that the frames before it left."""
        ids, size = self.setting.ids, self.setting.batch
        poses, values = self._ego(inputs["data"])
        ego_slots = self._ego_slots(poses, values, inputs["data"][-1])
        visual = self._visual(torch.tensor(inputs["pixel_values"]))
        encodings = self.encode(self._points(inputs))
        placed = visual + encodings if self.arguments["vis_3d_pos"] else visual
        rows = [self._insert(inputs["input_ids"][row], inputs["labels"][row]) for row in range(size)]
        length = max(len(tokens) for tokens, _, _ in rows)
        token_ids = torch.full((size, length), ids["pad"])
        labels = torch.full((size, length), IGNORE)
        mask = torch.zeros((size, length), dtype=torch.long)
        embeddings, position_ids = [], torch.zeros((3, size, length), dtype=torch.long)
        for row, (tokens, row_labels, ego_indices) in enumerate(rows):
            count = len(tokens)
            token_ids[row, :count], labels[row, :count], mask[row, :count] = tokens, row_labels, 1
            is_image = token_ids[row] == ids["image_pad"]
            is_image[ego_indices] = False
            embedded = self.embed(token_ids[row]).index_put((is_image.nonzero()[:, 0],), placed[row])
            embeddings.append(embedded.index_put((ego_indices,), ego_slots[row]))
            position_ids[:, row, :count] = self._positions(tokens)
        sequence = torch.stack(embeddings)
        return Prepared(
            token_ids, labels, mask, position_ids, sequence, visual, encodings, ego_slots, poses, values
        )

    def _ego_slots(self, poses: np.ndarray, values: np.ndarray, now: dict[str, Any]) -> torch.Tensor:
        """What stands at the ego tokens: (B, 0 to 3, D)."""
        size, status, heads = len(poses), self.arguments["ego_status"], self.heads
        token_type_ids = [torch.zeros(size, 0, self.setting.width)]
        if status in ("feature", "feature+PE"):
            current = np.concatenate([now["command"][:, None], now["can_bus"]], axis=1)
            numbers = np.concatenate([values.reshape(size, -1), current, poses.reshape(size, -1)], axis=1)
            inner = functional.linear(
                torch.tensor(numbers, dtype=torch.float32),
                heads["ego_status_mlp.0.weight"],
                heads["ego_status_mlp.0.bias"],
            ).relu()
            feature = functional.linear(
                inner, heads["ego_status_mlp.2.weight"], heads["ego_status_mlp.2.bias"]
            )
            token_type_ids.append(feature[:, None])
        if status in ("PE", "feature+PE"):
            token_type_ids.append(self.encode(torch.tensor(poses[:, :, :3, 3], dtype=torch.float32)))
        return torch.cat(token_type_ids, dim=1)

    def _ego(self, data: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Past poses (B, 2, 4, 4) and commands with CAN values (B, 2, 14) that the memory holds."""
        size = self.setting.batch
        poses, values = np.zeros((size, 2, 4, 4)), np.zeros((size, 2, 14))
        clock = None
        for frame in data:
            time = frame["timestamp"]
            if clock is not None and np.abs(time - clock)[0] >= 2:
                poses[:], values[:] = 0, 0
            if frame is data[-1]:
                break
            # The clock is float32 on the first frame and float64 afterwards.
            clock = time.astype(np.float32).astype(np.float64) if clock is None else time
            now = np.concatenate([frame["command"][:, None], frame["can_bus"]], axis=1)
            poses = np.stack([frame["ego_pose"].astype(np.float64), poses[:, 0]], axis=1)
            values = np.stack([now, values[:, 0]], axis=1)
        return np.linalg.inv(data[-1]["ego_pose"].astype(np.float64))[:, None] @ poses, values

    def _points(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Patch centres with the smallest depth of their window, in the ego frame: (B, N*rows*columns, 3)."""
        rows, columns = (cells // self.setting.merge for cells in self.setting.grid)
        step = STRIDE * self.setting.merge
        depth = inputs["depth"]
        height, width = depth.shape[-2:]
        row_edges = [round(index * height / rows) for index in range(rows + 1)]
        column_edges = [round(index * width / columns) for index in range(columns + 1)]
        to_ego = np.linalg.inv(inputs["data"][-1]["lidar2img"].astype(np.float64))
        points = np.zeros((*depth.shape[:2], rows, columns, 3))
        for row in range(rows):
            for column in range(columns):
                window = depth[
                    ..., row_edges[row] : row_edges[row + 1], column_edges[column] : column_edges[column + 1]
                ]
                nearest = window.min(axis=(-2, -1))
                u, v = (column + 0.5) * step, (row + 0.5) * step
                pixel = np.stack([u * nearest, v * nearest, nearest, np.ones_like(nearest)], axis=-1)
                points[:, :, row, column] = np.einsum("bnij,bnj->bni", to_ego, pixel)[..., :3]
        return torch.tensor(points.reshape(len(depth), -1, 3), dtype=torch.float32)

    def _visual(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.setting.family == "qwen":
            grids = torch.tensor([[1, *self.setting.grid]] * (self.setting.views * self.setting.batch))
            found = self.vlm.model.visual(pixels.reshape(-1, 1176), grid_thw=grids).pooler_output
        else:
            found = self.vlm.model.get_image_features(pixel_values=pixels.flatten(0, 1)).pooler_output
            found = torch.cat(list(found)) if isinstance(found, (list, tuple)) else found
        return found.reshape(self.setting.batch, -1, self.setting.width)

    def _insert(
        self, tokens: np.ndarray, labels: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Puts the ego tokens behind the last image."""
        ids, status = self.setting.ids, self.arguments["ego_status"]
        qwen = self.setting.family == "qwen"
        inserted: list[int] = []
        if status in ("feature", "feature+PE"):
            image, end = ids["image_pad"], ids["vision_end"]
            inserted += [end, image, end] if qwen else [image]
        if status in ("PE", "feature+PE"):
            inserted += [ids["pos_indicator"], ids["image_pad"]] * 2
        place = int(np.flatnonzero(tokens == ids["vision_end" if qwen else "image_pad"])[-1]) + 1
        tokens = np.insert(tokens, place, inserted)
        labels = np.insert(labels, place, [IGNORE] * len(inserted))
        token_type_ids = place + np.flatnonzero(np.array(inserted) == ids["image_pad"])
        return torch.tensor(tokens), torch.tensor(labels), torch.tensor(token_type_ids, dtype=torch.long)

    def _positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """Qwen's rotary positions: an image counts rows and columns, and as far as the longer of them."""
        ids = self.setting.ids
        rows, columns = (cells // self.setting.merge for cells in self.setting.grid)
        found: list[tuple[int, int, int]] = []
        start, index = 0, 0
        while index < len(tokens):
            opens = index > 0 and tokens[index - 1] == ids["vision_start"]
            if opens:
                found += [
                    (start, start + row, start + column) for row in range(rows) for column in range(columns)
                ]
                start, index = start + max(rows, columns), index + rows * columns
            else:
                found.append((start, start, start))
                start, index = start + 1, index + 1
        return torch.tensor(found).T

"""A training step of SpaceDrive in plain torch around transformers' models, written as a case for `verify`.

Follows `reference_behaviour` (section Spec) and the layout of the recorded cases, and shares no code with the
project, so that widths, batch sizes, clocks and options nobody recorded can be compared as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from tests.parity.spacedrive.setting import IGNORE, STRIDE, Setting, draw_inputs
from tests.parity.spacedrive.torch_model import Adapted, vision_language_model, waves


class Step:
    """Draws a case, runs it and writes it down."""

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

    def write(self, folder: Path) -> Path:
        """Runs the step and writes config.json, inputs, weights and outputs."""
        folder.mkdir(parents=True)
        inputs = draw_inputs(self.setting, self.random)
        outputs = self._run(inputs)
        last = len(self.setting.times) - 1
        stored = {
            f"f{index}/data/{key}": value
            for index, data in enumerate(inputs["data"])
            for key, value in data.items()
        }
        for key in ("pixel_values", "depth"):
            stored[f"f{last}/{key}"] = inputs[key]
        for row in range(self.setting.batch):
            for key in ("input_ids", "labels", "coords_pos"):
                stored[f"f{last}/{key}/{row}"] = inputs[key][row]
        np.savez(folder / "inputs.npz", **stored)
        np.savez(folder / "outputs.npz", **outputs)
        tensors = self.base | self.adapters | self.heads
        save_file(
            {name: value.detach().contiguous() for name, value in tensors.items()},
            folder / "weights.safetensors",
        )
        qwen = self.setting.family == "qwen"
        settings = {
            "kind": "train",
            "lm": self.setting.family,
            "B": self.setting.batch,
            "grid": self.setting.grid,
            "token_ids": self.setting.ids,
            "vlm_config": self.vlm.config.to_dict(),
            "lora": {"r": self.setting.rank, "alpha": 16 if qwen else self.setting.rank},
            "spacedrive_args": self.arguments,
        }
        (folder / "config.json").write_text(json.dumps(settings, default=str))
        return folder

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

    def _run(self, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
        setting, ids, arguments = self.setting, self.setting.ids, self.arguments
        qwen = setting.family == "qwen"
        poses, values = self._ego(inputs["data"])
        now = inputs["data"][-1]
        current = np.concatenate([now["command"][:, None], now["can_bus"]], axis=1)
        size = setting.batch
        status = np.concatenate([values.reshape(size, -1), current, poses.reshape(size, -1)], axis=1)
        ego: list[torch.Tensor] = []
        heads = self.heads
        if arguments["ego_status"] in ("feature", "feature+PE"):
            hidden = functional.linear(
                torch.tensor(status, dtype=torch.float32),
                heads["ego_status_mlp.0.weight"],
                heads["ego_status_mlp.0.bias"],
            )
            feature = functional.linear(
                hidden.relu(), heads["ego_status_mlp.2.weight"], heads["ego_status_mlp.2.bias"]
            )
            ego.append(feature[:, None])
        if arguments["ego_status"] in ("PE", "feature+PE"):
            ego.append(self.encode(torch.tensor(poses[:, :, :3, 3], dtype=torch.float32)))
        slots = torch.cat(ego, dim=1) if ego else torch.zeros(size, 0, setting.width)

        table, head = self.base["model.language_model.embed_tokens.weight"], self.base["lm_head.weight"]
        table, head = table.clone().requires_grad_(not qwen), head.clone().requires_grad_(not qwen)
        visual = self._visual(torch.tensor(inputs["pixel_values"]))
        encodings = self.encode(self._points(inputs))
        visual_in = visual + encodings if arguments["vis_3d_pos"] else visual
        rows = [self._insert(inputs["input_ids"][row], inputs["labels"][row]) for row in range(size)]
        length = max(len(tokens) for tokens, _, _ in rows)
        token_ids = torch.full((size, length), ids["pad"])
        labels = torch.full((size, length), IGNORE)
        mask = torch.zeros((size, length), dtype=torch.long)
        embeddings, positions = [], torch.zeros((3, size, length), dtype=torch.long)
        for row, (tokens, row_labels, ego_places) in enumerate(rows):
            count = len(tokens)
            token_ids[row, :count], labels[row, :count], mask[row, :count] = tokens, row_labels, 1
            embedded = functional.embedding(token_ids[row].clone(), table)
            if qwen:
                for index, name in enumerate(("pos_indicator", "pos_embedding")):
                    is_new = (token_ids[row] == ids[name])[:, None]
                    embedded = torch.where(is_new, heads["new_embed_tokens.weight"][index], embedded)
            is_image = token_ids[row] == ids["image_pad"]
            is_image[ego_places] = False
            embedded = embedded.index_put((is_image.nonzero()[:, 0],), visual_in[row])
            embeddings.append(embedded.index_put((ego_places,), slots[row]))
            positions[:, row, :count] = self._positions(tokens)
        sequence = torch.stack(embeddings)
        output = self.vlm.model.language_model(
            inputs_embeds=sequence,
            position_ids=positions if qwen else None,
            attention_mask=mask,
            output_hidden_states=True,
            use_cache=False,
        )
        last = output.last_hidden_state
        logits = last @ head.T
        if qwen:
            columns = [ids["pos_indicator"], ids["pos_embedding"]]
            logits = logits.index_copy(-1, torch.tensor(columns), last @ heads["new_lm_head.weight"].T)
        targets = torch.where(labels == ids["pos_embedding"], IGNORE, labels)
        entropy = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        losses = {"vlm_loss": entropy / size}
        places, truth = self._supervised(token_ids, labels, inputs["coords_pos"])
        at = last[places[:, 0], places[:, 1]]
        losses["loss_pos"], decoded = self._position_loss(at, truth)
        losses["total"] = losses["vlm_loss"] + losses["loss_pos"]
        trained = (
            self.adapters
            | heads
            | ({} if qwen else {"lm_head.weight": head, "model.language_model.embed_tokens.weight": table})
        )
        losses["total"].backward()
        outputs: dict[str, Any] = {f"losses/{name}": value for name, value in losses.items()}
        for name, parameter in trained.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if parameter is head or parameter is table:
                gradient = gradient.clone()
                gradient[: ids["pos_indicator"]] = 0
                gradient[ids["pos_embedding"] + 1 :] = 0
            outputs[f"grad/{name}"] = gradient.squeeze() if name == "pe_scaling" else gradient
        outputs |= {f"hidden_states/{index}": state for index, state in enumerate(output.hidden_states)}
        outputs |= {
            "input_ids": token_ids,
            "attention_mask": mask,
            "labels_for_ce": targets,
            "position_ids": positions if qwen else torch.zeros(0),
            "inputs_embeds": sequence,
            "logits": logits,
            "image_embeds": visual.flatten(0, 1),
            "pos_emb": encodings,
            "gt_coords_xy": truth,
            "output_pos": at,
        }
        if ego:
            outputs |= {
                "ego_feature": slots,
                "memory_egopose_at_forward": poses,
                "memory_canbus_at_forward": values,
            }
        if decoded is not None:
            outputs["decoded_coords"] = decoded
        return {
            name: value.detach().numpy() if isinstance(value, torch.Tensor) else value
            for name, value in outputs.items()
        }

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
        slots = place + np.flatnonzero(np.array(inserted) == ids["image_pad"])
        return torch.tensor(tokens), torch.tensor(labels), torch.tensor(slots, dtype=torch.long)

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

    def _supervised(
        self, token_ids: torch.Tensor, labels: torch.Tensor, points: list[np.ndarray]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and place of every supervised indicator, and its true x and y."""
        ids = self.setting.ids
        places, truth = [], []
        for row in range(self.setting.batch):
            all_embeddings = (token_ids[row] == ids["pos_embedding"]).nonzero()[:, 0].tolist()
            answered = ((token_ids[row] == ids["pos_indicator"]) & (labels[row] != IGNORE)).nonzero()[:, 0]
            if self.arguments["planning_only"]:
                answered = answered[:6]
            for place in answered.tolist():
                places.append((row, place))
                truth.append(points[row][all_embeddings.index(place + 1)])
        return torch.tensor(places), torch.tensor(np.array(truth))

    def _position_loss(
        self, at: torch.Tensor, truth: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        arguments, heads = self.arguments, self.heads
        method, kind = arguments["pe_decode_method"], arguments["loss_pos_type"]
        weight = arguments["loss_pos_lambda"]
        if method in ("cosine", "l2"):
            target = self.encode(functional.pad(truth, (0, 1))).detach()
            if method == "cosine":
                return weight * (1 - functional.cosine_similarity(at, target, dim=-1)).mean(), None
            return weight * functional.mse_loss(at, target), None
        if method == "l2_coords_mlp":
            decoded = functional.linear(
                at, heads["mlp_output_coords.weight"], heads["mlp_output_coords.bias"]
            )
        else:
            inner = functional.linear(
                at, heads["mlp_output_coords.0.weight"], heads["mlp_output_coords.0.bias"]
            ).relu()
            decoded = functional.linear(
                inner, heads["mlp_output_coords.2.weight"], heads["mlp_output_coords.2.bias"]
            )
        plane = decoded[:, :2]
        loss = {
            "huber": lambda: functional.huber_loss(plane, truth, delta=arguments.get("huber_delta", 1.0)),
            "l1": lambda: functional.l1_loss(plane, truth),
            "l2": lambda: functional.mse_loss(plane, truth),
        }[kind]()
        return weight * loss, decoded

"""A training step in plain torch, written as a case of kind `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tests.parity.spacedrive.case_writer import write_case
from tests.parity.spacedrive.setting import IGNORE, Setting, draw_inputs
from tests.parity.spacedrive.torch_spacedrive import TorchSpaceDrive


class Step:
    """Draws a case, runs it and writes it down."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.model = TorchSpaceDrive(setting, seed)

    def write(self, folder: Path) -> Path:
        """Runs the step and writes config.json, inputs, weights and outputs."""
        model = self.model
        inputs = draw_inputs(model.setting, model.random)
        return write_case(folder, model, inputs, self._run(inputs), {"kind": "train"})

    def _run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        model, ids = self.model, self.model.setting.ids
        qwen = model.setting.family == "qwen"
        frame = model.prepare(inputs)
        output = model.language_model(frame.sequence, frame.position_ids, frame.mask)
        last = output.last_hidden_state
        logits = model.logits(last)
        targets = torch.where(frame.labels == ids["pos_embedding"], IGNORE, frame.labels)
        entropy = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        losses = {"vlm_loss": entropy / model.setting.batch}
        indices, truth = self._supervised(frame.token_ids, frame.labels, inputs["coords_pos"])
        at = last[indices[:, 0], indices[:, 1]]
        losses["loss_pos"], decoded = self._position_loss(at, truth)
        losses["total"] = losses["vlm_loss"] + losses["loss_pos"]
        losses["total"].backward()
        outputs: dict[str, Any] = {f"losses/{name}": value for name, value in losses.items()}
        outputs |= self._gradients()
        outputs |= {f"hidden_states/{index}": state for index, state in enumerate(output.hidden_states)}
        outputs |= {
            "input_ids": frame.token_ids,
            "attention_mask": frame.mask,
            "labels_for_ce": targets,
            "position_ids": frame.position_ids if qwen else torch.zeros(0),
            "inputs_embeds": frame.sequence,
            "logits": logits,
            "image_embeds": frame.visual.flatten(0, 1),
            "pos_emb": frame.encodings,
            "gt_coords_xy": truth,
            "output_pos": at,
        }
        if frame.ego_slots.shape[1]:
            outputs |= {
                "ego_feature": frame.ego_slots,
                "memory_egopose_at_forward": frame.past_poses,
                "memory_canbus_at_forward": frame.past_values,
            }
        return outputs if decoded is None else outputs | {"decoded_coords": decoded}

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Of every trainable; the hooks on LLaVA's full tables let two rows through."""
        model = self.model
        found = {}
        for name, parameter in (model.adapters | model.heads).items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[f"grad/{name}"] = gradient.squeeze() if name == "pe_scaling" else gradient
        if model.setting.family == "llava":
            first = model.setting.ids["pos_indicator"]
            tables = {"lm_head.weight": model.head, "model.language_model.embed_tokens.weight": model.table}
            for name, table in tables.items():
                found[f"grad/{name}"] = torch.zeros_like(table)
                found[f"grad/{name}"][first : first + 2] = table.grad[first : first + 2]
        return found

    def _supervised(
        self, token_ids: torch.Tensor, labels: torch.Tensor, points: list[np.ndarray]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and place of every supervised indicator, and its true x and y."""
        ids = self.model.setting.ids
        indices, truth = [], []
        for row in range(self.model.setting.batch):
            all_embeddings = (token_ids[row] == ids["pos_embedding"]).nonzero()[:, 0].tolist()
            answered = ((token_ids[row] == ids["pos_indicator"]) & (labels[row] != IGNORE)).nonzero()[:, 0]
            if self.model.arguments["planning_only"]:
                answered = answered[:6]
            for place in answered.tolist():
                indices.append((row, place))
                truth.append(points[row][all_embeddings.index(place + 1)])
        places = torch.tensor(indices, dtype=torch.long).reshape(-1, 2)
        return places, torch.tensor(np.array(truth, np.float32).reshape(-1, 2))

    def _position_loss(
        self, at: torch.Tensor, truth: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        arguments = self.model.arguments
        method, kind = arguments["pe_decode_method"], arguments["loss_pos_type"]
        weight = arguments["loss_pos_lambda"]
        if not len(truth):  # the published loss of nothing is a zero that reaches no parameter
            return at.sum(), None
        if method in ("cosine", "l2"):
            target = self.model.encode(functional.pad(truth, (0, 1))).detach()
            if method == "cosine":
                return weight * (1 - functional.cosine_similarity(at, target, dim=-1)).mean(), None
            return weight * functional.mse_loss(at, target), None
        decoded = self.model.decode(at)
        plane = decoded[:, :2]
        loss = {
            "huber": lambda: functional.huber_loss(plane, truth, delta=arguments.get("huber_delta", 1.0)),
            "l1": lambda: functional.l1_loss(plane, truth),
            "l2": lambda: functional.mse_loss(plane, truth),
        }[kind]()
        return weight * loss, decoded

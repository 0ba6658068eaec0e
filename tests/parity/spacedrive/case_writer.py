"""Writes what torch computed in the layout of the recorded cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.parity.spacedrive.torch_spacedrive import TorchSpaceDrive


def write_case(
    folder: Path,
    model: TorchSpaceDrive,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    settings: dict[str, Any],
) -> Path:
    """Writes config.json, inputs.npz, outputs.npz and weights.safetensors.

    Args:
        folder: created.
        model: its weights and setting.
        inputs: as `draw_inputs` gives them.
        outputs: tensors or arrays by their recorded names.
        settings: what config.json says beside the setting.
    """
    folder.mkdir(parents=True)
    setting, last = model.setting, len(model.setting.times) - 1
    stored = {
        f"f{index}/data/{key}": value
        for index, data in enumerate(inputs["data"])
        for key, value in data.items()
    }
    for key in ("pixel_values", "depth"):
        stored[f"f{last}/{key}"] = inputs[key]
    for row in range(setting.batch):
        for key in ("input_ids", "labels", "coords_pos"):
            stored[f"f{last}/{key}/{row}"] = inputs[key][row]
    np.savez(folder / "inputs.npz", **stored)
    arrays = {
        name: value.detach().numpy() if isinstance(value, torch.Tensor) else value
        for name, value in outputs.items()
    }
    np.savez(folder / "outputs.npz", **arrays)
    tensors = model.base | model.adapters | model.heads
    save_file(
        {name: value.detach().contiguous() for name, value in tensors.items()},
        folder / "weights.safetensors",
    )
    config = {
        "lm": setting.family,
        "B": setting.batch,
        "grid": setting.grid,
        "token_ids": setting.ids,
        "vlm_config": model.vlm.config.to_dict(),
        "lora": {"r": setting.rank, "alpha": 16 if setting.family == "qwen" else setting.rank},
        "spacedrive_args": model.arguments,
    }
    (folder / "config.json").write_text(json.dumps(config | settings, default=str))
    return folder

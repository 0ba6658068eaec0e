"""The torch parts of a step: transformers' model, adapters, encodings."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional

from tests.parity.spacedrive.setting import STRIDE, Setting


class Adapted(nn.Module):
    """A linear layer with an adapter."""

    def __init__(self, base: nn.Linear, rank: int, factor: float) -> None:
        super().__init__()
        self.base, self.factor = base, factor
        self.lora_A = nn.Parameter(0.1 * torch.randn(rank, base.in_features))
        self.lora_B = nn.Parameter(0.1 * torch.randn(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.factor * (x @ self.lora_A.T @ self.lora_B.T)


def vision_language_model(setting: Setting) -> nn.Module:
    """Random weights, norms and biases spread so that an error in any of them shows."""
    ids = setting.ids
    text = {
        "vocab_size": setting.vocabulary,
        "hidden_size": setting.width,
        "intermediate_size": 2 * setting.width,
        "num_hidden_layers": 2,
        "num_attention_heads": setting.heads,
        "num_key_value_heads": setting.kv_heads,
    }
    if setting.family == "qwen":
        half = setting.width // setting.heads // 2
        third = half // 3
        rope = {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [half - 2 * third, third, third],
        }
        config = transformers.Qwen2_5_VLConfig(
            text_config={**text, "rms_norm_eps": 1e-6, "rope_parameters": rope},
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": setting.width,
                "fullatt_block_indexes": [1],
                "window_size": 112,
            },
            image_token_id=ids["image_pad"],
            vision_start_token_id=ids["vision_start"],
            vision_end_token_id=ids["vision_end"],
            video_token_id=ids["video_pad"],
            tie_word_embeddings=False,
        )
        model: nn.Module = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        config = transformers.LlavaConfig(
            text_config={**text, "model_type": "llama", "rms_norm_eps": 1e-5},
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": STRIDE * setting.grid[0],
                "patch_size": STRIDE,
            },
            image_token_index=ids["image_pad"],
            tie_word_embeddings=False,
        )
        model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name or "ln_q" in name else 0.0, 0.1)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            parameter.requires_grad_(False)
    return model.eval()


def waves(arguments: dict[str, Any], points: torch.Tensor, width: int) -> torch.Tensor:
    """The unscaled encoding: x | y | z, each sin, cos interleaved, cut or filled with zeros to the width."""
    base, kind = float(arguments["pe_freq_coeff"]), arguments["pe_type"]
    channels = 2 * math.ceil(width / 6)
    if kind == "fone":
        steps = torch.arange(math.ceil(arguments["fone_dim"] / 6), dtype=torch.float32)
        frequencies = 2 * math.pi * arguments["pe_freq_scaling"] * base**-steps
    elif kind == "nerf":
        exponents = base * torch.arange(0, channels, 2, dtype=torch.float32) / channels
        frequencies = torch.pi * 2**exponents
    else:
        exponents = torch.arange(0, channels, 2, dtype=torch.float32) / channels
        frequencies = arguments["pe_freq_scaling"] / base**exponents
    angles = points[..., None] * frequencies
    flat = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)[..., :width]
    return functional.pad(flat, (0, width - flat.shape[-1]))

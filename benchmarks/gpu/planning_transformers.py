"""The same planning prompt through transformers' `generate`: Qwen2.5-VL-7B in PyTorch, bfloat16.

The stock model and loop, without what SpaceDrive adds (encodings, coordinate decoder), on the same pixels
and prompts as `benchmarks/gpu/planning.py`. Weights are random; a logits processor makes every answer the
planning frame, so that both answer with the same tokens.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.gpu.models import PROMPT_LENGTH, make_config
from benchmarks.gpu.rows import each, finish, parser, seconds, tell
from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.inference.answers import planning_frame
from spacedrive_jax.interop.hf_config import write_hf_config
from spacedrive_jax.models.config import VLConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.training.step import fake_batch


def make_model(config: VLConfig, device: str) -> Any:
    """Drawn on the device it runs on."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(write_hf_config(config)))
        settings = transformers.AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(settings, dtype=torch.bfloat16)
    return model.eval()


class SayFrame(transformers.LogitsProcessor):
    """Makes every sample say the same ids."""

    def __init__(self, frame: tuple[int, ...], prompt: int) -> None:
        self.frame, self.prompt = frame, prompt

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leaves one id of the vocabulary."""
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.frame[ids.shape[1] - self.prompt]] = 0
        return forced


def measure(model: Any, batch: DrivingBatch, vlm: VLConfig, frame: tuple[int, ...], device: str) -> None:
    """Answers once, to see that the frame is said; times; prints the row."""
    samples, cameras, *size, _ = batch.pixel_values.shape
    processor = family_of(vlm).image_processor(vlm.vision, tuple(size))
    patches = processor.patches(list(np.asarray(batch.pixel_values).reshape(-1, *size, 3)))
    rows, columns = (side * vlm.vision.merge_size for side in batch.patch_depth.shape[2:])
    ids = torch.tensor(np.asarray(batch.token_ids), dtype=torch.long, device=device)
    pixels = torch.tensor(patches, device=device).flatten(0, 1)
    asked = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == vlm.image_token_id).long(),
        "pixel_values": (pixels.float() / 127.5 - 1).to(torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * (samples * cameras), device=device),
    }
    length = ids.shape[1]

    def call() -> np.ndarray:
        made = model.generate(
            **asked,
            do_sample=False,
            max_new_tokens=len(frame),
            eos_token_id=frame[-1],
            pad_token_id=0,
            logits_processor=[SayFrame(frame, length)],
        )
        return made[:, length:].cpu().numpy()

    said = call()
    if said.tolist() != [list(frame)] * samples:
        raise ValueError(f"transformers did not say the frame: {said.tolist()}")
    took = seconds(call, 3)
    figures = {"ms a sample": 1e3 * took / samples, "prompt": length, "answer": len(frame)}
    way = f"transformers generate, {model.config._attn_implementation}"
    tell(way=way, batch=samples, ms=1e3 * took, **figures)


@torch.inference_mode()
def main() -> None:
    """A row for each batch."""
    options = parser(__doc__)
    options.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    given = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = make_config("7b", given.size, {"data.sequence_length": PROMPT_LENGTH})
    vlm, frame = config.model.vlm, planning_frame(load_tokenizer(config.data.tokenizer))
    model = make_model(vlm, device)
    for samples in given.batches:
        with each(way="transformers generate", batch=samples):
            train = dataclasses.replace(config.train, batch_size=samples)
            batch = fake_batch(dataclasses.replace(config, train=train), seed=0)
            measure(model, batch, vlm, frame, device)
    finish()


if __name__ == "__main__":
    main()

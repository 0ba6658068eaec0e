"""Qwen2.5-VL of some 100 M parameters against transformers and peft in torch, on this machine's processor.

Same random weights, same inputs, float32: forward, forward and backward of the adapters, greedy decoding.
Hold it to one core: what counts is the processor time both use, because on a machine that does other work
too, threads that wait for each other tell more about that work. The two take turns; the best of each counts.
Needs torch and peft (requirements-parity.txt).

    taskset --cpu-list 0 python benchmarks/vlm.py --repeats 3 --out benchmarks/results/vlm_cpu.md
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from flax import nnx

from spacedrive_jax.interop.hf_checkpoint import from_hf
from spacedrive_jax.interop.peft import load_adapter, read_peft_config

IMAGE, START, END = 16001, 16002, 16003
GRID, IMAGES, WORDS, RANK, NEW_TOKENS = (12, 12), 6, 8, 16, 32


class Row(NamedTuple):
    """One line of the table."""

    what: str
    torch_seconds: float
    jax_seconds: float
    difference: str


def torch_model() -> Any:
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 16384,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 8,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_heads": 4,
            "out_hidden_size": 768,
            "fullatt_block_indexes": [3, 7],
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=16004,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def make_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Ids of one prompt with its images' placeholders, and the images' patches."""
    generator = np.random.default_rng(0)
    visual = GRID[0] * GRID[1] // 4
    pieces: list[Any] = []
    for _ in range(IMAGES):
        pieces += [generator.integers(0, 16000, WORDS), [START], [IMAGE] * visual, [END]]
    token_ids = np.concatenate([*pieces, generator.integers(0, 16000, WORDS)]).astype(np.int32)[None]
    return token_ids, generator.standard_normal((1, IMAGES, GRID[0] * GRID[1], 1176), np.float32)


def fastest_of(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Fastest of several turns each, after one to warm up."""
    best = [float("inf")] * 2
    for turn in range(repeats + 1):
        for number, action in enumerate((first, second)):
            started = time.process_time()
            action()
            if turn:
                best[number] = min(best[number], time.process_time() - started)
    return best[0], best[1]


def relative(ours: Any, theirs: Any) -> str:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return f"{np.abs(ours - theirs).max() / np.abs(theirs).max():.1e}"


def compare(repeats: int) -> tuple[list[Row], int, int]:
    base = torch_model()
    parameters = sum(each.numel() for each in base.parameters())
    settings = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=r".*language_model.*\.(q|k|v|o)_proj")
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(Path(folder) / "base")
        theirs = peft.get_peft_model(base, settings).eval()
        with torch.no_grad():
            for name, value in theirs.named_parameters():
                if "lora_B" in name:
                    value.normal_(0.0, 0.02)
        theirs.save_pretrained(Path(folder) / "adapter")
        lora = read_peft_config(Path(folder) / "adapter")
        model = from_hf(Path(folder) / "base", lora=lora)
        load_adapter(model, Path(folder) / "adapter")

    token_ids, pixels = make_inputs()
    ids = torch.tensor(token_ids, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.tensor(pixels[0].reshape(-1, 1176)),
        "image_grid_thw": torch.tensor([[1, *GRID]] * IMAGES),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }
    images = jnp.asarray(pixels)

    @torch.no_grad()
    def torch_forward() -> Any:
        return theirs(**inputs).logits.numpy()

    def jax_forward() -> Any:
        return model.logits(token_ids, pixel_values=images, image_grid_thw=(1, *GRID)).block_until_ready()

    def torch_backward() -> Any:
        theirs.zero_grad()
        loss = theirs(**inputs, labels=ids).loss
        loss.backward()
        return loss.detach().numpy()

    graph, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    layout, grids = model.lay_out(token_ids, images, (1, *GRID))

    @jax.jit
    def step(adapters: nnx.State, rest: nnx.State) -> Any:
        def loss(adapters: nnx.State) -> jax.Array:
            whole = nnx.merge(graph, adapters, rest)
            embeddings, _ = whole.embed_prompt(jnp.asarray(token_ids), images, layout, grids)
            hidden, _ = whole.decoder(embeddings, jnp.asarray(layout.position_ids))
            scores = jax.nn.log_softmax(whole.decoder.logits(hidden[:, :-1]))
            return -jnp.take_along_axis(scores, jnp.asarray(token_ids)[:, 1:, None], axis=-1).mean()

        return jax.value_and_grad(loss)(adapters)

    def jax_backward() -> Any:
        return jax.block_until_ready(step(adapters, rest))

    def torch_decode() -> Any:
        generated = theirs.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return generated[0, ids.shape[1] :].numpy()

    def jax_decode() -> Any:
        return model.generate(
            token_ids, pixel_values=images, image_grid_thw=(1, *GRID), max_new_tokens=NEW_TOKENS
        )[0]

    rows = []
    difference = relative(jax_forward(), torch_forward())
    rows.append(Row("forward", *fastest_of(torch_forward, jax_forward, repeats), difference))
    difference = relative(jax_backward()[0], torch_backward())
    rows.append(Row("forward and backward", *fastest_of(torch_backward, jax_backward, repeats), difference))
    same = int((jax_decode() == torch_decode()).sum())
    turns = fastest_of(torch_decode, jax_decode, repeats)
    rows.append(Row(f"greedy decoding of {NEW_TOKENS}", *turns, f"{same}/{NEW_TOKENS} ids equal"))
    return rows, parameters, token_ids.shape[1]


def report(rows: list[Row], parameters: int, length: int, repeats: int, load: float) -> str:
    head = [
        "# Qwen2.5-VL on the processor, against transformers and peft",
        "",
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} core, Python {platform.python_version()}, "
        f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}.",
        f"{parameters / 1e6:.0f} M parameters, adapters of rank {RANK}, float32; one prompt of {length} "
        f"tokens with {IMAGES} images.",
        "",
        "| | torch, s | here, s | torch / here | difference |",
        "|---|---:|---:|---:|---|",
    ]
    table = [
        f"| {row.what} | {row.torch_seconds:.3f} | {row.jax_seconds:.3f} | "
        f"{row.torch_seconds / row.jax_seconds:.2f} | {row.difference} |"
        for row in rows
    ]
    foot = [
        "",
        f"Seconds of processor time, best of {repeats} turns; a ratio above 1 means faster here. "
        "Difference: over the largest logit; of the loss.",
        f"Load average {load:.1f} before, {os.getloadavg()[0]:.1f} after.",
        "",
    ]
    return "\n".join([*head, *table, *foot])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table here as well")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    text = report(*compare(options.repeats), options.repeats, load)
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()

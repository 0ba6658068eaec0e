"""What an answer costs: planning in one pass against token by token, the prefill alone, and transformers.

All run the same small Qwen2.5-VL in float32 on the CPU, on the same pictures, prompts and weights, and must
give the same answer. transformers' `generate` is the stock loop; a hook adds the coordinate encodings to its
visual tokens, and a logits processor feeds the position token behind every indicator. The weights are random,
but for the head, which is solved for so that the model says the planning answer.

Needs torch and transformers beside this project. Example:
python benchmarks/planning.py --out benchmarks/results/planning_cpu.md
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
import tyro
from flax import nnx

from spacedrive_jax.batch import DrivingBatch, stack
from spacedrive_jax.config import ModelConfig
from spacedrive_jax.data.chat import ChatTokens, Turn, chat_tokens
from spacedrive_jax.data.prompts import planning_answer, planning_question
from spacedrive_jax.data.samples import token_fields
from spacedrive_jax.data.tokenizer import DrivingTokenizer, load_tokenizer
from spacedrive_jax.inference.answer import planning_frame
from spacedrive_jax.inference.generate import generate
from spacedrive_jax.inference.progress import Generation, start
from spacedrive_jax.model import SpaceDrive
from spacedrive_jax.vlm import DecoderConfig, QwenVisionConfig, QwenVLConfig, to_hf

MAX_NEW_TOKENS = 100
HEAD_SCORE = 20.0
"""What the solved head gives the right id."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    view_tokens: tuple[int, ...] = (2, 8)
    """Visual tokens along each side of a view; a table for each."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Samples at once; a table for each."""
    repeats: int = 5
    """Rounds over all ways; the fastest of each counts."""
    out: Path | None = None
    """Markdown file to write the tables to."""


def model_config(tokenizer: DrivingTokenizer) -> ModelConfig:
    """About 40 million parameters with the proportions of the 7B model."""
    decoder = DecoderConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=2048,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        rope_sections=(8, 12, 12),
    )
    vision = QwenVisionConfig(
        hidden_size=256,
        intermediate_size=684,
        depth=4,
        num_heads=4,
        full_attention_blocks=(1, 3),
        out_hidden_size=512,
    )
    vlm = QwenVLConfig(
        decoder=decoder,
        vision=vision,
        image_token_id=tokenizer.image,
        vision_start_token_id=tokenizer.vision_start,
        vision_end_token_id=tokenizer.vision_end,
    )
    return ModelConfig(vlm=vlm, use_lora=False, ego_status="none")


def make_batch(
    config: ModelConfig, tokenizer: DrivingTokenizer, side: int, size: int, *, answer: bool
) -> DrivingBatch:
    """Random pictures, depths and cameras; the published prompt, with or without its answer."""
    vision = config.vlm.vision
    patches = (side * vision.merge_size) ** 2
    rng = np.random.default_rng(0)
    turns = [Turn("user", planning_question("boston", 1))]
    turns += [Turn("assistant", planning_answer())] if answer else []
    chat: ChatTokens = chat_tokens(tokenizer, turns, side**2, generation_prompt=not answer)
    length = len(chat.token_ids)
    fields = token_fields(
        tokenizer, chat, (side, side), "none", sequence_length=length, max_targets=40 if answer else 1
    )
    camera = np.array([[100.0, 0, 60], [0, 100, 60], [0, 0, 1]], np.float32)
    samples = [
        DrivingBatch(
            **fields,
            pixel_values=rng.normal(size=(6, patches, vision.patch_channels)).astype(np.float32),
            patch_depth=rng.uniform(2, 50, (6, side, side)).astype(np.float32),
            intrinsics=np.stack([camera] * 6),
            camera_to_ego=np.stack([np.eye(4, dtype=np.float32)] * 6),
            ego_status=np.zeros(74, np.float32),
            past_positions=np.zeros((2, 3), np.float32),
            coordinates=np.zeros((6, 3), np.float32),
            waypoints=np.zeros((6, 2), np.float32),
            index=np.int32(0),
        )
        for _ in range(size)
    ]
    return jax.tree.map(jnp.asarray, stack(samples))


def teach_answer(model: SpaceDrive, batch: DrivingBatch) -> None:
    """Solves for a head that gives the answer's ids at the answer's hidden states (ridge regression)."""
    graph, state = nnx.split(model)

    @jax.jit
    def states(state: nnx.State, batch: DrivingBatch) -> jax.Array:
        hidden = nnx.merge(graph, state)(batch).hidden
        return jnp.take_along_axis(hidden, batch.target_places[..., None], axis=1)

    mask = np.asarray(batch.target_mask)
    features = np.asarray(states(state, batch), np.float64)[mask]
    wanted = np.zeros((len(features), model.config.vlm.decoder.vocab_size))
    wanted[np.arange(len(features)), np.asarray(batch.target_ids)[mask]] = HEAD_SCORE
    gram = features.T @ features + 1e-4 * np.eye(features.shape[1])
    head = np.linalg.solve(gram, features.T @ wanted).T
    model.vlm.decoder.head[...] = jnp.asarray(head, jnp.float32)


class Transformers:
    """The stock model with the same weights, and what SpaceDrive's way of answering needs around it."""

    def __init__(self, model: SpaceDrive, tokenizer: DrivingTokenizer) -> None:
        with tempfile.TemporaryDirectory() as folder:
            to_hf(model.vlm, Path(folder) / "model", naming="transformers")
            self.model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
                Path(folder) / "model", dtype=torch.float32
            ).eval()
        self.tokenizer = tokenizer
        self.encodings: torch.Tensor | None = None
        self.model.model.visual.register_forward_hook(self._add_encodings)
        layers = (model.decoder.hidden, model.decoder.output)
        self.head = [
            (torch.tensor(np.asarray(layer.kernel)), torch.tensor(np.asarray(layer.bias))) for layer in layers
        ]

    def _add_encodings(self, module: Any, inputs: Any, output: Any) -> Any:
        output.pooler_output = output.pooler_output + self.encodings
        return output

    def _feed_position(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        after = ids[:, -1] == self.tokenizer.indicator
        scores[after, self.tokenizer.position] = torch.inf
        return scores

    @torch.no_grad()
    def answer(
        self, batch: DrivingBatch, encodings: np.ndarray, threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Generated ids and the six waypoints of each sample."""
        torch.set_num_threads(threads)
        size, cameras, patches, channels = batch.pixel_values.shape
        side = int(patches**0.5)
        self.encodings = torch.tensor(encodings).reshape(-1, encodings.shape[-1])
        ids = torch.tensor(np.asarray(batch.token_ids), dtype=torch.long)
        result = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == self.tokenizer.image).long(),
            pixel_values=torch.tensor(np.asarray(batch.pixel_values)).reshape(-1, channels),
            image_grid_thw=torch.tensor([[1, side, side]] * (size * cameras)),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=self.tokenizer.turn_end,
            pad_token_id=self.tokenizer.padding,
            logits_processor=[self._feed_position],
            return_dict_in_generate=True,
            output_hidden_states=True,
        )
        new = result.sequences[:, ids.shape[1] :]
        places = [step for step in range(new.shape[1]) if int(new[0, step]) == self.tokenizer.position]
        hidden = torch.stack([result.hidden_states[step][-1][:, -1] for step in places], dim=1)
        (first, first_bias), (second, second_bias) = self.head
        points = torch.relu(hidden @ first + first_bias) @ second + second_bias
        return new.numpy(), points.numpy()


def fastest(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each way: all ways in turn, over and over, so that a busy machine slows all alike."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def compare_ways(arguments: Arguments, side: int, size: int) -> tuple[int, dict[str, float]]:
    """Prompt length, and seconds per sample of every way, answers compared."""
    tokenizer = load_tokenizer()
    config, frame = model_config(tokenizer), planning_frame(tokenizer)
    model = nnx.jit(lambda: SpaceDrive(config, indicator_id=tokenizer.indicator, rngs=nnx.Rngs(0)))()
    teach_answer(model, make_batch(config, tokenizer, side, size, answer=True))
    batch = make_batch(config, tokenizer, side, size, answer=False)
    graph, state = nnx.split(model)

    def jitted(function: Callable[[SpaceDrive, DrivingBatch], Any]) -> Callable[[], Any]:
        compiled = jax.jit(lambda state, batch: function(nnx.merge(graph, state), batch))
        return lambda: jax.block_until_ready(compiled(state, batch))

    def first_token(model: SpaceDrive, batch: DrivingBatch) -> jax.Array:
        begun = start(model, batch, tokenizer, MAX_NEW_TOKENS, 1.0)
        return jnp.argmax(model.vlm.decoder.logits(begun.hidden), axis=-1)

    def answer(frame: tuple[int, ...] | None) -> Callable[[SpaceDrive, DrivingBatch], Generation]:
        return lambda model, batch: generate(model, batch, tokenizer, MAX_NEW_TOKENS, frame=frame)

    theirs = Transformers(model, tokenizer)
    encodings = np.asarray(jax.jit(lambda state, batch: encode(nnx.merge(graph, state), batch))(state, batch))
    ways = {
        "embeddings (vision tower)": jitted(lambda model, batch: model.embeddings(batch)),
        "prefill and first token": jitted(first_token),
        "one pass": jitted(answer(frame)),
        "token by token": jitted(answer(None)),
    }
    # Its threads wait for each other actively, which a shared machine punishes: both are measured.
    for threads in sorted({1, os.cpu_count() or 1}):
        ways[f"transformers generate, threads: {threads}"] = functools.partial(
            theirs.answer, batch, encodings, threads
        )
    check_equal(ways, tokenizer)
    seconds = fastest(ways, arguments.repeats)
    return batch.token_ids.shape[1], {name: value / size for name, value in seconds.items()}


def encode(model: SpaceDrive, batch: DrivingBatch) -> jax.Array:
    """The encodings that the visual tokens get."""
    return model.encoder(model.patch_points(batch))


def check_equal(ways: dict[str, Callable[[], Any]], tokenizer: DrivingTokenizer) -> None:
    """All three ways of answering must agree; also compiles everything."""
    ways["prefill and first token"]()
    ways["embeddings (vision tower)"]()
    fast, slow = ways["one pass"](), ways["token by token"]()
    ids, points = ways["transformers generate, threads: 1"]()
    assert bool(fast.in_one_pass.all()), "the solved head does not keep to the frame"
    np.testing.assert_array_equal(fast.token_ids, slow.token_ids)
    length = int(slow.lengths[0])
    said = np.where(np.asarray(slow.is_coordinate), tokenizer.position, np.asarray(slow.token_ids))
    np.testing.assert_array_equal(said[:, :length], ids)
    for ours in (fast, slow):
        decoded = np.asarray(ours.coordinates)[np.asarray(ours.is_coordinate)]
        np.testing.assert_allclose(decoded.reshape(points.shape), points, atol=1e-3)


def main(arguments: Arguments) -> None:
    """Measures and prints; writes the tables where asked."""
    lines = []
    for side in arguments.view_tokens:
        for size in arguments.batch_sizes:
            length, seconds = compare_ways(arguments, side, size)
            prefill, one_pass = seconds["prefill and first token"], seconds["one pass"]
            lines += [
                "",
                f"{length} prompt tokens ({6 * side**2} visual), batch {size}:",
                "",
                "| way | ms per sample | samples/s | one pass is faster by |",
                "|---|---|---|---|",
            ]
            lines += [
                f"| {name} | {value * 1e3:.1f} | {1 / value:.2f} | {value / one_pass:.2f}x |"
                for name, value in seconds.items()
            ]
            lines += ["", f"An answer costs {one_pass / prefill - 1:+.0%} over the prefill."]
            print("\n".join(lines[-12:]), flush=True)
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    header = [
        "# Planning in one pass, CPU",
        "",
        f"`python benchmarks/planning.py`, {versions},",
        f"{os.cpu_count()} cores ({platform.machine()}), float32.",
        f"Load averages at the end {load}: the machine was shared, so ratios mean more than times.",
        f"The fastest of {arguments.repeats} rounds counts. Answers of all ways were equal (ids; coordinates",
        "to 1e-3 m).",
    ]
    if arguments.out is not None:
        arguments.out.write_text("\n".join([*header, *lines]) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))

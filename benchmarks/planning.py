"""What an answer costs, phase by phase: one pass, token by token, transformers, and the original's way.

All run the same Qwen2.5-VL in float32 on the CPU with the same number of threads, on the same pictures,
prompts and weights, and must give the same answer. transformers' `generate` is the stock loop; a hook adds
the coordinate encodings to its visual tokens, and a logits processor feeds the position token behind every
indicator. The weights are random, but for the head, which is solved for so that the model says the planning
answer.

The original's way is transformers' `generate` for one sample at a time, the depth network run for each. The
depth network here is this project's UniDepthV2, jitted, in the proportions that ViT-L has to the 7B model.

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
from spacedrive_jax.data.prompts import planning_answer, planning_question
from spacedrive_jax.data.tokenizer import DrivingTokenizer, load_tokenizer
from spacedrive_jax.data.transforms import token_fields
from spacedrive_jax.inference.answers import Generation, planning_frame
from spacedrive_jax.inference.generate import generate
from spacedrive_jax.inference.progress import start
from spacedrive_jax.interop.hf_checkpoint import to_hf
from spacedrive_jax.models.config import LanguageModelConfig
from spacedrive_jax.models.coordinate_decoder import MlpDecoder
from spacedrive_jax.models.depth.backbone import Dinov2Config
from spacedrive_jax.models.depth.unidepth import UniDepthConfig, UniDepthV2
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.families.qwen2_5_vl import QwenVisionConfig, QwenVLConfig
from spacedrive_jax.models.family import ChatTokens, Message
from spacedrive_jax.models.partitioning import initialize
from spacedrive_jax.models.spacedrive import SpaceDrive
from spacedrive_jax.models.spacedrive_config import ModelConfig

MAX_NEW_TOKENS = 100
HEAD_SCORE = 20.0
"""What the solved head gives the right id."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    view_tokens: tuple[int, ...] = (2, 8)
    """Visual tokens along each side of a view; a table for each."""
    batch_size: int = 8
    """Samples at once where depth is cached."""
    threads: int = 1
    """For every way. More than there are idle processors make torch's threads wait for each other."""
    repeats: int = 3
    """Rounds over all ways; the fastest of each counts."""
    layers: int = 12
    """Blocks of the language decoder; fewer for a quick look."""
    out: Path | None = None
    """Markdown file to write the tables to."""


def model_config(tokenizer: DrivingTokenizer, layers: int) -> ModelConfig:
    """About 100 million parameters (with 12 layers) in the proportions of the 7B model."""
    decoder = LanguageModelConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=3072,
        num_layers=layers,
        num_heads=12,
        num_kv_heads=2,
        head_dim=64,
        mrope_section=(8, 12, 12),
    )
    vision = QwenVisionConfig(
        hidden_size=256,
        intermediate_size=684,
        depth=8,
        num_heads=4,
        full_attention_blocks=(3, 7),
        out_hidden_size=768,
    )
    vlm = QwenVLConfig(
        decoder=decoder,
        vision=vision,
        image_token_id=tokenizer.image,
        vision_start_token_id=tokenizer.special["vision_start"],
        vision_end_token_id=tokenizer.special["vision_end"],
    )
    return ModelConfig(vlm=vlm, use_lora=False, ego_status="none")


def depth_network(pixels: int) -> UniDepthV2:
    """A UniDepthV2 that takes images of `pixels` on a side as they are, as it does the published 640."""
    encoder = Dinov2Config(width=192, depth=12, heads=3, final_norm_eps=1e-5)
    config = UniDepthConfig(encoder=encoder, width=64, heads=4, pixel_bounds=(pixels**2, pixels**2))
    return initialize(lambda rngs: UniDepthV2(config, rngs=rngs), seed=0)


def make_batch(
    config: ModelConfig, tokenizer: DrivingTokenizer, side: int, size: int, *, answer: bool
) -> DrivingBatch:
    """Random pictures, depths and cameras; the published prompt, with or without its answer."""
    vision = config.vlm.vision
    patches = (side * vision.merge_size) ** 2
    rng = np.random.default_rng(0)
    turns = [Message("user", planning_question("boston", 1))]
    turns += [Message("assistant", planning_answer())] if answer else []
    chat: ChatTokens = tokenizer.chat.apply_chat_template(
        tokenizer, turns, side**2, add_generation_prompt=not answer
    )
    length = len(chat.token_ids)
    fields = token_fields(
        family_of(config.vlm),
        tokenizer,
        chat,
        (side, side),
        config.ego_status,
        sequence_length=length,
        max_targets=40 if answer else 1,
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
        return jnp.take_along_axis(hidden, batch.target_indices[..., None], axis=1)

    mask = np.asarray(batch.target_mask)
    features = np.asarray(states(state, batch), np.float64)[mask]
    wanted = np.zeros((len(features), model.config.vlm.decoder.vocab_size))
    wanted[np.arange(len(features)), np.asarray(batch.target_ids)[mask]] = HEAD_SCORE
    gram = features.T @ features + 1e-4 * np.eye(features.shape[1])
    head = np.linalg.solve(gram, features.T @ wanted).T
    assert model.vlm.decoder.head is not None  # `model_config` ties no embeddings
    model.vlm.decoder.head[...] = jnp.asarray(head, jnp.float32)


class Transformers:
    """The stock model with the same weights, and what SpaceDrive's way of answering needs around it."""

    def __init__(self, model: SpaceDrive, tokenizer: DrivingTokenizer, encodings: np.ndarray) -> None:
        with tempfile.TemporaryDirectory() as folder:
            to_hf(model.vlm, Path(folder) / "model", naming="transformers")
            self.model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
                Path(folder) / "model", dtype=torch.float32
            ).eval()
        self.tokenizer = tokenizer
        self.encodings = torch.tensor(encodings).reshape(-1, encodings.shape[-1])
        self.model.model.visual.register_forward_hook(self._add_encodings)
        assert isinstance(model.decoder, MlpDecoder)
        assert model.decoder.hidden is not None
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
    def vision(self, batch: DrivingBatch) -> None:
        """The vision tower alone."""
        size, cameras, patches, channels = batch.pixel_values.shape
        side = int(patches**0.5)
        pixels = torch.tensor(np.asarray(batch.pixel_values)).reshape(-1, channels)
        self.model.model.visual(pixels, grid_thw=torch.tensor([[1, side, side]] * (size * cameras)))

    @torch.no_grad()
    def answer(self, batch: DrivingBatch, limit: int = MAX_NEW_TOKENS) -> tuple[np.ndarray, np.ndarray]:
        """Generated ids and the waypoints of each sample; at most `limit` tokens."""
        size, cameras, patches, channels = batch.pixel_values.shape
        side = int(patches**0.5)
        ids = torch.tensor(np.asarray(batch.token_ids), dtype=torch.long)
        result = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == self.tokenizer.image).long(),
            pixel_values=torch.tensor(np.asarray(batch.pixel_values)).reshape(-1, channels),
            image_grid_thw=torch.tensor([[1, side, side]] * (size * cameras)),
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=self.tokenizer.turn_end,
            pad_token_id=self.tokenizer.padding,
            logits_processor=[self._feed_position],
            return_dict_in_generate=True,
            output_hidden_states=True,
        )
        new = result.sequences[:, ids.shape[1] :]
        places = [step for step in range(new.shape[1]) if int(new[0, step]) == self.tokenizer.position]
        if not places:
            return new.numpy(), np.zeros((size, 0, 3))
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


@dataclasses.dataclass(frozen=True)
class Phases:
    """Seconds per sample of one way."""

    depth: float
    """Depth network; 0 where depth is cached."""
    vision: float
    prefill: float
    """Prompt through the decoder, first token included."""
    answer: float
    """The rest."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.depth + self.vision + self.prefill + self.answer


def compare_ways(arguments: Arguments, side: int) -> tuple[int, dict[str, Phases]]:
    """Prompt length, and the phases of every way, answers compared."""
    tokenizer = load_tokenizer()
    config, frame = model_config(tokenizer, arguments.layers), planning_frame(tokenizer)
    model = nnx.jit(lambda: SpaceDrive(config, indicator_id=tokenizer.indicator, rngs=nnx.Rngs(0)))()
    teach_answer(model, make_batch(config, tokenizer, side, arguments.batch_size, answer=True))
    graph, state = nnx.split(model)

    def jitted(function: Callable[[SpaceDrive, DrivingBatch], Any], size: int) -> Callable[[], Any]:
        batch = make_batch(config, tokenizer, side, size, answer=False)
        compiled = jax.jit(lambda state, batch: function(nnx.merge(graph, state), batch))
        return lambda: jax.block_until_ready(compiled(state, batch))

    def first_token(model: SpaceDrive, batch: DrivingBatch) -> jax.Array:
        begun = start(model, batch, tokenizer, MAX_NEW_TOKENS, 1.0)
        return jnp.argmax(model.vlm.decoder.logits(begun.hidden), axis=-1)

    def answer(frame: tuple[int, ...] | None) -> Callable[[SpaceDrive, DrivingBatch], Generation]:
        return lambda model, batch: generate(model, batch, tokenizer, MAX_NEW_TOKENS, frame=frame)

    single = make_batch(config, tokenizer, side, 1, answer=False)
    theirs = Transformers(model, tokenizer, np.asarray(jitted(encode, 1)()))
    network = depth_network(side * config.vlm.vision.merge_size * config.vlm.vision.patch_size)
    depth_graph, depth_state = nnx.split(network)
    predict_depth = jax.jit(lambda state, images: nnx.merge(depth_graph, state)(images).depth)
    pixels = network.config.inference_size((1, 1)).network[0]
    views = np.random.default_rng(0).integers(0, 256, (6, pixels, pixels, 3), dtype=np.uint8)

    many = arguments.batch_size
    ways: dict[str, Callable[[], Any]] = {
        "vision": jitted(lambda model, batch: model.visual_features(batch), 1),
        "first": jitted(first_token, 1),
        "fast": jitted(answer(frame), 1),
        "slow": jitted(answer(None), 1),
        "vision many": jitted(lambda model, batch: model.visual_features(batch), many),
        "first many": jitted(first_token, many),
        "fast many": jitted(answer(frame), many),
        "their vision": functools.partial(theirs.vision, single),
        "their first": functools.partial(theirs.answer, single, 1),
        "theirs": functools.partial(theirs.answer, single),
        "depth": lambda: jax.block_until_ready(predict_depth(depth_state, views)),
    }
    check_equal(ways, tokenizer)
    took = fastest(ways, arguments.repeats)

    def phases(vision: str, first: str, whole: str, *, samples: int = 1, depth: float = 0.0) -> Phases:
        return Phases(
            depth,
            took[vision] / samples,
            (took[first] - took[vision]) / samples,
            (took[whole] - took[first]) / samples,
        )

    published = phases("their vision", "their first", "theirs")
    return single.token_ids.shape[1], {
        "one pass": phases("vision", "first", "fast"),
        f"one pass, batch {many}": phases("vision many", "first many", "fast many", samples=many),
        "token by token": phases("vision", "first", "slow"),
        "transformers generate": published,
        "the original's way": dataclasses.replace(published, depth=took["depth"]),
    }


def encode(model: SpaceDrive, batch: DrivingBatch) -> jax.Array:
    """The encodings that the visual tokens get."""
    return model.encoder(model.patch_points(batch))


def check_equal(ways: dict[str, Callable[[], Any]], tokenizer: DrivingTokenizer) -> None:
    """All ways of answering must agree; also compiles everything."""
    results = {name: way() for name, way in ways.items()}
    ids, points = results["theirs"]
    for name in ("fast", "slow", "fast many"):
        ours = results[name]
        assert name == "slow" or bool(ours.in_one_pass.all()), "the solved head does not keep to the frame"
        length = int(ours.lengths[0])
        said = np.where(np.asarray(ours.is_position), tokenizer.position, np.asarray(ours.token_ids))
        np.testing.assert_array_equal(said[0, :length], ids[0])
        decoded = np.asarray(ours.coordinates)[0][np.asarray(ours.is_coordinate)[0]]
        np.testing.assert_allclose(decoded, points[0], atol=1e-3)


def table(length: int, visual: int, ways: dict[str, Phases]) -> list[str]:
    """One prompt's figures as Markdown."""
    fast, (_, many) = ways["one pass"], list(ways.items())[1]
    theirs, original = ways["transformers generate"], ways["the original's way"]
    lines = [
        "",
        f"{length} prompt tokens ({visual} visual):",
        "",
        "| way | depth | vision | prefill | answer | ms per sample |",
        "|---|---|---|---|---|---|",
    ]
    for name, way in ways.items():
        figures = (way.depth, way.vision, way.prefill, way.answer, way.total)
        lines.append(f"| {name} | " + " | ".join(f"{value * 1e3:.1f}" for value in figures) + " |")
    return [
        *lines,
        "",
        f"* One pass costs {fast.answer / (fast.vision + fast.prefill):+.0%} over the prefill"
        f" ({many.answer / (many.vision + many.prefill):+.0%} in a batch). Aim: at most +15%.",
        f"* transformers' `generate` takes {theirs.total / fast.total:.2f}x as long (aim: 5x),"
        f" {theirs.answer / max(fast.answer, 1e-6):.1f}x behind the first token.",
        f"* The original's way takes {original.total / many.total:.2f}x as long per sample as one pass in a "
        "batch with cached depth (aim: 15x).",
    ]


def main(arguments: Arguments) -> None:
    """Measures and prints; writes the tables where asked."""
    # Both libraries keep to these processors: XLA makes as many threads as it may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    torch.set_num_threads(arguments.threads)
    lines: list[str] = []
    for side in arguments.view_tokens:
        length, ways = compare_ways(arguments, side)
        figures = table(length, 6 * side**2, ways)
        print("\n".join(figures), flush=True)
        lines += figures
        if arguments.out is not None:
            arguments.out.write_text("\n".join([*header(arguments), *lines]) + "\n")


def header(arguments: Arguments) -> list[str]:
    """What was measured, on what."""
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return [
        "# Planning in one pass, CPU",
        "",
        f"`python benchmarks/planning.py`, {versions}, {platform.machine()}, float32,",
        f"{arguments.threads} thread(s) for every way, {arguments.layers} decoder layers of width 768; load",
        f"averages at the end {load}. The fastest of {arguments.repeats} rounds counts. Batch 1 unless",
        "said. Answers of all ways were equal (ids; six waypoints to 1e-3 m). With a load above the threads",
        "other work had a share of the processors: ratios then mean more than times.",
    ]


if __name__ == "__main__":
    main(tyro.cli(Arguments))

"""One training step on the processor: here, and as the published run does it with transformers and peft.

The same random weights, batch, adapters of rank 16, coordinate decoder, losses, gradient checkpointing of
every block, clipping and AdamW, float32, dropout off. PyTorch forms the logits of the whole sequence, as the
published code does; here only supervised places meet the vocabulary. The losses of the first steps must
agree before anything is timed. The two take turns on the same cores. Needs requirements-parity.txt.

    PYTHONPATH=. python benchmarks/train_step.py --steps 5 --out benchmarks/results/train_step_cpu.md
"""

from __future__ import annotations

import argparse
import dataclasses
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

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.config import Config, MeshConfig, TrainConfig
from spacedrive_jax.data.transforms import DataConfig
from spacedrive_jax.interop.peft import save_adapter
from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig, LoraConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.families.qwen2_5_vl import QwenVisionConfig, QwenVLConfig
from spacedrive_jax.models.image_processor import normalise
from spacedrive_jax.models.spacedrive_config import ModelConfig
from spacedrive_jax.training.sharding import make_mesh, place_batch, replicated
from spacedrive_jax.training.state import abstract_state, count, init_train_state
from spacedrive_jax.training.step import fake_batch, make_train_step
from spacedrive_jax.training.throughput import train_step_flops

CHECKED = 3
"""Steps whose losses must agree."""
TOLERANCE = 1e-4


def make_config(size: str, weights: str, batch_size: int) -> Config:
    """SpaceDrive without depth and ego status, whose inputs transformers' own model understands."""
    large = size == "100m"
    width = 768 if large else 64
    decoder = LanguageModelConfig(
        vocab_size=32768 if large else 1024,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_layers=10 if large else 2,
        num_heads=width // 64,
        num_kv_heads=width // 64 // 3 or 1,
        head_dim=64,
        mrope_section=(8, 12, 12),
        tie_word_embeddings=False,
    )
    vision = QwenVisionConfig(
        hidden_size=256 if large else 32,
        intermediate_size=512 if large else 64,
        depth=8 if large else 2,
        num_heads=4 if large else 2,
        full_attention_blocks=(3, 7) if large else (1,),
        out_hidden_size=width,
    )
    return Config(
        model=ModelConfig(
            vlm=QwenVLConfig(
                decoder=decoder,
                vision=vision,
                image_token_id=5,
                vision_start_token_id=3,
                vision_end_token_id=4,
            ),
            weights=weights,
            lora=LoraConfig(rank=16, dropout=0.0),
            new_token_rows=False,
            visual_positions="none",
            ego_status="none",
            compute=ComputeConfig(remat="full"),
        ),
        data=DataConfig(
            image_size=(168, 280) if large else (56, 56),
            sequence_length=576 if large else 128,
            max_targets=48,
        ),
        # A schedule that stays at its peak, so that PyTorch needs none.
        train=TrainConfig(batch_size=batch_size, steps=10**9, warmup_start=1.0, warmup_steps=1),
        mesh=MeshConfig(),
    )


def torch_base(config: Config) -> Any:
    """Transformers' model of the config's sizes, drawn at random."""
    model = config.model.vlm
    assert isinstance(model, QwenVLConfig)
    decoder, vision = model.decoder, model.vision
    torch.manual_seed(0)
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": decoder.vocab_size,
                "hidden_size": decoder.hidden_size,
                "intermediate_size": decoder.intermediate_size,
                "num_hidden_layers": decoder.num_layers,
                "num_attention_heads": decoder.num_heads,
                "num_key_value_heads": decoder.num_kv_heads,
                "max_position_embeddings": 4096,
                "rms_norm_eps": decoder.norm_eps,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": decoder.rope_theta,
                    "mrope_section": list(decoder.mrope_section),
                },
                "tie_word_embeddings": False,
            },
            vision_config={
                "depth": vision.depth,
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "num_heads": vision.num_heads,
                "out_hidden_size": vision.out_hidden_size,
                "fullatt_block_indexes": list(vision.full_attention_blocks),
            },
            image_token_id=model.image_token_id,
            vision_start_token_id=model.vision_start_token_id,
            vision_end_token_id=model.vision_end_token_id,
            video_token_id=6,
            tie_word_embeddings=False,
        )
    )


class JaxSide:
    """The step that `train` runs."""

    def __init__(self, config: Config, batch: DrivingBatch) -> None:
        self.mesh = make_mesh(config.mesh)
        self.step = make_train_step(config, self.mesh)
        self.trainable, self.frozen = init_train_state(config, self.mesh)
        self.optimizer = self.step.initialize_optimizer(self.trainable)
        self.batch, self.done = place_batch(batch, self.mesh), 0

    def __call__(self) -> float:
        """Takes a step; its loss."""
        number = jax.device_put(np.int32(self.done), replicated(self.mesh))
        self.trainable, self.optimizer, metrics = self.step.run(
            self.trainable, self.optimizer, self.frozen, self.batch, number
        )
        self.done += 1
        return float(metrics["loss"])


class TorchSide:
    """The same step as the published trainer takes it."""

    def __init__(self, config: Config, batch: DrivingBatch, base: Path, start: JaxSide) -> None:
        graph, _, _ = abstract_state(config, start.mesh)
        ours = nnx.merge(graph, start.trainable, start.frozen)
        adapter = base.with_name("adapter")
        save_adapter(ours.vlm, adapter, base_model=str(base))
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(base)
        self.model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
        self.inner = self.model.get_base_model()
        self.inner.activation_checkpointing_enable({"use_reentrant": False})
        self.decoder = torch.nn.Sequential(
            *(_linear(layer) for layer in (ours.decoder.hidden, ours.decoder.output))
        )
        self.decoder.insert(1, torch.nn.ReLU())
        settings = config.train
        adapters = [value for value in self.model.parameters() if value.requires_grad]
        weights, biases = ([v for v in self.decoder.parameters() if (v.ndim > 1) == many] for many in (1, 0))
        head = settings.learning_rate * settings.head_lr_mult
        self.optimizer = torch.optim.AdamW(
            [
                {"params": adapters, "lr": settings.learning_rate * settings.vlm_lr_mult},
                {"params": weights, "lr": head},
                {"params": biases, "lr": head, "weight_decay": 0.0},
            ],
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )
        self.trainable = [*adapters, *weights, *biases]
        self.settings = settings
        samples, cameras, rows, columns = batch.patch_depth.shape
        ids = torch.tensor(batch.token_ids, dtype=torch.long)
        images = ids == self.inner.config.image_token_id
        views = jnp.asarray(batch.pixel_values).reshape(-1, *batch.pixel_values.shape[2:])
        vlm = config.model.vlm
        _, height, width, _ = views.shape
        processor = family_of(vlm).image_processor(vlm.vision, (height, width))
        self.inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.tensor(np.array(normalise(processor.view_patches(views)))).flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]] * (samples * cameras)),
            "mm_token_type_ids": images.long(),
        }
        answer = int(batch.target_indices[0, 0]) + 1
        self.labels = ids.clone()
        self.labels[:, :answer] = -100
        self.indicators = torch.tensor(batch.waypoint_indices, dtype=torch.long)
        self.waypoints = torch.tensor(batch.waypoints)

    def __call__(self) -> float:
        """Takes a step; its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        hidden = self.inner.model(**self.inputs).last_hidden_state
        logits = self.inner.lm_head(hidden).float()
        language = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), self.labels[:, 1:].flatten(), reduction="sum"
        ) / len(logits)
        rows = torch.arange(len(hidden))[:, None]
        decoded = self.decoder(hidden[rows, self.indicators])[..., :2]
        position = torch.nn.functional.huber_loss(decoded, self.waypoints, delta=self.settings.huber_delta)
        loss = language + position
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, self.settings.clip_norm)
        self.optimizer.step()
        return float(loss.detach())


def _linear(layer: nnx.Linear) -> torch.nn.Linear:
    kernel, bias = np.array(layer.kernel[...]), np.array(layer.bias[...])
    linear = torch.nn.Linear(*kernel.shape)
    linear.weight.data, linear.bias.data = torch.tensor(kernel.T.copy()), torch.tensor(bias)
    return linear


class Times(NamedTuple):
    """Best of several turns, seconds of one step."""

    wall: float
    processor: float


def take_turns(sides: tuple[Callable[[], float], Callable[[], float]], steps: int) -> list[Times]:
    wall: list[list[float]] = [[], []]
    processor: list[list[float]] = [[], []]
    for _ in range(steps):
        for number, side in enumerate(sides):
            started, used = time.perf_counter(), time.process_time()
            side()
            wall[number].append(time.perf_counter() - started)
            processor[number].append(time.process_time() - used)
    return [Times(min(each), min(used)) for each, used in zip(wall, processor, strict=True)]


def measure(size: str, batch_size: int, steps: int) -> str:
    load = os.getloadavg()[0]
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        config = make_config(size, str(base), batch_size)
        torch_base(config).save_pretrained(base)
        batch = fake_batch(config, seed=0)
        ours = JaxSide(config, batch)
        theirs = TorchSide(config, batch, base, ours)
    parameters = count(ours.trainable) + count(ours.frozen)
    trained, theirs_trained = count(ours.trainable), sum(each.numel() for each in theirs.trainable)
    losses = [(theirs(), ours()) for _ in range(CHECKED)]
    print("losses of the first steps, PyTorch and here:", losses, flush=True)
    apart = max(abs(a - b) / abs(a) for a, b in losses)
    if apart > TOLERANCE:
        raise SystemExit(f"the two do not compute the same: losses {apart:.1e} apart")
    torch_times, jax_times = take_turns((theirs, ours), steps)
    flops = train_step_flops(config)
    lean = train_step_flops(dataclasses.replace(config, data=_whole_sequence(config.data)))
    return "\n".join(
        [
            "# A training step on the processor, against transformers and peft",
            "",
            f"{platform.machine()}, {threads} threads for either, Python {platform.python_version()}, jax "
            f"{jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, peft "
            f"{peft.__version__}.",
            f"{parameters / 1e6:.0f} M parameters, {trained:,} of them train ({theirs_trained:,} there), "
            f"rank 16, float32, every block checkpointed; {batch_size} samples of "
            f"{config.data.sequence_length} tokens with 6 images, {config.data.max_targets} supervised.",
            "",
            "| | PyTorch | here | PyTorch / here |",
            "|---|---:|---:|---:|",
            *(
                f"| {name}, s | {a:.3f} | {b:.3f} | **{a / b:.2f}** |"
                for name, a, b in zip(
                    ("step, wall clock", "step, processor"), torch_times, jax_times, strict=True
                )
            ),
            f"| matrix products, GFLOP | {lean.hardware / 1e9:.0f} | {flops.hardware / 1e9:.0f} | "
            f"{lean.hardware / flops.hardware:.2f} |",
            f"| GFLOP/s | {lean.hardware / 1e9 / torch_times.wall:.1f} | "
            f"{flops.hardware / 1e9 / jax_times.wall:.1f} | |",
            "",
            f"Best of {steps} steps in turns. The losses of the first {CHECKED} steps are within {apart:.0e} "
            "of each other. PyTorch's products count the logits of the whole sequence, as the published code "
            "forms them.",
            f"Load average {load:.1f} before, {os.getloadavg()[0]:.1f} after.",
            "",
        ]
    )


def _whole_sequence(data: DataConfig) -> DataConfig:
    return dataclasses.replace(data, max_targets=data.sequence_length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "100m"], default="100m")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table here as well")
    options = parser.parse_args()
    text = measure(options.size, options.batch_size, options.steps)
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()

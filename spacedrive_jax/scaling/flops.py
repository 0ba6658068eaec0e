"""Floating-point operations of a training or planning step, counted from the config.

Only matrix products count, a multiply-add as two. Attention of the decoder counts its causal half; padding
counts as the device computes it. What is recomputed to save memory is kept apart: it is work for the
hardware, not for the model (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import dataclasses

from spacedrive_jax.config import Config, ModelConfig
from spacedrive_jax.data.images import ImageProcessor
from spacedrive_jax.data.records import NUM_CAMERAS
from spacedrive_jax.vlm.config import ClipVisionConfig, DecoderConfig, LlavaConfig, QwenVisionConfig
from spacedrive_jax.vlm.windows import window_layout


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Of one step over the whole batch."""

    vision_forward: int
    decoder_forward: int
    adapter_forward: int
    head_forward: int
    backward: int
    recomputed: int
    """A second forward pass of the blocks, where remat is `full`."""

    @property
    def model(self) -> int:
        """What the step needs: the numerator of MFU."""
        forward = self.vision_forward + self.decoder_forward + self.adapter_forward + self.head_forward
        return forward + self.backward

    @property
    def hardware(self) -> int:
        """What the devices compute."""
        return self.model + self.recomputed


def train_step_flops(config: Config) -> StepFlops:
    """Counts one step of a config.

    With adapters the base needs gradients of its activations only (one more forward's worth in the decoder,
    none in the vision tower, before which nothing trains); without, of its weights too.
    """
    model, data, batch = config.model, config.data, config.train.batch_size
    decoder, length = model.vlm.decoder, data.sequence_length
    vision = NUM_CAMERAS * batch * vision_flops(model, data.image_size)
    products, attention = (batch * each for each in decoder_flops(decoder, length))
    adapters = batch * adapter_flops(model, length) if model.use_lora else 0
    head = 2 * batch * data.max_targets * decoder.hidden_size * decoder.vocab_size
    forward = products + attention
    if model.use_lora:
        backward = products + 2 * attention + 2 * adapters + head
        repeated = forward + adapters
    else:
        backward = 2 * (vision + forward + head)
        repeated = forward + vision
    recomputed = repeated if model.compute.remat == "full" else 0
    return StepFlops(vision, forward, adapters, head, backward, recomputed)


def plan_step_flops(config: Config, answer_length: int) -> StepFlops:
    """Counts answering one batch of planning questions in one pass.

    Args:
        config: `train.batch_size` prompts of `data.sequence_length` tokens.
        answer_length: tokens of the answer's frame, run behind the prompt and scored.
    """
    model, data, batch = config.model, config.data, config.train.batch_size
    decoder, length = model.vlm.decoder, data.sequence_length + answer_length
    vision = NUM_CAMERAS * batch * vision_flops(model, data.image_size)
    adapters = batch * adapter_flops(model, length) if model.use_lora else 0
    head = 2 * batch * answer_length * decoder.hidden_size * decoder.vocab_size
    return StepFlops(vision, batch * sum(decoder_flops(decoder, length)), adapters, head, 0, 0)


def decoder_flops(config: DecoderConfig, length: int) -> tuple[int, int]:
    """One forward pass over a sequence: the products with weights, and attention's own."""
    width, head = config.hidden_size, config.head_dim
    attention_weights = 2 * width * head * (config.num_heads + config.num_kv_heads)
    weights = config.num_layers * (attention_weights + 3 * width * config.intermediate_size)
    scores = config.num_layers * 2 * length * length * config.num_heads * head
    return 2 * weights * length, scores


def adapter_flops(model: ModelConfig, length: int) -> int:
    """One forward pass of all low-rank adapters over a sequence."""
    decoder, rank = model.vlm.decoder, model.lora.rank
    query, key = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    outer = {"q": query, "k": key, "v": key, "o": query}
    weights = sum(rank * (decoder.hidden_size + outer[target]) for target in model.lora.targets)
    return 2 * weights * length * decoder.num_layers


def vision_flops(model: ModelConfig, image_size: tuple[int, int]) -> int:
    """One forward pass of the vision tower over one image, up to the decoder's width."""
    vlm = model.vlm
    if isinstance(vlm, LlavaConfig):
        return _clip_flops(vlm.vision, vlm.decoder.hidden_size)
    return _qwen_vision_flops(vlm.vision, image_size)


def _clip_flops(vision: ClipVisionConfig, decoder_width: int) -> int:
    patches, width = vision.grid_side**2, vision.hidden_size
    tokens = patches + 1  # the class token
    block = 2 * tokens * (4 * width * width + 2 * width * vision.intermediate_size)
    scores = 4 * tokens**2 * width
    projector = 2 * patches * decoder_width * (width + decoder_width)
    embedding = 2 * patches * vision.patch_channels * width
    return vision.used_blocks * (block + scores) + projector + embedding


def _qwen_vision_flops(vision: QwenVisionConfig, image_size: tuple[int, int]) -> int:
    grid = ImageProcessor(vision, image_size).patch_grid
    patches, width = grid[0] * grid[1], vision.hidden_size
    layout = window_layout(grid, vision.merge_size, vision.window_tokens)
    windows, capacity = layout.slots.shape
    full = len(vision.full_attention_blocks)
    block = 2 * patches * (4 * width * width + 3 * width * vision.intermediate_size)
    scores = full * patches**2 + (vision.depth - full) * windows * capacity**2
    merged = width * vision.merge_size**2
    tokens = patches // vision.merge_size**2
    merger = 2 * tokens * merged * (merged + vision.out_hidden_size)
    embedding = 2 * patches * vision.patch_channels * width
    return vision.depth * block + 4 * scores * width + merger + embedding

"""Qwen2.5-VL: vision tower and language model as one module (Bai et al. 2025)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from spacedrive_jax.bounds import COUNT, FROM_ZERO, Bounds
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.attention import IMAGE_AXES, attend
from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig, VisionConfig, VLConfig
from spacedrive_jax.models.family import ChatML, Family, Tokenizer, chat_ml_tokens
from spacedrive_jax.models.image_processor import ImageProcessor, ProcessorSettings
from spacedrive_jax.models.layers import Projection, RMSNorm, SwiGLU, scan_layers, stack_layers
from spacedrive_jax.models.partitioning import constrain
from spacedrive_jax.models.positions import (
    RopePositions,
    RotaryTables,
    find_image_spans,
    mrope_positions,
    rotate,
    vision_rotary,
)
from spacedrive_jax.models.vision_language import VisionLanguageModel
from spacedrive_jax.models.vision_transformer import (
    Projector,
    WindowLayout,
    check_patches,
    full_attention_flags,
    projector_flops,
    window_layout,
)


@dataclasses.dataclass(frozen=True)
class QwenTowerConfig(VisionConfig):
    """What the towers of Qwen's families have alike: patches of equal frames, rotary positions on two axes,
    2x2 patches merged into one token of the language model's width.
    """

    merge_size: int = 2
    temporal_patch_size: int = 2
    out_hidden_size: int = 3584

    BOUNDS: ClassVar[Bounds] = {
        **VisionConfig.BOUNDS,
        **dict.fromkeys(("temporal_patch_size", "out_hidden_size"), COUNT),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 4:
            raise ConfigError(
                f"vision hidden_size ({self.hidden_size}) over num_heads ({self.num_heads}) must be a "
                "multiple of 4: the rotary embedding has two axes"
            )

    @property
    def patch_channels(self) -> int:
        """Length of one flattened patch as the image processor hands it over."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Channels of the patches that make one token."""
        return self.hidden_size * self.merge_size**2


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig(QwenTowerConfig):
    """The Qwen2.5-VL vision tower: windowed attention in most blocks, full attention in a few."""

    hidden_size: int = 1280
    intermediate_size: int = 3420
    depth: int = 32
    num_heads: int = 16
    norm_eps: float = 1e-6
    full_attention_blocks: tuple[int, ...] = (7, 15, 23, 31)
    window_size: int = 112
    """Side of an attention window in pixels."""

    BOUNDS: ClassVar[Bounds] = {
        **QwenTowerConfig.BOUNDS,
        "full_attention_blocks": FROM_ZERO,
        "window_size": COUNT,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not 0 <= block < self.depth for block in self.full_attention_blocks):
            raise ConfigError(
                f"full_attention_blocks {self.full_attention_blocks} must lie in 0..{self.depth - 1}"
            )
        if self.window_tokens < 1:
            raise ConfigError(
                f"window_size {self.window_size} holds no token of {self.patch_size * self.merge_size} pixels"
            )

    @property
    def window_tokens(self) -> int:
        """Side of an attention window in merged tokens."""
        return self.window_size // self.merge_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class QwenTokensConfig(VLConfig):
    """What Qwen's families have alike: the ids around an image, a tower that ends in the model's width."""

    vision: QwenTowerConfig
    image_token_id: int = 151655
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    BOUNDS: ClassVar[Bounds] = dict.fromkeys(
        ("image_token_id", "vision_start_token_id", "vision_end_token_id"), FROM_ZERO
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vision.out_hidden_size != self.decoder.hidden_size:
            raise ConfigError(
                f"model.vlm.vision.out_hidden_size ({self.vision.out_hidden_size}) must equal the width of "
                f"the language model, model.vlm.decoder.hidden_size ({self.decoder.hidden_size})"
            )


@dataclasses.dataclass(frozen=True)
class QwenVLConfig(QwenTokensConfig):
    """Qwen2.5-VL: vision tower, language model and the token ids that tie them together."""

    decoder: LanguageModelConfig = LanguageModelConfig()
    vision: QwenVisionConfig = QwenVisionConfig()

    @classmethod
    def qwen2_5_vl_3b(cls) -> QwenVLConfig:
        """Dimensions of Qwen2.5-VL-3B."""
        return cls(
            decoder=LanguageModelConfig(
                vocab_size=151936,
                hidden_size=2048,
                intermediate_size=11008,
                num_layers=36,
                num_heads=16,
                num_kv_heads=2,
                tie_word_embeddings=True,
            ),
            vision=QwenVisionConfig(out_hidden_size=2048),
        )

    @classmethod
    def qwen2_5_vl_7b(cls) -> QwenVLConfig:
        """Dimensions of Qwen2.5-VL-7B."""
        return cls()


# Patches to visual tokens: patch embedding, blocks with 2-D rotary embedding that attend within windows (a
# few to the whole image), and a merger of 2x2 patches into one token of the language model's width. Shapes
# are static for a grid; images of one call share it, and a caller with several grids loops over them.


Heads = Float[Array, "I P K H"]


class VisionAttention(nnx.Module):
    """Self-attention over patches in window order, within windows or over the whole image."""

    def __init__(self, config: QwenVisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        heads, names = (config.num_heads, config.head_dim), ("vision_heads", "head_dim")
        model = (config.hidden_size,)
        make = functools.partial(Projection, bias=True, compute=compute, rngs=rngs)
        self.qkv = make(model, (3, *heads), ("vision_embed",), (None, *names))
        self.o = make(heads, model, names, ("vision_embed",))
        self.attention_choice = compute.attention

    def __call__(
        self, x: Float[Array, "I P D"], rotary: RotaryTables, layout: WindowLayout, full: Bool[Array, ""]
    ) -> Float[Array, "I P D"]:
        """Attends over the whole image where `full`, else within each window."""
        q, k, v = jnp.moveaxis(self.qkv(x), -3, 0)
        q, k = rotate(q, rotary), rotate(k, rotary)
        # A branch, not a mask: a windowed block must not pay for the square of the patch count.
        attended = jax.lax.cond(
            full, self._whole_image, functools.partial(self._windowed, layout=layout), q, k, v
        )
        return self.o(attended)

    def _whole_image(self, q: Heads, k: Heads, v: Heads) -> Heads:
        return attend(q, k, v, choice=self.attention_choice, axes=IMAGE_AXES)

    def _windowed(self, q: Heads, k: Heads, v: Heads, *, layout: WindowLayout) -> Heads:
        images, _, heads, channels = q.shape
        windows, capacity = layout.slots.shape
        if layout.ragged:
            # Smaller windows are filled up with copies, which the key lengths hide.
            q, k, v = (each[:, layout.slots.reshape(-1)] for each in (q, k, v))
        q, k, v = (each.reshape(images * windows, capacity, heads, channels) for each in (q, k, v))
        lengths = jnp.tile(jnp.asarray(layout.window_lengths, jnp.int32), images) if layout.ragged else None
        attended = attend(q, k, v, choice=self.attention_choice, lengths=lengths, axes=IMAGE_AXES)
        attended = attended.reshape(images, windows * capacity, heads, channels)
        return attended[:, layout.places] if layout.ragged else attended


class VisionBlock(nnx.Module):
    """One block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: QwenVisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        norm = functools.partial(
            RMSNorm, config.hidden_size, config.norm_eps, name="vision_embed", compute=compute, rngs=rngs
        )
        self.attention_norm = norm()
        self.attention = VisionAttention(config, compute=compute, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = SwiGLU(
            config.hidden_size,
            config.intermediate_size,
            ("vision_embed", "vision_mlp"),
            bias=True,
            compute=compute,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "I P D"], rotary: RotaryTables, layout: WindowLayout, full: Bool[Array, ""]
    ) -> Float[Array, "I P D"]:
        """Runs the block."""
        x = constrain(x + self.attention(self.attention_norm(x), rotary, layout, full), "images", None, None)
        return constrain(x + self.mlp(self.mlp_norm(x)), "images", None, None)


class QwenVision(nnx.Module):
    """The whole tower."""

    def __init__(self, config: QwenVisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws a fresh tower.

        Args:
            config: architecture.
            compute: dtypes, rematerialisation, attention kernel.
            rngs: random streams (`params`).
        """
        self.config = config
        self.compute = compute
        self.patch_embedding = Projection(
            (config.patch_channels,),
            (config.hidden_size,),
            (None,),
            ("vision_embed",),
            bias=False,
            compute=compute,
            rngs=rngs,
        )
        self.layers = stack_layers(
            lambda streams: VisionBlock(config, compute=compute, rngs=streams), config.depth, rngs
        )
        norm = RMSNorm(config.hidden_size, config.norm_eps, name="vision_embed", compute=compute, rngs=rngs)
        merged, out = config.merged_size, config.out_hidden_size
        self.merger = Projector(merged, merged, out, norm=norm, compute=compute, rngs=rngs)

    def __call__(self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]) -> Float[Array, "I V D"]:
        """Encodes images of one size.

        Args:
            pixel_values: flattened patches as transformers' Qwen2-VL image processor lays them out:
                normalised channels x 2 equal frames x 14 x 14, patches of a 2x2 block next to each other.
            grid: patch rows and columns, the same for all images; static.

        Returns:
            Visual tokens in row-major order of the merged grid, in the language model's width.

        Raises:
            ConfigError: the pixels do not fit the grid or the grid does not divide into merged tokens.
        """
        config = self.config
        layout = window_layout(grid, config.merge_size, config.window_tokens)
        check_patches(pixel_values, grid, config)
        rotary = vision_rotary(layout.rows, layout.columns, config.head_dim)
        full = jnp.asarray(full_attention_flags(config.depth, config.full_attention_blocks))

        def apply(block: VisionBlock, hidden: Any, full: Any) -> tuple[Any, None]:
            return block(hidden, rotary, layout, full), None

        pixel_values = constrain(pixel_values, "images", None, None)
        hidden = constrain(self.patch_embedding(pixel_values[:, layout.patch_order]), "images", None, None)
        hidden, _ = scan_layers(self.layers, apply, hidden, full, self.compute)
        return self.merger(hidden)[:, layout.token_inverse]


class MultimodalRope(VisionLanguageModel):
    """A model whose rotary positions know rows and columns of images (M-RoPE)."""

    def sequence_positions(
        self, token_ids: Int[np.ndarray, " S"], visual_grids: Sequence[tuple[int, int]]
    ) -> RopePositions:
        """Multimodal positions; every run of image tokens is an image."""
        spans = find_image_spans(token_ids, visual_grids, self.config.image_token_id)
        return mrope_positions(len(token_ids), spans)


class QwenVL(MultimodalRope):
    """The vision-language model; its vision tower hands over tokens of the language model's width."""

    config: QwenVLConfig

    def draw_vision(self, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws the tower."""
        self.vision = QwenVision(self.config.vision, compute=compute, rngs=rngs)

    def encode_images(
        self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]
    ) -> Float[Array, "I V D"]:
        """Visual tokens of images that share a patch grid; see `QwenVision`."""
        return self.vision(pixel_values, grid)


class QwenChat(ChatML):
    """ChatML behind a system turn, images between vision_start and vision_end.

    Of an answer the first three ids are not supervised; the end and the newline behind it are, as published.
    """

    special_tokens = chat_ml_tokens("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    system: ClassVar[str | None] = "You are a helpful assistant."

    def header_length(self, tokenizer: Tokenizer) -> int:
        """`<|im_start|>`, `assistant`, newline, as published: three, whatever the vocabulary."""
        return 3

    def ego_feature(self, tokenizer: Tokenizer) -> tuple[list[int], int]:
        """[vision_end, image, vision_end]: vision_start holds vision_end's id (fidelity Q12)."""
        end = tokenizer.special["vision_end"]
        return [end, tokenizer.special["image"], end], 1


class QwenImageProcessor(ImageProcessor):
    """Bicubic resize to whole visual tokens, then patches of two equal frames, window-free order.

    transformers' Qwen2VLImageProcessor written out: rescaling and normalisation are left to the device.
    """

    published = ProcessorSettings(size=(("shortest_edge", 56 * 56), ("longest_edge", 28 * 28 * 16384)))
    """Pixels of an image at least and at most; others are scaled up or down."""
    fallback = ProcessorSettings(size=(("shortest_edge", 56 * 56), ("longest_edge", 28 * 28 * 1280)))

    def __init__(
        self,
        vision: Any,
        image_size: tuple[int, int],
        settings: ProcessorSettings | None = None,
    ) -> None:
        """See `ImageProcessor`.

        Raises:
            ConfigError: the image is more than 200 times as long as it is wide, or the settings lack a limit.
        """
        super().__init__(vision, image_size, settings)
        side = vision.patch_size * vision.merge_size
        limits = (settings or self.published).sizes
        if not {"shortest_edge", "longest_edge"} <= set(limits):
            raise ConfigError(
                f"size {dict(limits)} must have shortest_edge and longest_edge: least, most pixels"
            )
        least, most = limits["shortest_edge"], limits["longest_edge"]
        if settings is None:  # views as small as the caller likes
            least = min(least, side * side)
        self.resized = smart_resize(*image_size, factor=side, min_pixels=least, max_pixels=most)
        self.patch_grid = (self.resized[0] // vision.patch_size, self.resized[1] // vision.patch_size)
        self.token_grid = (self.resized[0] // side, self.resized[1] // side)
        # Published (fidelity Q15): intrinsics count the pixels of the image handed in, even where the
        # processor resizes it once more (640 to 644).
        self.intrinsics_size = image_size

    def cut(self, images: UInt8[np.ndarray | Array, "N h w 3"]) -> UInt8[np.ndarray | Array, "N P K"]:
        """Patches in the order of merged tokens; K is channel, frame (two equal ones), row, column."""
        vision, (rows, columns) = self.vision, self.token_grid
        merge, side = vision.merge_size, vision.patch_size
        cut = images.reshape(images.shape[0], rows, merge, side, columns, merge, side, 3)
        cut = cut.transpose(0, 1, 4, 2, 5, 7, 3, 6)[..., None, :, :]
        frames = cut.repeat(vision.temporal_patch_size, axis=-3)
        return frames.reshape(images.shape[0], rows * columns * merge * merge, -1)


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size Qwen's processor resizes to: whole tokens, about the same shape, pixels within bounds.

    Args:
        height: pixels.
        width: pixels.
        factor: side of a visual token in pixels.
        min_pixels: of the result.
        max_pixels: likewise.

    Returns:
        Height and width.

    Raises:
        ConfigError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ConfigError(f"an image of {height}x{width} pixels is too long for Qwen's image processor")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor * factor > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif rows * columns * factor * factor < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


def vision_flops(config: QwenVLConfig, patch_grid: tuple[int, int]) -> int:
    """Operations of the tower's forward pass over one image, merger included."""
    vision = config.vision
    patches, width = patch_grid[0] * patch_grid[1], vision.hidden_size
    layout = window_layout(patch_grid, vision.merge_size, vision.window_tokens)
    windows, capacity = layout.slots.shape
    full = len(vision.full_attention_blocks)
    block = 2 * patches * (4 * width * width + 3 * width * vision.intermediate_size)
    scores = full * patches**2 + (vision.depth - full) * windows * capacity**2
    merged, tokens = vision.merged_size, patches // vision.merge_size**2
    merger = projector_flops(tokens, merged, merged, vision.out_hidden_size)
    embedding = 2 * patches * vision.patch_channels * width
    return vision.depth * block + 4 * scores * width + merger + embedding


FAMILY = Family(
    name="qwen2_5_vl",
    config=QwenVLConfig,
    model=QwenVL,
    chat=QwenChat(),
    image_processor=QwenImageProcessor,
    position_ids=mrope_positions,
    vision_flops=vision_flops,
    interop="spacedrive_jax.interop.qwen2_5_vl",
)

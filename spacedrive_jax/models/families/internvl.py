"""InternVL3 in transformers' layout: InternViT, pixel shuffle, a two-layer projector and a Qwen2.5 decoder
(Zhu et al. 2025).

Images are not cut into tiles: a view is one square image, as the published processor makes it when
`crop_to_patches` is off.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from spacedrive_jax.bounds import FROM_ZERO, POSITIVE, SIDE, Bounds, check_bounds
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import (
    ComputeConfig,
    LanguageModelConfig,
    LoraConfig,
    VisionConfig,
    VLConfig,
)
from spacedrive_jax.models.family import (
    IGNORE,
    IMAGE_PLACEHOLDER,
    ChatTemplate,
    ChatTokens,
    Family,
    Message,
    Tokenizer,
)
from spacedrive_jax.models.image_processor import ImageProcessor, ProcessorSettings
from spacedrive_jax.models.layers import INIT_STD, LayerNorm, Projection, parameter, scan_layers, stack_layers
from spacedrive_jax.models.partitioning import constrain
from spacedrive_jax.models.positions import RopePositions, plain_positions, plain_sequence_positions
from spacedrive_jax.models.vision_language import VisionLanguageModel
from spacedrive_jax.models.vision_transformer import (
    VisionBlock,
    block_flops,
    check_patches,
    flatten_patches,
    pixel_shuffle,
)

PROJECTOR_EPS = 1e-5
"""Of the projector's norm (torch's default)."""


@dataclasses.dataclass(frozen=True)
class InternVisionConfig(VisionConfig):
    """The InternViT vision transformer (Chen et al. 2024); the defaults are InternViT-300M at 448 pixels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    depth: int = 24
    num_heads: int = 16
    norm_eps: float = 1e-6
    merge_size: int = 2
    """Side of a visual token in patches (one over transformers' `downsample_ratio`)."""
    image_size: int = 448
    """Side of the square images in pixels; the position embedding is learnt for this size alone."""
    attention_bias: bool = True
    """Queries, keys and values have biases."""
    last_norm: bool = False
    """A norm behind the last block (transformers' `use_mean_pooling` is off)."""
    layer_scale: float = 0.1
    """First value of the scales on what attention and MLP add."""

    BOUNDS: ClassVar[Bounds] = {**VisionConfig.BOUNDS, "image_size": SIDE, "layer_scale": POSITIVE}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % (self.patch_size * self.merge_size):
            raise ConfigError(
                f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size}) times "
                f"merge_size ({self.merge_size})"
            )

    @property
    def grid_side(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class InternVLConfig(VLConfig):
    """InternVL3: InternViT, pixel shuffle, a projector, a Qwen2.5 decoder; the defaults are those of 1B."""

    decoder: LanguageModelConfig = LanguageModelConfig(
        vocab_size=151674,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        mrope_section=(32,),
        max_position_embeddings=32768,
        dynamic_rope_factor=2.0,
    )
    vision: InternVisionConfig = InternVisionConfig()
    image_token_id: int = 151667

    BOUNDS: ClassVar[Bounds] = {"image_token_id": FROM_ZERO}

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model.vlm")
        if len(self.decoder.mrope_section) != 1 or not self.decoder.qkv_bias:
            raise ConfigError(
                "InternVL3's decoder has one-dimensional rotary positions and attention biases; got "
                f"mrope_section {self.decoder.mrope_section}, qkv_bias {self.decoder.qkv_bias}"
            )

    @classmethod
    def internvl3_1b(cls) -> InternVLConfig:
        """Dimensions of InternVL3-1B (Qwen2.5-0.5B)."""
        return cls()

    @classmethod
    def internvl3_2b(cls) -> InternVLConfig:
        """Dimensions of InternVL3-2B (Qwen2.5-1.5B)."""
        return cls._with_decoder(1536, 8960, 28, 12, 2)

    @classmethod
    def internvl3_8b(cls) -> InternVLConfig:
        """Dimensions of InternVL3-8B (Qwen2.5-7B)."""
        return cls._with_decoder(3584, 18944, 28, 28, 4)

    @classmethod
    def _with_decoder(cls, width: int, inner: int, layers: int, heads: int, kv_heads: int) -> InternVLConfig:
        decoder = dataclasses.replace(
            cls().decoder,
            hidden_size=width,
            intermediate_size=inner,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=128,
            mrope_section=(64,),
        )
        return cls(decoder=decoder)


class InternVision(nnx.Module):
    """Patch embedding, a class token, learnt positions, pre-norm blocks whose additions are scaled."""

    def __init__(self, config: InternVisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws a fresh tower.

        Args:
            config: Architecture.
            compute: Dtypes, rematerialisation, attention kernel.
            rngs: Random streams (`params`).
        """
        self.config = config
        self.compute = compute
        width = config.hidden_size
        learnt = functools.partial(
            parameter,
            nnx.Param,
            jax.nn.initializers.normal(INIT_STD),
            dtype=compute.storage_dtype,
            rngs=rngs,
        )
        self.patch_embedding = Projection(
            (config.patch_channels,),
            (width,),
            (None,),
            ("vision_embed",),
            bias=True,
            compute=compute,
            rngs=rngs,
        )
        self.class_embedding = learnt((width,), ("vision_embed",))
        self.position_embedding = learnt((config.grid_side**2 + 1, width), (None, "vision_embed"))
        block = functools.partial(
            VisionBlock,
            config,
            activation=erf_gelu,
            qkv_bias=config.attention_bias,
            layer_scale=config.layer_scale,
            compute=compute,
        )
        self.layers = stack_layers(lambda streams: block(rngs=streams), config.depth, rngs)
        self.last_norm = (
            LayerNorm(width, config.norm_eps, name="vision_embed", compute=compute, rngs=rngs)
            if config.last_norm
            else None
        )

    def __call__(self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]) -> Float[Array, "I P D"]:
        """Encodes images.

        Args:
            pixel_values: Flattened normalised patches in row-major order (`flatten_patches`).
            grid: Patch rows and columns; the tower knows one size only.

        Returns:
            The patches' hidden states behind the last block, in row-major order.

        Raises:
            ConfigError: If the grid is not the tower's or the pixels do not fit it.
        """
        config, side = self.config, self.config.grid_side
        if tuple(grid) != (side, side):
            raise ConfigError(
                f"image grid {grid[0]}x{grid[1]} must be {side}x{side} patches: InternViT's positions are "
                f"learnt for images of {config.image_size}x{config.image_size} pixels"
            )
        check_patches(pixel_values, (side, side), config)

        def apply(block: VisionBlock, hidden: Any, _: None) -> tuple[Any, None]:
            return block(hidden), None

        patches = self.patch_embedding(constrain(pixel_values, "images", None, None))
        first = jnp.broadcast_to(
            self.class_embedding[...].astype(patches.dtype), (len(patches), 1, config.hidden_size)
        )
        hidden = jnp.concatenate([first, patches], axis=1)
        hidden = hidden + self.position_embedding[...].astype(hidden.dtype)
        hidden, _ = scan_layers(self.layers, apply, hidden, None, self.compute)
        if self.last_norm is not None:
            hidden = self.last_norm(hidden)
        return hidden[:, 1:]


def erf_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by the error function."""
    return jax.nn.gelu(x, approximate=False)


class InternProjector(nnx.Module):
    """Norm, then a two-layer MLP, from the channels of a square of patches to the decoder's width."""

    def __init__(self, config: InternVLConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        merged, wide = config.vision.hidden_size * config.vision.merge_size**2, config.decoder.hidden_size
        make = functools.partial(Projection, bias=True, compute=compute, rngs=rngs)
        self.norm = LayerNorm(merged, PROJECTOR_EPS, name="vision_embed", compute=compute, rngs=rngs)
        self.hidden = make((merged,), (wide,), ("vision_embed",), ("vision_mlp",))
        self.out = make((wide,), (wide,), ("vision_mlp",), ("embed",))

    def __call__(self, x: Float[Array, "I V C"]) -> Float[Array, "I V D"]:
        """Maps each visual token."""
        return self.out(erf_gelu(self.hidden(self.norm(x))))


class InternVL(VisionLanguageModel):
    """The vision-language model; a square of patches is a visual token."""

    config: InternVLConfig

    def draw_vision(self, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws tower and projector."""
        self.vision = InternVision(self.config.vision, compute=compute, rngs=rngs)
        self.projector = InternProjector(self.config, compute=compute, rngs=rngs)

    def encode_images(
        self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]
    ) -> Float[Array, "I V D"]:
        """Visual tokens, one per square of patches; see `InternVision`."""
        features = self.vision(pixel_values, grid)
        return self.projector(pixel_shuffle(features, grid, self.config.vision.merge_size))

    def sequence_positions(
        self, token_ids: Int[np.ndarray, " S"], visual_grids: Sequence[tuple[int, int]]
    ) -> RopePositions:
        """Plain positions 0, 1, 2, ... on every axis, images or not."""
        return plain_sequence_positions(token_ids, visual_grids, self.config.image_token_id)


class InternVLChat(ChatTemplate):
    """`<|im_start|>role`, newline, text, `<|im_end|>`, newline; images between `<img>` and `</img>`.

    As transformers' layout has it there is no system turn. Answers, their ends and the newline behind are
    supervised; of them no position token (unless asked for).
    """

    special_tokens: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "turn_start": ("<|im_start|>",),
            "turn_end": ("<|im_end|>",),
            "image": ("<IMG_CONTEXT>",),
            "padding": ("<|endoftext|>", "<|pad|>"),
            "vision_start": ("<img>",),
            "vision_end": ("</img>",),
        }
    )
    added_tokens = ("<img>", "</img>", "<IMG_CONTEXT>")

    def apply_chat_template(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tokens_per_image: int,
        *,
        add_generation_prompt: bool = False,
        supervise_positions: bool = False,
    ) -> ChatTokens:
        """Lays out a conversation; see `ChatTemplate`."""
        image = f"<img>{'<IMG_CONTEXT>' * tokens_per_image}</img>"
        header = tokenizer.encode("<|im_start|>assistant\n")
        ignored = None if supervise_positions else tokenizer.position
        token_ids: list[int] = []
        labels: list[int] = []
        for message in messages:
            content = message.content.replace(IMAGE_PLACEHOLDER, image)
            ids = tokenizer.encode(f"<|im_start|>{message.role}\n{content}<|im_end|>\n")
            unsupervised = len(header) if message.role == "assistant" else len(ids)
            token_ids += ids
            labels += [IGNORE] * unsupervised
            labels += [IGNORE if token == ignored else token for token in ids[unsupervised:]]
        if add_generation_prompt:
            token_ids += header
            labels += [IGNORE] * len(header)
        images = [index for index, token in enumerate(token_ids) if token == tokenizer.special["image"]]
        return ChatTokens(token_ids, labels, images[::tokens_per_image])

    def ego_feature(self, tokenizer: Tokenizer) -> tuple[list[int], int]:
        """`<img>`, one image token, `</img>`."""
        special = tokenizer.special
        return [special["vision_start"], special["image"], special["vision_end"]], 1

    def image_end(self, tokenizer: Tokenizer) -> int:
        """`</img>`."""
        return tokenizer.special["vision_end"]


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InternVLImageProcessor(ImageProcessor):
    """Bicubic resize to the tower's square, then patches; the aspect ratio is not kept."""

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    published = ProcessorSettings(IMAGENET_MEAN, IMAGENET_STD)
    """The size is that of the tower."""
    fallback = ProcessorSettings(size=(("height", 384), ("width", 384)))

    def __init__(
        self,
        vision: InternVisionConfig,
        image_size: tuple[int, int],
        settings: ProcessorSettings | None = None,
    ) -> None:
        """See `ImageProcessor`.

        Raises:
            ConfigError: the settings resize to another size than the tower's.
        """
        super().__init__(vision, image_size, settings)
        tower = {"height": vision.image_size, "width": vision.image_size}
        if settings is not None and settings.size and dict(settings.size) != tower:
            raise ConfigError(
                f"images must be resized to the tower's {vision.image_size}x{vision.image_size} pixels; the "
                f"processor's settings say {dict(settings.size)}"
            )
        side = vision.grid_side
        self.patch_grid = (side, side)
        self.token_grid = (side // vision.merge_size, side // vision.merge_size)
        self.intrinsics_size = self.resized = (vision.image_size, vision.image_size)

    def cut(self, images: UInt8[np.ndarray | Array, "N h w 3"]) -> UInt8[np.ndarray | Array, "N P K"]:
        """Patches in row-major order; K is channel, row, column."""
        return flatten_patches(images.transpose(0, 3, 1, 2), self.vision.patch_size)


def vision_flops(config: InternVLConfig, patch_grid: tuple[int, int]) -> int:
    """Operations of the tower's forward pass over one image, projector included."""
    vision, wide = config.vision, config.decoder.hidden_size
    patches, tokens = patch_grid[0] * patch_grid[1], patch_grid[0] * patch_grid[1] // vision.merge_size**2
    embedding = 2 * patches * vision.patch_channels * vision.hidden_size
    projector = 2 * tokens * wide * (vision.hidden_size * vision.merge_size**2 + wide)
    # A token more than patches: the class token.
    return vision.depth * block_flops(vision, patches + 1) + embedding + projector


def lora(rank: int) -> LoraConfig:
    """SpaceDrive's adapters as on Qwen2.5-VL: q, k, v, o with alpha 16."""
    return LoraConfig(rank=rank)


FAMILY = Family(
    name="internvl",
    config=InternVLConfig,
    model=InternVL,
    chat=InternVLChat(),
    image_processor=InternVLImageProcessor,
    position_ids=plain_positions,
    vision_flops=vision_flops,
    lora=lora,
    interop="spacedrive_jax.interop.internvl",
)

"""InternVL3 in transformers' layout: InternViT, pixel shuffle, a two-layer projector and a
Qwen2.5 language model (Zhu et al. 2025).

Images are not cut into tiles: a view is one square image, as the published processor makes it when
`crop_to_patches` is off.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float

from spacedrive_jax.bounds import POSITIVE, Bounds
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig, SquareVisionConfig, VLConfig
from spacedrive_jax.models.family import ChatML, Family, chat_ml_tokens
from spacedrive_jax.models.image_processor import ProcessorSettings, SquareImageProcessor
from spacedrive_jax.models.layers import LayerNorm
from spacedrive_jax.models.vision_language import VisionLanguageModel
from spacedrive_jax.models.vision_transformer import (
    Projector,
    VisionTransformer,
    erf_gelu,
    pixel_shuffle,
    projector_flops,
    tower_flops,
)

PROJECTOR_EPS = 1e-5
"""Of the projector's norm (torch's default)."""


@dataclasses.dataclass(frozen=True)
class InternVisionConfig(SquareVisionConfig):
    """The InternViT vision transformer (Chen et al. 2024); the defaults are InternViT-300M at 448 pixels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    depth: int = 24
    num_heads: int = 16
    norm_eps: float = 1e-6
    merge_size: int = 2
    """Side of a visual token in patches (one over transformers' `downsample_ratio`)."""
    image_size: int = 448
    attention_bias: bool = True
    """Queries, keys and values have biases."""
    last_norm: bool = False
    """A norm behind the last block (transformers' `use_mean_pooling` is off)."""
    layer_scale: float = 0.1
    """First value of the scales on what attention and MLP add."""

    BOUNDS: ClassVar[Bounds] = {**SquareVisionConfig.BOUNDS, "layer_scale": POSITIVE}


@dataclasses.dataclass(frozen=True)
class InternVLConfig(VLConfig):
    """InternVL3: InternViT, pixel shuffle, a projector, Qwen2.5; the defaults are those of 1B."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_plain_decoder("InternVL3", qkv_bias=True)

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


class InternVL(VisionLanguageModel):
    """The vision-language model; a square of patches is a visual token."""

    config: InternVLConfig

    def draw_vision(self, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws tower and projector."""
        vision, wide = self.config.vision, self.config.decoder.hidden_size
        merged = vision.hidden_size * vision.merge_size**2
        self.vision = VisionTransformer(
            vision,
            activation=erf_gelu,
            class_token=True,
            last_norm=vision.last_norm,
            qkv_bias=vision.attention_bias,
            layer_scale=vision.layer_scale,
            compute=compute,
            rngs=rngs,
        )
        norm = LayerNorm(merged, PROJECTOR_EPS, name="vision_embed", compute=compute, rngs=rngs)
        self.projector = Projector(
            merged, wide, wide, norm=norm, norm_merged=True, compute=compute, rngs=rngs
        )

    def encode_images(
        self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]
    ) -> Float[Array, "I V D"]:
        """Visual tokens, one per square of patches; see `VisionTransformer`."""
        features = self.vision(pixel_values, grid)
        return self.projector(pixel_shuffle(features, grid, self.config.vision.merge_size))


class InternVLChat(ChatML):
    """ChatML with images between `<img>` and `</img>`; as transformers' layout has it, no system turn."""

    special_tokens = chat_ml_tokens("<img>", "<IMG_CONTEXT>", "</img>")
    added_tokens = ("<img>", "</img>", "<IMG_CONTEXT>")


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InternVLImageProcessor(SquareImageProcessor):
    """Bicubic resize to the tower's square, then patches; the aspect ratio is not kept."""

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    published = ProcessorSettings(IMAGENET_MEAN, IMAGENET_STD)
    """The size is that of the tower."""
    fallback = ProcessorSettings(size=(("height", 384), ("width", 384)))

    def square_side(self) -> int:
        """The tower's.

        Raises:
            ConfigError: the settings resize to another size.
        """
        side, settings = self.vision.image_size, self.settings
        if settings is not None and settings.size and dict(settings.size) != {"height": side, "width": side}:
            raise ConfigError(
                f"images must be resized to the tower's {side}x{side} pixels; the processor's settings say "
                f"{dict(settings.size)}"
            )
        return side


def vision_flops(config: InternVLConfig, patch_grid: tuple[int, int]) -> int:
    """Operations of the tower's forward pass over one image, projector included."""
    vision, wide, squared = config.vision, config.decoder.hidden_size, config.vision.merge_size**2
    tokens = patch_grid[0] * patch_grid[1] // squared
    projector = projector_flops(tokens, vision.hidden_size * squared, wide, wide)
    return projector + tower_flops(vision, patch_grid, class_token=True)


FAMILY = Family(
    name="internvl",
    config=InternVLConfig,
    model=InternVL,
    chat=InternVLChat(),
    image_processor=InternVLImageProcessor,
    vision_flops=vision_flops,
    interop="spacedrive_jax.interop.internvl",
)

"""SmolVLM and SmolVLM2: SigLIP, pixel shuffle and a LLaMA language model (Marafioti et al. 2025).

Images are not split into tiles: a view is one square image, as the published processor makes it when
`do_image_splitting` is off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig, SquareVisionConfig, VLConfig
from spacedrive_jax.models.family import IMAGE_PLACEHOLDER, ChatTemplate, Family, Message, Tokenizer
from spacedrive_jax.models.image_processor import HALVES, ProcessorSettings, SquareImageProcessor, resize
from spacedrive_jax.models.layers import Projection
from spacedrive_jax.models.vision_language import VisionLanguageModel
from spacedrive_jax.models.vision_transformer import VisionTransformer, pixel_shuffle, tanh_gelu, tower_flops


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig(SquareVisionConfig):
    """SigLIP's vision transformer (Zhai et al. 2023), as SmolVLM uses it; the defaults are base/16 at 512."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    depth: int = 12
    num_heads: int = 12
    norm_eps: float = 1e-6
    patch_size: int = 16
    merge_size: int = 4
    """Side of a visual token in patches (transformers' `scale_factor`)."""
    image_size: int = 512
    """Side of the published processor's square images in pixels. What `patch_size` leaves over at their right
    and bottom is not seen (384 pixels are 27 patches of 14)."""

    leaves_border = True


@dataclasses.dataclass(frozen=True)
class SmolVLMConfig(VLConfig):
    """SmolVLM: SigLIP, pixel shuffle, one linear layer, LLaMA; the defaults are those of 500M."""

    decoder: LanguageModelConfig = LanguageModelConfig(
        vocab_size=49280,
        hidden_size=960,
        intermediate_size=2560,
        num_layers=32,
        num_heads=15,
        num_kv_heads=5,
        head_dim=64,
        rope_theta=100_000.0,
        mrope_section=(32,),
        norm_eps=1e-5,
        qkv_bias=False,
    )
    vision: SiglipVisionConfig = SiglipVisionConfig()
    image_token_id: int = 49190
    model_type: Literal["smolvlm", "idefics3"] = "smolvlm"
    """What its config.json says: SmolVLM2 is `smolvlm`, the first SmolVLM is `idefics3`; they compute the
    same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_plain_decoder("SmolVLM", qkv_bias=False)

    @classmethod
    def smolvlm_256m(cls) -> SmolVLMConfig:
        """Dimensions of SmolVLM-256M and SmolVLM2-256M (SmolLM2-135M)."""
        decoder = dataclasses.replace(
            cls().decoder,
            hidden_size=576,
            intermediate_size=1536,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
        )
        return cls(decoder=decoder)

    @classmethod
    def smolvlm_500m(cls) -> SmolVLMConfig:
        """Dimensions of SmolVLM-500M and SmolVLM2-500M (SmolLM2-360M)."""
        return cls()

    @classmethod
    def smolvlm_2b(cls) -> SmolVLMConfig:
        """Dimensions of SmolVLM2-2.2B (SmolLM2-1.7B, SigLIP so400m/14 at 384)."""
        decoder = dataclasses.replace(
            cls().decoder,
            hidden_size=2048,
            intermediate_size=8192,
            num_layers=24,
            num_heads=32,
            num_kv_heads=32,
            rope_theta=130_000.0,
        )
        return cls(
            decoder=decoder,
            vision=SiglipVisionConfig(
                hidden_size=1152,
                intermediate_size=4304,
                depth=27,
                num_heads=16,
                patch_size=14,
                merge_size=3,
                image_size=384,
            ),
        )


class SiglipVision(VisionTransformer):
    """SigLIP's tower; grids of other sizes than its own take the learnt positions at their places."""

    config: SiglipVisionConfig

    def positions(self, grid: tuple[int, int]) -> Float[Array, "T D"]:
        """The learnt position at each patch's share of the image.

        Raises:
            ConfigError: the grid is not square or not of whole visual tokens.
        """
        config = self.config
        if grid[0] != grid[1] or grid[0] % config.merge_size:
            raise ConfigError(
                f"image grid {grid[0]}x{grid[1]} must be square, of visual tokens of "
                f"{config.merge_size}x{config.merge_size} patches: SmolVLM's images are"
            )
        return self.position_embedding[...][position_buckets(grid, config.grid_side)]


def position_buckets(grid: tuple[int, int], side: int) -> Int[np.ndarray, " P"]:
    """Which of the side x side learnt positions each patch of a grid has: the one at its share of the image.

    Worked out in float32 as published, so that 1/3 may fall on either side of a third; a grid of the tower's
    own size has each position once at all released sizes.
    """
    count = int(np.ceil((1.0 - 1.0 / side) / (1.0 / side)))
    boundaries = (1.0 / side + np.arange(count) * (1.0 / side)).astype(np.float32)

    def buckets(patches: int) -> Int[np.ndarray, " n"]:
        step = np.float32(1.0) / np.float32(patches)
        share = np.minimum(np.arange(patches, dtype=np.float32) * step, np.float32(1.0 - 1e-6))
        return np.searchsorted(boundaries, share, side="right")

    rows, columns = grid
    return (buckets(rows)[:, None] * side + buckets(columns)).reshape(-1)


class SmolVLM(VisionLanguageModel):
    """The vision-language model; a square of patches is a visual token."""

    config: SmolVLMConfig

    def draw_vision(self, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws tower and connector."""
        vision, wide = self.config.vision, self.config.decoder.hidden_size
        self.vision = SiglipVision(vision, activation=tanh_gelu, compute=compute, rngs=rngs)
        self.connector = Projection(
            (vision.hidden_size * vision.merge_size**2,),
            (wide,),
            ("vision_embed",),
            ("embed",),
            bias=False,
            compute=compute,
            rngs=rngs,
        )

    def encode_images(
        self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]
    ) -> Float[Array, "I V D"]:
        """Visual tokens, one per square of patches; see `SiglipVision`."""
        features = self.vision(pixel_values, grid)
        return self.connector(pixel_shuffle(features, grid, self.config.vision.merge_size))


class SmolVLMChat(ChatTemplate):
    """`<|im_start|>`, then per turn `User: question<end_of_utterance>` or `Assistant: …`, and a newline.

    A turn that begins with an image has no space behind `User:`. An image is its visual tokens between
    `<fake_token_around_image><global-img>` and `<fake_token_around_image>`, as published for images that are
    not split.
    """

    special_tokens: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "begin": ("<|im_start|>",),
            "turn_end": ("<end_of_utterance>",),
            "image": ("<image>",),
            "padding": ("<|im_end|>", "<|endoftext|>"),
            "image_border": ("<fake_token_around_image>",),
            "whole_image": ("<global-img>",),
        }
    )
    added_tokens = ("<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>")

    beginning = "<|im_start|>"
    answer_header = "Assistant:"

    def image(self, tokens_per_image: int) -> str:
        """The border, what says that the image is whole, visual tokens, the border."""
        border = "<fake_token_around_image>"
        return f"{border}<global-img>{'<image>' * tokens_per_image}{border}"

    def turn(self, message: Message) -> str:
        """Role, text, end."""
        space = "" if message.content.startswith(IMAGE_PLACEHOLDER) else " "
        return f"{message.role.capitalize()}:{space}{message.content}<end_of_utterance>\n"

    def ego_feature(self, tokenizer: Tokenizer) -> tuple[list[int], int]:
        """One image token between two borders."""
        border = tokenizer.special["image_border"]
        return [border, tokenizer.special["image"], border], 1

    def image_end(self, tokenizer: Tokenizer) -> int:
        """The border behind an image."""
        return tokenizer.special["image_border"]


class SmolVLMImageProcessor(SquareImageProcessor):
    """Resize to a square, then patches; the aspect ratio is not kept.

    The published processor, with `do_image_splitting` off, resizes the longer side first, to four times the
    square's as released, and then to the square. SpaceDrive's views go at once to a square of whole patches,
    so that no border is left out.
    """

    mean = std = HALVES
    published = ProcessorSettings(HALVES, HALVES)
    """Sizes are those of the tower."""
    fallback = ProcessorSettings(HALVES, HALVES, size=(("longest_edge", 4 * 364), ("max_longest_edge", 364)))
    resample = Image.Resampling.LANCZOS
    pads = True  # what it does to images of several sizes, of which there are none behind the squares

    def square_side(self) -> int:
        """That of whole patches, or what the settings ask for.

        Raises:
            ConfigError: that is not of whole visual tokens.
        """
        vision, settings = self.vision, self.settings
        sizes = {} if settings is None else settings.sizes
        whole = vision.grid_side * vision.patch_size
        side = whole if settings is None else sizes.get("max_longest_edge", vision.image_size)
        patches, merge = side // vision.patch_size, vision.merge_size
        if patches < merge or patches % merge:
            raise ConfigError(
                f"max_image_size {side} gives {patches} patches of {vision.patch_size} pixels a side, "
                f"which must be a multiple of {merge}"
            )
        self.first_size: tuple[int, int] | None = None
        if "height" in sizes and "width" in sizes:
            self.first_size = (sizes["height"], sizes["width"])
        if settings is not None and (self.first_size is None or "longest_edge" in sizes):
            self.first_size = with_longest_edge(*self.image_size, sizes.get("longest_edge", 4 * side))
        return side

    def resize(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """An image of `image_size` as it is cut, by way of the published size in between."""
        if self.first_size is not None:
            image = resize(image, *self.first_size, self.resample)
        return super().resize(image)


MOST_EDGE = 4096
"""Pixels: the longest side that the published processor resizes to."""


def with_longest_edge(height: int, width: int, longest: int) -> tuple[int, int]:
    """The size SmolVLM's processor resizes to first: its longer side given, the other even."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        height, width = longest, int(longest * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > MOST_EDGE:
        width, height = MOST_EDGE, int(MOST_EDGE / ratio)
    elif height > width and height > MOST_EDGE:
        height, width = MOST_EDGE, int(MOST_EDGE * ratio)
    return max(height, 1), max(width, 1)


def vision_flops(config: SmolVLMConfig, patch_grid: tuple[int, int]) -> int:
    """Operations of the tower's forward pass over one image, connector included."""
    vision = config.vision
    connector = 2 * patch_grid[0] * patch_grid[1] * vision.hidden_size * config.decoder.hidden_size
    return connector + tower_flops(vision, patch_grid)


FAMILY = Family(
    name="smolvlm",
    config=SmolVLMConfig,
    model=SmolVLM,
    chat=SmolVLMChat(),
    image_processor=SmolVLMImageProcessor,
    vision_flops=vision_flops,
    interop="spacedrive_jax.interop.smolvlm",
    also=("idefics3",),
)

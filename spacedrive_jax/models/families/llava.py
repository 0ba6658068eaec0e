"""LLaVA-1.5: CLIP, a two-layer projector and a LLaMA decoder as one module (Liu et al. 2024)."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from spacedrive_jax.bounds import FROM_ZERO, SIDE, Bound, Bounds, check_bounds
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
from spacedrive_jax.models.image_processor import ImageProcessor, ProcessorSettings, resize
from spacedrive_jax.models.layers import INIT_STD, LayerNorm, Projection, parameter, scan_layers, stack_layers
from spacedrive_jax.models.partitioning import constrain
from spacedrive_jax.models.positions import RopePositions, plain_positions, plain_sequence_positions
from spacedrive_jax.models.vision_language import VisionLanguageModel
from spacedrive_jax.models.vision_transformer import (
    VisionBlock,
    block_flops,
    check_patches,
    flatten_patches,
)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(VisionConfig):
    """The CLIP vision transformer (Radford et al. 2021), as LLaVA uses it; the defaults are ViT-L/14-336."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    depth: int = 24
    num_heads: int = 16
    norm_eps: float = 1e-5
    image_size: int = 336
    """Side of the square images in pixels; the position embedding is learnt for this size alone."""
    feature_layer: int = -2
    """Which hidden state is handed on, counted from the end: -1 is the last block's output."""

    BOUNDS: ClassVar[Bounds] = {**VisionConfig.BOUNDS, "image_size": SIDE, "feature_layer": Bound(most=-1)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_size != 1:
            raise ConfigError(
                f"LLaVA's visual tokens are single patches: merge_size {self.merge_size} must be 1"
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})"
            )
        if not -self.depth - 1 <= self.feature_layer <= -1:
            raise ConfigError(f"feature_layer {self.feature_layer} must lie in -{self.depth + 1}..-1")

    @property
    def grid_side(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size

    @property
    def used_blocks(self) -> int:
        """Blocks that run; those behind are kept for the checkpoint's sake only."""
        return self.depth + 1 + self.feature_layer


@dataclasses.dataclass(frozen=True)
class LlavaConfig(VLConfig):
    """LLaVA-1.5 (Liu et al. 2024): CLIP, a two-layer projector and a LLaMA decoder.

    The defaults are those of LLaVA-1.5-7B.
    """

    decoder: LanguageModelConfig = LanguageModelConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        rope_theta=10_000.0,
        mrope_section=(64,),
        norm_eps=1e-5,
        qkv_bias=False,
    )
    vision: ClipVisionConfig = ClipVisionConfig()
    image_token_id: int = 32000
    projector_bias: bool = True

    BOUNDS: ClassVar[Bounds] = {"image_token_id": FROM_ZERO}

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model.vlm")
        if len(self.decoder.mrope_section) != 1 or self.decoder.qkv_bias:
            raise ConfigError(
                "LLaVA's decoder has one-dimensional rotary positions and no attention biases; got "
                f"mrope_section {self.decoder.mrope_section}, qkv_bias {self.decoder.qkv_bias}"
            )

    @classmethod
    def llava_1_5_7b(cls) -> LlavaConfig:
        """Dimensions of LLaVA-1.5-7B."""
        return cls()


# The CLIP vision transformer as LLaVA-1.5 uses it (Radford et al. 2021; Liu et al. 2024, section 3).
#
# Patches to features: patch embedding, a class token, learnt positions, pre-norm blocks with full
# attention. The features are a hidden state before the last one; the class token takes part in attention
# and is dropped.


class ClipVision(nnx.Module):
    """The whole tower, those parts included that only the checkpoint needs (last block, last norm)."""

    def __init__(self, config: ClipVisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
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
        norm = functools.partial(
            LayerNorm, width, config.norm_eps, name="vision_embed", compute=compute, rngs=rngs
        )
        self.patch_embedding = Projection(
            (config.patch_channels,),
            (width,),
            (None,),
            ("vision_embed",),
            bias=False,
            compute=compute,
            rngs=rngs,
        )
        self.class_embedding = learnt((width,), ("vision_embed",))
        self.position_embedding = learnt((config.grid_side**2 + 1, width), (None, "vision_embed"))
        self.first_norm = norm()
        self.layers = stack_layers(
            lambda streams: VisionBlock(config, activation=quick_gelu, compute=compute, rngs=streams),
            config.depth,
            rngs,
        )
        self.last_norm = norm()

    def __call__(self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]) -> Float[Array, "I P D"]:
        """Encodes images.

        Args:
            pixel_values: Flattened normalised patches in row-major order (`flatten_patches`).
            grid: Patch rows and columns; the tower knows one size only.

        Returns:
            The patches' hidden states at `feature_layer`, in row-major order.

        Raises:
            ConfigError: If the grid is not the tower's or the pixels do not fit it.
        """
        config = self.config
        side = config.grid_side
        if tuple(grid) != (side, side):
            raise ConfigError(
                f"image grid {grid[0]}x{grid[1]} must be {side}x{side} patches: CLIP's positions are learnt "
                f"for images of {config.image_size}x{config.image_size} pixels"
            )
        check_patches(pixel_values, (side, side), config)

        def apply(block: VisionBlock, hidden: Any, used: Bool[Array, ""]) -> tuple[Any, None]:
            # The stack stays whole: cutting unused blocks off would copy the rest at every call.
            return jax.lax.cond(used, block, lambda unchanged: unchanged, hidden), None

        patches = self.patch_embedding(constrain(pixel_values, "images", None, None))
        first = jnp.broadcast_to(
            self.class_embedding[...].astype(patches.dtype), (len(patches), 1, config.hidden_size)
        )
        hidden = jnp.concatenate([first, patches], axis=1)
        hidden = self.first_norm(hidden + self.position_embedding[...].astype(hidden.dtype))
        used = jnp.asarray(np.arange(config.depth) < config.used_blocks)
        hidden, _ = scan_layers(self.layers, apply, hidden, used, self.compute)
        return hidden[:, 1:]


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """CLIP's approximation of GELU, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


class Projector(nnx.Module):
    """A two-layer MLP from the vision tower's width to the decoder's."""

    def __init__(self, config: LlavaConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        narrow, wide = (config.vision.hidden_size,), (config.decoder.hidden_size,)
        make = functools.partial(Projection, bias=config.projector_bias, compute=compute, rngs=rngs)
        self.hidden = make(narrow, wide, ("vision_embed",), ("vision_mlp",))
        self.out = make(wide, wide, ("vision_mlp",), ("embed",))

    def __call__(self, x: Float[Array, "I V C"]) -> Float[Array, "I V D"]:
        """Maps each visual token."""
        return self.out(jax.nn.gelu(self.hidden(x), approximate=False))


class Llava(VisionLanguageModel):
    """The vision-language model; every patch of an image is a visual token."""

    config: LlavaConfig

    def draw_vision(self, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws tower and projector."""
        self.vision = ClipVision(self.config.vision, compute=compute, rngs=rngs)
        self.projector = Projector(self.config, compute=compute, rngs=rngs)

    def encode_images(
        self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]
    ) -> Float[Array, "I V D"]:
        """Visual tokens, one per patch; see `ClipVision`."""
        return self.projector(self.vision(pixel_values, grid))

    def sequence_positions(
        self, token_ids: Int[np.ndarray, " S"], visual_grids: Sequence[tuple[int, int]]
    ) -> RopePositions:
        """Plain positions 0, 1, 2, ... on every axis, images or not."""
        return plain_sequence_positions(token_ids, visual_grids, self.config.image_token_id)


class LlavaChat(ChatTemplate):
    """`<s>USER: question ASSISTANT: answer</s>USER: …`; all images stand together before the question."""

    special_tokens: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "begin": ("<s>",),
            "turn_end": ("</s>",),
            "image": ("<image>",),
            "padding": ("<pad>", "<unk>"),
        }
    )
    added_tokens = ("<s>", "</s>", "<pad>", "<image>")
    user_header = "USER:"
    assistant_header = " ASSISTANT:"

    def apply_chat_template(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tokens_per_image: int,
        *,
        add_generation_prompt: bool = False,
        supervise_positions: bool = False,
    ) -> ChatTokens:
        """Lays out a conversation with the published labels (`llava_labels`); see `ChatTemplate`."""
        image, end = tokenizer.special["image"], tokenizer.special["turn_end"]
        images = re.compile(f"(?:{IMAGE_PLACEHOLDER}\\n)+")

        def spread(match: re.Match[str]) -> str:
            return tokenizer.decode([image]) * (match[0].count(IMAGE_PLACEHOLDER) * tokens_per_image) + "\n"

        text = ""
        for message in messages:
            if message.role == "user":
                text += f"{self.user_header} {images.sub(spread, message.content)}"
            else:
                text += f"{self.assistant_header} {message.content}{tokenizer.decode([end])}"
        if add_generation_prompt:
            text += self.assistant_header
        begin = tokenizer.special.get("begin")  # a vocabulary without one begins with the text
        token_ids = [] if begin is None else [begin]
        token_ids += tokenizer.encode(text)
        labels = llava_labels(
            token_ids,
            user_header=tokenizer.encode(self.user_header),
            assistant_header=tokenizer.encode(self.assistant_header.lstrip()),
            image=image,
        )
        if not supervise_positions:
            labels = [IGNORE if label == tokenizer.position else label for label in labels]
        first = [index for index, token in enumerate(token_ids) if token == image]
        return ChatTokens(token_ids, labels, first[::tokens_per_image])

    def ego_feature(self, tokenizer: Tokenizer) -> tuple[list[int], int]:
        """One bare image token."""
        return [tokenizer.special["image"]], 0

    def image_end(self, tokenizer: Tokenizer) -> int:
        """The image token itself."""
        return tokenizer.special["image"]


def llava_labels(
    token_ids: Sequence[int], *, user_header: Sequence[int], assistant_header: Sequence[int], image: int
) -> list[int]:
    """The published label rule: everything is supervised but images and what runs from a user's header to
    the assistant's.

    So the begin-of-text token, the colon behind `ASSISTANT` and, in a conversation without an answer, the
    whole question are supervised (fidelity Q22).

    Args:
        token_ids: a conversation.
        user_header: ids of `USER:`.
        assistant_header: ids of `ASSISTANT:`, the colon last.
        image: id of an image token.

    Returns:
        The id at each supervised position, IGNORE elsewhere.
    """
    labels = [IGNORE if token == image else token for token in token_ids]
    starts, ends = (_places(token_ids, header) for header in (user_header, assistant_header))
    for start, end in zip(starts, ends, strict=False):
        if end > start:
            stop = end + len(assistant_header) - 1
            labels[start:stop] = [IGNORE] * (stop - start)
    return labels


def _places(token_ids: Sequence[int], wanted: Sequence[int]) -> list[int]:
    width = len(wanted)
    starts = range(len(token_ids) - width + 1)
    return [start for start in starts if list(token_ids[start : start + width]) == list(wanted)]


class LlavaImageProcessor(ImageProcessor):
    """Bicubic resize to the one size that the tower's position embedding knows, then patches.

    The published processor resizes the shorter side and cuts the middle out; SpaceDrive's views are resized
    whole, so that no part of a view is lost.
    """

    fallback = ProcessorSettings(size=(("shortest_edge", 224), ("crop_height", 224), ("crop_width", 224)))

    def __init__(
        self,
        vision: ClipVisionConfig,
        image_size: tuple[int, int],
        settings: ProcessorSettings | None = None,
    ) -> None:
        """See `ImageProcessor`.

        Raises:
            ConfigError: the settings resize to less than the tower's size, or cut to another.
        """
        super().__init__(vision, image_size, settings)
        side = vision.image_size
        sizes = dict.fromkeys(self.fallback.sizes, side)
        if settings is not None and settings.size:
            sizes = dict(settings.size)
        self.shorter = sizes.pop("shortest_edge", 0)
        if self.shorter < side or sizes != {"crop_height": side, "crop_width": side}:
            raise ConfigError(
                f"images must be resized to a shorter side of at least {side} pixels and cut to the tower's "
                f"{side}x{side}; the processor's settings say {dict(settings.size) if settings else {}}"
            )
        self.patch_grid = self.token_grid = (vision.grid_side, vision.grid_side)
        self.intrinsics_size = self.resized = (vision.image_size, vision.image_size)

    def resize(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """An image of `image_size` as it is cut: whole for SpaceDrive, its middle as published."""
        return super().resize(image) if self.settings is None else self._cut_out(image)

    def cut(self, images: UInt8[np.ndarray | Array, "N h w 3"]) -> UInt8[np.ndarray | Array, "N P K"]:
        """Patches in row-major order; K is channel, row, column."""
        return flatten_patches(images.transpose(0, 3, 1, 2), self.vision.patch_size)

    def _cut_out(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """The middle of an image whose shorter side is resized."""
        side, (height, width) = self.vision.image_size, image.shape[:2]
        longer = int(self.shorter * max(height, width) / min(height, width))
        sizes = (self.shorter, longer) if height <= width else (longer, self.shorter)
        resized = resize(image, *sizes)
        top, left = ((each - side) // 2 for each in sizes)
        return resized[top : top + side, left : left + side]


def vision_flops(config: LlavaConfig, patch_grid: tuple[int, int]) -> int:
    """Operations of the tower's forward pass over one image, projector included."""
    vision, decoder_width = config.vision, config.decoder.hidden_size
    patches, width = patch_grid[0] * patch_grid[1], vision.hidden_size
    projector = 2 * patches * decoder_width * (width + decoder_width)
    embedding = 2 * patches * vision.patch_channels * width
    # A token more than patches: the class token.
    return vision.used_blocks * block_flops(vision, patches + 1) + projector + embedding


def lora(rank: int) -> LoraConfig:
    """SpaceDrive's adapters: k, v, o, always with scaling 1."""
    return LoraConfig(rank=rank, alpha=float(rank), targets=("k", "v", "o"))


FAMILY = Family(
    name="llava",
    config=LlavaConfig,
    model=Llava,
    chat=LlavaChat(),
    image_processor=LlavaImageProcessor,
    position_ids=plain_positions,
    vision_flops=vision_flops,
    lora=lora,
    interop="spacedrive_jax.interop.llava",
)

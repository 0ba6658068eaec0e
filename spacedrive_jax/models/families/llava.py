"""LLaVA-1.5: CLIP, a two-layer projector and a LLaMA language model as one module (Liu et al. 2024)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from spacedrive_jax.bounds import Bound, Bounds
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import (
    ComputeConfig,
    LanguageModelConfig,
    LoraConfig,
    SquareVisionConfig,
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
from spacedrive_jax.models.image_processor import ProcessorSettings, SquareImageProcessor, resize
from spacedrive_jax.models.layers import scan_layers
from spacedrive_jax.models.vision_language import VisionLanguageModel
from spacedrive_jax.models.vision_transformer import (
    Projector,
    VisionBlock,
    VisionTransformer,
    projector_flops,
    tower_flops,
)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(SquareVisionConfig):
    """The CLIP vision transformer (Radford et al. 2021), as LLaVA uses it; the defaults are ViT-L/14-336."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    depth: int = 24
    num_heads: int = 16
    norm_eps: float = 1e-5
    image_size: int = 336
    feature_layer: int = -2
    """Which hidden state is handed on, counted from the end: -1 is the last block's output."""

    BOUNDS: ClassVar[Bounds] = {**SquareVisionConfig.BOUNDS, "feature_layer": Bound(most=-1)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_size != 1:
            raise ConfigError(
                f"LLaVA's visual tokens are single patches: merge_size {self.merge_size} must be 1"
            )
        if not -self.depth - 1 <= self.feature_layer <= -1:
            raise ConfigError(f"feature_layer {self.feature_layer} must lie in -{self.depth + 1}..-1")

    @property
    def used_blocks(self) -> int:
        """Blocks that run; those behind are kept for the checkpoint's sake only."""
        return self.depth + 1 + self.feature_layer


@dataclasses.dataclass(frozen=True)
class LlavaConfig(VLConfig):
    """LLaVA-1.5 (Liu et al. 2024): CLIP, a two-layer projector and a LLaMA language model.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_plain_decoder("LLaVA", qkv_bias=False)

    @classmethod
    def llava_1_5_7b(cls) -> LlavaConfig:
        """Dimensions of LLaVA-1.5-7B."""
        return cls()


class ClipVision(VisionTransformer):
    """CLIP's tower as LLaVA-1.5 uses it (Liu et al. 2024, section 3): its features are a hidden state before
    the last one; what comes behind it is only there for the checkpoint.
    """

    config: ClipVisionConfig

    def run_blocks(self, hidden: Float[Array, "I T D"]) -> Float[Array, "I T D"]:
        """The blocks up to `feature_layer`, no norm."""

        def apply(block: VisionBlock, hidden: Any, used: Bool[Array, ""]) -> tuple[Any, None]:
            # The stack stays whole: cutting unused blocks off would copy the rest at every call.
            return jax.lax.cond(used, block, lambda unchanged: unchanged, hidden), None

        used = jnp.asarray(np.arange(self.config.depth) < self.config.used_blocks)
        return scan_layers(self.layers, apply, hidden, used, self.compute)[0]


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """CLIP's approximation of GELU, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


class Llava(VisionLanguageModel):
    """The vision-language model; every patch of an image is a visual token."""

    config: LlavaConfig

    def draw_vision(self, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws tower and projector."""
        config, wide = self.config, self.config.decoder.hidden_size
        self.vision = ClipVision(
            config.vision,
            activation=quick_gelu,
            patch_bias=False,
            class_token=True,
            first_norm=True,
            compute=compute,
            rngs=rngs,
        )
        self.projector = Projector(
            config.vision.hidden_size, wide, wide, bias=config.projector_bias, compute=compute, rngs=rngs
        )

    def encode_images(
        self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]
    ) -> Float[Array, "I V D"]:
        """Visual tokens, one per patch; see `ClipVision`."""
        return self.projector(self.vision(pixel_values, grid))


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
    answer_header = " ASSISTANT:"

    def image(self, tokens_per_image: int) -> str:
        """Visual tokens, nothing around them."""
        return "<image>" * tokens_per_image

    def turn(self, message: Message) -> str:
        """A question behind its header, or an answer behind its own with the end of text."""
        if message.role == "user":
            return f"{self.user_header} {message.content}"
        return f"{self.answer_header} {message.content}</s>"

    def apply_chat_template(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tokens_per_image: int,
        *,
        add_generation_prompt: bool = False,
        supervise_positions: bool = False,
    ) -> ChatTokens:
        """Lays out a conversation with the published labels (`llava_labels`); see `ChatTemplate`.

        The text is tokenised as a whole, and the line ends between images are left out.
        """
        image = tokenizer.special["image"]
        images = re.compile(f"(?:{IMAGE_PLACEHOLDER}\\n)+")

        def spread(match: re.Match[str]) -> str:
            return self.image(match[0].count(IMAGE_PLACEHOLDER) * tokens_per_image) + "\n"

        text = ""
        for message in messages:
            turn = self.turn(message)
            text += images.sub(spread, turn) if message.role == "user" else turn
        if add_generation_prompt:
            text += self.answer_header
        begin = tokenizer.special.get("begin")  # a vocabulary without one begins with the text
        token_ids = [] if begin is None else [begin]
        token_ids += tokenizer.encode(text)
        labels = llava_labels(
            token_ids,
            user_header=tokenizer.encode(self.user_header),
            assistant_header=tokenizer.encode(self.answer_header.lstrip()),
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


class LlavaImageProcessor(SquareImageProcessor):
    """Bicubic resize to the one size that the tower's position embedding knows, then patches.

    The published processor resizes the shorter side and cuts the middle out; SpaceDrive's views are resized
    whole, so that no part of a view is lost.
    """

    fallback = ProcessorSettings(size=(("shortest_edge", 224), ("crop_height", 224), ("crop_width", 224)))

    def square_side(self) -> int:
        """The tower's.

        Raises:
            ConfigError: the settings resize to less than that, or cut to another.
        """
        side, settings = self.vision.image_size, self.settings
        sizes = dict.fromkeys(self.fallback.sizes, side)
        if settings is not None and settings.size:
            sizes = dict(settings.size)
        self.shorter = sizes.pop("shortest_edge", 0)
        if self.shorter < side or sizes != {"crop_height": side, "crop_width": side}:
            raise ConfigError(
                f"images must be resized to a shorter side of at least {side} pixels and cut to the tower's "
                f"{side}x{side}; the processor's settings say {dict(settings.size) if settings else {}}"
            )
        return side

    def resize(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """An image of `image_size` as it is cut: whole for SpaceDrive, its middle as published."""
        return super().resize(image) if self.settings is None else self._cut_out(image)

    def _cut_out(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """The middle of an image whose shorter side is resized."""
        side, (height, width) = self.side, image.shape[:2]
        longer = int(self.shorter * max(height, width) / min(height, width))
        sizes = (self.shorter, longer) if height <= width else (longer, self.shorter)
        resized = resize(image, *sizes)
        top, left = ((each - side) // 2 for each in sizes)
        return resized[top : top + side, left : left + side]


def vision_flops(config: LlavaConfig, patch_grid: tuple[int, int]) -> int:
    """Operations of the tower's forward pass over one image, projector included."""
    vision, wide = config.vision, config.decoder.hidden_size
    projector = projector_flops(patch_grid[0] * patch_grid[1], vision.hidden_size, wide, wide)
    return projector + tower_flops(vision, patch_grid, blocks=vision.used_blocks, class_token=True)


def lora(rank: int) -> LoraConfig:
    """SpaceDrive's adapters: k, v, o, always with scaling 1."""
    return LoraConfig(rank=rank, alpha=float(rank), targets=("k", "v", "o"))


FAMILY = Family(
    name="llava",
    config=LlavaConfig,
    model=Llava,
    chat=LlavaChat(),
    image_processor=LlavaImageProcessor,
    vision_flops=vision_flops,
    lora=lora,
    interop="spacedrive_jax.interop.llava",
)

"""A family of vision-language models as one object: everything that sets it apart from the others.

A chat template knows how its family writes a conversation (and how the published SpaceDrive labels it);
which ids the words have is the tokenizer's business, of which it needs no more than `Tokenizer` says.

An image processor makes the patches that a vision tower takes, on the host. Rescaling and normalisation are
left to the device (`normalise`), so that bytes, not floats, travel there.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from spacedrive_jax.models.config import LoraConfig, VLConfig
from spacedrive_jax.models.positions import ImageSpan, RopePositions
from spacedrive_jax.models.vision_language import VisionLanguageModel

IGNORE = -100
"""Label of a token that is not supervised."""
IMAGE_PLACEHOLDER = "<image>"
"""Stands for an image in a message's text."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation; `<image>` in the content stands for an image."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclasses.dataclass(frozen=True)
class ChatTokens:
    """A tokenised conversation."""

    token_ids: list[int]
    labels: list[int]
    """The id at each supervised position (not shifted), IGNORE elsewhere."""
    image_starts: list[int]
    """Index of the first visual token of each image."""


@runtime_checkable
class Tokenizer(Protocol):
    """What a template needs of a tokenizer."""

    @property
    def special(self) -> Mapping[str, int]:
        """Ids of the template's special tokens, by the names in `ChatTemplate.special_tokens`."""

    @property
    def position(self) -> int:
        """Id of the position token `<POS_EMBEDDING>`."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which special tokens may be spelled out."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens spelled out."""


class ChatTemplate(abc.ABC):
    """How a family writes a conversation. Stateless; one instance serves all."""

    special_tokens: ClassVar[Mapping[str, tuple[str, ...]]]
    """What the template names to how vocabularies spell it, the first that a vocabulary has: at least
    `image` (one visual token), `turn_end` (ends an answer) and `padding`."""
    added_tokens: ClassVar[tuple[str, ...]] = ()
    """Special tokens that the project's own small tokenizer is given for this template."""

    @abc.abstractmethod
    def apply_chat_template(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tokens_per_image: int,
        *,
        add_generation_prompt: bool = False,
        supervise_positions: bool = False,
    ) -> ChatTokens:
        """Lays out a conversation, with the labels of the published code.

        Args:
            tokenizer: gives the ids.
            messages: user and assistant turns; a system turn, where the family has one, is added.
            tokens_per_image: V, visual tokens that each image occupies.
            add_generation_prompt: end with the header of an assistant turn, to be continued.
            supervise_positions: keep the labels at position tokens.
        """

    @abc.abstractmethod
    def ego_feature(self, tokenizer: Tokenizer) -> tuple[list[int], int]:
        """Ids that hold the ego status feature, and the index among them where the feature stands."""

    @abc.abstractmethod
    def image_end(self, tokenizer: Tokenizer) -> int:
        """Id behind whose last occurrence the ego tokens are inserted."""


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation (Radford et al. 2021), after division by 255."""


class ImageProcessor(abc.ABC):
    """Cuts images of one size into patches, bit for bit as the family's published processor does."""

    mean: ClassVar[tuple[float, float, float]] = CLIP_MEAN
    std: ClassVar[tuple[float, float, float]] = CLIP_STD

    patch_grid: tuple[int, int]
    """Patches of an image, rows and columns."""
    token_grid: tuple[int, int]
    """Visual tokens of an image, rows and columns."""
    intrinsics_size: tuple[int, int]
    """(height, width) in whose pixels the published SpaceDrive counts intrinsics and patch centres."""

    def __init__(self, vision: Any, image_size: tuple[int, int]) -> None:
        """Settles the grids.

        Args:
            vision: the family's vision config.
            image_size: (height, width) of the images that will be handed in.
        """
        self.vision = vision
        self.image_size = image_size

    @abc.abstractmethod
    def patches(self, images: list[UInt8[np.ndarray, "H W 3"]]) -> UInt8[np.ndarray, "N P K"]:
        """Patches of images of `image_size`, 0..255; P patches in the tower's order, K values a patch."""


def bicubic(image: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Pillow's bicubic resize, which transformers' processors use."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def normalise(
    patches: UInt8[Array, "... K"] | Float[Array, "... K"],
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> Float[Array, "... K"]:
    """Rescales and normalises raw patches; floats are taken to be normalised already.

    Args:
        patches: K runs over channel, then time and pixels, as the image processors lay patches out.
        mean: of the channels, after division by 255.
        std: likewise.
    """
    if patches.dtype != jnp.uint8:
        return patches
    per_channel = patches.shape[-1] // 3
    means, deviations = (
        jnp.asarray(np.repeat(np.asarray(each, np.float32), per_channel)) for each in (mean, std)
    )
    return (patches.astype(jnp.float32) / 255.0 - means) / deviations


@dataclasses.dataclass(frozen=True)
class Family:
    """What the rest of the project asks of a family; nothing else may depend on which one it is."""

    name: str
    """transformers' `model_type`; also the tag of its configs in JSON."""
    config: type[VLConfig]
    model: Callable[..., VisionLanguageModel]
    """Constructor: (config, *, compute, rngs, lora=None, new_tokens=None)."""
    chat: ChatTemplate
    image_processor: type[ImageProcessor]
    position_ids: Callable[[int, Sequence[ImageSpan]], RopePositions]
    """From a sequence's length and its images to the rotary positions."""
    vision_flops: Callable[[Any, tuple[int, int]], int]
    """From the config and the patch grid to the operations of the tower's forward pass over one image."""
    lora: Callable[[int], LoraConfig]
    """SpaceDrive's adapters at a rank."""
    interop: str
    """Module that knows the family's files as others have them; it defines `FORMAT`
    (`interop.families.Format`)."""

"""A family of vision-language models as one object: everything that sets it apart; and the registry of all.

A chat template knows how its family writes a conversation (and how the published SpaceDrive labels it);
which ids the words have is the tokenizer's business, of which it needs no more than `Tokenizer` says.

`models.families` fills the registry; it stands here, below the models, so that a model can ask for its own
family.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import LoraConfig, VLConfig
from spacedrive_jax.models.image_processor import ImageProcessor
from spacedrive_jax.models.positions import ImageSpan, RopePositions

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


@dataclasses.dataclass(frozen=True)
class Family:
    """What the rest of the project asks of a family; nothing else may depend on which one it is."""

    name: str
    """transformers' `model_type`; also the tag of its configs in JSON."""
    config: type[VLConfig]
    model: Callable[..., Any]
    """Constructor of its `VisionLanguageModel`: (config, *, compute, rngs, lora=None, new_tokens=None)."""
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
    also: tuple[str, ...] = ()
    """Further `model_type`s whose config.json and tensors are this family's."""


FAMILIES: dict[str, Family] = {}
"""By transformers' `model_type`."""


def register(family: Family) -> None:
    """Makes a family known.

    Raises:
        ConfigError: another one has its name or its config class.
    """
    for other in FAMILIES.values():
        shared = {other.name, *other.also} & {family.name, *family.also}
        if other is not family and (shared or other.config is family.config):
            raise ConfigError(f"the family {family.name} is registered already, as {other.name}")
    FAMILIES[family.name] = family


def family_of(config: VLConfig) -> Family:
    """The family a config belongs to.

    Raises:
        ConfigError: it is of none that is registered.
    """
    for family in FAMILIES.values():
        if type(config) is family.config:
            return family
    raise ConfigError(
        f"{type(config).__name__} is the config of no registered family ({', '.join(FAMILIES)})"
    )

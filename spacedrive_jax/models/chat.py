"""Conversations as tokens: what every family's chat template takes and gives.

A template knows how its family writes a conversation (and how the published SpaceDrive labels it); which ids
the words have is the tokenizer's business, of which it needs no more than `Tokenizer` says.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol, runtime_checkable

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

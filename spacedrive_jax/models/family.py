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
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import LoraConfig, VLConfig
from spacedrive_jax.models.image_processor import ImageProcessor
from spacedrive_jax.models.positions import ImageSpan, RopePositions, plain_positions

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
    """How a family writes a conversation. Stateless; one instance serves all.

    Turns stand one behind the other, each written and tokenised by itself; of answers everything behind the
    header is supervised, the end of the turn too, but no position token (unless asked for).
    """

    special_tokens: ClassVar[Mapping[str, tuple[str, ...]]]
    """What the template names to how vocabularies spell it, the first that a vocabulary has: at least
    `image` (one visual token), `turn_end` (ends an answer) and `padding`."""
    added_tokens: ClassVar[tuple[str, ...]] = ()
    """Special tokens that the project's own small tokenizer is given for this template."""
    beginning: ClassVar[str] = ""
    """What stands before the first turn."""
    system: ClassVar[str | None] = None
    """The turn before all others; None for none."""
    answer_header: ClassVar[str]
    """What an assistant turn begins with."""

    @abc.abstractmethod
    def image(self, tokens_per_image: int) -> str:
        """How an image of so many visual tokens is spelled out."""

    @abc.abstractmethod
    def turn(self, message: Message) -> str:
        """How a turn is spelled out, `<image>` left as it is."""

    def header_length(self, tokenizer: Tokenizer) -> int:
        """Ids at the beginning of an assistant turn that are not supervised."""
        return len(tokenizer.encode(self.answer_header))

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
        image = self.image(tokens_per_image)
        ignored = None if supervise_positions else tokenizer.position
        system = [] if self.system is None else [Message("system", self.system)]
        token_ids = tokenizer.encode(self.beginning) if self.beginning else []
        labels = [IGNORE] * len(token_ids)
        for message in (*system, *messages):
            ids = tokenizer.encode(self.turn(message).replace(IMAGE_PLACEHOLDER, image))
            answers = message.role == "assistant"
            unsupervised = self.header_length(tokenizer) if answers else len(ids)
            token_ids += ids
            labels += [IGNORE] * unsupervised
            labels += [IGNORE if token == ignored else token for token in ids[unsupervised:]]
        if add_generation_prompt:
            header = tokenizer.encode(self.answer_header)
            token_ids += header
            labels += [IGNORE] * len(header)
        places = [index for index, token in enumerate(token_ids) if token == tokenizer.special["image"]]
        return ChatTokens(token_ids, labels, places[::tokens_per_image])

    @abc.abstractmethod
    def ego_feature(self, tokenizer: Tokenizer) -> tuple[list[int], int]:
        """Ids that hold the ego status feature, and the index among them where the feature stands."""

    @abc.abstractmethod
    def image_end(self, tokenizer: Tokenizer) -> int:
        """Id behind whose last occurrence the ego tokens are inserted."""


def chat_ml_tokens(vision_start: str, image: str, vision_end: str) -> Mapping[str, tuple[str, ...]]:
    """The special tokens of a `ChatML` template, but for images they are the same everywhere."""
    return MappingProxyType(
        {
            "turn_start": ("<|im_start|>",),
            "turn_end": ("<|im_end|>",),
            "image": (image,),
            "padding": ("<|endoftext|>", "<|pad|>"),
            "vision_start": (vision_start,),
            "vision_end": (vision_end,),
        }
    )


class ChatML(ChatTemplate):
    """`<|im_start|>role`, newline, text, `<|im_end|>`, newline; an image is its visual tokens between
    vision_start and vision_end (`chat_ml_tokens`).
    """

    answer_header = "<|im_start|>assistant\n"

    def image(self, tokens_per_image: int) -> str:
        """vision_start, visual tokens, vision_end."""
        start, token, end = (self.special_tokens[name][0] for name in ("vision_start", "image", "vision_end"))
        return start + token * tokens_per_image + end

    def turn(self, message: Message) -> str:
        """Role and text between start and end."""
        return f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n"

    def ego_feature(self, tokenizer: Tokenizer) -> tuple[list[int], int]:
        """[vision_start, image, vision_end], as an image of one token is written."""
        special = tokenizer.special
        return [special["vision_start"], special["image"], special["vision_end"]], 1

    def image_end(self, tokenizer: Tokenizer) -> int:
        """vision_end."""
        return tokenizer.special["vision_end"]


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
    vision_flops: Callable[[Any, tuple[int, int]], int]
    """From the config and the patch grid to the operations of the tower's forward pass over one image,
    projector included."""
    interop: str
    """Module that knows the family's files as others have them; it defines `FORMAT`
    (`interop.weight_table.Format`)."""
    position_ids: Callable[[int, Sequence[ImageSpan]], RopePositions] = plain_positions
    """From a sequence's length and its images to the rotary positions."""
    lora: Callable[[int], LoraConfig] = LoraConfig
    """SpaceDrive's adapters at a rank; as on Qwen2.5-VL (q, k, v, o with alpha 16) unless published
    otherwise."""
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

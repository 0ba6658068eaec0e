"""The chat layouts by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from spacedrive_jax.data.prompts import SYSTEM
from spacedrive_jax.data.tokenizer import NO_TOKEN, ChatLayout, DrivingTokenizer

# The Qwen chat layout: turns to token ids, labels and the places of the images.


IGNORE = -100
"""Label of a token that is not supervised."""
IMAGE_PLACEHOLDER = "<image>"
HEADER_TOKENS = 3
"""`<|im_start|>`, `assistant`, newline: the first three ids of an assistant turn are not supervised."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of the conversation; `<image>` in the text stands for an image."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclasses.dataclass(frozen=True)
class ChatTokens:
    """A tokenised conversation."""

    token_ids: list[int]
    labels: list[int]
    """The id at each supervised position (not shifted), IGNORE elsewhere."""
    image_starts: list[int]
    """Index of the first visual token of each image."""


def chat_tokens(
    tokenizer: DrivingTokenizer,
    turns: Sequence[Turn],
    tokens_per_image: int,
    *,
    generation_prompt: bool = False,
    supervise_positions: bool = False,
) -> ChatTokens:
    """Lays out a conversation (system turn first) as the published code does.

    Everything but assistant turns is ignored by the loss, and of those the three header ids and every
    position token (unless asked for). `<|im_end|>` and the newline after it are supervised.

    Args:
        tokenizer: gives the ids.
        turns: user and assistant turns; the system turn is added.
        tokens_per_image: V, visual tokens that each image occupies.
        generation_prompt: end with the header of an assistant turn, to be continued.
        supervise_positions: keep the labels at position tokens.
    """
    image = f"<|vision_start|>{'<|image_pad|>' * tokens_per_image}<|vision_end|>"
    token_ids: list[int] = []
    labels: list[int] = []
    for turn in (Turn("system", SYSTEM), *turns):
        text = turn.text.replace(IMAGE_PLACEHOLDER, image)
        ids = tokenizer.encode(f"<|im_start|>{turn.role}\n{text}<|im_end|>\n")
        token_ids += ids
        if turn.role == "assistant":
            ignored = None if supervise_positions else tokenizer.position
            labels += [IGNORE] * HEADER_TOKENS
            labels += [IGNORE if token == ignored else token for token in ids[HEADER_TOKENS:]]
        else:
            labels += [IGNORE] * len(ids)
    if generation_prompt:
        header = tokenizer.encode("<|im_start|>assistant\n")
        token_ids += header
        labels += [IGNORE] * len(header)
    starts = [index + 1 for index, token in enumerate(token_ids) if token == tokenizer.vision_start]
    return ChatTokens(token_ids, labels, starts)


# The LLaVA-1.5 chat layout and its published label rule.


USER_HEADER = "USER:"
ASSISTANT_HEADER = " ASSISTANT:"


def llava_chat_tokens(
    tokenizer: DrivingTokenizer,
    turns: Sequence[Turn],
    tokens_per_image: int,
    *,
    generation_prompt: bool = False,
    supervise_positions: bool = False,
) -> ChatTokens:
    """`<s>USER: question ASSISTANT: answer</s>USER: ...`; all images stand together before the question.

    Args and result as in `chat_tokens`.
    """
    images = re.compile(f"(?:{IMAGE_PLACEHOLDER}\\n)+")

    def spread(match: re.Match[str]) -> str:
        count = match[0].count(IMAGE_PLACEHOLDER)
        return tokenizer.decode([tokenizer.image]) * (count * tokens_per_image) + "\n"

    text = ""
    for turn in turns:
        if turn.role == "user":
            text += f"{USER_HEADER} {images.sub(spread, turn.text)}"
        else:
            text += f"{ASSISTANT_HEADER} {turn.text}{tokenizer.decode([tokenizer.turn_end])}"
    if generation_prompt:
        text += ASSISTANT_HEADER
    begin = [] if tokenizer.begin == NO_TOKEN else [tokenizer.begin]
    token_ids = begin + tokenizer.encode(text)
    labels = llava_labels(
        token_ids,
        user_header=tokenizer.encode(USER_HEADER),
        assistant_header=tokenizer.encode(ASSISTANT_HEADER.lstrip()),
        image=tokenizer.image,
    )
    if not supervise_positions:
        labels = [IGNORE if label == tokenizer.position else label for label in labels]
    first = [index for index, token in enumerate(token_ids) if token == tokenizer.image]
    return ChatTokens(token_ids, labels, first[::tokens_per_image])


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


class LayOut(Protocol):
    """Turns to token ids, labels and image places; see `chat_tokens`."""

    def __call__(
        self,
        tokenizer: DrivingTokenizer,
        turns: Sequence[Turn],
        tokens_per_image: int,
        *,
        generation_prompt: bool = False,
        supervise_positions: bool = False,
    ) -> ChatTokens:
        """Lays a conversation out."""


CHAT_LAYOUTS: Mapping[ChatLayout, LayOut] = {"qwen": chat_tokens, "llava": llava_chat_tokens}

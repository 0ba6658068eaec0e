"""The Qwen chat layout: turns to token ids, labels and the places of the images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from spacedrive_jax.data.prompts import SYSTEM
from spacedrive_jax.data.tokenizer import DrivingTokenizer

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

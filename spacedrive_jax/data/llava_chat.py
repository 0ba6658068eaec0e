"""The LLaVA-1.5 chat layout and its published label rule."""

from __future__ import annotations

import re
from collections.abc import Sequence

from spacedrive_jax.data.chat import IGNORE, IMAGE_PLACEHOLDER, ChatTokens, Turn
from spacedrive_jax.data.tokenizer import NO_TOKEN, DrivingTokenizer

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
    whole question are supervised (reference_behaviour 12).

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

"""The chat layouts by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from spacedrive_jax.data.chat import ChatTokens, Turn, chat_tokens
from spacedrive_jax.data.llava_chat import llava_chat_tokens
from spacedrive_jax.data.tokenizer import ChatLayout, DrivingTokenizer


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

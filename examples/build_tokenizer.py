"""Makes the demo tokenizer (data/tokenizers/demo.json): a small byte-level BPE trained on our own prompts.

Run `python -m examples.build_tokenizer` after changing the prompts; the result is deterministic. Released
models bring their own vocabulary; this one is for models trained from scratch.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from spacedrive_jax.data.prompts import COMMAND_WORDS, planning_answer, planning_question
from spacedrive_jax.data.tokenizer import DEMO_TOKENIZER, INDICATOR, POSITION
from spacedrive_jax.io import write_text
from spacedrive_jax.models.families.qwen2_5_vl import QwenChat

VOCABULARY = 512
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)


def corpus() -> Iterator[str]:
    """Every prompt the project can produce, and coordinates as text."""
    yield f"system\n{QwenChat.system}"
    for city in ("boston", "singapore"):
        for command in (None, *range(len(COMMAND_WORDS))):
            yield f"user\n{planning_question(city, command)}".replace("<image>", "")
    answer = planning_answer().replace(INDICATOR, "").replace(POSITION, "")
    yield f"assistant\n{answer}"
    for number in range(0, 1000, 7):
        yield f"({number / 10:+.2f}, {-number / 100:+.2f})"


def build() -> Tokenizer:
    """Trains the tokenizer; specials come first, the two coordinate tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (INDICATOR, POSITION)]
    )
    return tokenizer


if __name__ == "__main__":
    write_text(DEMO_TOKENIZER, build().to_str(pretty=True) + "\n")
    print(f"wrote {DEMO_TOKENIZER}")

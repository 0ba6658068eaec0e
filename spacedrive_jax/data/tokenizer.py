"""The text tokenizer with the special tokens that driving needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from spacedrive_jax.errors import DataError
from spacedrive_jax.io import is_bucket, local, place, read_text
from spacedrive_jax.json_files import parse_json
from spacedrive_jax.models.families import qwen2_5_vl
from spacedrive_jax.models.family import ChatTemplate

INDICATOR = "<POS_INDICATOR>"
"""Indicator token: a coordinate follows; the next hidden state is regressed."""
POSITION = "<POS_EMBEDDING>"
"""Position token: the slot where a coordinate's encoding stands."""
COORDINATE = INDICATOR + POSITION

DEMO_TOKENIZER = Path(__file__).parent / "tokenizers" / "demo.json"


@dataclasses.dataclass(frozen=True)
class DrivingTokenizer:
    """A tokenizer with a chat vocabulary plus the two coordinate tokens."""

    tokenizer: Tokenizer
    chat: ChatTemplate
    """Which chat it is for."""
    special: Mapping[str, int]
    """Ids of the chat's special tokens, by the names in `ChatTemplate.special_tokens`."""
    indicator: int
    position: int

    @property
    def image(self) -> int:
        """Id of one visual token."""
        return self.special["image"]

    @property
    def turn_end(self) -> int:
        """Id that ends an answer."""
        return self.special["turn_end"]

    @property
    def padding(self) -> int:
        """Id that fills sequences up."""
        return self.special["padding"]

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def highest_id(self) -> int:
        """The largest id, added tokens included; a vocabulary may leave ids out below it."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens may be spelled out."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        """The text of token ids; special tokens are spelled out unless skipped."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special)


MOST_BYTES = 256 << 20
MOST_GAPS = 100_000
"""Ids that no token has, at most; each would be a row of a table."""


def read_tokenizer(file: Path) -> Tokenizer:
    """Reads a tokenizer.json.

    Raises:
        DataError: it cannot be read, is no tokenizer, or has an id far above its number of tokens, which
            would make tables of that many rows.
    """
    text = read_text(file, most=MOST_BYTES)
    parse_json(text, file)  # says where it is damaged, which the tokenizers library does not
    try:
        tokenizer = Tokenizer.from_str(text)
        # Some releases leave a length in the file, at which every text would be cut off or to which it would
        # be filled up, without a word; transformers sets both aside too.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise DataError(
            f"{file} is not a tokenizer.json that the tokenizers library reads: {error}"
        ) from error
    name, highest = max(vocabulary.items(), key=lambda item: item[1], default=("", 0))
    if highest > len(vocabulary) + MOST_GAPS:
        raise DataError(
            f"{file}: the token {name!r} has the id {highest:,}, but there are {len(vocabulary):,} tokens: "
            "take the tokenizer that came with the weights"
        )
    return tokenizer


def tokenizer_file(path: Path | str | None) -> Path:
    """The file that a tokenizer is read from; see `load_tokenizer`.

    Raises:
        DataError: there is none.
    """
    file = DEMO_TOKENIZER if path is None else place(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if is_bucket(file) and file.is_file():
        file = local(file)
    if not file.is_file():
        raise DataError(f"no tokenizer at {file}: give a tokenizer.json or the folder that holds one")
    return file


def load_tokenizer(
    path: Path | str | None = None, chat: ChatTemplate = qwen2_5_vl.FAMILY.chat
) -> DrivingTokenizer:
    """Loads a `tokenizer.json` (or the folder that holds it) and adds the coordinate tokens it lacks.

    On the released Qwen2.5 vocabulary the two new tokens get the ids 151665 and 151666.

    Args:
        path: file or folder; when None the project's own small tokenizer, which has Qwen's special tokens
            and is given those of another chat.
        chat: which chat the tokenizer is for.

    Raises:
        DataError: no such file, or a special token of the chat is missing from it.
    """
    file = tokenizer_file(path)
    tokenizer = read_tokenizer(file)
    added = [INDICATOR, POSITION, *(chat.added_tokens if path is None else ())]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])

    def special(*names: str) -> int:
        for name in names:
            found = tokenizer.token_to_id(name)
            if found is not None:
                return found
        raise DataError(
            f"{file} lacks the special token {names[0]} of the model's chat: give the model's own tokenizer "
            "in data.tokenizer"
        )

    return DrivingTokenizer(
        tokenizer=tokenizer,
        chat=chat,
        special={name: special(*spellings) for name, spellings in chat.special_tokens.items()},
        indicator=special(INDICATOR),
        position=special(POSITION),
    )

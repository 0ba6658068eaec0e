"""Adds the two coordinate tokens to a released vocabulary: tokenizer, embedding table and head."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from tokenizers import AddedToken

from spacedrive_jax.data.tokenizer import INDICATOR, MOST_BYTES, POSITION, read_tokenizer
from spacedrive_jax.errors import DataError
from spacedrive_jax.io import read_json, require_regular, write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
"""What transformers may have beside the weights."""


class Extension(NamedTuple):
    """What became of the two tokens."""

    indicator: int | None
    """The indicator token's id, the position token's being the next; None where they are not there."""
    added: bool
    """Whether the vocabulary lacked them."""


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer's files, as many as there are, into an existing folder."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            require_regular(source / name, most=MOST_BYTES)
            shutil.copyfile(source / name, target / name)


def extend_tokenizer(source: Path, target: Path, *, add: bool = True) -> Extension:
    """Copies a tokenizer and adds the indicator and position tokens to the copy.

    A vocabulary that has both already stays as it is. Qwen2.5-VL's gives them the ids 151665 and 151666,
    LLaVA-1.5's 32002 and 32003.

    Args:
        source: Folder with a tokenizer.json.
        target: Existing folder to write into.
        add: False copies without adding anything.

    Returns:
        Where the tokens are.

    Raises:
        DataError: If there is no tokenizer.json, or it gives the two ids that do not follow each other.
    """
    copy_tokenizer(source, target)
    file = target / "tokenizer.json"
    if not file.is_file():
        if not add:
            return Extension(None, added=False)
        raise DataError(
            f"{source} holds no tokenizer.json to add {INDICATOR} and {POSITION} to; give --tokenizer "
            "FOLDER, or --no-add-tokens to import the weights alone"
        )
    tokenizer = read_tokenizer(file)
    tokens = (INDICATOR, POSITION)
    known = [tokenizer.token_to_id(token) for token in tokens]
    if add and None in known:
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        tokenizer.save(str(file))
    indicator, position = (tokenizer.token_to_id(token) for token in tokens)
    if indicator is None:
        return Extension(None, added=False)
    if position != indicator + 1:
        raise DataError(
            f"{source} gives {INDICATOR} the id {indicator} and {POSITION} the id {position}, not the next "
            "one; take the tokenizer that came with the weights"
        )
    if None not in known:
        return Extension(indicator, added=False)
    _list_in_config(target, {INDICATOR: indicator, POSITION: position})
    return Extension(indicator, added=True)


def _list_in_config(folder: Path, ids: dict[str, int]) -> None:
    """Tells the files in which transformers lists added tokens once more."""
    file = folder / "tokenizer_config.json"
    if file.is_file():
        config = _object(file)
        listed = config.get("added_tokens_decoder")
        if isinstance(listed, dict):
            plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
            listed |= {
                str(number): {"content": token, **plain, "special": True} for token, number in ids.items()
            }
            write_json(file, config, indent=2, ensure_ascii=False)
    file = folder / "added_tokens.json"
    if file.is_file():
        write_json(file, _object(file) | ids, indent=2, ensure_ascii=False)


def _object(file: Path) -> dict[str, Any]:
    content = read_json(file, most=MOST_BYTES)
    if not isinstance(content, dict):
        raise DataError(f"{file} holds no JSON object: take the tokenizer that came with the weights")
    return content


def with_mean_rows(
    table: Float[np.ndarray, "vocabulary D"], first: int, count: int
) -> Float[np.ndarray, "vocabulary D"]:
    """A table whose rows `first` and following are the mean of all rows before them.

    Args:
        table: Embedding or head. Rows behind the vocabulary, which released tables have to spare, are used;
            the table grows only where there are too few.
        first: Id of the first new token.
        count: New tokens.

    Returns:
        The changed copy, in the table's type; the mean is taken in float32.
    """
    rows = max(len(table), first + count)
    extended = np.zeros((rows, table.shape[1]), table.dtype)
    extended[: len(table)] = table
    extended[first : first + count] = table[:first].mean(axis=0, dtype=np.float32).astype(table.dtype)
    return extended

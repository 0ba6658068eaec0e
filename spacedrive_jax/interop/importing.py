"""Others' weights into a folder of ours, with the two coordinate tokens added to their vocabulary.

Tensors stream from file to file: no model is built, no device is used.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from tokenizers import AddedToken

from spacedrive_jax.console import progress
from spacedrive_jax.data.tokenizer import INDICATOR, MOST_BYTES, POSITION, read_tokenizer
from spacedrive_jax.errors import CheckpointError, DataError
from spacedrive_jax.interop.hf_checkpoint import with_own_head, without_content
from spacedrive_jax.interop.hf_config import (
    format_of,
    read_hf_config,
    read_processor_settings,
    read_special_ids,
)
from spacedrive_jax.interop.peft import base_of, open_adapter, read_peft_config, write_adapter
from spacedrive_jax.interop.safetensors_folder import (
    PlannedTensor,
    SafetensorsFolder,
    check_folder,
    new_folder,
    plan_shards,
    write_tensors,
)
from spacedrive_jax.interop.weight_table import check_names_and_shapes
from spacedrive_jax.interop.weights_folder import ADAPTER_FOLDER, Fingerprint, WeightsMetadata
from spacedrive_jax.io import require_regular, write_part
from spacedrive_jax.json_files import read_json, write_json
from spacedrive_jax.models.families import family_of

# Adds the two coordinate tokens to a released vocabulary: tokenizer, embedding table and head.


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
        source: folder with a tokenizer.json.
        target: existing folder to write into.
        add: False copies without adding anything.

    Returns:
        Where the tokens are.

    Raises:
        DataError: there is no tokenizer.json, or it gives the two ids that do not follow each other.
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
    tokenizer = read_tokenizer(source / file.name)
    tokens = (INDICATOR, POSITION)
    known = [tokenizer.token_to_id(token) for token in tokens]
    if add and None in known:
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        write_part(file, tokenizer.to_str(pretty=True))
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
    _list_in_config(source, target, {INDICATOR: indicator, POSITION: position})
    return Extension(indicator, added=True)


def _list_in_config(source: Path, target: Path, ids: dict[str, int]) -> None:
    """Tells the files in which transformers lists added tokens once more."""
    file = target / "tokenizer_config.json"
    if file.is_file():
        config = _object(source / file.name)
        listed = config.get("added_tokens_decoder")
        if isinstance(listed, dict):
            plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
            listed |= {
                str(number): {"content": token, **plain, "special": True} for token, number in ids.items()
            }
            write_json(file, config, indent=2, ensure_ascii=False)
    file = target / "added_tokens.json"
    if file.is_file():
        write_json(file, _object(source / file.name) | ids, indent=2, ensure_ascii=False)


def _object(file: Path) -> dict[str, Any]:
    content = read_json(file, most=MOST_BYTES)
    if not isinstance(content, dict):
        raise DataError(f"{file} holds no JSON object: take the tokenizer that came with the weights")
    return content


def with_mean_rows(
    table: Float[np.ndarray, "vocabulary D"], first: int, count: int
) -> Float[np.ndarray, "grown D"]:
    """A table whose rows `first` and following are the mean of all rows before them.

    Args:
        table: embedding or head. Rows behind the vocabulary, which released tables have to spare, are used;
            the table grows only where there are too few.
        first: id of the first new token.
        count: new tokens.

    Returns:
        The changed copy, in the table's type; the mean is taken in float32.
    """
    rows = max(len(table), first + count)
    extended = np.zeros((rows, table.shape[1]), table.dtype)
    extended[: len(table)] = table
    extended[first : first + count] = table[:first].mean(axis=0, dtype=np.float32).astype(table.dtype)
    return extended


TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")
"""Tensors with a row per token."""


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """What a reader is told besides source and target."""

    base: Path | None = None
    """Base checkpoint that adapters belong to; None takes the one their config names."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; None takes the base checkpoint's."""
    add_tokens: bool = True
    """Add the two coordinate tokens."""
    max_shard_bytes: int = 2 * 1000**3
    published_config: Path | None = None
    """The published config that a SpaceDrive checkpoint was trained with."""
    preset: str | None = None
    """The run that a SpaceDrive checkpoint is to serve; None takes the published one of its family."""


Reader = Callable[[Path, Path, ImportOptions], Mapping[str, Any]]
"""(source, target folder to create, options) to the metadata of what was written."""


def import_hf(source: Path, out: Path, options: ImportOptions) -> Mapping[str, Any]:
    """Imports a transformers checkpoint of any family into a weights folder.

    Raises:
        CheckpointError: `out` exists, files are missing or damaged, or tensors are missing, unknown or
            misshapen.
    """
    with new_folder(out) as folder:
        metadata = _import_base(source, folder, options)
        metadata.write(folder)
    return dataclasses.asdict(metadata)


def import_peft(source: Path, out: Path, options: ImportOptions) -> Mapping[str, Any]:
    """Imports a PEFT adapter together with its base checkpoint into a weights folder.

    Raises:
        CheckpointError: as `import_hf`; also if the base is not found or the adapter does not fit it.
    """
    lora = read_peft_config(source)
    base = options.base or _base_of(source)
    check_folder(base)
    rules, adapter = open_adapter(source, read_hf_config(base), lora)
    with new_folder(out) as folder:
        metadata = dataclasses.replace(
            _import_base(base, folder, options), adapter_rank=lora.rank, adapter_source=str(source)
        )
        tensors = ((name, adapter.read(name)) for rule in rules for name in rule.source_names())
        form = format_of(read_hf_config(base))
        write_adapter(folder / ADAPTER_FOLDER, tensors, lora, rules, form, base_model=str(base))
        metadata.write(folder)
    return dataclasses.asdict(metadata)


READERS: dict[str, Reader] = {"hf": import_hf, "peft": import_peft}


def _import_base(source: Path, folder: Path, options: ImportOptions) -> WeightsMetadata:
    """Checks a checkpoint against its config and writes it, with the two tokens, into an open folder."""
    check_folder(source)
    config = read_hf_config(source)
    # Handed on as they are: what cannot be read is said here, not when the folder is opened.
    read_processor_settings(source, config)
    read_special_ids(source)
    form = format_of(config)
    tensors = SafetensorsFolder(source, rename=form.canonical_name)
    tensors.check_flavour()
    config = with_own_head(config, tensors)
    rules = form.rules(config)
    ignore = without_content(config, tensors)
    check_names_and_shapes(rules, tensors.shapes(), origin=str(source), ignore=ignore)
    tokens = extend_tokenizer(options.tokenizer or source, folder, add=options.add_tokens)
    rows = config.decoder.vocab_size
    if tokens.indicator is not None and tokens.indicator + 2 > rows:
        if not tokens.added:
            raise CheckpointError(
                f"{source}: the tokenizer has the coordinate tokens at {tokens.indicator}, but the table has "
                f"{rows} rows; give the tokenizer that belongs to these weights"
            )
        if tokens.indicator > rows:
            raise CheckpointError(
                f"{options.tokenizer or source}: the tokenizer has ids up to {tokens.indicator - 1:,}, but "
                f"the table has {rows:,} rows; give the tokenizer that belongs to these weights (--tokenizer)"
            )
        rows = tokens.indicator + 2
    names = [name for rule in rules for name in rule.source_names()]

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for name in progress(names, desc=f"import {source.name}", unit="tensor"):
            value = tensors.read(name)
            if tokens.added and tokens.indicator is not None and name in TABLES:
                value = with_mean_rows(value, tokens.indicator, 2)
            yield form.hub_name(name), value

    def size(name: str) -> int:
        place = tensors.places[name]
        return place.nbytes * rows // place.shape[0] if name in TABLES else place.nbytes

    planned = [PlannedTensor(form.hub_name(name), size(name)) for name in names]
    fields = with_vocabulary(source, rows, form.text_part)
    if not config.decoder.tie_word_embeddings and read_hf_config(source).decoder.tie_word_embeddings:
        fields = untied(fields, form.text_part)
    write_json(folder / "config.json", fields, indent=2)
    fingerprint = Fingerprint()
    write_tensors(folder, fingerprint.watch(stream()), plan_shards(planned, options.max_shard_bytes))
    return WeightsMetadata.of(family_of(config).name, source, fingerprint, new_tokens=tokens.indicator)


def with_vocabulary(source: Path, rows: int, text_part: str) -> dict[str, Any]:
    """The source's own config.json for tables of `rows` rows; `text_part` as in `Format`."""
    fields = read_json(source / "config.json")
    for part in (fields, fields.get(text_part)):
        if part and "vocab_size" in part:
            part["vocab_size"] = rows
    return fields


def untied(fields: Mapping[str, Any], text_part: str) -> dict[str, Any]:
    """A config.json that says that the head has weights of its own, in both places that are read."""
    text = fields.get(text_part)
    parts = {text_part: {**text, "tie_word_embeddings": False}} if isinstance(text, Mapping) else {}
    return {**fields, "tie_word_embeddings": False, **parts}


def _base_of(adapter: Path) -> Path:
    """The folder of the base checkpoint that an adapter's config names."""
    named = base_of(adapter)
    if named is None or not Path(named).is_dir():
        raise CheckpointError(f"{adapter} adapts {named!r}, which is no folder here; give --base FOLDER")
    return Path(named)

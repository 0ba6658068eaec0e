"""Readers of others' weights. Tensors stream from file to file: no model is built, no device is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spacedrive_jax.console import progress
from spacedrive_jax.errors import CheckpointError
from spacedrive_jax.interop.flavours import check_folder
from spacedrive_jax.io import read_json, write_json
from spacedrive_jax.vlm.checkpoint import with_own_head, without_content
from spacedrive_jax.vlm.conversion import check_names_and_shapes
from spacedrive_jax.vlm.families import family_of
from spacedrive_jax.vlm.hf_config import read_hf_config
from spacedrive_jax.vlm.peft import base_of, open_adapter, read_peft_config, write_adapter
from spacedrive_jax.vlm.safetensors_folder import (
    PlannedTensor,
    SafetensorsFolder,
    new_folder,
    plan_shards,
    write_tensors,
)
from spacedrive_jax.weights.folder import ADAPTER_FOLDER, Fingerprint, WeightsFacts
from spacedrive_jax.weights.tokens import extend_tokenizer, with_mean_rows

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
"""(source, target folder to create, options) to the facts of what was written."""


def import_hf(source: Path, out: Path, options: ImportOptions) -> Mapping[str, Any]:
    """Imports a transformers checkpoint of any family into a weights folder.

    Raises:
        CheckpointError: If `out` exists, files are missing or damaged, or tensors are missing, unknown or
            misshapen.
    """
    with new_folder(out) as folder:
        facts = _import_base(source, folder, options)
        facts.write(folder)
    return dataclasses.asdict(facts)


def import_peft(source: Path, out: Path, options: ImportOptions) -> Mapping[str, Any]:
    """Imports a PEFT adapter together with its base checkpoint into a weights folder.

    Raises:
        CheckpointError: As `import_hf`; also if the base is not found or the adapter does not fit it.
    """
    lora = read_peft_config(source)
    base = options.base or _base_of(source)
    check_folder(base)
    rules, adapter = open_adapter(source, read_hf_config(base), lora)
    with new_folder(out) as folder:
        facts = dataclasses.replace(
            _import_base(base, folder, options), adapter_rank=lora.rank, adapter_source=str(source)
        )
        tensors = ((name, adapter.read(name)) for rule in rules for name in rule.source_names())
        write_adapter(folder / ADAPTER_FOLDER, tensors, lora, rules, base_model=str(base))
        facts.write(folder)
    return dataclasses.asdict(facts)


READERS: dict[str, Reader] = {"hf": import_hf, "peft": import_peft}


def _import_base(source: Path, folder: Path, options: ImportOptions) -> WeightsFacts:
    """Checks a checkpoint against its config and writes it, with the two tokens, into an open folder."""
    check_folder(source)
    config = read_hf_config(source)
    family = family_of(config)
    tensors = SafetensorsFolder(source, rename=family.canonical_name)
    tensors.check_flavour()
    config = with_own_head(config, tensors)
    rules = family.rules(config)
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
            yield family.hub_name(name), value

    def size(name: str) -> int:
        place = tensors.places[name]
        return place.nbytes * rows // place.shape[0] if name in TABLES else place.nbytes

    planned = [PlannedTensor(family.hub_name(name), size(name)) for name in names]
    fields = with_vocabulary(source, rows)
    if not config.decoder.tied_head and read_hf_config(source).decoder.tied_head:
        fields = untied(fields)
    write_json(folder / "config.json", fields, indent=2)
    fingerprint = Fingerprint()
    write_tensors(folder, fingerprint.watch(stream()), plan_shards(planned, options.max_shard_bytes))
    return WeightsFacts.of(family, source, fingerprint, new_tokens=tokens.indicator)


def with_vocabulary(source: Path, rows: int) -> dict[str, Any]:
    """The source's own config.json for tables of `rows` rows."""
    fields = read_json(source / "config.json")
    for part in (fields, fields.get("text_config")):
        if part and "vocab_size" in part:
            part["vocab_size"] = rows
    return fields


def untied(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says that the head has weights of its own, in both places that are read."""
    text = fields.get("text_config")
    parts = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, Mapping) else {}
    return {**fields, "tie_word_embeddings": False, **parts}


def _base_of(adapter: Path) -> Path:
    """The folder of the base checkpoint that an adapter's config names."""
    named = base_of(adapter)
    if named is None or not Path(named).is_dir():
        raise CheckpointError(f"{adapter} adapts {named!r}, which is no folder here; give --base FOLDER")
    return Path(named)

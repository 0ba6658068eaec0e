"""Writers of weights for others: what this project trained or imported, as transformers and PEFT have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from spacedrive_jax.errors import CheckpointError
from spacedrive_jax.interop.hf_checkpoint import to_hf
from spacedrive_jax.interop.peft import save_adapter
from spacedrive_jax.interop.safetensors_folder import save_tensors
from spacedrive_jax.interop.weight_table import new_token_rules
from spacedrive_jax.models.language_model import NewTokenParam
from spacedrive_jax.models.partitioning import to_host
from spacedrive_jax.models.vision_language import VisionLanguageModel

NEW_TOKENS_FILE = "new_tokens.safetensors"


@dataclasses.dataclass(frozen=True)
class Exportable:
    """A vision-language model and what belongs to it."""

    model: VisionLanguageModel
    base_name: str
    """What the base checkpoint is called."""
    write_tokenizer: Callable[[Path], None]
    """Puts the tokenizer's files into a folder."""
    left_out: tuple[str, ...] = ()
    """Modules of a trained model that are no part of the vision-language model."""


def export_hf(opened: Exportable, out: Path) -> Mapping[str, Any]:
    """Writes the whole vision-language model for transformers, adapters and new-token rows folded in.

    Args:
        opened: the model; see `inference.open_model`.
        out: Folder to create.

    Returns:
        Facts for `--json`.

    Raises:
        CheckpointError: If `out` exists, or transformers cannot express the model.
    """
    decoder = opened.model.decoder
    written = to_hf(opened.model, out, merged=True, complete=opened.write_tokenizer)
    return {
        "out": str(out),
        "merged_adapter_rank": None if decoder.lora is None else decoder.lora.rank,
        "new_tokens": None if decoder.new_tokens is None else decoder.new_tokens.first_id,
        "untied_head": written.decoder.tie_word_embeddings != decoder.config.tie_word_embeddings,
        "left_out": list(opened.left_out),
    }


def export_peft(opened: Exportable, out: Path) -> Mapping[str, Any]:
    """Writes the adapters for PEFT, and trained new-token rows beside them, which PEFT has no place for.

    Args:
        opened: as in `export_hf`.
        out: Folder to create; `new_tokens.safetensors` in it holds the rows under their published names.

    Returns:
        Facts for `--json`.

    Raises:
        CheckpointError: If the model has no adapters, or `out` exists.
    """
    lora, new_tokens = opened.model.decoder.lora, opened.model.decoder.new_tokens
    if lora is None:
        raise CheckpointError(f"{opened.base_name} has no adapters; --to hf writes the whole model")

    rows: dict[str, np.ndarray] = {}
    if new_tokens is not None:
        state = dict(nnx.to_flat_state(nnx.state(opened.model, NewTokenParam)))
        rules = new_token_rules(opened.model.config.decoder, new_tokens)
        rows = {rule.source: to_host(state[rule.target][...]) for rule in rules}

    def add_new_tokens(folder: Path) -> None:
        if rows:
            save_tensors(rows, folder / NEW_TOKENS_FILE)

    save_adapter(opened.model, out, base_model=opened.base_name, complete=add_new_tokens)
    return {
        "out": str(out),
        "adapter_rank": lora.rank,
        "new_tokens": None if new_tokens is None else new_tokens.first_id,
        "left_out": list(opened.left_out),
    }

"""What transformers wants beside the weights of a run: tokenizer, processor, chat template, generation.

They are the base's own, with the tokenizer that the run used in the place of the base's. A run whose base was
drawn has none; then the tokenizer and what ends an answer are written, and the processor is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spacedrive_jax.data.tokenizer import DrivingTokenizer, load_tokenizer
from spacedrive_jax.errors import CheckpointError
from spacedrive_jax.interop.importing import copy_tokenizer
from spacedrive_jax.io import MEBIBYTE, is_there, read_json, write_json, write_part
from spacedrive_jax.models.config import VLConfig
from spacedrive_jax.models.families import family_of

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SAMPLING = ("temperature", "top_k", "top_p", "typical_p", "min_p")
"""Fields of a generation config that mean nothing without sampling; transformers warns about them."""


def write_processor(folder: Path, tokenizer: str | None, vlm: VLConfig, beside: Sequence[Path]) -> None:
    """Writes the files of tokenizer and processor into an existing folder.

    Args:
        folder: to write into.
        tokenizer: the run's `data.tokenizer`.
        vlm: the run's vision-language config.
        beside: folders that hold the base's files, the nearest to the run last.

    Raises:
        SpaceDriveError: a file of theirs is damaged, or cannot be written.
    """
    for source in beside:
        copy_tokenizer(source, folder)
    for older in ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"):
        # The tokens that the run added are in tokenizer.json alone: these would lack them.
        (folder / older).unlink(missing_ok=True)
    loaded = load_tokenizer(tokenizer, family_of(vlm).chat)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    write_part(folder / "tokenizer.json", loaded.tokenizer.to_str(pretty=True))
    _write_tokenizer_config(folder / TOKENIZER_CONFIG, loaded)
    _write_generation(folder / GENERATION, loaded)


def _write_tokenizer_config(file: Path, tokenizer: DrivingTokenizer) -> None:
    """The base's, or a plain one; either ends a turn where the run's answers do."""
    fields = _object(file)
    spelled = {name: tokenizer.tokenizer.id_to_token(number) for name, number in tokenizer.special.items()}
    fields.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    fields["eos_token"] = spelled["turn_end"]
    fields.setdefault("pad_token", spelled["padding"])
    # Where the base lists the added tokens, transformers takes that list and no other: it must be whole.
    known = fields.get("added_tokens_decoder")
    if isinstance(known, dict):
        for number, token in tokenizer.tokenizer.get_added_tokens_decoder().items():
            known[str(number)] = {"content": token.content} | {
                name: getattr(token, name)
                for name in ("lstrip", "normalized", "rstrip", "single_word", "special")
            }
    file.unlink(missing_ok=True)
    write_json(file, fields, indent=2)


def _write_generation(file: Path, tokenizer: DrivingTokenizer) -> None:
    """The base's, greedy as SpaceDrive answers, stopped by the end of a turn."""
    fields = {name: value for name, value in _object(file).items() if name not in SAMPLING}
    ends = fields.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.turn_end not in ends:
        ends = [tokenizer.turn_end, *ends]
    fields |= {"do_sample": False, "eos_token_id": ends}
    fields.setdefault("pad_token_id", tokenizer.padding)
    file.unlink(missing_ok=True)
    write_json(file, fields, indent=2)


def _object(file: Path) -> dict[str, Any]:
    if not is_there(file):
        return {}
    fields = read_json(file, most=64 * MEBIBYTE)
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} holds no JSON object: fetch the base's files again")
    return fields

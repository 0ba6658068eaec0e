"""Writers of weights for others: what this project trained or imported, as transformers and PEFT have it.

And the other way: which run of this project a published SpaceDrive checkpoint means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from spacedrive_jax.config import Config, TrainConfig, load_config
from spacedrive_jax.data.tokenizer import DrivingTokenizer, load_tokenizer
from spacedrive_jax.errors import CheckpointError
from spacedrive_jax.interop.hf_checkpoint import to_hf
from spacedrive_jax.interop.hf_config import published_of
from spacedrive_jax.interop.importing import ImportOptions, copy_tokenizer
from spacedrive_jax.interop.model_card import CARD
from spacedrive_jax.interop.peft import save_adapter
from spacedrive_jax.interop.safetensors_folder import save_tensors
from spacedrive_jax.interop.spacedrive_config import (
    PublishedConfig,
    data_config,
    model_config,
    parse_published_config,
    read_published_config,
    train_config,
)
from spacedrive_jax.interop.spacedrive_tensors import Parts
from spacedrive_jax.interop.weight_table import new_token_rules
from spacedrive_jax.io import MEBIBYTE, is_there, write_part, write_text
from spacedrive_jax.json_files import read_json, write_json
from spacedrive_jax.models.config import LoraConfig, VLConfig
from spacedrive_jax.models.coordinate_encoder import frequency_table
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.language_model import NewTokenParam
from spacedrive_jax.models.partitioning import to_host
from spacedrive_jax.models.spacedrive_config import ModelConfig
from spacedrive_jax.models.vision_language import VisionLanguageModel

FREQUENCIES = "position_encoder.freq"
FREQUENCY_TOLERANCE = 1e-5
"""Relative; torch's vectorised power is off by two units in the last place."""
LOSS_FIELDS = ("position_loss", "huber_delta", "position_weight", "supervision")
UNTRACED = ("visual_positions", "position_input", "semantic_position")
"""Fields of a model that leave no trace in a checkpoint."""


def published_run(
    parts: Parts, vlm: VLConfig, lora: LoraConfig, options: ImportOptions, origin: str
) -> tuple[Config, list[str]]:
    """The run that a checkpoint means.

    The model follows from the published config, which `--published-config` names or the checkpoint carries in
    its `meta`; without one, from the preset. Data and training settings are the preset's where one is given,
    else the published ones.

    Args:
        parts: the checkpoint.
        vlm: its base.
        lora: its adapters.
        options: names the published config and the preset.
        origin: what to call the checkpoint.

    Returns:
        The run, and what had to be assumed.

    Raises:
        CheckpointError: the published config cannot be read or means nothing this project knows, or the
            checkpoint's frequencies are not its encoder's.
    """
    preset = load_config(options.preset or _preset_of(parts, vlm))
    published = _published_config(parts, options, origin)
    notes = []
    if published is None:
        model = dataclasses.replace(preset.model, vlm=vlm, lora=lora, weights=None)
        settings = ", ".join(f"model.{name} {getattr(model, name)}" for name in UNTRACED)
        notes.append(
            f"the checkpoint does not say how it was trained: {settings} are those of {preset.name} "
            "(--published-config FILE tells)"
        )
        run = dataclasses.replace(preset, model=model)
    else:
        if not published.model.get("io_3d_pos", False):
            raise CheckpointError(
                f"{origin}: its config has io_3d_pos False, with which the published code cannot train"
            )
        model = model_config(published.model, vlm, lora, preset.model.compute)
        data = preset.data
        if options.preset is None:
            data = data_config(published.model, published.loader, data)
        train = _with_losses(preset.train, train_config(published.model))
        run = dataclasses.replace(preset, model=model, data=data, train=train)
    check_frequencies(model, parts.buffers, origin)
    return dataclasses.replace(run, name="published_spacedrive", run_dir=None), notes


def _published_config(parts: Parts, options: ImportOptions, origin: str) -> PublishedConfig | None:
    if options.published_config is not None:
        return read_published_config(options.published_config)
    text = parts.meta.get("config")
    return parse_published_config(text, f"{origin}, meta.config") if isinstance(text, str) else None


def _preset_of(parts: Parts, vlm: VLConfig) -> str:
    """The published run of the family, with ego status where the checkpoint has its MLP."""
    has_ego = any(name.startswith("ego_status_mlp") for name in parts.heads)
    return published_of(vlm).presets[has_ego]


def _with_losses(train: TrainConfig, losses: TrainConfig) -> TrainConfig:
    return dataclasses.replace(train, **{name: getattr(losses, name) for name in LOSS_FIELDS})


def check_frequencies(model: ModelConfig, buffers: Mapping[str, np.ndarray], origin: str) -> None:
    """Compares the encoder's frequencies with those that the checkpoint keeps.

    Raises:
        CheckpointError: they differ, naming the fields.
    """
    held = buffers.get(FREQUENCIES)
    if held is None:
        return
    ours = frequency_table(model.encoder, model.vlm.decoder.hidden_size)
    same = held.shape == ours.shape and np.allclose(
        np.asarray(held, np.float32), ours, rtol=FREQUENCY_TOLERANCE, atol=0
    )
    if not same:
        encoder = model.encoder
        raise CheckpointError(
            f"{origin}: {FREQUENCIES} runs from {held.flat[0]:.6g} to {held.flat[-1]:.6g} ({held.size}), but "
            f"model.encoder.kind {encoder.kind}, base {encoder.base:g} and frequency_scaling "
            f"{encoder.frequency_scaling:g} (published pe_type, pe_freq_coeff, pe_freq_scaling) give "
            f"{ours[0]:.6g} to {ours[-1]:.6g} ({ours.size}): give its --published-config, or a --config"
        )


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
    card: str | None = None
    """Text of the model card; None where nothing is known beside the folder itself."""


def export_hf(opened: Exportable, out: Path) -> Mapping[str, Any]:
    """Writes the whole vision-language model for transformers, adapters and new-token rows folded in.

    Args:
        opened: the model; see `inference.open_model`.
        out: folder to create.

    Returns:
        Facts for `--json`.

    Raises:
        CheckpointError: `out` exists, or transformers cannot express the model.
    """
    decoder = opened.model.decoder

    def complete(folder: Path) -> None:
        opened.write_tokenizer(folder)
        if opened.card is not None:
            write_text(folder / CARD, opened.card)

    written = to_hf(opened.model, out, merged=True, complete=complete)
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
        out: folder to create; `new_tokens.safetensors` in it holds the rows under their published names.

    Returns:
        Facts for `--json`.

    Raises:
        CheckpointError: the model has no adapters, or `out` exists.
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

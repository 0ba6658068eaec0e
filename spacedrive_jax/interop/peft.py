"""LoRA adapters in and out as PEFT folders (adapter_config.json, adapter_model.safetensors)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
from flax import nnx

from spacedrive_jax.errors import CheckpointError, DataError
from spacedrive_jax.interop.families import format_of
from spacedrive_jax.interop.hf_checkpoint import export_tensors, fill
from spacedrive_jax.interop.peft_options import read_lora_options
from spacedrive_jax.interop.safetensors_folder import Complete, SafetensorsFolder, write_folder
from spacedrive_jax.interop.weight_table import Rule, check_names_and_shapes, lora_rules
from spacedrive_jax.io import MEBIBYTE, read_json, reason
from spacedrive_jax.models.config import LoraConfig, LoraTarget, VLConfig
from spacedrive_jax.models.vision_language import VisionLanguageModel

CONFIG_FILE = "adapter_config.json"
STEM = "adapter_model"

_WRAPPER = "base_model.model."


def read_peft_config(path: str | Path) -> LoraConfig:
    """Reads what adapters a PEFT folder holds, to build the model with.

    Args:
        path: Folder with adapter_config.json and adapter_model.safetensors.

    Returns:
        Rank, alpha, dropout and targets.

    Raises:
        CheckpointError: If files are missing or damaged, or an option is used that is not understood.
    """
    values, file = _read_config(Path(path))
    rank, alpha, dropout = read_lora_options(values, file)
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=_targets(_open(path, str).places, Path(path)),
    )


def load_adapter(model: VisionLanguageModel, path: str | Path) -> None:
    """Puts the adapters of a PEFT folder into a model built for them.

    Args:
        model: A model built with `lora=read_peft_config(path)`; changed in place.
        path: The PEFT folder.

    Raises:
        CheckpointError: If the model was built with other adapters, or tensors do not fit.
    """
    wanted, built = read_peft_config(path), model.decoder.lora
    if built is None or _kind(wanted) != _kind(built):
        raise CheckpointError(
            f"{path} holds {wanted} but the model was built with {built}; build it with the former"
        )
    rules, folder = open_adapter(path, model.config, wanted)
    state = dict(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))
    fill(state, rules, folder)
    nnx.update(model, nnx.from_flat_state(state))


def open_adapter(
    path: str | Path, config: VLConfig, lora: LoraConfig
) -> tuple[tuple[Rule, ...], SafetensorsFolder]:
    """Opens the adapters of a PEFT folder and checks them against the model they are for.

    Args:
        path: The PEFT folder.
        config: The model.
        lora: What `read_peft_config(path)` says.

    Returns:
        The conversion table and the tensors under its names.

    Raises:
        CheckpointError: If tensors are missing, unknown or misshapen.
    """
    rules = lora_rules(config.decoder, lora)
    folder = _open(path, format_of(config).canonical_name)
    check_names_and_shapes(rules, folder.shapes(), origin=str(path))
    return rules, folder


def save_adapter(
    model: VisionLanguageModel, path: str | Path, *, base_model: str, complete: Complete | None = None
) -> None:
    """Writes a model's adapters as a PEFT folder.

    Args:
        model: The model.
        path: Folder to create.
        base_model: Name or path of the base checkpoint, for `base_model_name_or_path`.
        complete: Adds what else belongs into the folder.

    Raises:
        CheckpointError: If the model has no adapters or the folder exists.
    """
    lora = model.decoder.lora
    if lora is None:
        raise CheckpointError("the model has no adapters to save; it was built with lora=None")
    rules = lora_rules(model.config.decoder, lora)
    state = dict(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))
    write_adapter(path, export_tensors(state, rules), lora, rules, base_model=base_model, complete=complete)


def write_adapter(
    path: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    lora: LoraConfig,
    rules: Iterable[Rule],
    *,
    base_model: str,
    complete: Complete | None = None,
) -> None:
    """Writes adapters as a PEFT folder.

    Args:
        path: Folder to create.
        tensors: Names and values in the order of `rules`.
        lora: What the adapters are.
        rules: `lora_rules` of the model they belong to.
        base_model: Name or path of the base checkpoint, for `base_model_name_or_path`.
        complete: Adds what else belongs into the folder.

    Raises:
        CheckpointError: If the folder exists.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "inference_mode": True,
        # An expression, not a list: CLIP's projections have the same names.
        "target_modules": rf".*language_model.*\.({'|'.join(lora.targets)})_proj",
    }
    shards = [[name for rule in rules for name in rule.source_names()]]
    write_folder(path, tensors, shards, config=config, stem=STEM, config_file=CONFIG_FILE, complete=complete)


def _kind(lora: LoraConfig) -> tuple[int, float, frozenset[str]]:
    """What must agree for one model's adapters to fit another; dropout need not."""
    return lora.rank, lora.alpha, frozenset(lora.targets)


def base_of(path: Path) -> str | None:
    """The name or path of the base checkpoint that an adapter's config gives.

    Raises:
        CheckpointError: the config cannot be read.
    """
    named = _read_config(path)[0].get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def _read_config(path: Path) -> tuple[dict[str, Any], Path]:
    file = path / CONFIG_FILE
    try:
        values = read_json(file, most=MEBIBYTE)
    except DataError as error:
        raise CheckpointError(
            f"cannot read {file}: {reason(error, file)}; give a folder that PEFT wrote"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object; give a folder that PEFT wrote")
    return values, file


def _open(path: str | Path, canonical_name: Callable[[str], str]) -> SafetensorsFolder:
    file = Path(path) / f"{STEM}.safetensors"
    if not file.is_file():
        if file.with_suffix(".bin").is_file():
            raise CheckpointError(
                f"{path} holds {STEM}.bin, torch's pickled weights: save the adapters as safetensors "
                "(model.save_pretrained(NEW, safe_serialization=True))"
            )
        raise CheckpointError(f"{file} is not there; save the adapters as safetensors")
    # The wrapped model's names come in the hub's and in transformers' form, like those of checkpoints.
    return SafetensorsFolder(file, rename=lambda name: _WRAPPER + canonical_name(name.removeprefix(_WRAPPER)))


def _targets(names: Iterable[str], path: Path) -> tuple[LoraTarget, ...]:
    names = [name for name in names if "vision" not in name]
    found = [target for target in get_args(LoraTarget) if any(f".{target}_proj." in name for name in names)]
    if not found:
        raise CheckpointError(f"{path} adapts none of the decoder's q, k, v, o projections")
    return tuple(found)

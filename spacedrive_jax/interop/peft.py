"""LoRA adapters in and out as PEFT folders (adapter_config.json, adapter_model.safetensors).

Of an adapter's options each is understood, known to have no effect on what is stored, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from flax import nnx

from spacedrive_jax.errors import CheckpointError, DataError
from spacedrive_jax.interop.hf_checkpoint import export_tensors, fill
from spacedrive_jax.interop.hf_config import format_of
from spacedrive_jax.interop.safetensors_folder import FLOAT_TYPES, Complete, SafetensorsFolder, write_folder
from spacedrive_jax.interop.weight_table import Format, Rule, check_names_and_shapes, lora_rules
from spacedrive_jax.io import MEBIBYTE, reason
from spacedrive_jax.json_files import read_json
from spacedrive_jax.models.config import LoraConfig, LoraTarget, VLConfig
from spacedrive_jax.models.vision_language import VisionLanguageModel

ONLY_AT_THE_START = (True, False, None, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base as it is. All others (pissa, olora, corda, loftq, lora_ga, mica …)
take the adapter's first product out of the base, or replace it: W + s B A is not what they mean."""

_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights", "use_rslora")
_WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    # Which modules are adapted is read from the tensors, which say it without an expression.
    *("target_modules", "exclude_modules", "layers_pattern", "runtime_config", "megatron_core"),
    # Settings of how training begins or goes, with `init_lora_weights` and the switches that decide.
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config", "qalora_group_size"),
)


def read_lora_options(values: Mapping[str, Any], file: Path) -> tuple[int, float, float]:
    """Rank, alpha and dropout of a plain LoRA adapter, alpha over rank being the scale.

    Args:
        values: adapter_config.json.
        file: what to call it.

    Returns:
        `r`, `lora_alpha` and `lora_dropout`; with `use_rslora` an alpha that gives its scale, alpha over the
        root of the rank.

    Raises:
        CheckpointError: an option changes what the adapter means and is not understood, or a value cannot be.
    """
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: only peft_type LORA with bias none is supported, not {kind!r}")
    if values.get("bias", "none") != "none":
        raise CheckpointError(
            f"{file}: only peft_type LORA with bias none is supported, not bias {values['bias']!r} (train "
            "with bias none, or import the merged model: --from hf)"
        )
    start = values.get("init_lora_weights", True)
    if not any(start is known or start == known for known in ONLY_AT_THE_START):
        raise CheckpointError(
            f"{file}: init_lora_weights {str(start)[:40]!r} belongs to a base that PEFT changed, not to the "
            "one it names: save it as plain LoRA (path_initial_model_for_weight_conversion of "
            "save_pretrained) or merged (merge_and_unload(), then --from hf)"
        )
    used = [name for name, value in values.items() if name not in _READ + _WITHOUT_EFFECT and _is_set(value)]
    if used:
        said = ", ".join(f"{name} {str(values[name])[:40]}" for name in sorted(used))
        raise CheckpointError(
            f"{file}: {', '.join(sorted(used))} is not supported, only plain LoRA ({said}): import "
            "the merged model (merge_and_unload(), then --from hf)"
        )
    for name in ("r", "lora_alpha"):
        if name not in values:
            raise CheckpointError(f"{file}: field {name!r} is missing")
    rank, alpha, dropout = values["r"], values["lora_alpha"], values.get("lora_dropout") or 0.0
    if type(rank) is not int or not 1 <= rank <= 65536:
        raise CheckpointError(f"{file}: r is {rank!r}, expected a whole number from 1 to 65536")
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise CheckpointError(f"{file}: lora_alpha is {alpha!r}, expected a number")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise CheckpointError(f"{file}: lora_dropout is {dropout!r}, expected a number from 0 to below 1")
    by_root = values.get("use_rslora")
    if not isinstance(by_root, bool | None):
        raise CheckpointError(f"{file}: use_rslora is {by_root!r}, expected true or false")
    scaled = alpha * math.sqrt(rank) if by_root else alpha
    return rank, float(scaled), float(dropout)


def _is_set(value: Any) -> bool:
    """Whether an option differs from "not used", which PEFT writes as null, false or nothing."""
    return value is not None and value is not False and value != {} and value != []


CONFIG_FILE = "adapter_config.json"
STEM = "adapter_model"

_WRAPPER = "base_model.model."


def read_peft_config(path: str | Path) -> LoraConfig:
    """Reads what adapters a PEFT folder holds, to build the model with.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors.

    Returns:
        Rank, alpha, dropout and targets.

    Raises:
        CheckpointError: files are missing or damaged, or an option is used that is not understood.
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
        model: a model built with `lora=read_peft_config(path)`; changed in place.
        path: the PEFT folder.

    Raises:
        CheckpointError: the model was built with other adapters, or tensors do not fit.
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
        path: the PEFT folder.
        config: the model.
        lora: what `read_peft_config(path)` says.

    Returns:
        The conversion table and the tensors under its names.

    Raises:
        CheckpointError: tensors are missing, unknown or misshapen.
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
        model: the model.
        path: folder to create.
        base_model: name or path of the base checkpoint, for `base_model_name_or_path`.
        complete: adds what else belongs into the folder.

    Raises:
        CheckpointError: the model has no adapters or the folder exists.
    """
    lora = model.decoder.lora
    if lora is None:
        raise CheckpointError("the model has no adapters to save; it was built with lora=None")
    rules = lora_rules(model.config.decoder, lora)
    state = dict(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))
    form = format_of(model.config)
    tensors = export_tensors(state, rules)
    write_adapter(path, tensors, lora, rules, form, base_model=base_model, complete=complete)


def write_adapter(
    path: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    lora: LoraConfig,
    rules: Iterable[Rule],
    form: Format,
    *,
    base_model: str,
    complete: Complete | None = None,
) -> None:
    """Writes adapters as a PEFT folder.

    Args:
        path: folder to create.
        tensors: names and values in the order of `rules`.
        lora: what the adapters are.
        rules: `lora_rules` of the model they belong to.
        form: format of its family, which says how PEFT names its modules.
        base_model: name or path of the base checkpoint, for `base_model_name_or_path`.
        complete: adds what else belongs into the folder.

    Raises:
        CheckpointError: the folder exists.
    """

    def renamed(name: str) -> str:
        return _WRAPPER + form.module_name(name.removeprefix(_WRAPPER))

    decoder = form.module_name("model.language_model.layers").split(".")[1]
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
        "target_modules": rf".*{decoder}.*\.({'|'.join(lora.targets)})_proj",
    }
    shards = [[renamed(name) for rule in rules for name in rule.source_names()]]
    tensors = ((renamed(name), tensor) for name, tensor in tensors)
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
    folder = SafetensorsFolder(
        file, rename=lambda name: _WRAPPER + canonical_name(name.removeprefix(_WRAPPER))
    )
    for place in folder.places.values():
        if place.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{file} is quantised ({place.name} has numbers of type {place.dtype}): save it as floats"
            )
    return folder


def _targets(names: Iterable[str], path: Path) -> tuple[LoraTarget, ...]:
    names = [name for name in names if "vision" not in name]
    found = [target for target in get_args(LoraTarget) if any(f".{target}_proj." in name for name in names)]
    if not found:
        raise CheckpointError(f"{path} adapts none of the language model's q, k, v, o projections")
    return tuple(found)

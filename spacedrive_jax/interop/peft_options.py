"""PEFT's options of a LoRA adapter: understood, without effect on what is stored, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spacedrive_jax.errors import CheckpointError

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
    scaled = alpha * math.sqrt(rank) if values.get("use_rslora") else alpha
    return rank, float(scaled), float(dropout)


def _is_set(value: Any) -> bool:
    """Whether an option differs from "not used", which PEFT writes as null, false or nothing."""
    return value is not None and value is not False and value != {} and value != []

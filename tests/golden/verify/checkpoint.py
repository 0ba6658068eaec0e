"""A published checkpoint read, put into a model, and written again: kind `checkpoint`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from flax import nnx

from spacedrive_jax.errors import DataError
from spacedrive_jax.interop.hf_checkpoint import export_tensors
from spacedrive_jax.interop.hf_config import format_of, read_hf_config
from spacedrive_jax.interop.spacedrive_tensors import (
    Parts,
    adapter_rules,
    base_rules,
    head_rules,
    join_checkpoint,
    new_row_rules,
    split_checkpoint,
)
from spacedrive_jax.interop.torch_file import read_torch_file, write_torch_file
from spacedrive_jax.interop.weight_table import Rule, check_names_and_shapes
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.families.llava import LlavaConfig
from spacedrive_jax.models.spacedrive import SpaceDrive, new_token_rows
from spacedrive_jax.models.spacedrive_config import ModelConfig
from tests.golden.verify.case_files import read_settings
from tests.golden.verify.check import Check, compare
from tests.golden.verify.modules import read_module

EQUAL = {"atol": 0.0, "rtol": 0.0}


class _Tensors:
    """A dict as `fill` reads it."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self.tensors[name])


def verify_checkpoint(folder: Path) -> list[Check]:
    """Names, types and sums as recorded; file to model to file bit for bit.

    Raises:
        DataError: there is no checkpoint, or its tensors do not fit the model.
    """
    settings = read_settings(folder)
    file = next(iter(sorted(folder.glob("*.pth"))), None)
    if file is None:
        raise DataError(f"{folder} holds no .pth file")
    content = read_torch_file(file)
    state = content["state_dict"]
    checks = [_listing(settings, state)]
    for name, total in settings["checksums"].items():
        ours = np.abs(np.asarray(state[name], np.float64)).sum()
        checks.append(compare(f"{name}/abs_sum", ours, total, rtol=1e-12))
    parts = split_checkpoint(content, str(file))
    through = through_model(parts, settings["vlm_config"])
    with tempfile.TemporaryDirectory() as temporary:
        again = Path(temporary) / file.name
        write_torch_file(again, join_checkpoint(through))
        written = read_torch_file(again)
        same = sum(
            value.dtype == written["state_dict"][name].dtype
            and value.shape == written["state_dict"][name].shape
            and value.tobytes() == written["state_dict"][name].tobytes()
            for name, value in state.items()
        )
        in_order = list(state) == list(written["state_dict"])
        checks.append(compare("round trip, tensors equal bit for bit", same, len(state), **EQUAL))
        checks.append(compare("round trip, names in order", in_order, True, **EQUAL))
        checks.append(compare("round trip, meta", content["meta"] == written["meta"], True, **EQUAL))
    return checks


def _listing(settings: dict, state: dict[str, np.ndarray]) -> Check:
    """Every recorded name with its shape and type, and no other."""
    recorded = {name: (tuple(shape), dtype) for name, (shape, dtype) in settings["names"].items()}
    found = {name: (value.shape, str(value.dtype)) for name, value in state.items()}
    different = {name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name)}
    return compare("names, shapes and types that differ", len(different), 0, **EQUAL)


def through_model(parts: Parts, vlm_config: dict) -> Parts:
    """Puts a checkpoint into a model and takes it out again (the depth network and buffers pass by).

    Raises:
        DataError: with every missing, unknown or misshapen tensor.
    """
    config, indicator = checkpoint_config(parts, vlm_config)
    form = format_of(config.vlm)
    names = {form.canonical_name(name): name for name in parts.base}
    base = {canonical: parts.base[name] for canonical, name in names.items()}
    found = base | parts.adapters | parts.heads
    own_rows = None if isinstance(config.vlm, LlavaConfig) else new_token_rows(config, indicator)
    rules: tuple[Rule, ...] = (
        *base_rules(config),
        *adapter_rules(config),
        *new_row_rules(config, own_rows),
        *head_rules(config),
    )
    shapes = {name: value.shape for name, value in found.items()}
    check_names_and_shapes(rules, shapes, origin="the checkpoint")
    model = read_module(
        lambda: SpaceDrive(config, indicator_id=indicator, rngs=nnx.Rngs(0)), rules, _Tensors(found)
    )
    out = dict(export_tensors(dict(nnx.to_flat_state(nnx.state(model, nnx.Param))), rules))
    return Parts(
        base={name: out[canonical].astype(parts.base[name].dtype) for canonical, name in names.items()},
        adapters={name: out[name] for name in parts.adapters},
        heads={name: out[name] for name in parts.heads},
        depth=parts.depth,
        buffers=parts.buffers,
        order=parts.order,
        meta=parts.meta,
    )


def checkpoint_config(parts: Parts, vlm_config: dict) -> tuple[ModelConfig, int]:
    """The model that a checkpoint's tensors ask for, and the indicator's id.

    The two new tokens are the last rows of the vocabulary; a rank is a shape; a one-layer head, ego status
    and the scale show by being there. Past-position tokens have no tensors: with an ego MLP they are taken
    to be on, as in the published SpaceDrive+.
    """
    vlm = read_hf_config(vlm_config)
    rank = next(value.shape[0] for name, value in parts.adapters.items() if ".lora_A." in name)
    lora = family_of(vlm).lora(rank)
    has_ego = "ego_status_mlp.0.weight" in parts.heads
    # LLaVA's tables are trained in float32 amid a bfloat16 base; float32 holds both.
    types = {str(value.dtype) for value in parts.base.values()}
    storage = types.pop() if len(types) == 1 else "float32"
    config = ModelConfig(
        vlm=vlm,
        lora=lora,
        ego_status="both" if has_ego else "none",
        compute=ComputeConfig(param_dtype=storage),
    )
    return config, vlm.decoder.vocab_size - 2

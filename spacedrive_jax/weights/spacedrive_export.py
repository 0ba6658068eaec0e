"""SpaceDrive in the layout of its published checkpoints: what was imported, bit for bit, or a run of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from spacedrive_jax.console import UserError
from spacedrive_jax.inference.checkpoint import open_trained_model
from spacedrive_jax.model import SpaceDrive
from spacedrive_jax.positional.coordinates import frequency_table
from spacedrive_jax.published.checkpoint import (
    SCALE,
    SCALE_COPIES,
    VLM,
    Parts,
    join_checkpoint,
    published_name,
)
from spacedrive_jax.published.tensors import adapter_rules, base_rules
from spacedrive_jax.published.torch_file import write_torch_file
from spacedrive_jax.training.checkpoints import locate
from spacedrive_jax.vlm.checkpoint import export_tensors
from spacedrive_jax.vlm.config import LlavaConfig, NewTokensConfig
from spacedrive_jax.vlm.families import family_of
from spacedrive_jax.vlm.hf_config import read_hf_config
from spacedrive_jax.vlm.safetensors_folder import SafetensorsFolder
from spacedrive_jax.weights.folder import ADAPTER_FOLDER
from spacedrive_jax.weights.published_run import FREQUENCIES
from spacedrive_jax.weights.trained_parts import (
    DEPTH_FOLDER,
    EXTRAS,
    EXTRAS_FILE,
    LAYOUT_FILE,
    TABLE_ROWS,
    trained_rules,
)


def export_spacedrive(source: Path, out: Path) -> Mapping[str, Any]:
    """Writes a SpaceDrive in the published layout.

    Args:
        source: a weights folder that `import_spacedrive` wrote (bit for bit what it came from), or a training
            run with adapters.
        out: file to create.

    Raises:
        UserError: the folder is neither, the run's model has parts that the published one has not, or `out`
            exists.
    """
    content = _imported(source) if (source / LAYOUT_FILE).is_file() else _trained(source)
    write_torch_file(out, content)
    return {"out": str(out), "tensors": len(content["state_dict"])}


def _imported(source: Path) -> dict[str, Any]:
    """What an imported folder came from."""
    layout = json.loads((source / LAYOUT_FILE).read_text())
    family = family_of(read_hf_config(source))
    base = SafetensorsFolder(source, rename=family.canonical_name)
    adapters = SafetensorsFolder(source / ADAPTER_FOLDER / "adapter_model.safetensors")
    extras = SafetensorsFolder(source / EXTRAS_FILE)
    separate: dict[str, dict[str, np.ndarray]] = {part: {} for part in EXTRAS}
    for name in extras.places:
        part, _, short = name.partition("/")
        separate[part][short] = extras.read(name)
    depth: dict[str, np.ndarray] = {}
    if (source / DEPTH_FOLDER).is_dir():
        network = SafetensorsFolder(source / DEPTH_FOLDER)
        depth = {name: network.read(name) for name in network.places}
    parts = Parts(
        base={name: base.read(family.canonical_name(name)) for name in layout["base"]},
        adapters={name: adapters.read(name) for name in adapters.places},
        **separate,
        depth=depth,
        order=tuple(layout["order"]),
        meta=layout["meta"],
    )
    return join_checkpoint(parts)


def _trained(source: Path) -> dict[str, Any]:
    """A training run as the published code would have saved it, without its optimiser and depth network."""
    if not (source / "checkpoints").is_dir() and source.parent.name != "checkpoints":
        raise UserError(
            f"{source} is neither a training run nor was it imported with --from spacedrive "
            f"(it lacks {LAYOUT_FILE})"
        )
    trained = open_trained_model(source)
    model = nnx.merge(trained.graph, trained.trainable, trained.frozen)
    _, step = locate(source)
    return {"meta": {"iter": step}, "state_dict": published_state(model)}


def published_state(model: SpaceDrive) -> dict[str, np.ndarray]:
    """A model's tensors under the names of the published checkpoints.

    Raises:
        UserError: the model has no adapters, or learned parts that the published model has not.
    """
    config = model.config
    if not config.use_lora or config.encoder.learnable_frequencies:
        raise UserError(
            "the published layout has adapters (model.use_lora True) and no learned frequencies "
            "(model.encoder.learnable_frequencies False)"
        )
    state = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    base = dict(export_tensors(state, base_rules(config)))
    if config.new_token_rows and isinstance(config.vlm, LlavaConfig):
        # The published LLaVA trains rows of its tables, which are float32 for it.
        rows = slice(model.indicator_id, model.indicator_id + NewTokensConfig(model.indicator_id).count)
        for name, path in TABLE_ROWS.items():
            base[name] = base[name].astype(np.float32)
            base[name][rows] = np.asarray(state[path][...])
    adapters = dict(export_tensors(state, adapter_rules(config)))
    heads = dict(export_tensors(state, trained_rules(config, model.indicator_id)))
    wrapper = "base_model.model."
    adapted = {name.removeprefix(wrapper).rsplit(".", 2)[0] for name in adapters}
    found = {published_name("heads", SCALE): heads.pop(SCALE)} if SCALE in heads else {}
    found |= {published_name("base", name, adapted): value for name, value in base.items()}
    found |= {published_name("adapters", name): value for name, value in adapters.items()}
    found |= {published_name("heads", name): value for name, value in heads.items()}
    found |= {copy: found[SCALE] for copy in SCALE_COPIES if SCALE in found}
    frequencies = frequency_table(config.encoder, config.vlm.decoder.hidden_size)
    return found | dict.fromkeys((FREQUENCIES, f"{VLM}{FREQUENCIES}"), frequencies)

"""The published SpaceDrive checkpoint into a weights folder, bit for bit.

What the folder has beside what every weights folder has: `spacedrive_jax.weights.trained_parts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spacedrive_jax.config import to_json
from spacedrive_jax.console import UserError
from spacedrive_jax.interop.flavours import check_published_source
from spacedrive_jax.io import write_json, write_text
from spacedrive_jax.published.checkpoint import Parts, split_checkpoint
from spacedrive_jax.published.torch_file import read_torch_file
from spacedrive_jax.vlm.config import LlavaConfig, LoraConfig
from spacedrive_jax.vlm.conversion import check_names_and_shapes, lora_rules
from spacedrive_jax.vlm.families import family_of
from spacedrive_jax.vlm.hf_config import read_hf_config
from spacedrive_jax.vlm.peft import write_adapter
from spacedrive_jax.vlm.safetensors_folder import (
    SINGLE_FILE,
    PlannedTensor,
    new_folder,
    plan_shards,
    save_tensors,
    write_tensors,
)
from spacedrive_jax.weights.folder import ADAPTER_FOLDER, Fingerprint, WeightsFacts
from spacedrive_jax.weights.importing import ImportOptions, with_vocabulary
from spacedrive_jax.weights.published_run import published_run
from spacedrive_jax.weights.tokens import extend_tokenizer
from spacedrive_jax.weights.trained_parts import (
    DEPTH_FOLDER,
    EXTRAS,
    EXTRAS_FILE,
    LAYOUT_FILE,
    RUN_FILE,
    check_heads,
    pointed_at,
)


def import_spacedrive(source: Path, out: Path, options: ImportOptions) -> Mapping[str, Any]:
    """Imports a published training checkpoint (`iter_N.pth`) into a weights folder.

    Args:
        source: the file.
        out: folder to create.
        options: `base` is needed: the architecture and the tokenizer are not in the checkpoint.

    Returns:
        The facts of the folder, and notes on what had to be assumed.

    Raises:
        UserError: no base is given, `out` exists, the file is damaged or holds anything but tensors and
            plain containers, or its tensors do not fit the base's config or the run it means.
    """
    if options.base is None:
        raise UserError(f"{source} holds no architecture: give --base FOLDER with its base's config.json")
    check_published_source(source)
    parts = split_checkpoint(read_torch_file(source), str(source))
    family = family_of(read_hf_config(options.base))
    base = {family.canonical_name(name): value for name, value in parts.base.items()}
    table = base.get("model.language_model.embed_tokens.weight")
    if table is None:
        raise UserError(f"{source} has no token embeddings under the published names")
    fields = with_vocabulary(options.base, len(table))
    config = read_hf_config(fields)
    rules, lora = family.rules(config), _lora(parts, isinstance(config, LlavaConfig))
    adapter = lora_rules(config.decoder, lora)
    shapes = {name: value.shape for name, value in (base | parts.adapters).items()}
    check_names_and_shapes((*rules, *adapter), shapes, origin=str(source))
    run, notes = published_run(parts, config, lora, options, str(source))
    names = [name for rule in rules for name in rule.source_names()]
    planned = [PlannedTensor(family.hub_name(name), base[name].nbytes) for name in names]
    fingerprint = Fingerprint()
    with new_folder(out) as folder:
        tokens = extend_tokenizer(options.tokenizer or options.base, folder)
        if tokens.indicator is None or tokens.indicator + 2 > len(table):
            raise UserError(
                f"{options.tokenizer or options.base} gives the coordinate tokens the ids {tokens.indicator} "
                f"and the next, but the checkpoint's table has {len(table)} rows: give its --tokenizer"
            )
        check_heads(run.model, parts.heads, tokens.indicator, str(source))
        write_text(folder / RUN_FILE, to_json(pointed_at(run, out)))
        write_json(folder / "config.json", fields, indent=2)
        stream = fingerprint.watch((family.hub_name(name), base[name]) for name in names)
        write_tensors(folder, stream, plan_shards(planned, options.max_shard_bytes))
        adapters = ((name, parts.adapters[name]) for rule in adapter for name in rule.source_names())
        write_adapter(folder / ADAPTER_FOLDER, adapters, lora, adapter, base_model=str(options.base))
        extras = {
            f"{part}/{name}": np.array(value, order="C")  # a copy: files must not share memory
            for part in EXTRAS
            for name, value in getattr(parts, part).items()
        }
        save_tensors(extras, folder / EXTRAS_FILE)
        if parts.depth:
            (folder / DEPTH_FOLDER).mkdir()
            depth = {name: np.array(value, order="C") for name, value in parts.depth.items()}
            save_tensors(depth, folder / DEPTH_FOLDER / SINGLE_FILE)
        layout = {"meta": dict(parts.meta), "order": parts.order, "base": list(parts.base)}
        write_json(folder / LAYOUT_FILE, layout, default=_plain)
        facts = WeightsFacts.of(
            family, source, fingerprint, new_tokens=tokens.indicator, adapter_rank=lora.rank
        )
        facts.write(folder)
    return {**dataclasses.asdict(facts), "notes": notes}


def _plain(value: Any) -> Any:
    """A number of numpy's, which trainers leave in `meta`, for JSON; anything else as text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)


def _lora(parts: Parts, is_llava: bool) -> LoraConfig:
    """The adapters' rank is a shape; the scaling is that of the published training."""
    ranks = {value.shape[0] for name, value in parts.adapters.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise UserError(f"the checkpoint's adapters have the ranks {sorted(ranks)}, expected one")
    rank = ranks.pop()
    return LoraConfig.llava_1_5(rank) if is_llava else LoraConfig(rank=rank)

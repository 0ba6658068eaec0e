"""SpaceDrive in the layout of its published checkpoints: read, and written again.

What is written is what was imported, bit for bit, or a run of ours. A checkpoint that was read means a run of
this project (`published_run`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
from flax import nnx

from spacedrive_jax.config import Config, TrainConfig, load_config, to_json
from spacedrive_jax.errors import CheckpointError, ConfigError
from spacedrive_jax.interop.hf_checkpoint import export_tensors
from spacedrive_jax.interop.hf_config import format_of, published_of, read_hf_config
from spacedrive_jax.interop.importing import ImportOptions, extend_tokenizer, with_vocabulary
from spacedrive_jax.interop.peft import write_adapter
from spacedrive_jax.interop.safetensors_folder import (
    ADAPTER_FILE,
    SINGLE_FILE,
    PlannedTensor,
    SafetensorsFolder,
    new_folder,
    plan_shards,
    save_tensors,
    write_tensors,
)
from spacedrive_jax.interop.spacedrive_config import (
    PublishedConfig,
    data_config,
    model_config,
    parse_published_config,
    read_published_config,
    train_config,
)
from spacedrive_jax.interop.spacedrive_tensors import (
    SCALE,
    SCALE_COPIES,
    VLM,
    Parts,
    adapter_rules,
    base_rules,
    join_checkpoint,
    published_name,
    split_checkpoint,
)
from spacedrive_jax.interop.torch_file import read_torch_file, write_torch_file
from spacedrive_jax.interop.weight_table import check_names_and_shapes, lora_rules
from spacedrive_jax.interop.weights_folder import (
    ADAPTER_FOLDER,
    DEPTH_FOLDER,
    EXTRAS,
    EXTRAS_FILE,
    LAYOUT_FILE,
    RUN_FILE,
    TABLE_ROWS,
    Fingerprint,
    WeightsMetadata,
    check_heads,
    pointed_at,
    trained_rules,
    trains_table_rows,
)
from spacedrive_jax.io import read_bytes, write_text
from spacedrive_jax.json_files import write_json
from spacedrive_jax.models.config import LoraConfig, NewTokensConfig, VLConfig
from spacedrive_jax.models.coordinate_encoder import frequency_table
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.partitioning import to_host
from spacedrive_jax.models.spacedrive import SpaceDrive
from spacedrive_jax.models.spacedrive_config import ModelConfig

FREQUENCIES = "position_encoder.freq"
FREQUENCY_TOLERANCE = 1e-5
"""Relative; torch's vectorised power is off by two units in the last place."""
LOSS_FIELDS = ("position_loss", "huber_delta", "position_weight", "supervision")
UNTRACED = ("visual_positions", "position_input", "semantic_position")
"""Fields of a model that leave no trace in a checkpoint."""

# The published SpaceDrive checkpoint into a weights folder, bit for bit.
#
# What the folder has beside what every weights folder has: `spacedrive_jax.interop.weights_folder`.


def import_spacedrive(source: Path, out: Path, options: ImportOptions) -> Mapping[str, Any]:
    """Imports a published training checkpoint (`iter_N.pth`) into a weights folder.

    Args:
        source: the file.
        out: folder to create.
        options: `base` is needed: the architecture and the tokenizer are not in the checkpoint.

    Returns:
        The metadata of the folder, and notes on what had to be assumed.

    Raises:
        SpaceDriveError: no base is given, `out` exists, the file is damaged or holds anything but tensors and
            plain containers, or its tensors do not fit the base's config or the run it means.
    """
    if options.base is None:
        raise ConfigError(f"{source} holds no architecture: give --base FOLDER with its base's config.json")
    check_published_source(source)
    parts = split_checkpoint(read_torch_file(source), str(source))
    form = format_of(read_hf_config(options.base))
    base = {form.canonical_name(name): value for name, value in parts.base.items()}
    table = base.get("model.language_model.embed_tokens.weight")
    if table is None:
        raise CheckpointError(f"{source} has no token embeddings under the published names")
    fields = with_vocabulary(options.base, len(table), form.text_part)
    config = read_hf_config(fields)
    rules, lora = form.rules(config), family_of(config).lora(_rank(parts))
    adapter = lora_rules(config.decoder, lora)
    shapes = {name: value.shape for name, value in (base | parts.adapters).items()}
    check_names_and_shapes((*rules, *adapter), shapes, origin=str(source))
    run, notes = published_run(parts, config, lora, options, str(source))
    names = [name for rule in rules for name in rule.source_names()]
    planned = [PlannedTensor(form.hub_name(name), base[name].nbytes) for name in names]
    fingerprint = Fingerprint()
    with new_folder(out) as folder:
        tokens = extend_tokenizer(options.tokenizer or options.base, folder)
        if tokens.indicator is None or tokens.indicator + 2 > len(table):
            raise CheckpointError(
                f"{options.tokenizer or options.base} gives the coordinate tokens the ids {tokens.indicator} "
                f"and the next, but the checkpoint's table has {len(table)} rows: give its --tokenizer"
            )
        check_heads(run.model, parts.heads, tokens.indicator, str(source))
        write_text(folder / RUN_FILE, to_json(pointed_at(run, out)))
        write_json(folder / "config.json", fields, indent=2)
        stream = fingerprint.watch((form.hub_name(name), base[name]) for name in names)
        write_tensors(folder, stream, plan_shards(planned, options.max_shard_bytes))
        adapters = ((name, parts.adapters[name]) for rule in adapter for name in rule.source_names())
        write_adapter(folder / ADAPTER_FOLDER, adapters, lora, adapter, form, base_model=str(options.base))
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
        metadata = WeightsMetadata.of(
            family_of(config).name, source, fingerprint, new_tokens=tokens.indicator, adapter_rank=lora.rank
        )
        metadata.write(folder)
    return {**dataclasses.asdict(metadata), "notes": notes}


def check_published_source(path: Path) -> None:
    """Refuses what is no published training checkpoint.

    Raises:
        CheckpointError: saying what it is instead.
    """
    if path.is_dir():
        found = sorted(file.name for file in path.glob("iter_*.pth"))
        if found:
            raise CheckpointError(f"{path} is a folder: give one of its checkpoints, {path / found[-1]}")
        kind = "a transformers checkpoint (--from hf)" if (path / SINGLE_FILE).is_file() else "a folder"
        kind = "a PEFT adapter (--from peft)" if (path / ADAPTER_FILE).is_file() else kind
        raise CheckpointError(f"{path} is {kind}, not a published iter_N.pth")


def _plain(value: Any) -> Any:
    """A number of numpy's, which trainers leave in `meta`, for JSON; anything else as text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)


def _rank(parts: Parts) -> int:
    """The adapters' rank is a shape; their scaling is that of the published training."""
    ranks = {value.shape[0] for name, value in parts.adapters.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise CheckpointError(f"the checkpoint's adapters have the ranks {sorted(ranks)}, expected one")
    return ranks.pop()


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


def export_imported(source: Path, out: Path) -> Mapping[str, Any]:
    """Writes what `import_spacedrive` read back into one file, bit for bit.

    Args:
        source: the weights folder it made.
        out: file to create.

    Raises:
        CheckpointError: the folder is damaged.
        SpaceDriveError: `out` exists.
    """
    return _write(out, _imported(source))


def export_trained(model: SpaceDrive, step: int, out: Path) -> Mapping[str, Any]:
    """Writes a model as the published code would have saved it, without its optimiser and depth network.

    Args:
        model: with adapters.
        step: steps it was trained for.
        out: file to create.

    Raises:
        ConfigError: the model has parts that the published one has not.
        SpaceDriveError: `out` exists.
    """
    return _write(out, {"meta": {"iter": step}, "state_dict": published_state(model)})


def _write(out: Path, content: dict[str, Any]) -> Mapping[str, Any]:
    if jax.process_index() == 0:  # of several hosts, all of which have the content by now
        write_torch_file(out, content)
    return {"out": str(out), "tensors": len(content["state_dict"])}


class _Layout(msgspec.Struct):
    """What checkpoint.json says."""

    order: list[str]
    base: list[str]
    meta: dict[str, Any]


def _layout(file: Path) -> _Layout:
    try:
        return msgspec.json.decode(read_bytes(file), type=_Layout)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): import again") from None


def _imported(source: Path) -> dict[str, Any]:
    """What an imported folder came from."""
    layout = _layout(source / LAYOUT_FILE)
    form = format_of(read_hf_config(source))
    base = SafetensorsFolder(source, rename=form.canonical_name)
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
        base={name: base.read(form.canonical_name(name)) for name in layout.base},
        adapters={name: adapters.read(name) for name in adapters.places},
        **separate,
        depth=depth,
        order=tuple(layout.order),
        meta=layout.meta,
    )
    return join_checkpoint(parts)


def published_state(model: SpaceDrive) -> dict[str, np.ndarray]:
    """A model's tensors under the names of the published checkpoints.

    Raises:
        ConfigError: the model has no adapters, or learned parts that the published model has not.
    """
    config = model.config
    if not config.use_lora or config.encoder.learnable_frequencies:
        raise ConfigError(
            "the published layout has adapters (model.use_lora True) and no learned frequencies "
            "(model.encoder.learnable_frequencies False)"
        )
    more_in_status = config.ego_units or config.target_points_in_status or config.strips_in_status
    if config.decoder.output_scale != 1.0 or more_in_status:
        raise ConfigError(
            "the published model decodes metres and reads the ego status alone, as it is: this one has "
            f"model.decoder.output_scale {config.decoder.output_scale:g}, "
            f"model.ego_units {config.ego_units}, model.target_points_in_status "
            f"{config.target_points_in_status} and model.strips_in_status {config.strips_in_status} "
            "(published 1, False, False, 0)"
        )
    state = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    base = dict(export_tensors(state, base_rules(config), config.compute.storage_dtype))
    if config.new_token_rows and trains_table_rows(config):
        # The published LLaVA trains rows of its tables, which are float32 for it.
        rows = slice(model.indicator_id, model.indicator_id + NewTokensConfig(model.indicator_id).count)
        for name, path in TABLE_ROWS.items():
            base[name] = base[name].astype(np.float32)
            base[name][rows] = to_host(state[path][...])
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

"""What a run starts from: `model.weights` settles architecture, adapters, tokenizer and image size.

It is a transformers checkpoint of any family, a folder that `import-weights` wrote, or a run of this project
(its newest checkpoint, `RUN/checkpoints/STEP`, or what `export-weights --to safetensors` wrote of it).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from spacedrive_jax.batch import LENGTH_STEP
from spacedrive_jax.config import Config, change, check_config, config_changes, read_config, to_plain
from spacedrive_jax.console import note
from spacedrive_jax.constants import NUM_CAMERAS
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.interop.hf_checkpoint import with_own_head
from spacedrive_jax.interop.hf_config import format_of, read_hf_config
from spacedrive_jax.interop.peft import read_peft_config
from spacedrive_jax.interop.safetensors_folder import SafetensorsFolder, check_folder
from spacedrive_jax.interop.weights_folder import ADAPTER_FOLDER, NOT_COMPARED
from spacedrive_jax.io import is_bucket, local, place
from spacedrive_jax.models.config import LoraConfig, VLConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.training import checkpoints
from spacedrive_jax.training.trained_folder import is_trained_folder, trained_config

BASE = "model.vlm."


def is_run(weights: str | Path) -> bool:
    """Whether weights are those of a run of this project (`RUN`, `RUN/best`, `RUN/checkpoints/STEP`, or a
    trained folder, see `trained_folder`).
    """
    path = place(weights)
    if is_trained_folder(path):
        return True
    if path.name == "best" and not path.is_dir():
        path = path.parent
    is_step = path.parent.name == "checkpoints" and path.name.isdecimal()
    return is_step or (path / "checkpoints").is_dir()


def on_disk(weights: str | Path) -> Path:
    """Weights as files of this machine, which safetensors maps into memory.

    Args:
        weights: a folder or file, or `gs://…`, of which a copy is kept (`io.local`). A run in a bucket stays
            there: its checkpoints are read where they are.

    Raises:
        SpaceDriveError: the bucket has no such folder, or cannot be reached.
    """
    path = place(weights)
    if not is_bucket(path) or (is_run(path) and not is_trained_folder(path)):
        return path
    return local(path)


def run_config(weights: str | Path) -> Config:
    """The config of the run that weights are of.

    Raises:
        CheckpointError: it has no finished checkpoint.
        ConfigError: its config is damaged.
    """
    if is_trained_folder(weights):
        return trained_config(on_disk(weights))
    run_dir, _ = checkpoints.locate(place(weights))
    return read_config(run_dir / "config.json")


def architecture(weights: str | Path) -> VLConfig:
    """The vision-language model that weights are of; reads no more of tensors than their shapes.

    Raises:
        SpaceDriveError: the folder holds no weights of a family that is known here.
    """
    if is_run(weights):
        return run_config(weights).model.vlm
    folder = on_disk(weights)
    check_folder(folder)
    config = read_hf_config(folder)
    return with_own_head(config, SafetensorsFolder(folder, rename=format_of(config).canonical_name))


def pinned(config: Config, *, resume: bool = False) -> Config:
    """A config whose weights name the step of the run that it starts from: the newest may move.

    Args:
        config: of a run.
        resume: take the step that its folder says it was started from, whatever has come since.

    Raises:
        CheckpointError: that run has no such step.
    """
    weights = config.model.weights
    if weights is None or not is_run(weights) or is_trained_folder(weights):
        return config
    path = place(weights)
    if resume:
        begun = _begun_from(config.directory)
        same = begun is not None and begun.parent.parent.resolve() in (path.resolve(), path.parent.resolve())
        if begun is not None and same:
            return change(config, config.name, {"model.weights": str(begun)})
        if path.parent.name == "checkpoints":
            return config  # which may be there no longer: `resumable`
    run_dir, step = checkpoints.locate(path)
    return change(config, config.name, {"model.weights": str(run_dir / "checkpoints" / str(step))})


def resumable(config: Config) -> Config:
    """What a run that has checkpoints of its own loads: of a run that it was started from and that has
    pruned that step, another step (`checkpoints.standing_in`).
    """
    weights = config.model.weights
    if weights is None or not is_run(weights) or is_trained_folder(weights):
        return config
    standing = checkpoints.standing_in(weights)
    if standing != place(weights):
        note(
            f"note: {weights}, which this run was started from, is there no longer; its own checkpoint holds "
            f"what it learnt, the base is read through {standing}"
        )
        return change(config, config.name, {"model.weights": str(standing)})
    return config


def _begun_from(run_dir: Path) -> Path | None:
    """The checkpoint that a run was started from, as its config has it; None where it was from none."""
    file = run_dir / "config.json"
    if not file.is_file() or not checkpoints.steps_of(run_dir):
        return None
    weights = read_config(file).model.weights
    if weights is None or place(weights).parent.name != "checkpoints":
        return None
    return place(weights)


def with_weights(config: Config, preset: Config | None = None, *, resume: bool = False) -> Config:
    """A config with all that its weights decide: architecture, adapters, tokenizer, image size.

    Args:
        config: of a run; unchanged where it names no weights.
        preset: the config before its fields were changed one by one. What differs from it is meant: such a
            field is kept, and where no weights can follow it, it is an error. None takes no field as meant.
            One that names these weights itself means its own tokenizer and image size too.
        resume: the run goes on: see `pinned` and `resumable`.

    Raises:
        SpaceDriveError: there are no such weights, or a field that is meant says otherwise; each is named
            with both values.
    """
    check_config(config, "with_weights")
    if config.model.weights is None:
        return config
    preset = config if preset is None else preset
    settled = preset.model.weights == config.model.weights
    config = pinned(config, resume=resume)
    begun = config.model.weights
    weights = (resumable(config) if resume else config).model.weights
    assert weights is not None
    before = run_config(weights) if is_run(weights) else None
    fields: dict[str, Any] = {"model.weights": begun}
    vlm = architecture(weights)
    _refuse(_meant(preset, config, BASE), vlm, weights)
    fields["model.vlm"] = vlm
    fields["model.lora"] = _with_meant(
        _adapters(weights, before, preset, vlm), preset.model.lora, config.model.lora
    )
    decided: dict[str, Any] = {}
    if before is None:
        decided["data.tokenizer"] = weights if (place(weights) / "tokenizer.json").is_file() else None
        side = getattr(vlm.vision, "image_size", None)
        if side is not None and type(vlm) is not type(preset.model.vlm):
            decided["data.image_size"] = (side, side)
    else:
        decided["data.tokenizer"] = before.data.tokenizer
        decided["data.image_size"] = before.data.image_size
    if settled:
        # The file that names the weights is a run's config.json, or somebody's own: what it says is meant.
        same_tower = type(vlm) is type(preset.model.vlm)
        own = {"data.tokenizer": preset.data.tokenizer is not None, "data.image_size": same_tower}
        decided = {name: value for name, value in decided.items() if not own[name]}
    fields |= {name: value for name, value in decided.items() if not _meant(preset, config, name)}
    chosen = change(config, config.name, fields)
    if chosen.data.tokenizer is None and before is None:
        raise ConfigError(
            f"model.weights {weights} has no tokenizer.json: copy the model's own there, or name it with "
            "--data.tokenizer"
        )
    if not _meant(preset, config, "data.sequence_length"):
        chosen = change(chosen, chosen.name, {"data.sequence_length": _length(preset, chosen)})
    decoder = vlm.decoder
    note(
        f"{weights}: {family_of(vlm).name}, {decoder.num_layers} layers of width {decoder.hidden_size}, "
        f"{decoder.vocab_size:,} ids; tokenizer {chosen.data.tokenizer or 'of this project'}, images of "
        f"{chosen.data.image_size[0]}x{chosen.data.image_size[1]}, sequences of {chosen.data.sequence_length}"
    )
    return chosen


def check_architecture(config: Config) -> None:
    """Refuses weights of another architecture than `model.vlm` says.

    Raises:
        SpaceDriveError: each field that differs is named, with both values.
    """
    weights = config.model.weights
    if weights is None:
        return
    _refuse(_differences(architecture(weights), config.model.vlm), None, weights)
    if is_run(weights):
        _check_run(config, run_config(weights))


def starting_state(
    config: Config, saved: dict[Any, Any], drawn: dict[Any, Any], indicator: int
) -> dict[Any, Any]:
    """All parameters of a new run that starts from another's.

    Args:
        config: the new run.
        saved: the other's parameters by their paths.
        drawn: those of the new run that the other lacks.
        indicator: vocabulary id of the indicator token.

    Raises:
        ConfigError: the other run has parameters that the new one has no place for.
    """
    state = {**saved, **drawn}
    rows = slice(indicator, indicator + 2)
    tied = config.model.vlm.decoder.tie_word_embeddings
    for new, table in (("new_embedding", "embedding"), ("new_head", "embedding" if tied else "head")):
        path, whole = ("vlm", "decoder", new), ("vlm", "decoder", table)
        if path in drawn:  # a base that was trained whole: its rows are what it knows of the two tokens
            state[path] = drawn[path].replace(saved[whole][...][rows].astype(jnp.float32))
    kept = config.model.compute.storage_dtype
    for path, variable in saved.items():
        if path[0] == "vlm" and not issubclass(type(variable), nnx.LoRAParam) and path not in drawn:
            frozen = config.model.use_lora and not str(path[-1]).startswith("new_")
            if frozen and jnp.issubdtype(variable.dtype, jnp.floating) and "_scale" not in str(path[-1]):
                state[path] = variable.replace(variable[...].astype(kept))
    return state


def _check_run(config: Config, before: Config) -> None:
    """Refuses a run whose trained numbers would mean something else under the new config."""
    free = [*NOT_COMPARED, "use_lora"]
    if not before.model.use_lora:
        free += ["lora.", "new_token_rows"]
    if config.model.use_lora < before.model.use_lora:
        raise ConfigError(
            f"model.weights {config.model.weights} has adapters, which model.use_lora False would leave out: "
            "fold them in (export-weights --to hf) and start from the result"
        )
    changes = [
        each
        for each in config_changes(dataclasses.asdict(before.model), dataclasses.asdict(config.model))
        if not each.startswith(tuple(free))
    ]
    held, wanted = (each.model.compute.base_quantization for each in (before, config))
    if held != wanted:
        changes.append(f"compute.base_quantization: {held} -> {wanted}")
    if changes:
        raise ConfigError(
            f"model.weights {config.model.weights} was trained under other settings (its -> this run's): "
            + "; ".join(f"model.{each}" for each in changes)
        )


def _adapters(weights: str, before: Config | None, preset: Config, vlm: VLConfig) -> LoraConfig:
    """The adapters that weights have, or the family's own at the preset's rank."""
    if before is not None:
        return before.model.lora if before.model.use_lora else preset.model.lora
    if (place(weights) / ADAPTER_FOLDER).is_dir():
        held = read_peft_config(on_disk(weights) / ADAPTER_FOLDER)
        return dataclasses.replace(held, dropout=preset.model.lora.dropout)
    if type(vlm) is type(preset.model.vlm):
        return preset.model.lora
    return family_of(vlm).lora(preset.model.lora.rank)


def _with_meant(decided: LoraConfig, preset: LoraConfig, given: LoraConfig) -> LoraConfig:
    """What the weights decide, but for the fields that were given one by one."""
    names = [field.name for field in dataclasses.fields(given)]
    meant = {name: getattr(given, name) for name in names if getattr(given, name) != getattr(preset, name)}
    return dataclasses.replace(decided, **meant)


def _length(preset: Config, chosen: Config) -> int:
    """The preset's sequence length, with room for the visual tokens that the weights' tower makes."""

    def visual(config: Config) -> int:
        processor = family_of(config.model.vlm).image_processor(
            config.model.vlm.vision, config.data.image_size
        )
        rows, columns = processor.token_grid
        return NUM_CAMERAS * rows * columns

    more = visual(chosen) - visual(preset)
    length = preset.data.sequence_length + more
    return preset.data.sequence_length if more <= 0 else -(-length // LENGTH_STEP) * LENGTH_STEP


def _meant(preset: Config, config: Config, name: str) -> list[str]:
    """Changes between preset and config at or below a field, as `field: old -> new`."""
    changes = config_changes(_plain(preset), _plain(config))
    return [each for each in changes if each.startswith(name)]


def _plain(value: Any) -> Any:
    """As JSON has it, so that tuples and lists are alike."""
    return json.loads(json.dumps(to_plain(value)))


def _differences(held: VLConfig, wanted: VLConfig) -> list[str]:
    return [f"{BASE}{each}" for each in config_changes(_plain(held), _plain(wanted))]


def _refuse(changes: Iterable[str], held: VLConfig | None, weights: str) -> None:
    """Names the fields of `model.vlm` that say something else than the weights.

    Args:
        changes: `field: old -> new`; old is what the weights have where `held` is None.
        held: what the weights have, where the changes are from something else.
        weights: whose.

    Raises:
        ConfigError: there are any.
    """
    unlike = []
    for each in changes:
        name, _, values = each.partition(": ")
        old, _, new = values.rpartition(" -> ")
        if held is not None:
            value: Any = _plain(held)
            for part in name.removeprefix(BASE).split("."):
                value = value.get(part) if isinstance(value, dict) else None
            old = str(value)
        if old != new:
            unlike.append(f"{name} is {old} there and {new} here")
    if unlike:
        raise ConfigError(
            f"model.weights {weights} is of another architecture: {'; '.join(unlike)}. The weights settle "
            "model.vlm by themselves where a command line leaves it out (`with_weights` in Python)"
        )

"""A whole run as one frozen, typed value.

Presets live in `configs/`, a file per family of runs; every field can be overridden on the command line
(`--train.steps 200`). A run writes its resolved config beside its results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, get_type_hints

import msgspec

from spacedrive_jax.bounds import (
    COUNT,
    FROM_ZERO,
    POSITIVE,
    SEED,
    SHARE,
    SHARE_BELOW_ONE,
    Bound,
    Bounds,
    check_bounds,
    require_kind,
)
from spacedrive_jax.data.transforms import DataConfig, add_depth_flags
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.io import MEBIBYTE, is_bucket, place, read_text
from spacedrive_jax.json_files import parse_json
from spacedrive_jax.models.config import VLConfig
from spacedrive_jax.models.families import FAMILIES, family_of
from spacedrive_jax.models.spacedrive_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation, as in the published run unless a preset says otherwise (paper, supplement)."""

    steps: int = 21096
    batch_size: int = 8
    """Samples per step, over all devices."""
    grad_accum_steps: int = 1
    """Work the batch out in this many pieces, one after the other: less memory, the same samples per step."""
    learning_rate: float = 5e-5
    """Base rate; the parameter groups multiply it."""
    vlm_lr_mult: float = 0.1
    """Multiplier inside the vision-language model (adapters, new-token rows)."""
    head_lr_mult: float = 4.0
    """Multiplier of every other trainable (coordinate decoder, ego MLP, alpha)."""
    warmup_steps: int = 500
    warmup_start: float = 1 / 3
    """The warm-up starts at this fraction of the peak."""
    final_fraction: float = 1e-3
    """The cosine ends at this fraction of the peak."""
    weight_decay: float = 1e-4
    """On matrices; vectors and scalars are not decayed."""
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 35.0
    """Global gradient norm over all trainables."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the trainables with this decay; None keeps none."""
    path_weight: float = 1.0
    """Of the position loss on the path points, where `model.path_points` asks for any."""
    language_weight: float = 1.0
    position_weight: float = 1.0
    huber_delta: float = 1.0
    """Metres."""
    position_loss: Literal["huber", "l1", "l2", "cosine", "embedding_l2"] = "huber"
    """In metres (table F: MAE is `l1`, MSE `l2`), or, for decoders that search a grid, between the hidden
    state and the true coordinate's encoding."""
    supervision: Literal["planning", "first", "all"] = "planning"
    """Which coordinates have a position loss: the six waypoints; the first alone, held against all six
    (published `single_coords_only`, fidelity Q18); or every coordinate of the answers."""
    braking_weight: float = 1.0
    """Of a sample's position loss where its plan brakes: the fourth half-second is driven more than
    `losses.SPEED_CHANGE` slower than the first one. Keyframes in which others matter are mostly of these, and
    few."""
    accelerating_weight: float = 1.0
    """The same where its plan speeds up. Without it, who learns to brake does not learn to go on: it stands,
    or creeps, behind a free road."""
    past_motion_dropout: float = 0.0
    """Share of the samples from which the past and the present acceleration are withheld in training, drawn
    anew at every step (ChauffeurNet's past motion dropout): a model that is told that it is being braked need
    not see why. Present speed, yaw rate and command stay."""
    vae_weight: float = 1.0
    """Of the divergence that the `vae` coordinate decoder adds."""
    indicator_weight: float = 1.0
    """Of the indicator token in the cross-entropy. The published 3 never acts (fidelity Q11)."""
    seed: int = 888
    log_every: int = 10
    trackers: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl", "tensorboard")
    """Where metrics go: RUN/metrics.jsonl, which `report` reads, TensorBoard events, Weights & Biases."""
    checkpoint_every: int = 500
    max_to_keep: int = 2
    """The newest checkpoints that stay, beside the best."""
    validate_every: int = 0
    """Steps between validations on a fixed part of `val`; 0 for none."""
    validate_keyframes: int = 128
    """Keyframes of that part, evenly spaced over those of `val` with a whole future."""
    best_by: Literal["l2", "collision", "loss"] = "l2"
    """The validated number, the lower the better, whose best step's checkpoint is kept (`--checkpoint
    RUN/best`): average L2 in metres, average collision rate, or the loss."""

    BOUNDS: ClassVar[Bounds] = {
        "steps": Bound(1, 2**31 - 1),
        "batch_size": COUNT,
        "grad_accum_steps": COUNT,
        "learning_rate": POSITIVE,
        "vlm_lr_mult": FROM_ZERO,
        "head_lr_mult": FROM_ZERO,
        "warmup_steps": FROM_ZERO,
        "warmup_start": SHARE,
        "final_fraction": SHARE,
        "weight_decay": FROM_ZERO,
        "beta1": SHARE_BELOW_ONE,
        "beta2": SHARE_BELOW_ONE,
        "clip_norm": POSITIVE,
        "ema_decay": SHARE_BELOW_ONE,
        "path_weight": FROM_ZERO,
        "language_weight": FROM_ZERO,
        "position_weight": FROM_ZERO,
        "huber_delta": POSITIVE,
        "vae_weight": FROM_ZERO,
        "braking_weight": FROM_ZERO,
        "accelerating_weight": FROM_ZERO,
        "past_motion_dropout": SHARE,
        "indicator_weight": FROM_ZERO,
        "seed": SEED,
        "log_every": COUNT,
        "checkpoint_every": COUNT,
        "max_to_keep": COUNT,
        "validate_every": FROM_ZERO,
        "validate_keyframes": COUNT,
    }

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "train")
        if len(set(self.trackers)) < len(self.trackers):
            raise ConfigError(f"train.trackers {' '.join(self.trackers)}: names one twice")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = -1
    """TPU slices or GPU nodes that the devices lie on; -1 finds out. On a platform that has none (CPUs) a
    number means processes. `data` goes over them first, then `fsdp`."""

    BOUNDS: ClassVar[Bounds] = {
        "slices": Bound(1, also=(-1,)),
        "data": Bound(1, also=(-1,)),
        "fsdp": Bound(1, also=(-1,)),
        "tensor": Bound(1, also=(-1,)),
    }

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "mesh")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    name: str = "spacedrive"
    run_dir: str | None = None
    """Where the run writes; `runs/<name>` when None."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check_bounds(self, {})

    @property
    def directory(self) -> Path:
        """The run's folder, on this machine or in a bucket."""
        return place(self.run_dir or f"runs/{self.name}")


_BUNDLED = Path(__file__).resolve().parent / "bundled" / "configs"
PRESET_FOLDER = _BUNDLED if _BUNDLED.is_dir() else Path(__file__).resolve().parents[1] / "configs"
"""In a wheel the presets lie in the package, in a checkout beside it."""


@functools.cache
def preset_groups() -> Mapping[str, tuple[str, Mapping[str, Config]]]:
    """The presets that come with the project.

    Returns:
        For each file of `configs/`, by its name: what its runs are in one line, and its presets by name.

    Raises:
        ConfigError: a file defines no presets, or one that another file has.
    """
    # A package of a name of its own, wherever the folder lies: its files import from one another.
    package = load_module(PRESET_FOLDER / "__init__.py", "spacedrive_jax_presets")
    groups: dict[str, tuple[str, Mapping[str, Config]]] = {}
    for file in sorted(PRESET_FOLDER.glob("[a-z]*.py")):
        module = importlib.import_module(f"{package.__name__}.{file.stem}")
        known = {name for _, presets in groups.values() for name in presets}
        presets = _defined_presets(module, file)
        if twice := sorted(known & set(presets)):
            raise ConfigError(f"{file} defines {', '.join(twice)}, which another file has")
        groups[file.stem] = ((module.__doc__ or "").split("\n")[0], presets)
    return groups


def check_config(config: object, what: str) -> None:
    """Refuses anything that is no config where one is asked for.

    Args:
        config: what was given.
        what: who asks.

    Raises:
        ConfigError: it is something else; the message says what.
    """
    require_kind(
        config,
        Config,
        f"{what} takes a Config, as load_config(NAME) gives, with dataclasses.replace or "
        "spacedrive_jax.config.change for other values",
    )


def load_config(name: str | Path) -> Config:
    """Finds a preset.

    Args:
        name: of a preset (`demo`); a .py file that defines `config`, or `PRESETS` of which FILE.py:NAME takes
            one; or a config's JSON (`runs/demo/config.json`).

    Raises:
        ConfigError: there is no such preset, or its file does not hold a config.
    """
    if not isinstance(name, str):
        name = str(place(name))
    is_url = is_bucket(name)
    file, chosen = (name, "") if is_url else file_and_name(name)
    path = place(file)
    if is_url and path.suffix != ".json":
        raise ConfigError(f"{name}: of a bucket a config.json alone is taken; copy other files here first")
    if path.suffix == ".json" and path.is_file():
        return read_config(path)
    if path.suffix == ".py" and path.is_file():
        return _preset_of_file(path, chosen)
    groups = preset_groups()
    for _, presets in groups.values():
        if name in presets:
            return presets[name]
    if (path / "config.json").is_file():
        raise ConfigError(f"{name} is a folder: give the config in it, {path / 'config.json'}")
    if "/" in name or path.suffix in (".py", ".json"):
        what = "it is neither a .py nor a .json file" if path.exists() else "there is no such file"
        raise ConfigError(f"no config {name!r}: {what} (`train --list` names the presets)")
    close = difflib.get_close_matches(name, [each for _, presets in groups.values() for each in presets], 1)
    meant = f"did you mean {close[0]}? " if close else ""
    listed = "; ".join(f"{group}: {', '.join(presets)}" for group, (_, presets) in groups.items())
    raise ConfigError(f"no config {name!r}; {meant}presets: {listed} (or give a .py or .json file)")


def read_config(file: Path) -> Config:
    """A config's JSON file, as a run has it.

    Raises:
        ConfigError: it cannot be read, or holds something else; the file is named.
    """
    try:
        return from_json(read_text(file, most=16 * MEBIBYTE))
    except SpaceDriveError as error:
        raise ConfigError(f"{file} does not hold a config ({error})") from error


def file_and_name(text: str) -> tuple[str, str]:
    """The two parts of FILE.py:NAME; the second is empty where there is none, as in a path with a colon."""
    file, _, name = text.rpartition(":")
    return (file, name) if file.endswith(".py") and not place(text).exists() else (text, "")


def _preset_of_file(path: Path, chosen: str) -> Config:
    module = load_module(path, f"preset_{path.stem}")
    config = getattr(module, "config", None)
    if isinstance(config, Config) and not chosen:
        return config
    presets = _defined_presets(module, path)
    if not chosen and len(presets) == 1:
        return next(iter(presets.values()))
    if chosen not in presets:
        raise ConfigError(f"{path} defines {', '.join(presets)}: take one as {path}:NAME")
    return presets[chosen]


def _defined_presets(module: ModuleType, path: Path) -> Mapping[str, Config]:
    presets = getattr(module, "PRESETS", None)
    if (
        not isinstance(presets, dict)
        or not presets
        or not all(isinstance(each, Config) for each in presets.values())
    ):
        raise ConfigError(
            f"{path} defines neither `config`, a spacedrive_jax.config.Config, nor `PRESETS`, names to such"
        )
    return presets


def depth_advice(config: Config) -> str:
    """The flags of the `add-depth` that makes the depth a run asks for: its preset, or one by one."""

    def wanted(run: Config) -> str:
        return add_depth_flags(run.data, run.model.vlm)

    # Among the presets alone: a config of somebody else's may be called like a file, which would be run.
    for _, presets in preset_groups().values():
        preset = presets.get(config.name)
        if preset is not None and wanted(preset) == wanted(config):
            return f"--run {config.name}"
    return wanted(config)


def change(config: Config, name: str, fields: dict[str, Any]) -> Config:
    """A config that differs from another in a few fields.

    Args:
        config: the other.
        name: of the new one.
        fields: dotted names to values, e.g. `{"model.encoder.alpha": 1.0}`.

    Raises:
        ConfigError: there is no such field.
    """
    for path, value in fields.items():
        config = _with_field(config, path.split("."), value, path)
    return dataclasses.replace(config, name=name)


def _with_field(node: Any, path: list[str], value: Any, whole: str) -> Any:
    first, *rest = path
    if not dataclasses.is_dataclass(node) or first not in {field.name for field in dataclasses.fields(node)}:
        raise ConfigError(f"a config has no field {whole}")
    inner = _with_field(getattr(node, first), rest, value, whole) if rest else value
    return dataclasses.replace(node, **{first: inner})  # type: ignore[type-var]


def load_module(path: Path, name: str) -> ModuleType:
    """A file as a module; an `__init__.py` as a package that finds the files beside it.

    Raises:
        ConfigError: it fails where it is run; the message names file and line.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if path.name == "__init__.py":
        sys.modules[name] = module
    with naming_line(path):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def naming_line(path: Path) -> Iterator[None]:
    """Around what runs a Python file of a user's.

    Raises:
        ConfigError: it fails; the message names file and line.
    """
    try:
        yield
    except SpaceDriveError:
        raise
    except Exception as error:  # somebody else's code raises anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        said = error.msg if isinstance(error, SyntaxError) else error
        where = path if line is None else f"{path}, line {line}"
        raise ConfigError(f"{where}: {type(error).__name__}: {said}") from error


TAG = "family"
"""Key under which JSON names the family of a vision-language config: one of `models.families.FAMILIES`."""


def to_plain(value: Any) -> Any:
    """A config (or a part of one) as JSON values; vision-language configs carry their family's name."""
    if isinstance(value, VLConfig):
        return {TAG: family_of(value).name, **_fields(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    return list(value) if isinstance(value, tuple) else value


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def to_json(config: Config) -> str:
    """The resolved config as JSON text, keys sorted; `from_json` reads it back."""
    return json.dumps(to_plain(config), indent=2, sort_keys=True) + "\n"


def config_changes(old: Any, new: Any, place: str = "") -> list[str]:
    """Lists the fields in which two configs (as JSON values) differ, as `field: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        parts = (config_changes(old.get(name), new.get(name), f"{place}.{name}") for name in names)
        return [change for part in parts for change in part]
    return [] if old == new else [f"{place.lstrip('.')}: {old} -> {new}"]


def from_json(text: str) -> Config:
    """Rebuilds a config from `to_json`.

    Raises:
        ConfigError: a field is unknown to this version, or its value is of another type.
        DataError: the text is not JSON.
    """
    return _build(Config(), parse_json(text, "the config", nan=True), "config")


def _build(template: Any, values: Any, place: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{place} is {str(values)[:40]!r}, expected an object")
    if isinstance(template, VLConfig):
        name = values.get(TAG)
        if name not in FAMILIES:
            raise ConfigError(f"{place}.{TAG} is {name!r}, expected one of {', '.join(FAMILIES)}")
        template = FAMILIES[name].config()  # type: ignore[call-arg]  # families give every field a default
        values = {key: value for key, value in values.items() if key != TAG}
    known = {field.name for field in dataclasses.fields(template)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{place} has unknown fields {', '.join(unknown)}: written by another version?")
    changes = {}
    types = get_type_hints(type(template))
    for name, value in values.items():
        current = getattr(template, name)
        if dataclasses.is_dataclass(current):
            changes[name] = _build(current, value, f"{place}.{name}")
        else:
            try:
                changes[name] = msgspec.convert(value, types[name])
            except (msgspec.ValidationError, UnicodeEncodeError, OverflowError) as error:
                raise ConfigError(f"{place}.{name} is {str(value)[:40]!r}: {error}") from None
    return dataclasses.replace(template, **changes)

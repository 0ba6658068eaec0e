"""What the JSON files of a transformers checkpoint say: architecture, ids, how images are prepared.

config.json and generation_config.json of any family, through the family's own module.
preprocessor_config.json is written for an image processor alone, processor_config.json, with the same fields
under `image_processor`, for one that is saved with a tokenizer. Settings that cut images into tiles
(`do_image_splitting`, `crop_to_patches`) are read as off: here one view is one image.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.interop.hf_fields import MOST, Fields, expect, part, real, size
from spacedrive_jax.interop.weight_table import Format, Published
from spacedrive_jax.io import MEBIBYTE, is_there, reason
from spacedrive_jax.json_files import read_json
from spacedrive_jax.models.config import Ids, SpecialIds, VLConfig
from spacedrive_jax.models.families import FAMILIES, family_of
from spacedrive_jax.models.image_processor import ProcessorSettings


def format_named(name: str) -> Format:
    """The format of a family by transformers' `model_type`."""
    # The module's name stands with the family, so that a family is registered in one place.
    return importlib.import_module(FAMILIES[name].interop).FORMAT


def format_of(config: VLConfig) -> Format:
    """The format of the family that a config belongs to."""
    return format_named(family_of(config).name)


def published_of(config: VLConfig) -> Published:
    """The published SpaceDrive on a base.

    Raises:
        ConfigError: there is none.
    """
    published = format_of(config).published
    if published is None:
        raise ConfigError(
            f"there is no published SpaceDrive on {family_of(config).name}: import its base with --from hf"
        )
    return published


def read_hf_config(source: Mapping[str, Any] | str | Path) -> VLConfig:
    """Reads the configuration of a model of any family.

    Args:
        source: the parsed config, a config.json, or a folder that holds one.

    Returns:
        The architecture.

    Raises:
        ConfigError: the file is unreadable, is of another model, lacks a size, or uses a feature that this
            implementation does not have (scaled rotary embeddings, sliding windows, other activations).
    """
    fields, origin = _load(source)
    names = {kind: name for name, family in FAMILIES.items() for kind in (name, *family.also)}
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in names:
        expected = " or ".join(map(repr, names))
        raise ConfigError(f"{origin}: model_type is {fields.get('model_type')!r}, expected {expected}")
    try:
        return format_named(names[kind]).read_config(fields, origin)
    except SpaceDriveError as error:
        if str(origin) in str(error):
            raise
        raise ConfigError(f"{origin}: {error}") from error  # of sizes that do not fit each other


def write_hf_config(config: VLConfig, ids: SpecialIds | None = None) -> dict[str, Any]:
    """The config.json of a model, as transformers 4.52 and 5 read it.

    Args:
        config: the architecture.
        ids: what the checkpoint that it came from said of ids.

    Raises:
        ConfigError: transformers cannot express the architecture.
    """
    fields = format_of(config).write_config(config)
    for name, value in () if ids is None else ids.named:
        fields.get("text_config", fields)[name] = list(value) if isinstance(value, tuple) else value
    return fields


def read_special_ids(folder: Path) -> SpecialIds:
    """What the files of a checkpoint say of ids: generation_config.json and config.json.

    Raises:
        SpaceDriveError: one of them is damaged.
    """
    fields, origin = _load(folder)
    file = folder / "generation_config.json"
    generation = _load(file)[0] if file.is_file() else None
    return special_ids(fields, generation, origin if generation is None else str(file))


KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
"""Fields of the language model's config that no number depends on, and that an export hands on."""


def special_ids(fields: Fields, generation: Fields | None, origin: str) -> SpecialIds:
    """What a checkpoint says of the ids that begin, end and fill.

    Args:
        fields: config.json.
        generation: generation_config.json; None where there is none.
        origin: names the folder.

    Raises:
        ConfigError: one is neither a whole number, nor a list of such, nor null.
    """
    text = part(fields, "text_config", origin)
    found = {name: _ids(text if text.get(name) is not None else fields, name, origin) for name in KEPT}
    ends = found["eos_token_id"] if generation is None else _ids(generation, "eos_token_id", origin)
    stops = () if ends is None else ends if isinstance(ends, tuple) else (ends,)
    named = tuple((name, value) for name, value in found.items() if value is not None)
    return SpecialIds(tuple(dict.fromkeys(each for each in stops if each >= 0)), named)


def _ids(fields: Fields, name: str, origin: str) -> Ids | None:
    value = fields.get(name)
    several = value if isinstance(value, list) else [] if value is None else [value]
    # -1 stands for none in older files.
    if not all(type(each) is int and -1 <= each <= MOST for each in several):
        raise ConfigError(f"{origin}: {name} is {str(value)[:40]!r}, expected an id, a list of ids or null")
    return tuple(value) if isinstance(value, list) else value


def _load(source: Mapping[str, Any] | str | Path) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, Mapping):
        return source, "the given config"
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = read_json(path, most=16 * MEBIBYTE)
    except DataError as error:
        raise ConfigError(
            f"cannot read {path}: {reason(error, path)}; give a folder with transformers' config.json"
        ) from error
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{path} holds no JSON object; give a folder with transformers' config.json")
    return fields, str(path)


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
MOST_PIXELS = 1 << 40
_SIZES = (("size", ""), ("crop_size", "crop_"), ("max_image_size", "max_"))
"""Fields, and what their edges begin with in `ProcessorSettings.size`."""
_EDGES = ("shortest_edge", "longest_edge", "height", "width")


def read_processor_settings(folder: Path, config: VLConfig) -> ProcessorSettings | None:
    """Reads how a checkpoint's images are prepared.

    Args:
        folder: a transformers checkpoint.
        config: its architecture.

    Returns:
        The settings; None where the folder has no such file.

    Raises:
        ConfigError: the file is damaged, contradicts the architecture, or asks for what is not done here.
    """
    for name in PROCESSOR_FILES:
        file = folder / name
        if not is_there(file):
            continue
        fields = read_json(file, most=MEBIBYTE)
        if not isinstance(fields, Mapping):
            raise ConfigError(f"{file} holds no JSON object: take the file that came with the weights")
        if name == PROCESSOR_FILES[1]:
            fields = part(fields, "image_processor", str(file))
        if fields:
            return _settings(fields, str(file), config)
    return None


def _settings(fields: Fields, origin: str, config: VLConfig) -> ProcessorSettings:
    kind = family_of(config).image_processor
    fields = {name: value for name, value in fields.items() if value is not None}  # null is the default
    for name in ("do_resize", "do_rescale", "do_normalize"):
        expect(fields, name, True, origin)
    expect(fields, "resample", int(kind.resample), origin)
    if not kind.pads and fields.get("do_pad"):
        raise ConfigError(f"{origin}: do_pad is not supported for {family_of(config).name}")
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        if fields.get(name) is not None and hasattr(config.vision, name):
            expect(fields, name, getattr(config.vision, name), origin)
    fallback = kind.fallback
    usual = {edge: value for edge, value in fallback.sizes.items() if _field_of(edge) not in fields}
    sizes = {**usual, **_sizes(fields, origin)}
    if fields.get("do_center_crop") is False:
        sizes = {edge: value for edge, value in sizes.items() if not edge.startswith("crop_")}
    return ProcessorSettings(
        mean=_three(fields, "image_mean", origin, fallback.mean),
        std=_three(fields, "image_std", origin, fallback.std),
        rescale_factor=real(fields, "rescale_factor", origin, fallback.rescale_factor),
        size=tuple(sorted(sizes.items())),
    )


def _field_of(edge: str) -> str:
    """The field that sets a size, all of whose edges it sets."""
    return next((name for name, prefix in _SIZES[1:] if edge.startswith(prefix)), "size")


def _sizes(fields: Fields, origin: str) -> dict[str, int]:
    """Sizes under the names of `ProcessorSettings.size`."""
    found: dict[str, int] = {}
    for name, prefix in _SIZES:
        edges = ("longest_edge",) if name == "max_image_size" else _EDGES
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, int):  # as CLIP's first files have it
            value = {"shortest_edge": value} if name == "size" else {"height": value, "width": value}
        inner = {} if not isinstance(value, Mapping) else value
        known = {
            f"{prefix}{edge}": size(inner, edge, origin, most=MOST_PIXELS)
            for edge in edges
            if inner.get(edge) is not None
        }
        if not known:
            raise ConfigError(
                f"{origin}: {name} is {str(value)[:40]!r}, expected an object of {', '.join(edges)}"
            )
        found |= known
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if fields.get(name) is not None:
            found[edge] = size(fields, name, origin, most=MOST_PIXELS)
    return found


def _three(fields: Fields, name: str, origin: str, default: tuple[float, float, float]) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, list):  # one for all channels
        value = [value] * 3
    numbers = len(value) == 3 and all(type(each) in (int, float) for each in value)
    if not numbers or (name == "image_std" and 0 in value):
        raise ConfigError(f"{origin}: {name} is {str(value)[:40]!r}, expected one number or three")
    return tuple(float(each) for each in value)

"""preprocessor_config.json: how a checkpoint's images are prepared.

transformers writes the file for an image processor alone, and `processor_config.json` with the same fields
under `image_processor` for one that is saved with a tokenizer. Settings that cut images into tiles
(`do_image_splitting`, `crop_to_patches`) are read as off: here one view is one image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.interop.hf_fields import Fields, expect, part, real, size
from spacedrive_jax.io import MEBIBYTE, is_there, read_json
from spacedrive_jax.models.config import VLConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.image_processor import ProcessorSettings

FILES = ("preprocessor_config.json", "processor_config.json")
MOST_PIXELS = 1 << 40
_SIZES = (("size", ""), ("crop_size", "crop_"), ("max_image_size", "max_"))
"""Fields, and what their edges begin with in `ProcessorSettings.size`."""
_EDGES = ("shortest_edge", "longest_edge", "height", "width")


def read_processor_settings(folder: Path, config: VLConfig) -> ProcessorSettings | None:
    """Reads how a checkpoint's images are prepared.

    Args:
        folder: A transformers checkpoint.
        config: Its architecture.

    Returns:
        The settings; None where the folder has no such file.

    Raises:
        ConfigError: The file is damaged, contradicts the architecture, or asks for what is not done here.
    """
    for name in FILES:
        file = folder / name
        if not is_there(file):
            continue
        fields = read_json(file, most=MEBIBYTE)
        if not isinstance(fields, Mapping):
            raise ConfigError(f"{file} holds no JSON object: take the file that came with the weights")
        if name == FILES[1]:
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

"""The planning step as a file: StableHLO through `jax.export`, with its weights and what the host must know.

    DIR/planning.stablehlo    (weights, batch) -> answers; for any batch size, or one file a size
    DIR/weights.safetensors   the arrays it takes, by name
    DIR/export.json           the run's config, prompt length, batch sizes, what jax compiled it

What runs it needs this project's data pipeline, not its model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import export as jax_export
from msgspec import Meta
from safetensors.flax import load_file, save_file

from spacedrive_jax import folders, io, json_files
from spacedrive_jax.batch import DrivingBatch, stack, without_padding
from spacedrive_jax.config import from_json
from spacedrive_jax.console import note
from spacedrive_jax.data.schema import Record
from spacedrive_jax.data.tokenizer import tokenizer_file
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import CheckpointError, ConfigError
from spacedrive_jax.inference.answers import Generation
from spacedrive_jax.inference.planner import BatchPlanner, doubled_sizes, longest_prompt

VERSION = 3
METADATA = "export.json"
WEIGHTS = "weights.safetensors"
MOST_METADATA_BYTES = 16 << 20

Arrays = dict[str, Any]


def write_export(
    folder: Path,
    config_json: str,
    weights: Mapping[str, jax.Array],
    step: Callable[[Arrays, DrivingBatch], Generation],
    example: DrivingBatch,
    *,
    most: int,
) -> dict[str, Any]:
    """Exports a planning step.

    Args:
        folder: to write; must not exist.
        config_json: of the run.
        weights: by name.
        step: weights and a batch to answers; jittable.
        example: a sample, its prompt cut.
        most: largest batch, where sizes must be fixed.

    Returns:
        What is written: `batch` is `any`, or the sizes.

    Raises:
        SpaceDriveError: the folder exists, or cannot be written.
    """
    batch_fields = _fields(example)
    names = sorted(batch_fields)

    def flat(arrays: Arrays, batch: Arrays) -> Arrays:
        rebuilt = DrivingBatch(**{**_EMPTY, **batch})
        return {name: value for name, value in _fields(step(arrays, rebuilt)).items()}

    def exported(size: Any) -> jax_export.Exported:
        shapes = {
            name: jax.ShapeDtypeStruct((size, *np.shape(batch_fields[name])), batch_fields[name].dtype)
            for name in names
        }
        held = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in weights.items()}
        return jax_export.export(jax.jit(flat))(held, shapes)

    programs: dict[str, jax_export.Exported] = {}
    try:
        programs["planning.stablehlo"] = exported(jax_export.symbolic_shape("b")[0])
        sizes: list[int] | None = None
    except (jax.errors.InconclusiveDimensionOperation, NotImplementedError, ValueError) as error:
        if not is_of_symbolic_size(error):
            raise  # would meet every size alike
        said = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        note(f"no program for any batch size ({said}): one for each size")
        sizes = doubled_sizes(1, most)
        programs = {f"planning-{size}.stablehlo": exported(size) for size in sizes}
    metadata: dict[str, Any] = {
        "version": VERSION,
        "config": json.loads(config_json),
        "model": json.loads(config_json)["name"],
        "length": int(example.token_ids.shape[0]),
        "batch": "any" if sizes is None else sizes,
        "platforms": list(next(iter(programs.values())).platforms),
        "jax": jax.__version__,
        "tokenizer": _tokenizer_digest(config_json),
        "files": {},
    }
    with folders.atomic_folder(folder) as unfinished:
        for name, program in programs.items():
            data = bytes(program.serialize())
            metadata["files"][name] = hashlib.sha256(data).hexdigest()
            io.write_bytes(unfinished / name, data)
        save_file(dict(weights), str(unfinished / WEIGHTS))
        # safetensors makes files that only their owner may read; follow the umask, as the folder does.
        (unfinished / WEIGHTS).chmod(unfinished.stat().st_mode & 0o666)
        with (unfinished / WEIGHTS).open("rb") as stream:
            metadata["files"][WEIGHTS] = hashlib.file_digest(stream, "sha256").hexdigest()
        metadata["digest"] = json_files.json_digest(metadata)
        json_files.write_json(unfinished / METADATA, metadata, indent=2)
    return metadata


def is_of_symbolic_size(error: Exception) -> bool:
    """Whether jax cannot trace or lower a program for a size that is not known: a comparison of sizes, a
    shape that must be a number, or a kernel whose blocks must be.
    """
    return isinstance(error, jax.errors.InconclusiveDimensionOperation) or bool(
        re.search(r"shape polymorphism|dynamic(ally-shaped| shapes?)", str(error), re.IGNORECASE)
    )


def open_exported(folder: Path, *, most: int = 8) -> BatchPlanner:
    """A planner over an exported planning step.

    Args:
        folder: what `write_export` wrote.
        most: largest batch.

    Raises:
        CheckpointError: it is not such a folder, is damaged, or was exported for another kind of device.
        ConfigError: it holds no program for so small a batch.
    """
    metadata = _metadata(folder)
    config = from_json(json.dumps(metadata["config"]))
    builder = SampleBuilder(config.data, config.model, answer=False)
    programs = {
        name: jax_export.deserialize(bytearray(_checked(folder, metadata, name)))
        for name in metadata["files"]
        if name != WEIGHTS
    }
    platform = jax.default_backend()
    if platform not in [_platform(name) for name in metadata["platforms"]]:
        raise CheckpointError(
            f"{folder} was exported for {', '.join(metadata['platforms'])}, this machine has {platform}: "
            "export it on such a machine"
        )
    _checked(folder, metadata, WEIGHTS, read=False)
    weights = load_file(str(folder / WEIGHTS))
    if metadata["batch"] == "any":
        sizes = doubled_sizes(1, most)
        calls = dict.fromkeys(sizes, jax.jit(programs["planning.stablehlo"].call))
    else:
        sizes = [size for size in metadata["batch"] if size <= most]
        if not sizes:
            raise ConfigError(f"{folder} has programs for batches of {metadata['batch']}, none up to {most}")
        calls = {size: jax.jit(programs[f"planning-{size}.stablehlo"].call) for size in sizes}

    def answer(batch: DrivingBatch) -> Generation:
        fields = jax.tree.map(jnp.asarray, _fields(batch))
        found = jax.device_get(calls[batch.size](weights, fields))
        return Generation(**{**_NOT_WHOLE, **found})

    return BatchPlanner(config, builder, answer, sizes, metadata["length"])


def export_example(builder: SampleBuilder, record: Record) -> DrivingBatch:
    """A sample with its prompt cut to the longest that a record can have."""
    batch = without_padding(stack([builder(record, 0)]), longest_prompt(builder, record))
    return jax.tree.map(lambda leaf: leaf[0], batch)


_EMPTY: Arrays = {field.name: None for field in dataclasses.fields(DrivingBatch) if field.default is None}
_NOT_WHOLE: Arrays = {"waypoints": None}
"""Of a model with a token for every waypoint."""


def _fields(value: Any) -> Arrays:
    """A dataclass as a dict, without what is absent: plain trees need no registration to be exported."""
    named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: part for name, part in named.items() if part is not None}


def _platform(name: str) -> str:
    """jax.export's name of a platform as `jax.default_backend` has it."""
    return "gpu" if name in ("cuda", "rocm") else name


def _metadata(folder: Path) -> dict[str, Any]:
    file = folder / METADATA
    metadata = json_files.read_json(file, most=MOST_METADATA_BYTES)
    if not isinstance(metadata, dict) or metadata.get("version") != VERSION:
        raise CheckpointError(f"{file} is not of this version of the project: export it again")
    json_files.convert(metadata, _Metadata, file, "export it again")
    if metadata["digest"] != json_files.json_digest(metadata):
        raise CheckpointError(f"{file} is not what was exported: export it again")
    if metadata["tokenizer"] != _tokenizer_digest(json.dumps(metadata["config"])):
        raise CheckpointError(f"{folder} was exported with another tokenizer than data.tokenizer names now")
    return metadata


class _Metadata(msgspec.Struct):
    config: dict[str, Any]
    length: Annotated[int, Meta(ge=1)]
    batch: Literal["any"] | list[int]
    platforms: list[str]
    tokenizer: str
    files: dict[str, str]
    digest: str


def _tokenizer_digest(config_json: str) -> str:
    """SHA-256 of the tokenizer's file, which makes the prompts that the program reads."""
    file = tokenizer_file(from_json(config_json).data.tokenizer)
    return hashlib.sha256(io.read_bytes(file)).hexdigest()


def _checked(folder: Path, metadata: Mapping[str, Any], name: str, *, read: bool = True) -> bytes:
    path = io.inside(folder, name, f"{folder / METADATA}: file")
    io.require_regular(path)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != metadata["files"].get(name):
        raise CheckpointError(f"{path} is not what was exported (its SHA-256 differs): export it again")
    return io.read_bytes(path) if read else b""

"""A trained model held ready: samples in, plans out, in batches of a few sizes that were compiled before.

`predict` goes through a split; a policy (server, closed loop) asks now and then, for one car or for several.
Both build samples and read answers with the same functions.

The planning step may also come from a file: StableHLO through `jax.export`, with its weights and what the
host must know. What runs it needs this project's data pipeline, not its model.

    DIR/planning.stablehlo    (weights, batch) -> answers; for any batch size, or one file a size
    DIR/weights.safetensors   the arrays it takes, by name
    DIR/export.json           the run's config, prompt length, batch sizes, what jax compiled it
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import export as jax_export
from jaxtyping import Float
from msgspec import Meta
from safetensors.flax import load_file, save_file

from spacedrive_jax import folders, io, json_files
from spacedrive_jax.batch import LENGTH_STEP, DrivingBatch, stack, without_padding
from spacedrive_jax.config import Config, from_json
from spacedrive_jax.console import note
from spacedrive_jax.data.conversation import question_turn
from spacedrive_jax.data.depth_cache import CachedDepth
from spacedrive_jax.data.ego_status import insert_ego_tokens
from spacedrive_jax.data.prompts import COMMAND_WORDS, ROUTE_WORDS
from spacedrive_jax.data.schema import Record
from spacedrive_jax.data.tokenizer import tokenizer_file
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import CheckpointError, ConfigError
from spacedrive_jax.inference.answers import Generation, prediction_line

Answer = Callable[[DrivingBatch], Generation]
"""Batch on the host in, generation on the host out."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What the model says about one keyframe. Equal to itself alone: it holds arrays."""

    waypoints: Float[np.ndarray, "T 2"]
    """Metres, ego frame, 0.5 s apart; T is 6, or 0 where the answer could not be read."""
    path: Float[np.ndarray, "R 2"]
    """Metres, ego frame, 1 m apart; R is 0 where the model gives none or the answer could not be read."""
    text: str
    status: str
    """`ok` or `unparsed`."""


class BatchPlanner:
    """Answers batches of samples; safe to call from several threads, one batch at a time."""

    def __init__(
        self, config: Config, builder: SampleBuilder, answer: Answer, sizes: Sequence[int], length: int
    ) -> None:
        """Prepares a planner; see `open_planner`.

        Args:
            config: of the run.
            builder: without answers.
            answer: the compiled planning step.
            sizes: batch sizes to fill up to, rising.
            length: tokens that prompts are cut to.
        """
        self.config = config
        self.builder = builder
        self.sizes = tuple(sizes)
        self.length = length
        self._answer = answer
        self._lock = threading.Lock()

    @property
    def most(self) -> int:
        """Samples that one call takes."""
        return self.sizes[-1]

    def sample(self, record: Record, cached: CachedDepth | None = None) -> DrivingBatch:
        """A record's prompt, images and ego status; callable from any thread.

        Args:
            record: a keyframe.
            cached: a network's depth of it, where the run's `data.depth` asks for one.

        Raises:
            SpaceDriveError: the record lacks something, or its prompt is longer than the planner's prompts.
        """
        sample = self.builder(record, 0, cached)
        if int(sample.lengths) > self.length:
            raise ConfigError(
                f"the prompt has {int(sample.lengths)} tokens, more than the {self.length} that the planner "
                "was compiled for"
            )
        return sample

    def plan(self, samples: Sequence[DrivingBatch]) -> list[Plan]:
        """Plans of one to `most` samples, in order.

        Raises:
            ConfigError: there are none or more, or they are no samples of `sample`.
        """
        count = len(samples)
        if isinstance(samples, DrivingBatch) or not all(isinstance(each, DrivingBatch) for each in samples):
            raise ConfigError("plan takes a list of samples, as planner.sample(RECORD) makes them")
        if not 1 <= count <= self.most:
            raise ConfigError(
                f"plan takes 1 to {self.most} samples at a time (open_planner's most), not {count}"
            )
        size = next(size for size in self.sizes if size >= count)
        batch = without_padding(stack([*samples, *[samples[-1]] * (size - count)]), self.length)
        with self._lock:
            generated = self._answer(batch)
        return [self._read(generated, row) for row in range(count)]

    def warm_up(self, record: Record, cached: CachedDepth | None = None) -> None:
        """Compiles for every batch size, with a record whose images and matrices are whole."""
        sample = self.sample(record, cached)
        for size in self.sizes:
            note(f"compiling for {size} at a time, prompts of {self.length} tokens")
            self.plan([sample] * size)

    def _read(self, generated: Generation, row: int) -> Plan:
        line = prediction_line(self.builder, "", generated, row)
        waypoints, path = (
            np.asarray(line.get(name, []), np.float64).reshape(-1, 2) for name in ("waypoints", "path")
        )
        return Plan(waypoints, path, line["text"], line["status"])


def longest_prompt(builder: SampleBuilder, record: Record) -> int:
    """Tokens of the longest prompt that a record can have, whatever its command, in steps of `LENGTH_STEP`.

    Args:
        builder: of the run.
        record: its texts and numbers as long as they may become; pictures do not matter.
    """
    rows, columns = builder.images.token_grid
    lengths = []
    commands_of = ROUTE_WORDS if builder.data.command == "route" else range(len(COMMAND_WORDS))
    for number in commands_of:
        names = ("command_released", "command_navigation", "command_route")
        commands = {name: np.int32(number) for name in names}
        turn = question_turn(
            record | commands,
            builder.data.command,
            ego_in_words=builder.model.ego_status == "language",
            target_points=builder.data.target_points,
            reasons=builder.thinks,
        )
        chat = builder.family.chat.apply_chat_template(
            builder.tokenizer, [turn], rows * columns, add_generation_prompt=True
        )
        chat, _ = insert_ego_tokens(builder.tokenizer, chat, builder.model.ego_status)
        lengths.append(len(chat.token_ids))
    return min(-(-max(lengths) // LENGTH_STEP) * LENGTH_STEP, builder.data.sequence_length)


def doubled_sizes(least: int, most: int) -> list[int]:
    """Batch sizes from `least` up to `most`, each twice the one before."""
    sizes = [least]
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    return sizes


EXPORT_VERSION = 3
EXPORT_METADATA = "export.json"
EXPORT_WEIGHTS = "weights.safetensors"
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
        "version": EXPORT_VERSION,
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
        save_file(dict(weights), str(unfinished / EXPORT_WEIGHTS))
        # safetensors makes files that only their owner may read; follow the umask, as the folder does.
        (unfinished / EXPORT_WEIGHTS).chmod(unfinished.stat().st_mode & 0o666)
        metadata["files"][EXPORT_WEIGHTS] = io.file_sha256(unfinished / EXPORT_WEIGHTS)
        metadata["digest"] = json_files.json_digest(metadata)
        json_files.write_json(unfinished / EXPORT_METADATA, metadata, indent=2)
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
        if name != EXPORT_WEIGHTS
    }
    platform = jax.default_backend()
    if platform not in [_platform(name) for name in metadata["platforms"]]:
        raise CheckpointError(
            f"{folder} was exported for {', '.join(metadata['platforms'])}, this machine has {platform}: "
            "export it on such a machine"
        )
    _checked(folder, metadata, EXPORT_WEIGHTS, read=False)
    weights = load_file(str(folder / EXPORT_WEIGHTS))
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
    file = folder / EXPORT_METADATA
    metadata = json_files.read_json(file, most=MOST_METADATA_BYTES)
    if not isinstance(metadata, dict) or metadata.get("version") != EXPORT_VERSION:
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
    return io.file_sha256(tokenizer_file(from_json(config_json).data.tokenizer))


def _checked(folder: Path, metadata: Mapping[str, Any], name: str, *, read: bool = True) -> bytes:
    path = io.inside(folder, name, f"{folder / EXPORT_METADATA}: file")
    if io.file_sha256(path) != metadata["files"].get(name):
        raise CheckpointError(f"{path} is not what was exported (its SHA-256 differs): export it again")
    return io.read_bytes(path) if read else b""

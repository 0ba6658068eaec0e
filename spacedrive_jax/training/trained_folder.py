"""A trained model as one folder to hand on: what `export-weights --to safetensors` writes, and `--checkpoint`
takes like a run.

    config.json          the run's resolved config
    trained.safetensors  every trained number under its path, with the base where the base was trained
    trained.json         `TrainedMetadata`: step, fingerprints, where the data came from
    tokenizer.json       with the two coordinate tokens
    README.md            the model card

A base that was frozen is not in it: it follows from `model.weights` (or the seed), and is held against its
fingerprint, as with a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spacedrive_jax.config import Config, read_config, to_json
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.data.transforms import DataConfig
from spacedrive_jax.errors import CheckpointError, ConfigError
from spacedrive_jax.interop.safetensors_folder import SafetensorsFolder, new_folder, save_tensors
from spacedrive_jax.io import MEBIBYTE, file_sha256, has_files, write_part, write_text
from spacedrive_jax.json_files import read_typed, write_json
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.partitioning import to_host

TENSORS = "trained.safetensors"
METADATA = "trained.json"
FORMAT = 1
StoredType = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class TrainedMetadata:
    """What a trained folder says of itself."""

    step: int
    """Optimisation steps."""
    dtype: StoredType
    """Type that the numbers are stored in."""
    sha256: str
    """Of the file with the numbers."""
    base_fingerprint: str | None
    """Of the frozen base; None where there is none that the config does not draw."""
    records_fingerprint: str | None
    """Of the records that were trained on."""
    format: int = FORMAT


def is_trained_folder(folder: str | Path) -> bool:
    """Whether a folder is what `write_trained_folder` writes."""
    return has_files(folder, TENSORS, METADATA)


def write_trained_folder(
    out: Path,
    config: Config,
    trainable: nnx.State,
    checkpoint: Mapping[str, Any],
    card: str,
    dtype: StoredType = "float32",
) -> TrainedMetadata:
    """Writes a trained model; the folder appears under its name only when whole.

    Args:
        out: folder to create.
        config: of the run.
        trainable: its trained numbers; of several hosts all bring their parts, and the first writes.
        checkpoint: `step`, `base_fingerprint`, `records_fingerprint`.
        card: text of README.md.
        dtype: to store the numbers in; only float32 keeps their bits.

    Raises:
        SpaceDriveError: `out` exists, or cannot be written.
    """
    kept = jnp.dtype(dtype)
    tensors = {
        "/".join(map(str, path)): np.array(to_host(variable[...]), kept, order="C")
        for path, variable in nnx.to_flat_state(trainable)
    }
    tokenizer = load_tokenizer(config.data.tokenizer, family_of(config.model.vlm).chat).tokenizer
    if jax.process_index() > 0:
        return TrainedMetadata(checkpoint["step"], dtype, "", None, None)
    with new_folder(out) as folder:
        save_tensors(tensors, folder / TENSORS)
        metadata = TrainedMetadata(
            step=checkpoint["step"],
            dtype=dtype,
            sha256=file_sha256(folder / TENSORS),
            base_fingerprint=checkpoint.get("base_fingerprint"),
            records_fingerprint=checkpoint.get("records_fingerprint"),
        )
        write_json(folder / METADATA, dataclasses.asdict(metadata), indent=2)
        # Where it was trained, and on what folder, does not matter to whoever takes it.
        data = dataclasses.replace(config.data, tokenizer=None, records=DataConfig.records)
        kept_config = dataclasses.replace(config, run_dir=None, data=data)
        write_text(folder / "config.json", to_json(kept_config))
        write_part(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
        write_text(folder / "README.md", card)
    return metadata


def trained_config(folder: Path) -> Config:
    """The config of a trained folder, pointed at its tokenizer.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    try:
        config = read_config(folder / "config.json")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(folder)))


def trained_metadata(folder: Path) -> TrainedMetadata:
    """What a trained folder says of itself.

    Raises:
        DataError: the file is damaged.
        CheckpointError: it is of another version.
    """
    metadata = read_typed(folder / METADATA, TrainedMetadata, most=MEBIBYTE)
    if metadata.format != FORMAT:
        raise CheckpointError(
            f"{folder / METADATA} has format {metadata.format}, this version reads {FORMAT}: export it again"
        )
    return metadata


def read_trained(folder: Path, trainable: nnx.State) -> nnx.State:
    """Reads the numbers of a trained folder onto the types and shardings of an (abstract) state.

    Args:
        folder: what `write_trained_folder` wrote.
        trainable: of its config (`training.state.abstract_state`).

    Raises:
        CheckpointError: the file is not the one that was written, or does not fit the config.
    """
    file = folder / TENSORS
    if file_sha256(file) != trained_metadata(folder).sha256:
        raise CheckpointError(f"{file} is not the file that {METADATA} names: it is damaged, fetch it again")
    held = SafetensorsFolder(file)
    state = dict(nnx.to_flat_state(trainable))
    names = {"/".join(map(str, path)): path for path in state}
    wrong = sorted(names.keys() ^ held.places.keys())
    wrong += [
        name for name in names.keys() & held.places.keys() if held.shapes()[name] != state[names[name]].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{file} does not fit {folder / 'config.json'}: {', '.join(wrong[:5])}"
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        )
    for name, path in names.items():
        variable = state[path]
        value = held.read(name).astype(variable.dtype)
        placed = getattr(variable.get_value(), "sharding", None)
        array = (
            jax.make_array_from_callback(value.shape, placed, value.__getitem__)
            if placed
            else jnp.asarray(value)
        )
        state[path] = variable.replace(array)
    return nnx.from_flat_state(list(state.items()))

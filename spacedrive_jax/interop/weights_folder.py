"""The weights folder: what `import-weights` writes, `model.weights` takes and `export-weights` reads.

    config.json, model*.safetensors   the base, as transformers has it, in the types it came in
    tokenizer.json, ...               the tokenizer with the two coordinate tokens
    adapter/                          low-rank adapters, as PEFT has them (only if there are any)
    weights.json                      what this is: `WeightsMetadata`

transformers and PEFT load it as it stands. An imported SpaceDrive checkpoint has more:

    spacedrive.safetensors            new-token rows, coordinate head, ego MLP, scale, buffers
    depth/model.safetensors           the depth network under its own names (only if there is one)
    checkpoint.json                   the order of the published names
    spacedrive.json                   the run it means: a `spacedrive_jax.config.Config`
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import msgspec
import numpy as np

from spacedrive_jax.config import Config, config_changes, read_config
from spacedrive_jax.errors import CheckpointError, ConfigError, DataError, SpaceDriveError
from spacedrive_jax.interop.hf_checkpoint import fill, from_hf
from spacedrive_jax.interop.hf_config import format_of
from spacedrive_jax.interop.peft import load_adapter, open_adapter, read_peft_config
from spacedrive_jax.interop.safetensors_folder import SafetensorsFolder
from spacedrive_jax.interop.spacedrive_tensors import head_rules, inside_vlm, new_row_rules
from spacedrive_jax.interop.weight_table import ParameterPath, Rule, check_names_and_shapes
from spacedrive_jax.io import MEBIBYTE, has_files, read_bytes
from spacedrive_jax.json_files import write_json
from spacedrive_jax.models.config import ComputeConfig, LoraConfig, NewTokensConfig
from spacedrive_jax.models.partitioning import ShardingOf, axis_names
from spacedrive_jax.models.spacedrive_config import ModelConfig
from spacedrive_jax.models.vision_language import VisionLanguageModel

METADATA_FILE = "weights.json"
ADAPTER_FOLDER = "adapter"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class WeightsMetadata:
    """What a weights folder says about itself."""

    family: str
    """transformers' `model_type`."""
    source: str
    """Where the base came from; what adapters exported from here name as theirs."""
    tensors: int
    parameters: int
    """Numbers in the base."""
    dtypes: tuple[str, ...]
    fingerprint: str
    """SHA-256 over the names, types, shapes and values of the base."""
    new_tokens: int | None
    """Id of the indicator token, the position token's being the next; None without the two."""
    adapter_rank: int | None = None
    adapter_source: str | None = None
    """Where the adapters came from."""
    format: int = FORMAT

    @classmethod
    def of(
        cls,
        family: str,
        source: Path,
        base: Fingerprint,
        *,
        new_tokens: int | None,
        adapter_rank: int | None = None,
    ) -> WeightsMetadata:
        """The metadata of a folder whose base, of the family of this name, has passed through `base`."""
        return cls(
            family=family,
            source=str(source),
            tensors=base.tensors,
            parameters=base.parameters,
            dtypes=tuple(sorted(base.dtypes)),
            fingerprint=base.value,
            new_tokens=new_tokens,
            adapter_rank=adapter_rank,
        )

    def write(self, folder: Path) -> None:
        """Writes weights.json."""
        write_json(folder / METADATA_FILE, dataclasses.asdict(self), indent=2)

    @classmethod
    def read(cls, folder: Path) -> WeightsMetadata:
        """Reads weights.json.

        Raises:
            CheckpointError: it is missing, damaged or of another version.
        """
        file = Path(folder) / METADATA_FILE
        try:
            metadata = msgspec.json.decode(read_bytes(file, most=MEBIBYTE), type=cls)
        except (DataError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{file} is not readable ({error}); give a folder that import-weights wrote"
            ) from error
        if metadata.format != FORMAT:
            raise CheckpointError(
                f"{file} has format {metadata.format}, this version reads {FORMAT}: import again"
            )
        return metadata


class Fingerprint:
    """SHA-256 of a stream of named tensors, taken while it passes; counts them too."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.tensors = self.parameters = 0
        self.dtypes: set[str] = set()

    def watch(self, tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        """Passes the tensors on."""
        for name, tensor in tensors:
            tensor = np.ascontiguousarray(tensor)
            self._hash.update(f"{name} {tensor.dtype} {tensor.shape};".encode())
            self._hash.update(tensor.reshape(-1).view(np.uint8).data)
            self.tensors += 1
            self.parameters += tensor.size
            self.dtypes.add(str(tensor.dtype))
            yield name, tensor

    @property
    def value(self) -> str:
        """The digest so far, in hexadecimal."""
        return self._hash.hexdigest()


def load(
    folder: str | Path,
    *,
    compute: ComputeConfig | None = None,
    trainable_tokens: bool = False,
    shardings: ShardingOf | None = None,
) -> VisionLanguageModel:
    """Loads a weights folder with its adapters.

    Args:
        folder: what `import-weights` wrote.
        compute: dtypes, rematerialisation, attention kernel.
        trainable_tokens: give the two coordinate tokens trainable rows of their own.
        shardings: placement of each parameter; None puts them on the default device.

    Returns:
        The model.

    Raises:
        CheckpointError: the folder is not one, or its files are damaged or do not fit each other.
    """
    folder = Path(folder)
    metadata = WeightsMetadata.read(folder)
    adapter = folder / ADAPTER_FOLDER
    lora = None if metadata.adapter_rank is None else read_peft_config(adapter)
    rows = (
        NewTokensConfig(metadata.new_tokens) if trainable_tokens and metadata.new_tokens is not None else None
    )
    model = from_hf(folder, compute=compute, lora=lora, new_tokens=rows, shardings=shardings)
    if lora is not None:
        load_adapter(model, adapter)
    return model


EXTRAS_FILE = "spacedrive.safetensors"
LAYOUT_FILE = "checkpoint.json"
RUN_FILE = "spacedrive.json"
DEPTH_FOLDER = "depth"
EXTRAS = ("heads", "buffers")
"""The parts of a checkpoint that stand in `EXTRAS_FILE`, each name behind its part's and a slash."""

TABLE_ROWS: Mapping[str, ParameterPath] = MappingProxyType(
    {
        "model.language_model.embed_tokens.weight": ("vlm", "decoder", "new_embedding"),
        "lm_head.weight": ("vlm", "decoder", "new_head"),
    }
)
"""Tables whose rows the published LLaVA trains for the new tokens (fidelity Q28), and where ours are."""
NOT_COMPARED = (
    "weights",
    "random_base",
    "compute.",
    "vlm.",
    "lora.dropout",
    "path_points",
    "position_input_training",
)
"""Fields of a model that may differ from what a checkpoint was trained with: they do not change what its
tensors mean, or are checked against the base's config."""

State = dict[ParameterPath, Any]
"""Parameter path in a `SpaceDrive` to variable."""


def is_imported(folder: str | Path) -> bool:
    """Whether a weights folder came from a published SpaceDrive checkpoint."""
    return has_files(folder, RUN_FILE, EXTRAS_FILE)


def imported_config(folder: Path) -> Config:
    """The run that an imported checkpoint means, pointed at its folder.

    Raises:
        CheckpointError: the file is damaged or of another version.
    """
    try:
        config = read_config(folder / RUN_FILE)
    except ConfigError as error:
        raise CheckpointError(f"{error}: import again") from error
    return pointed_at(config, folder)


def pointed_at(config: Config, folder: Path) -> Config:
    """The same run with weights and tokenizer of a folder."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, weights=str(folder)),
        data=dataclasses.replace(config.data, tokenizer=str(folder)),
    )


def check_trained_parts(folder: Path, model: ModelConfig, indicator: int) -> None:
    """Refuses a model that could not take up what a weights folder holds beside its base.

    Args:
        folder: a weights folder, or a transformers checkpoint, which holds nothing of the kind.
        model: the model.
        indicator: vocabulary id of the indicator token.

    Raises:
        CheckpointError: the folder's parts were trained under other settings than the model's, naming the
            fields.
    """
    if not (folder / METADATA_FILE).is_file():
        return
    metadata = WeightsMetadata.read(folder)
    if metadata.adapter_rank is not None:
        if not model.use_lora:
            raise CheckpointError(
                f"{folder} holds adapters, which model.use_lora False would leave out: fold them in with "
                "export-weights --to hf and import the result, or set model.use_lora True"
            )
        _check_lora(folder, model.lora)
    if not is_imported(folder):
        return
    check_model(folder, model)
    if metadata.new_tokens != indicator:
        raise CheckpointError(
            f"{folder} has the indicator token at {metadata.new_tokens}, data.tokenizer at {indicator}: set "
            f"data.tokenizer to {folder}"
        )


def fill_trained_parts(
    state: State, folder: Path, model: ModelConfig, indicator: int, shardings: ShardingOf | None = None
) -> None:
    """Puts what a weights folder holds beside its base into a model's parameters.

    That is the adapters of any folder, and of a published checkpoint the new tokens' rows, the coordinate
    head, the ego MLP and the scale.

    Args:
        state: all parameters of a `SpaceDrive`; changed in place.
        folder: as in `check_trained_parts`.
        model: what the state belongs to.
        indicator: vocabulary id of the indicator token.
        shardings: placement of each parameter.

    Raises:
        CheckpointError: see `check_trained_parts`.
    """
    check_trained_parts(folder, model, indicator)
    if (folder / ADAPTER_FOLDER).is_dir():
        rules, adapters = open_adapter(folder / ADAPTER_FOLDER, model.vlm, model.lora)
        fill(state, inside_vlm(rules), adapters, shardings)
    if not is_imported(folder):
        return
    fill(state, head_rules(model), _heads(folder), shardings)
    fill_new_rows(state, folder, model, indicator, shardings)


def trained_rules(model: ModelConfig, indicator: int) -> tuple[Rule, ...]:
    """The table of the trained parts beside the adapters."""
    return (*_row_rules(model, indicator), *head_rules(model))


def trains_table_rows(model: ModelConfig) -> bool:
    """Whether the published SpaceDrive on this base trains rows of its full tables for the new tokens."""
    published = format_of(model.vlm).published
    return published is not None and published.trains_table_rows


def _row_rules(model: ModelConfig, indicator: int) -> tuple[Rule, ...]:
    """Of the new tokens' rows; the published LLaVA trains rows of its tables, which are no part of it."""
    own_rows = model.new_token_rows and not trains_table_rows(model)
    return new_row_rules(model, NewTokensConfig(indicator) if own_rows else None)


def fill_new_rows(
    state: State, folder: Path, model: ModelConfig, indicator: int, shardings: ShardingOf | None = None
) -> None:
    """Puts the new tokens' trained rows of an imported checkpoint into parameters, in float32.

    Args and errors as in `fill_trained_parts`.
    """
    if not model.new_token_rows:
        return
    if not trains_table_rows(model):
        fill(state, _row_rules(model, indicator), _heads(folder), shardings)
        return
    tables = SafetensorsFolder(folder, rename=format_of(model.vlm).canonical_name)
    rows = slice(indicator, indicator + NewTokensConfig(indicator).count)
    for source, path in TABLE_ROWS.items():
        value = np.asarray(tables.read(source)[rows], np.float32)
        variable = state[path]
        placement = None if shardings is None else shardings(axis_names(variable), value.shape)
        state[path] = variable.replace(jax.device_put(value, placement))


def _heads(folder: Path) -> SafetensorsFolder:
    return SafetensorsFolder(folder / EXTRAS_FILE, rename=lambda name: name.removeprefix("heads/"))


def check_model(folder: Path, model: ModelConfig) -> None:
    """Refuses a model under whose settings an imported checkpoint's tensors would mean something else.

    Raises:
        CheckpointError: naming the fields.
    """
    imported = imported_config(folder).model
    unlike = [*NOT_COMPARED, *(["encoder.alpha"] if imported.encoder.learnable_alpha else [])]
    changes = [
        change
        for change in config_changes(dataclasses.asdict(imported), dataclasses.asdict(model))
        if not change.startswith(tuple(unlike))
    ]
    if changes:
        listed = "; ".join(f"model.{change}" for change in changes)
        raise CheckpointError(
            f"{folder} was trained under other settings than this run's (its -> this run's): {listed}. Set "
            f"them as in {folder / RUN_FILE}, or start from the base alone (import-weights --from hf)"
        )


def check_heads(model: ModelConfig, heads: Mapping[str, np.ndarray], indicator: int, origin: str) -> None:
    """Compares the trained parts of a checkpoint with the model they are to belong to.

    Args:
        model: the model.
        heads: published names to values.
        indicator: vocabulary id of the indicator token.
        origin: what to call the checkpoint.

    Raises:
        CheckpointError: with every missing, unknown and misshapen tensor, and the fields they belong to.
    """
    rules = trained_rules(model, indicator)
    shapes = {name: value.shape for name, value in heads.items()}
    try:
        check_names_and_shapes(rules, shapes, origin=origin)
    except SpaceDriveError as error:
        expected = {rule.source: rule.source_shape for rule in rules}
        unlike = {name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)}
        raise CheckpointError(f"{error}\n  which depend on {', '.join(_fields(unlike, model))}") from error


def _fields(names: Iterable[str], model: ModelConfig) -> list[str]:
    """The config's fields, with their values, that decide which tensors a checkpoint has."""
    table = {
        "pe_scaling": ("model.encoder.learnable_alpha", model.encoder.learnable_alpha),
        "position_encoder_mlp": ("model.encoder.kind", model.encoder.kind),
        "ego_status_mlp": ("model.ego_status", model.ego_status),
        "mlp_output_coords": ("model.decoder.kind", model.decoder.kind),
        "vae_output_coords": ("model.decoder.kind", model.decoder.kind),
        "new_": ("model.new_token_rows", model.new_token_rows),
    }
    found = {field for name in names for start, field in table.items() if name.startswith(start)}
    return [f"{name} (here {value})" for name, value in sorted(found)] or ["nothing this version knows"]


def _check_lora(folder: Path, wanted: LoraConfig) -> None:
    held = read_peft_config(folder / ADAPTER_FOLDER)
    unlike = [
        f"model.lora.{name}: {ours} -> {theirs}"
        for name, ours, theirs in (
            ("rank", held.rank, wanted.rank),
            ("alpha", held.alpha, wanted.alpha),
            ("targets", sorted(held.targets), sorted(wanted.targets)),
        )
        if ours != theirs
    ]
    if unlike:
        raise CheckpointError(
            f"the adapters of {folder} are not this run's (theirs -> this run's): {'; '.join(unlike)}"
        )
